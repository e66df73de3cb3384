"""Every key of DeepSpeed's configuration has a row, as the installed release reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from allinone_ds.run_config.schema import load_config
from allinone_ds.zero.config_keys import CONFIG_KEYS, IGNORED, REFUSED, SERVED, ignored_keys
from allinone_ds.zero.support import checked_release, config_problems
from tests.launcher import run_ranks
from tests.zero.ranks_config_keys import TRIALS, ZERO, name_of

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("ranks_config_keys.py")
BATCH = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


class Recorder(dict):
    """A configuration that notes the keys which DeepSpeed asks for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def __copy__(self) -> Recorder:
        return self

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # `key in config.keys()`


def asked(section: str = "") -> set[str]:
    """Return the keys of a section of plain values that the installed release reads."""
    inner = Recorder({"enabled": True} if section == "torch_autocast" else {})
    whole = Recorder({**BATCH, **({section: inner} if section else {})})
    DeepSpeedConfig(whole)
    return inner.asked if section else whole.asked


def fields(model: type[pydantic.BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def rows(section: str = "") -> set[str]:
    prefix = f"{section}." if section else ""
    inside = {key.removeprefix(prefix) for key in CONFIG_KEYS if key.startswith(prefix)}
    return {key for key in inside if "." not in key}


@pytest.mark.skipif(not checked_release(), reason="the table is that of the checked release")
def test_the_table_has_every_key_of_the_installed_release_and_no_other() -> None:
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    with_ranks_only = {"sequence_parallel_size"}
    assert rows() == (asked() - removed) | with_ranks_only
    assert rows("zero_optimization") == fields(DeepSpeedZeroConfig)
    assert rows("zero_optimization.offload_optimizer") == fields(DeepSpeedZeroOffloadOptimizerConfig)
    assert rows("zero_optimization.offload_param") == fields(DeepSpeedZeroOffloadParamConfig)
    assert rows("bf16") == fields(DeepSpeedBF16Config) and rows("fp16") == fields(DeepSpeedFP16Config)
    assert rows("torch_autocast") == asked("torch_autocast")
    assert rows("data_types") == asked("data_types")
    assert rows("timers") == asked("timers")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(SCRIPT, 2, tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("trial", [name_of(*trial) for trial in TRIALS])
def test_served_keys_leave_balanced_steps_exact(tried: dict[str, str], trial: str) -> None:
    assert tried[trial] == ""


def test_served_keys_that_could_change_a_gradient_are_tried() -> None:
    of_zero = {key for _, given in TRIALS for key in given.get(ZERO, {})}
    always = {"stage", "allgather_bucket_size", "reduce_bucket_size"}  # in the config of each case
    in_the_table = {
        "overlap_comm",
        "contiguous_gradients",
        "sub_group_size",
        "offload_optimizer",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
    }  # of exactness
    names_only = {"cpu_offload_param", "cpu_offload_use_pin_memory", "stage3_gather_16bit_weights_on_model_save",
                  "stage3_gather_fp16_weights_on_model_save"}  # fmt: skip
    served = {key for key in rows("zero_optimization") if CONFIG_KEYS[f"zero_optimization.{key}"][0] == SERVED}
    assert served <= of_zero | always | in_the_table | names_only


REFUSING: dict[str, Any] = {
    "autotuning": {"enabled": True}, "data_efficiency": {"enabled": True}, "compile": {"deepcompile": True},
    "datastates_ckpt": {"enabled": True}, "expert_parallel": {"enabled": True}, "gradient_allreduce_op": "sum",
    "hybrid_engine": {"enabled": True}, "sequence_parallel_size": 2,
    "tensor_parallel": {"autotp_size": 2}, "weight_quantization": {},
    "zero_optimization.legacy_stage1": True, "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.stage3_module_granularity_threshold": 10,
    "zero_optimization.zero_quantized_gradients": True, "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "zero_optimization.offload_optimizer.ratio": 0.5, "zero_optimization.offload_optimizer.super_offload": True,
}  # fmt: skip
"""Key -> a value that is refused. `gradient_clipping` is refused by the trainer and the balancer themselves."""


def test_every_refused_key_has_a_value_that_is_tried() -> None:
    refused = {key for key, (verdict, _) in CONFIG_KEYS.items() if verdict == REFUSED}
    assert refused == set(REFUSING) | {"gradient_clipping"}


@pytest.mark.parametrize("key", REFUSING)
def test_refused_keys_are_refused_with_a_reason(key: str) -> None:
    stage = 3 if "stage3" in key or "ratio" in key else 2
    content: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    *sections, last = key.split(".")
    inside = content
    for section in sections:
        inside = inside.setdefault(section, {"device": "cpu"} if section == "offload_optimizer" else {})
    inside[last] = REFUSING[key]
    problems = config_problems(content)
    assert any("cannot be balanced; " in problem for problem in problems), problems


def test_unknown_keys_of_a_run_are_refused_with_the_nearest() -> None:
    found = config_problems(
        {
            "zero_optimisation": {"stage": 2},
            "zero_optimization": {"stage": 2, "overlap_com": True, "max_live_parameters": 10},
            "data_types": {"grad_acum_dtype": "fp32"},
            "optimizer": {"type": "AdamW", "params": {"anything": 1}},
        }
    )
    assert [problem.split("; ")[1].split("?")[0] for problem in found] == [
        "did you mean 'zero_optimization'", "did you mean 'overlap_comm'", "did you mean 'grad_accum_dtype'",
    ]  # fmt: skip
    for run in ("demo", "traffic_8gpu", "traffic_64gpu"):
        assert config_problems(load_config(f"configs/runs/{run}.yaml").deepspeed) == []


ODD: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": True}, '.zero_optimization = True: this is a section; write its keys, such as {"stage"'),
    ({"zero_optimization": {"stage": "auto"}}, ".zero_optimization.stage = 'auto': Trainer does not fill"),
    ({"bf16": "auto"}, ".bf16 = 'auto': Trainer does not fill"),
    ({"bf16": True}, '.bf16 = True: this is a section; write its keys, such as {"enabled"'),
    ({"bf16": {"enabled": True}, "bfloat16": {"enabled": False}}, "remove bfloat16"),
    ({"bfloat16": {"imediate_grad_update": True}}, ".bfloat16.imediate_grad_update = True"),
    ({"data_types": "fp32"}, ".data_types = 'fp32': this is a section"),
    ({"data_types": {"grad_accum_dtype": "float8"}}, "data_types with a type that DeepSpeed does not know"),
    ({"data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}}, "data_efficiency cannot be balanced"),
    ({"sequence_parallel_size": "2"}, "sequence parallelism cannot be balanced"),
    ({"gradient_allreduce_op": "SUM"}, 'gradient_allreduce_op = "sum" cannot be balanced'),
    ({"managed_gradient_accumulation": 0}, "managed_gradient_accumulation = false cannot be balanced"),
    ({"hybrid_engine": {"enabled": "true"}}, "the hybrid engine cannot be balanced"),
    ({"Zero_Optimization": {"stage": 2}}, "did you mean 'zero_optimization'"),
    ({"grad_accum_dtype": "fp32"}, ".grad_accum_dtype: DeepSpeed has no such key"),
    ({"amp": {"enabled": True}}, ".amp: DeepSpeed has no such key"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size: DeepSpeed has no such key"),
    ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "ZenFlow cannot be balanced"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": False, "offload_optimizer": None}}, "together"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'such as {"device": ...}'),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": "0.5"}}}, ": Assertion failed"),
    ({"zero_optimization": {"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 2}}, "not permitted"),
]
"""Odd places and spellings of keys that are refused, and a part of the reason."""


@pytest.mark.parametrize(("content", "reason"), ODD)
def test_odd_places_and_spellings_are_refused_with_a_reason(content: dict[str, Any], reason: str) -> None:
    (problem,) = config_problems(content)
    assert reason in problem


def test_old_names_and_numbers_as_texts_mean_what_deepspeed_reads() -> None:
    zero = {"stage": "2", "cpu_offload": False, "reduce_bucket_size": "auto"}
    whole = {"zero_optimization": zero, "bfloat16": {"enabled": True}, "gradient_clipping": "auto"}
    assert config_problems(whole) == []
    old = {"stage": 3, "max_live_parameters": 10, "stage3_gather_fp16_weights_on_model_save": True}
    assert config_problems({"zero_optimization": old}) == []


def test_keys_without_effect_are_named_with_the_reason() -> None:
    ignored = {key for key, (verdict, _) in CONFIG_KEYS.items() if verdict == IGNORED}
    whole: dict[str, Any] = {}
    for key in ignored:
        *sections, last = key.split(".")
        inside = whole
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = 1
    named = {line.partition(" (")[0] for line in ignored_keys(whole)}
    assert named == ignored - {"gradient_accumulation_steps", "train_batch_size"}  # which the trainer sets
    assert ignored_keys({"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": True}}) == []


def test_the_documents_show_the_table() -> None:
    page = (ROOT / "docs" / "shards.md").read_text()
    for key, (verdict, note) in CONFIG_KEYS.items():
        assert f"| `{key}` | {verdict} | {note} |" in page, key
