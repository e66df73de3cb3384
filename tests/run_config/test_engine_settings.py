"""Engine settings are read from the DeepSpeed file."""

from __future__ import annotations

from allinone_ds.run_config.engine_settings import read_engine


def test_the_deepspeed_file_decides() -> None:
    bf16 = read_engine(
        {
            "bf16": {"enabled": "auto"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 10},
        },
        bf16=True,
    )
    assert (bf16.stage, bf16.weight_bytes, bf16.fp32_accumulation, bf16.offload, bf16.bucket) == (2, 2, True, True, 10)
    assert read_engine({"bf16": {"enabled": "auto"}}).weight_bytes == 4
