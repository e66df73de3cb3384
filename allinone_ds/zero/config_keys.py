"""Every key of DeepSpeed 0.19.8's configuration: what it means for balanced steps.

`tests/zero/test_config_keys.py` compares the table with the installed release, tries the served keys that could change
a gradient on two ranks, and the refused ones. docs/shards.md shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from allinone_ds.strict import did_you_mean

SERVED, IGNORED, REFUSED = "served", "ignored", "refused"
"""Balanced steps stay exact; nothing that a balanced step reads; refused with a reason where it would matter."""

_TOP = {
    SERVED: {
        "activation_checkpointing": "of DeepSpeed's own checkpointing functions, which the trainer does not call",
        "bf16": "see its keys", "bfloat16": "old name of bf16", "fp16": "see its keys",
        "checkpoint": "how DeepSpeed writes files",
        "comms_logger": "measures only", "flops_profiler": "measures only", "memory_breakdown": "prints only",
        "wall_clock_breakdown": "measures only; its timers wait for the device",
        "comet": "logs of DeepSpeed", "csv_monitor": "logs of DeepSpeed", "tensorboard": "logs of DeepSpeed",
        "wandb": "logs of DeepSpeed", "log_level": "prints only", "dump_state": "prints only",
        "steps_per_print": "prints only", "timers": "see docs/gpu.md: the throughput timer waits for the device",
        "communication_data_type": "exact in fp32; within its rounding in 16 bit",
        "data_types": "see its keys", "disable_allgather": "ZeRO-0 only", "disable_python_gc": "no effect on values",
        "gradient_predivide_factor": "ZeRO 0, 1, 2; refused on ZeRO-3", "prescale_gradients": "see docs/shards.md",
        "managed_gradient_accumulation": "either: the balancer owns the boundaries of its steps",
        "optimizer": "element-wise ones, and Muon; the trainer sets `optim` instead",
        "scheduler": "steps in balancer.step(); the trainer sets `lr_scheduler_type` instead",
        "torch_autocast": "see its keys", "train_micro_batch_size_per_gpu": "set by the tasks in the trainer",
        "zero_allow_untested_optimizer": "allows optimizers of torch", "zero_optimization": "see its keys",
        "zero_force_ds_cpu_optimizer": "which optimizer is allowed with offload",
    },
    IGNORED: {
        "aio": "NVMe only", "dataloader_drop_last": "loaders of DeepSpeed only", "pipeline": "PipelineModule only",
        "gradient_accumulation_steps": "micro_steps takes its place; 1 in the trainer",
        "seq_parallel_communication_data_type": "sequence parallelism only",
        "train_batch_size": "follows from the tasks", "use_data_before_expert_parallelism": "experts only",
        "vocabulary_size": "a warning of DeepSpeed",
    },
    REFUSED: {
        "autotuning": "ends the process after some steps", "data_efficiency": "changes batches or layers by itself",
        "compile": "with deepcompile only", "datastates_ckpt": "writes checkpoints after the save returns",
        "expert_parallel": "gradients of experts are averaged over other ranks",
        "gradient_allreduce_op": "a value other than mean",
        "gradient_clipping": "a value other than 0.0 would clip the balanced sum again",
        "hybrid_engine": "where enabled",
        "sequence_parallel_size": "above 1", "tensor_parallel": "where ranks share a layer",
        "weight_quantization": "changes the weights by itself",
    },
}  # fmt: skip
_ZERO = {
    SERVED: {
        "stage": "0 to 3", "allgather_bucket_size": "", "allgather_partitions": "", "contiguous_gradients": "",
        "compute_grad_norm": "refused with torch_autocast in fp16", "enable_sanity_checks": "",
        "ignore_unused_parameters": "", "leaf_module": "", "log_trace_cache_warnings": "prints only",
        "memory_efficient_linear": "", "offload_optimizer": "see its keys", "offload_param": "see its keys",
        "cpu_offload": "old name of offload_optimizer", "cpu_offload_param": "old name of offload_param",
        "cpu_offload_use_pin_memory": "", "overlap_comm": "see docs/gpu.md: waits for the device on ZeRO 1 and 2",
        "override_module_apply": "", "parameter_alignment": "", "reduce_bucket_size": "", "reduce_scatter": "",
        "round_robin_gradients": "", "sub_group_size": "", "use_multi_rank_bucket_allreduce": "",
        "zero_hpz_partition_size": "copies of weights within groups of ranks", "stage3_allgather_sequential": "",
        "stage3_gather_16bit_weights_on_model_save": "the trainer sets it",
        "stage3_gather_fp16_weights_on_model_save": "old name", "stage3_max_live_parameters": "",
        "stage3_max_reuse_distance": "", "stage3_model_persistence_threshold": "",
        "stage3_param_persistence_threshold": "", "stage3_prefetch_bucket_size": "",
        "stage3_use_all_reduce_for_fetch_params": "",
    },
    IGNORED: {
        "elastic_checkpoint": "checkpoints of this package fit any number of ranks",
        "load_from_fp32_weights": "DeepSpeed's own loading only", "pipeline_loading_checkpoint": "pipelines only",
        "save_muon_momentum_buffer_in_memory": "Muon on NVMe only",
    },
    REFUSED: {
        "legacy_stage1": "DeepSpeed no longer has it", "zenflow": "updates weights asynchronously",
        "stage3_module_granularity_threshold": "above 0: DeepSpeed itself fails on a model with several heads",
        "zero_quantized_gradients": "gradients are rounded before they are averaged",
        "zero_quantized_nontrainable_weights": "needs CUDA kernels, and fp16 weights",
        "zero_quantized_weights": "needs CUDA kernels; tasks would see differently rounded weights",
    },
}  # fmt: skip
_SECTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "zero_optimization.offload_optimizer": {
        SERVED: {"device": "cpu or none; nvme is refused", "fast_init": "", "pin_memory": "", "cpuadam_cores_perc": ""},
        IGNORED: {"buffer_count": "NVMe only", "nvme_path": "NVMe only", "pipeline_read": "NVMe only",
                  "pipeline_write": "NVMe only"},
        REFUSED: {"ratio": "below 1: DeepSpeed does not save the moments of the part on the accelerator",
                  "super_offload": "where true"},
    },
    "zero_optimization.offload_param": {
        SERVED: {"device": "cpu or none; nvme is refused", "pin_memory": ""},
        IGNORED: {"buffer_count": "NVMe only", "buffer_size": "NVMe only", "max_in_cpu": "NVMe only",
                  "nvme_path": "NVMe only"},
    },
    "bf16": {
        SERVED: {"enabled": "", "check_grad_overflow": "", "immediate_grad_update": "",
                 "bf16_master_weights_and_grads": "rounds the weights; needs bf16_optimizer_states or DeepSpeedCPUAdam",
                 "bf16_optimizer_states": ""},
    },
    "fp16": {
        SERVED: {"enabled": "", "auto_cast": "", "consecutive_hysteresis": "", "hysteresis": "", "loss_scale": "",
                 "initial_scale_power": "", "loss_scale_window": "", "min_loss_scale": "",
                 "fp16_master_weights_and_grads": "rounds the weights; needs DeepSpeedCPUAdam"},
    },
    "torch_autocast": {SERVED: {"enabled": "", "dtype": "", "lower_precision_safe_modules": ""}},
    "data_types": {SERVED: {"grad_accum_dtype": "", "param_dtype": "", "buffer_dtype": "", "keep_in_fp32_modules": ""}},
    "timers": {SERVED: {"throughput": ""}},
}  # fmt: skip


def _rows(table: Mapping[str, Mapping[str, str]], prefix: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for verdict, notes in table.items():
        yield from ((f"{prefix}{key}", (verdict, note)) for key, note in notes.items())


AUTO = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16.enabled", "fp16.enabled", "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_param_persistence_threshold",
}  # fmt: skip
"""Dotted keys whose value may be "auto", which Trainer fills in; DeepSpeed does not know the word."""


CONFIG_KEYS: Mapping[str, tuple[str, str]] = dict(
    sorted(
        [
            *_rows(_TOP, ""),
            *_rows(_ZERO, "zero_optimization."),
            *(row for section, table in _SECTIONS.items() for row in _rows(table, f"{section}.")),
        ]
    )
)
"""Dotted key -> (SERVED, IGNORED or REFUSED, note). Sections without keys of their own count as a whole."""
_SECTION_NAMES = {key.rpartition(".")[0] for key in CONFIG_KEYS} - {""}


def ignored_keys(content: Mapping[str, Any], section: str = "") -> list[str]:
    """Return one line per key of a configuration that has no effect on a run, with the reason.

    Args:
        content: the configuration, or one of its sections.
        section: dotted name of the section.

    Example:
        >>> ignored_keys({"zero_optimization": {"stage": 2, "elastic_checkpoint": True}})
        ['zero_optimization.elastic_checkpoint (checkpoints of this package fit any number of ranks)']
    """
    lines: list[str] = []
    for key, value in content.items():
        place = f"{section}.{key}" if section else str(key)
        verdict, note = CONFIG_KEYS.get(place, ("", ""))
        if isinstance(value, Mapping) and place in _SECTION_NAMES:
            lines += ignored_keys(value, place)
        elif verdict == IGNORED and key not in _OF_THE_TRAINER:
            lines.append(f"{place} ({note})")
    return lines


def checkpointing_problems(content: Mapping[str, Any]) -> list[str]:
    """Return one line if a configuration asks something of DeepSpeed's checkpointing functions, which nobody calls.

    Args:
        content: the configuration of a run that recomputes its layers through torch.

    Example:
        >>> checkpointing_problems({"activation_checkpointing": {"cpu_checkpointing": False}})
        []
    """
    section = content.get("activation_checkpointing")
    asked = [key for key, value in section.items() if value] if isinstance(section, Mapping) else []
    if not asked:
        return []
    offload = " and activation_checkpointing_kwargs: {offload: true}" if "cpu_checkpointing" in asked else ""
    return [
        f".activation_checkpointing ({', '.join(asked)}) would have no effect: it is of DeepSpeed's own checkpointing "
        "functions, and the layers of a run are recomputed by torch; remove the section and set "
        f"trainer.activation_checkpointing: true{offload}"
    ]


_OF_THE_TRAINER = ("gradient_accumulation_steps", "train_batch_size")


def known_part(content: Mapping[str, Any], section: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return a configuration without the keys that are in no row, and one line per such key.

    DeepSpeed ignores most of them without a word.

    Args:
        content: the configuration, or one of its sections.
        section: dotted name of the section. One without rows for its keys is returned as it is.

    Example:
        >>> part, problems = known_part({"zero_optimisation": {"stage": 2}, "gradient_clipping": 0.0})
        >>> part, problems[0].split("? ")[0]
        ({'gradient_clipping': 0.0}, ".zero_optimisation: DeepSpeed has no such key; did you mean 'zero_optimization'")
    """
    prefix = f"{section}." if section else ""
    known = {key.removeprefix(prefix) for key in CONFIG_KEYS if key.startswith(prefix)}
    known = {key for key in known if "." not in key}
    if not known:
        return dict(content), []
    part: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in content.items():
        place = f"{prefix}{key}"
        if str(key) not in known and not _is_field_name(section, str(key), known):
            problems.append(f".{place}: DeepSpeed has no such key; {did_you_mean(str(key), known)}")
            continue
        if value == "auto" and place not in AUTO:
            problems.append(f".{place} = 'auto': Trainer does not fill this key in; write its value or remove it")
        elif isinstance(value, Mapping):
            part[key], inner = known_part(value, place)
            problems += inner
        elif place in _SECTION_NAMES and (value is not None or "offload" not in place):
            problems.append(f".{place} = {value!r}: this is a section; write its keys, such as {_example(place)}")
        else:
            part[key] = value
    return part, problems


def _example(section: str) -> str:
    """Return how to write a section, with one of its keys."""
    usual = ("stage", "enabled", "device", "grad_accum_dtype", "throughput")
    return f'{{"{next(key for key in usual if f"{section}.{key}" in CONFIG_KEYS)}": ...}}'


def _is_field_name(section: str, key: str, known: set[str]) -> bool:
    """Return whether it is a ZeRO-3 key without its prefix, which DeepSpeed accepts too."""
    return section == "zero_optimization" and f"stage3_{key}" in known
