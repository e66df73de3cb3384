"""Balanced steps with keys of the DeepSpeed config that are served; started by test_config_keys.py."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch.distributed as dist

from allinone_ds.testing.exactness import compare, train
from allinone_ds.testing.reference import reference_run
from allinone_ds.zero.engine_like import whole_weights
from tests.balance.engines import CASES, finish, make_balancer, make_engine, toy
from tests.launcher import run_checks

ZERO = "zero_optimization"
TRIALS: list[tuple[str, dict[str, Any]]] = [
    ("zero1 fp32", {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}}),
    ("zero2 fp32", {"comms_logger": {"enabled": True}}),
    ("zero2 fp32", {"flops_profiler": {"enabled": True, "profile_step": 1, "output_file": "/dev/null"}}),
    ("zero2 fp32", {"wall_clock_breakdown": True, "memory_breakdown": False}),
    ("zero2 fp32", {"dump_state": True, "disable_python_gc": True, "steps_per_print": 1, "log_level": "error"}),
    ("zero2 fp32", {"timers": {"throughput": {"enabled": True, "synchronized": False}}}),
    ("zero2 fp32", {"data_types": {"buffer_dtype": "fp32", "keep_in_fp32_modules": ["norm"]}}),
    ("zero0 fp32", {"disable_allgather": True, "dataloader_drop_last": True, "vocabulary_size": 11}),
    ("zero1 fp32", {ZERO: {"reduce_scatter": False}}),
    ("zero2 fp32", {ZERO: {"reduce_scatter": False}}),
    ("zero2 fp32", {ZERO: {"use_multi_rank_bucket_allreduce": False}}),
    ("zero2 fp32", {ZERO: {"allgather_partitions": False}}),
    ("zero1 fp32", {ZERO: {"round_robin_gradients": True}}),
    ("zero1 fp32", {ZERO: {"parameter_alignment": True}}),
    ("zero2 fp32", {ZERO: {"parameter_alignment": True, "round_robin_gradients": True}}),
    ("zero2 bf16", {ZERO: {"parameter_alignment": True}}),
    ("zero1 fp32", {ZERO: {"compute_grad_norm": False}}),
    ("zero2 bf16", {ZERO: {"compute_grad_norm": False}}),
    ("zero1 fp32", {ZERO: {"elastic_checkpoint": True, "load_from_fp32_weights": False}}),
    ("zero2 fp32", {ZERO: {"ignore_unused_parameters": False, "enable_sanity_checks": True}}),
    ("zero2 fp32", {ZERO: {"cpu_offload": True}}),
    ("zero2 fp32 offload", {ZERO: {"offload_optimizer": {"device": "cpu", "pin_memory": False, "fast_init": True}}}),
    ("zero3 fp32", {ZERO: {"cpu_offload": True}}),
    ("zero3 fp32", {ZERO: {"offload_param": {"device": "cpu", "pin_memory": False}}}),
    ("zero3 fp32 offload", {ZERO: {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}),
    ("zero3 fp32", {ZERO: {"stage3_max_live_parameters": 10, "stage3_max_reuse_distance": 10}}),
    ("zero3 fp32", {ZERO: {"stage3_model_persistence_threshold": 50}}),
    ("zero3 fp32", {ZERO: {"stage3_use_all_reduce_for_fetch_params": True}}),
    ("zero3 fp32", {ZERO: {"stage3_allgather_sequential": True, "log_trace_cache_warnings": True}}),
    ("zero3 fp32", {ZERO: {"memory_efficient_linear": False, "override_module_apply": False}}),
    ("zero3 fp32", {ZERO: {"zero_hpz_partition_size": 2}}),
    ("zero3 fp32", {ZERO: {"enable_sanity_checks": True, "reduce_scatter": False}}),
    ("zero3 fp32", {ZERO: {"leaf_module": {"names": ["backbone.blocks.0"]}}}),
    ("zero2 bf16", {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    ("zero3 bf16", {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    ("zero1 bf16 fp32-accumulation", {"bf16": {"enabled": True, "immediate_grad_update": True}}),
    ("zero3 bf16", {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}),
    ("zero2 fp16", {"fp16": {"enabled": True, "auto_cast": True, "loss_scale": 4, "hysteresis": 1,
                             "consecutive_hysteresis": True, "min_loss_scale": 2, "loss_scale_window": 2}}),
    ("zero2 bf16", {"data_types": {"param_dtype": "bf16", "buffer_dtype": "bf16"}}),
    ("zero2 fp32", {"torch_autocast": {"enabled": True, "dtype": "bfloat16",
                                       "lower_precision_safe_modules": ["torch.nn.Linear"]}}),
    ("zero2 fp32", {"checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": True}}}),
    ("zero2 fp32", {"compile": {"deepcompile": False, "debug_log": False}}),
]  # fmt: skip
"""(case, keys that replace those of its config)."""


def exact(case: str, given: dict[str, Any]) -> None:
    """Weights and norms within the rounding of the case."""
    counts, steps, lr = {"det": 1, "seg": 2, "cls": 1}, 2, 0.5
    config = {key: value for key, value in given.items() if key != ZERO}
    config[ZERO] = {**CASES[case].config()[ZERO], **given.get(ZERO, {})}
    engine = make_engine(case, lr=lr, **config)
    balancer = make_balancer(engine)
    reports = train(engine, balancer, counts, steps)
    wanted = reference_run({"name": "tbgc", "max_norm": 0.1}, steps, counts, dist.get_world_size(), lr=lr)
    found = compare(whole_weights(engine), reports, wanted, toy.make_model())
    finish(balancer)
    rounds = "16" in case or "torch_autocast" in given
    assert found["overflows"] == 0
    assert found["weights_relative"] < (0.1 if rounds else 1e-4) and found["norms"] < (0.1 if rounds else 1e-4), found


def name_of(case: str, given: dict[str, Any]) -> str:
    return f"{case} {given}"


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes fp16 on any CPU
    wanted_names = sys.argv[2:]
    checks = {name_of(*trial): partial(exact, *trial) for trial in TRIALS}
    run_checks({n: c for n, c in checks.items() if not wanted_names or any(w in n for w in wanted_names)}, sys.argv[1])
