"""Two ranks: weights read from ZeRO shards equal those of the optimizer. Started by test_weights.py."""

import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from allinone_ds.run_folder.weights import read_weights, shards_of
from allinone_ds.training.optimizer import parameter_groups
from tests.launcher import run_checks
from tests.tiny import samples, tiny_model


def compare(stage: int, dtype: str) -> None:
    """Train a few steps, save, and read the shards back against the engine's own float32 weights."""
    model = tiny_model()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype != "fp32"},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000000,
    }
    if dtype == "bf16 masters":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 3 and dtype != "fp32":
        model.bfloat16()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05, 0.5))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for _ in range(2):
        for name, task in engine.module.tasks.items():
            engine.backward(engine(task=name, **task.collate(samples(2))).loss)
            engine.step()
    shared = [Path(tempfile.mkdtemp(prefix="shards")) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = shared[0]
    engine.save_checkpoint(str(folder), tag="global_step6")
    held = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            held[name] = safe_get_full_fp32_param(parameter).cpu()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                held[name] = parameter.detach().float().cpu().clone()
    state, source = read_weights(folder)
    assert source == shards_of(folder) == folder / "global_step6"
    assert state.keys() == held.keys(), (stage, dtype, state.keys() ^ held.keys())
    for name, value in held.items():
        assert state[name].dtype == torch.float32 and state[name].device.type == "cpu", name
        assert state[name].shape == value.shape, name
        assert torch.equal(state[name], value), (name, float((state[name] - value).abs().max()))
    if dtype != "fp32":  # the masters, not their 16-bit copies
        assert any((value != value.bfloat16().float()).any() for value in state.values())
    dist.barrier()
    engine.destroy()


def check_stage_1() -> None:
    for dtype in ("fp32", "bf16", "bf16 masters"):
        compare(1, dtype)


def check_stage_2() -> None:
    for dtype in ("fp32", "bf16"):
        compare(2, dtype)


def check_stage_3() -> None:
    for dtype in ("fp32", "bf16"):
        compare(3, dtype)


if __name__ == "__main__":
    run_checks({k: v for k, v in list(globals().items()) if k.startswith("check_")}, sys.argv[1])
