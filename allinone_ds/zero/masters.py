"""The optimizer's own copy of the weights: this rank's shards of it, and how the model gets what they hold.

Private fields of DeepSpeed 0.19.8, the same that its own steps read and write.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.optim import Optimizer

from allinone_ds.errors import UnsupportedEngine


def master_shards(engine: Any) -> list[Tensor]:
    """The tensors that this rank's optimizer steps on (fp32, wherever it is offloaded to); never copies.

    Args:
        engine: what `deepspeed.initialize` returned, ZeRO stage 0 to 3.

    Raises:
        UnsupportedEngine: another kind of engine.
    """
    optimizer = engine.optimizer
    kind = type(optimizer)
    if kind is DeepSpeedZeroOptimizer_Stage3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if kind is DeepSpeedZeroOptimizer:
        return list(optimizer.single_partition_of_fp32_groups)
    if kind is BF16_Optimizer:
        return list(optimizer.fp32_groups_flat_partition)
    if kind is FP16_Optimizer:
        return list(optimizer.fp32_groups_flat)
    if kind is FP16_UnfusedOptimizer:
        return [copy for group in optimizer.fp32_groups for copy in group]
    if isinstance(optimizer, Optimizer) and engine.zero_optimization_stage() == 0:
        return [param for group in optimizer.param_groups for param in group["params"]]
    raise UnsupportedEngine(f"the engine's optimizer is {kind.__name__}; served are ZeRO stages 0 to 3")


def publish_masters(engine: Any) -> None:
    """Give the model's own weights, on all ranks, what `master_shards` hold now. Collective.

    Args:
        engine: what `deepspeed.initialize` returned.
    """
    optimizer = engine.optimizer
    kind = type(optimizer)
    if kind is DeepSpeedZeroOptimizer_Stage3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # small parameters stay gathered: put away without being written back, then gathered anew
        params = [param for group in optimizer.fp16_groups for param in group]
        gathered = [param for param in params if param.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(gathered, has_been_updated=False)
            gathered[0].all_gather(gathered)
    elif kind in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        optimizer.update_lp_params()
    elif kind is FP16_Optimizer:
        for flat, params in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            position = 0
            for param in params:
                param.data.copy_(flat.data[position : position + param.numel()].view_as(param))
                position += param.numel()
    elif kind is FP16_UnfusedOptimizer:
        for copies, params in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for copy, param in zip(copies, params, strict=True):
                param.data.copy_(copy.data)
