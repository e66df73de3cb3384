"""What one optimizer step did to each task's gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """The record of one balanced step, equal on all ranks.

    Values are 0-dim float32 tensors on the gradients' device, so that a step waits for the device only when a value is
    read, for example by `float(report.norms["det"])`.

    Args:
        norms: task -> norm of its gradient on the shared backbone, mean over its micro-steps and all its ranks, before
            scaling (and without fp16 loss scale).
        scales: task -> factor that its backbone gradient got; 0 for a skipped task.
        losses: task -> loss, mean over its micro-steps and all its ranks.
        whole_norms: task -> norm of its whole gradient, head included, before scaling.
        skipped: tasks left out of this step because their loss, gradient or factor was not finite.
        overflow: True when fp16 gradients overflowed; the weights stay, DeepSpeed lowers its loss scale.
        applied: True when the optimizer changed the weights.
        tasks: names of the T tasks of the step.
        gram: inner products of the tasks' gradients on the shared backbone, (T, T) in the order of `tasks`, float64,
            where the step was asked for it (`cosines_every`) and no task was skipped; else None.
        norm_error: bound of the relative standard error of the norms: 0 when they are exact, sqrt(6 / k) / 2 when they
            are estimated from sketches of k numbers.

    Example:
        >>> import torch
        >>> from allinone_ds import StepReport
        >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
        >>> report = StepReport({}, {}, {}, {}, tasks=("det", "seg"), gram=gram)
        >>> report.cosines()
        {('det', 'seg'): -0.5}
        >>> report.conflict_rate()
        1.0
    """

    norms: dict[str, Tensor]
    scales: dict[str, Tensor]
    losses: dict[str, Tensor]
    whole_norms: dict[str, Tensor]
    skipped: tuple[str, ...] = ()
    overflow: bool = False
    applied: bool = True
    tasks: tuple[str, ...] = field(default=())
    gram: Tensor | None = None
    norm_error: float = 0.0

    def cosines(self) -> dict[tuple[str, str], float]:
        """Return (task, other task) -> cosine of the angle between their backbone gradients, every pair once.

        Raises:
            ValueError: this step has no Gram matrix.
        """
        if self.gram is None:
            raise ValueError("this report has no Gram matrix; construct the TaskBalancer with cosines_every=N")
        gram = self.gram.cpu()
        norms = gram.diagonal().clamp(min=0).sqrt()
        cosine = (gram / (norms[:, None] * norms[None, :]).clamp(min=1e-30)).clamp(-1, 1).tolist()
        names = self.tasks
        return {(names[i], names[j]): cosine[i][j] for i in range(len(names)) for j in range(i + 1, len(names))}

    def conflict_rate(self) -> float:
        """Return the fraction of pairs of tasks whose backbone gradients have a cosine below 0, 0 to 1."""
        cosines = self.cosines()
        return sum(value < 0 for value in cosines.values()) / max(len(cosines), 1)
