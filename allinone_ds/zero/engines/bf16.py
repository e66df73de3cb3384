"""ZeRO-1 with bf16 weights and fp32 accumulation (`BF16_Optimizer`).

DeepSpeed 0.19.8, `runtime/bf16_optimizer.py`: every rank keeps the whole gradient in fp32
(`fp32_groups_gradients_flat`), all-reduced at the boundary, and steps on its own slice
`fp32_groups_gradient_flat_partition`. Only that slice is kept and scaled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor
from torch.nn import Parameter

from allinone_ds.zero.engines.base import EngineAdapter
from allinone_ds.zero.engines.pieces import Span, cut
from allinone_ds.zero.fragments import Fragment, fragments_of_parts, no_paddings


class BF16Adapter(EngineAdapter):
    """ZeRO-1 through `BF16_Optimizer`; the shard is this rank's slice of the fp32 gradient."""

    allows_clipping = False

    @classmethod
    def serves(cls, engine: Any) -> bool:
        return type(engine.optimizer) is BF16_Optimizer

    _norm: Tensor | None = None

    def _shard_sizes(self) -> list[int]:
        return [master.numel() for master in self.masters()]

    def _find_spans(self) -> list[Span]:
        spans = []
        for group, params in enumerate(self.optimizer.bf16_groups):
            size = self.sizes[group]
            first = self._rank_in(group) * size
            position = 0
            for param in params:
                start, end = max(position - first, 0), min(position + param.numel() - first, size)
                if start < end:
                    spans.append(Span(param, group, start, end - start))
                position += param.numel()
        return spans

    def _rank_in(self, group: int) -> int:
        return torch.distributed.get_rank(self.optimizer.real_dp_process_group[group])

    def begin_task(self) -> None:
        pass

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        # DeepSpeed clears the bf16 gradients in a hook on what `engine.forward` returned, and adds them to the fp32
        # ones after each backward; a loss of `engine.module` would add those of earlier backwards again
        self.optimizer.clear_lp_grads()
        super().backward(loss, retain_graph)

    def gradient(self) -> list[Tensor]:
        return cut(self.optimizer.fp32_groups_gradient_flat_partition, self.pieces)

    def clear_gradient(self) -> None:
        self.optimizer.clear_hp_grads()

    def _set_gradient(self, flats: Sequence[Tensor], overflow: bool) -> None:
        for gradient, flat in zip(self.optimizer.fp32_groups_gradient_flat_partition, flats, strict=True):
            gradient.copy_(flat)
        for flags in self.optimizer.fp32_groups_has_gradients:
            flags[:] = [True] * len(flags)
        if self._muon is not None:  # which reports the norm of the gradient
            return
        square = torch.stack([flat.norm() for flat in flats]).square().sum()
        torch.distributed.all_reduce(square, group=self.optimizer.dp_process_group)
        self._norm = square.sqrt()

    def _after_step(self) -> None:
        # the engine sees only this rank's slice; the other slices are zero, so its own norm is that of one slice
        if self._norm is not None:
            self.optimizer._global_grad_norm = self.engine._global_grad_norm = self._norm
            self._norm = None

    def _discard(self) -> None:
        self._remove_gradients()

    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_groups_flat_partition)

    def model_groups(self) -> list[list[Parameter]]:
        return self.optimizer.bf16_groups

    def publish_masters(self) -> None:
        self.optimizer.update_lp_params()

    def fragments(self) -> list[Fragment]:
        shapes = self.engine._get_zero_param_shapes()
        parts = [(self._rank_in(group) * size, size) for group, size in enumerate(self.sizes)]
        return fragments_of_parts(shapes, no_paddings(shapes), parts)

    def master(self, span: Span) -> tuple[Tensor, dict[str, Any]]:
        master = self.optimizer.fp32_groups_flat_partition[span.group]
        return master, self.optimizer.optimizer.state[master]
