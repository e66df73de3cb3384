"""Which releases and settings of DeepSpeed are served, and a clear refusal of every other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed import checkpointing
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from pydantic import ValidationError

from allinone_ds.errors import UnsupportedEngine
from allinone_ds.zero.config_keys import known_part
from allinone_ds.zero.engines.choose import adapter_class
from allinone_ds.zero.engines.loss_scale import grad_scaler
from allinone_ds.zero.engines.muon import unfit_for_muon, uses_muon
from allinone_ds.zero.releases import RELEASE, SERVES_MUON

_SEQUENCES = "ranks of a sequence would count as ranks of different data; remove mesh_param and sequence_parallel_size"
_CHANGES_GRADIENTS = ("muon", "onebit", "zeroone")
_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)
CHECKED_RELEASES = ("0.19.8",)
"""DeepSpeed releases whose private fields were read and whose exactness table was run."""


def checked_release() -> bool:
    """Return whether the installed DeepSpeed is one of `CHECKED_RELEASES`."""
    return str(RELEASE) in CHECKED_RELEASES


def release_name() -> str:
    """Return the installed release of DeepSpeed, such as "0.19.8"."""
    return str(RELEASE)


def refuse_unsupported(engine: Any, allow_gradient_clipping: bool) -> None:
    """Raise unless gradients of `engine` can be balanced exactly.

    Args:
        engine: what `deepspeed.initialize` returned.
        allow_gradient_clipping: accept that DeepSpeed clips the balanced gradient a second time.

    Raises:
        TypeError: `engine` is not what `deepspeed.initialize` returns.
        UnsupportedEngine: a kind or setting that is not served; the message says what to do.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine is {type(engine).__name__}; pass the engine that deepspeed.initialize returned "
            "(with accelerate: what accelerator.prepare returned for the model)"
        )
    for reason, advice in _refusals(engine):
        raise UnsupportedEngine(f"{reason} cannot be balanced; {advice}")
    clip = float(engine.gradient_clipping())
    adapter = adapter_class(engine)
    may_clip = adapter is not None and adapter.allows_clipping and not uses_muon(engine.basic_optimizer)
    if clip and not (allow_gradient_clipping and may_clip):
        raise UnsupportedEngine(
            f"gradient_clipping is {clip} in the DeepSpeed config (1.0 when the key is absent, and Hugging Face fills "
            "'auto' from max_grad_norm): the balanced sum would be clipped a second time; "
            'set "gradient_clipping": 0.0' + (", or pass allow_gradient_clipping=True" if may_clip else "")
        )


def config_problems(content: Mapping[str, Any]) -> list[str]:
    """Return what DeepSpeed or the balancer refuses in a DeepSpeed configuration, without an engine.

    Args:
        content: the configuration; values "auto" and the batch sizes are left out.

    Returns:
        One line per problem, to be put behind the name of the configuration.

    Example:
        >>> config_problems({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}})
        [': NVMe offload cannot be balanced; offload to cpu or not at all']
        >>> config_problems({"zero_optimization": {"stage": 5}})
        ['.zero_optimization.stage = 5: Input should be 0, 1, 2, 3 or 3']
    """
    batch = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    part, unknown = known_part(content)
    try:
        config = DeepSpeedConfig({**_without_auto(part), **batch})
    except ValidationError as error:
        return unknown + [_invalid(content, one) for one in error.errors()]
    except Exception as error:  # DeepSpeed raises many types, among them AssertionError and KeyError
        return [*unknown, f": {' '.join(str(error).split()) or repr(error)}"]
    return unknown + [f": {reason} cannot be balanced; {advice}" for reason, advice in _setting_refusals(config)]


def _muon_refusals(engine: Any) -> list[tuple[bool, str, str]]:
    """Rows of `_refusals` on optimizers that change gradients themselves."""
    optimizer = getattr(engine, "basic_optimizer", None)
    name = type(optimizer).__name__
    if not uses_muon(optimizer):
        changes = any(word in name.lower() for word in _CHANGES_GRADIENTS)
        return [(changes, f"the optimizer {name}", "it changes gradients itself; use an element-wise one such as "
                 "AdamW or SGD, or DeepSpeed's MuonWithAuxAdam")]  # fmt: skip
    zero, unfit = engine.optimizer, unfit_for_muon(engine)
    offload = bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False))
    heads = any(getattr(param, "muon_num_heads", None) for param in engine.module.parameters())
    return [
        (not SERVES_MUON, f"Muon of DeepSpeed {RELEASE}", "use DeepSpeed 0.19.8 or newer"),
        (offload, "Muon with the optimizer on the CPU", "keep the optimizer on the accelerator, or use AdamW"),
        (bool(unfit), f"Muon on parameters that are no matrices ({', '.join(unfit[:3])})",
         "put them into a parameter group with use_muon=False"),
        (engine.zero_optimization_stage() == 0 and next(engine.module.parameters()).dtype != torch.float32,
         "Muon in 16 bit on ZeRO-0", "its iteration enlarges the rounding of the balanced sum; use ZeRO 1, 2 or 3"),
        (heads and engine.zero_optimization_stage() == 0, "per_head_muon on ZeRO-0",
         "DeepSpeed ignores it there; use ZeRO 1, 2 or 3, or remove the key"),
    ]  # fmt: skip


def _without_auto(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _without_auto(value) for key, value in content.items() if value != "auto"}
    return content


def _invalid(content: Mapping[str, Any], error: Any) -> str:
    """Return the line of an error of pydantic: at a key, or of a section whose keys do not fit each other."""
    place = _place(content, error["loc"])
    return f"{place} = {error['input']!r}: {error['msg']}" if place else f": {error['msg']}"


def _enables(section: Any) -> bool:
    """Return whether a section or one inside it is enabled: DeepSpeed does not ask the outer ones in every place."""
    inner = section.items() if isinstance(section, Mapping) else ()
    return any(bool(value) if key == "enabled" else _enables(value) for key, value in inner)


def _place(content: Mapping[str, Any], path: tuple[Any, ...], where: str = "") -> str:
    """Return the dotted name of a key in a configuration; `path` is its place in the section that holds it."""
    if path[:1] and path[0] in content:
        return f"{where}.{'.'.join(map(str, path))}"
    sections = ((key, value) for key, value in content.items() if isinstance(value, Mapping))
    return next((found for key, value in sections if (found := _place(value, path, f"{where}.{key}"))), "")


def _setting_refusals(config: Any) -> list[tuple[str, str]]:
    """(what is not served, what to do instead) of everything in the configuration of an engine that applies."""
    zero = config.zero_config
    offload = [c for c in (zero.offload_optimizer, zero.offload_param) if c is not None]
    nvme = any(str(getattr(c.device, "value", c.device)) == "nvme" for c in offload)
    scaled = config.torch_autocast_enabled and config.torch_autocast_dtype == torch.float16
    rows: list[tuple[bool, str, str]] = [
        (getattr(zero, "zenflow", None) is not None, "ZenFlow", "remove the zenflow section"),
        (bool(getattr(zero.offload_optimizer, "super_offload", False)), "SuperOffload", "set super_offload to false"),
        (nvme, "NVMe offload", "offload to cpu or not at all"),
        (float(getattr(zero.offload_optimizer, "ratio", 1.0)) < 1, "offload_optimizer.ratio below 1",
         "DeepSpeed saves no moments of the part on the accelerator, and one group there has a fixed rate; remove it"),
        (config.tensor_parallel_config.autotp_size > 1, "tensor or model parallelism", "use ZeRO alone"),
        (bool(config.hybrid_engine.enabled), "the hybrid engine", "remove the hybrid_engine section"),
        (getattr(zero, "mics_shard_size", -1) > 0, "MiCS", "remove mics_shard_size"),
        (bool(zero.zero_quantized_gradients), "quantized gradients (ZeRO++)", "set zero_quantized_gradients false"),
        (bool(config.compile_config.deepcompile), "DeepCompile", "set compile.deepcompile to false"),
        (scaled and config.float16_config.enabled, "torch_autocast in fp16 beside the fp16 section",
         "DeepSpeed scales the loss once and divides its gradient by both scales; remove one of the two sections"),
        (scaled and not getattr(zero, "compute_grad_norm", True),
         "torch_autocast in fp16 with compute_grad_norm = false",
         "DeepSpeed would not see an overflow; remove the key compute_grad_norm"),
        (zero.stage == 3 and config.gradient_predivide_factor != 1.0, "gradient_predivide_factor on ZeRO-3",
         "DeepSpeed divides by it and may not multiply again; remove the key"),
        (zero.legacy_stage1, "legacy_stage1", "DeepSpeed no longer has it; remove the key"),
        (bool(getattr(zero, "module_granularity_threshold", 0)), "stage3_module_granularity_threshold",
         "DeepSpeed fails with it on a model of several heads; remove the key"),
        (zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights, "quantized weights (ZeRO++)",
         "a weight is rounded together with those that are gathered with it, so tasks see different weights; set "
         "zero_quantized_weights and zero_quantized_nontrainable_weights false, zero_hpz_partition_size to the GPUs "
         "of a node to send less"),
        (_enables(config._param_dict.get("data_efficiency")), "data_efficiency",
         "DeepSpeed would change batches or layers by itself; remove the section"),
        (bool(config.autotuning_config.enabled), "autotuning", "it ends the process; remove the section"),
        (bool(getattr(config, "datastates_config", None)) and bool(config.datastates_config.enabled),
         "datastates_ckpt", "a checkpoint is written after the save returns; use async_save of the trainer"),
        (bool(getattr(config, "expert_parallel_config", None)) and bool(config.expert_parallel_config.enabled),
         "expert_parallel", "gradients of experts are averaged over other ranks; remove the section"),
        (config.weight_quantization_config is not None, "weight_quantization",
         "it changes the weights by itself; remove the section"),
        (str(config._param_dict.get("sequence_parallel_size") or 1) != "1", "sequence parallelism", _SEQUENCES),
        (not _dtypes_exist(config), "data_types with a type that DeepSpeed does not know", "use fp32, bf16 or fp16"),
        ({"bf16", "bfloat16"} <= set(config._param_dict), "bf16 beside its old name bfloat16",
         "DeepSpeed would ignore the second; remove bfloat16"),
        (getattr(config, "gradient_allreduce_op", "mean") != "mean", 'gradient_allreduce_op = "sum"',
         "a task's gradient is its mean over ranks; remove the key, and multiply the loss by the number of ranks"),
    ]  # fmt: skip
    return [(reason, advice) for wrong, reason, advice in rows if wrong]


def _dtypes_exist(config: Any) -> bool:
    """Return whether the engine will understand the data types of a configuration."""
    try:
        return all(name is None or DtypeEnum(name) for name in (config.grad_accum_dtype, config.param_dtype))
    except ValueError:
        return False


def _refusals(engine: Any) -> list[tuple[str, str]]:
    """(what is not served, what to do instead) of everything that applies to the engine."""
    rows: list[tuple[bool, str, str]] = [
        (isinstance(engine, PipelineEngine), "a pipeline engine", "use ZeRO without PipelineModule"),
        (adapter_class(engine) is None, "an engine without an optimizer of its own",
         "give deepspeed.initialize an optimizer or an optimizer section"),
        (bool(engine.has_moe_layers), "mixture-of-experts layers", "their gradients are averaged over other ranks"),
        (engine.mpu is not None, "tensor or model parallelism", "use ZeRO alone"),
        (engine.mesh_device is not None or engine.sequence_parallel_size > 1, "sequence parallelism (a device mesh)",
         _SEQUENCES),
        (isinstance(engine, DeepSpeedHybridEngine), "the hybrid engine", "remove the hybrid_engine section"),
        (grad_scaler(engine) is not None and getattr(engine.optimizer, "custom_loss_scaler", False),
         "override_loss_scale with torch_autocast",
         "DeepSpeed would multiply by one scale and divide by both; do not call it"),
        (any(getattr(m, "sparse", False) for m in engine.module.modules() if isinstance(m, _EMBEDDINGS)),
         "an embedding with sparse gradients", "construct it with sparse=False"),
        (checkpointing.CPU_CHECKPOINT and get_accelerator().is_synchronized_device(),
         "cpu_checkpointing of DeepSpeed on the CPU",
         "its function empties the tensors that it has not copied; set activation_checkpointing.cpu_checkpointing to "
         "false"),
        *_muon_refusals(engine),
    ]  # fmt: skip
    return _setting_refusals(engine._config) + [(reason, advice) for wrong, reason, advice in rows if wrong]
