"""What one optimizer step did to each task's gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """The record of one balanced step. Equal on all ranks.

    Values are 0-dim float32 tensors on the gradients' device, so that reading none of them costs no wait for the
    device; `float(report.norms["det"])` when logging.

    Args:
        norms: task -> norm of its gradient on the shared backbone, mean over its micro-steps and all ranks, before
            scaling (and without fp16 loss scale).
        scales: task -> factor its backbone gradient got; 0 for a skipped task.
        losses: task -> loss, mean over its micro-steps and all ranks.
        whole_norms: task -> norm of its whole gradient, head included, before scaling.
        skipped: tasks left out of this step because their loss or gradient was not finite.
        overflow: True when fp16 gradients overflowed; the weights stay, DeepSpeed lowers its loss scale.
        applied: True when the optimizer changed the weights.
        norm_error: bound of the norms' relative standard error: 0 when they are exact, sqrt(6 / k) / 2 when they are
            estimated from sketches of k numbers.
    """

    norms: dict[str, Tensor]
    scales: dict[str, Tensor]
    losses: dict[str, Tensor]
    whole_norms: dict[str, Tensor]
    skipped: tuple[str, ...] = ()
    overflow: bool = False
    applied: bool = True
    tasks: tuple[str, ...] = field(default=())
    norm_error: float = 0.0

    def shares(self) -> dict[str, float]:
        """Task -> its share of the sum of squared scaled backbone norms, 0 to 1 (all 0 when every norm is 0)."""
        squares = {t: float(self.norms[t] * self.scales[t]) ** 2 if t not in self.skipped else 0.0 for t in self.tasks}
        total = sum(squares.values())
        return {task: square / total if total > 0 else 0.0 for task, square in squares.items()}
