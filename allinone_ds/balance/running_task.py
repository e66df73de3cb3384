"""The task that runs now: its micro-steps counted, its losses checked and averaged, other ranks told how it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.distributed import rank
from allinone_ds.errors import BalancerError
from allinone_ds.strict import did_you_mean


def refuse_task(name: str, groups: TaskGroups, done: tuple[str, ...], running: RunningTask | None) -> None:
    """Raise unless a task can begin on this rank now.

    Args:
        name: of the task.
        groups: which ranks run which task.
        done: tasks of this step that have run.
        running: the task that runs now.

    Raises:
        BalancerError: an unknown task, a task of other ranks, nesting, or a task that has run already.
    """
    if running is not None:
        raise BalancerError(f"task '{name}' begins inside task '{running.name}'; tasks run one after another")
    if name not in groups.tasks:
        raise BalancerError(f"unknown task '{name}'; {did_you_mean(str(name), groups.tasks)}")
    if rank() not in groups.ranks[name]:
        raise BalancerError(
            f"task '{name}' runs on rank(s) {list(groups.ranks[name])}, this is rank {rank()}; loop over "
            "balancer.tasks, which are those of this rank"
        )
    if name in done:
        raise BalancerError(
            f"task '{name}' runs a second time in this step; call balancer.step() first, or give it more micro_steps"
        )


def refuse_missing(missing: Sequence[str], ran: Sequence[str], require_all: bool) -> None:
    """Raise if tasks of a step are missing that must not be.

    Args:
        missing: tasks that did not run.
        ran: tasks that ran.
        require_all: whether every task must run; one must in any case.

    Raises:
        BalancerError: names the tasks.
    """
    if missing and (require_all or not ran):
        raise BalancerError(
            f"balancer.step() before task(s) {', '.join(missing)} ran (ran: {', '.join(ran) or 'none'}); run every "
            "task, or ask for a partial step of at least one task with require_all=False"
        )


class RunningTask:
    """One task of a step, from the beginning of its block to the end.

    Args:
        name: of the task.
        micro_steps: number of micro-batches that its gradient is the mean of.
        device: of the losses.
        agreement: with the other ranks; None: they are not asked.
        forwards_communicate: whether a forward is a collective operation (ZeRO-3).

    Attributes:
        loss: mean of the losses so far over all micro-steps, 0-dim.

    Raises:
        BalancerError: `micro_steps` is not an integer of 1 or more.
    """

    def __init__(
        self,
        name: str,
        micro_steps: int,
        device: torch.device,
        agreement: Agreement | None = None,
        forwards_communicate: bool = False,
    ):
        if not isinstance(micro_steps, int) or isinstance(micro_steps, bool) or micro_steps < 1:
            raise BalancerError(f"micro_steps = {micro_steps!r} for task '{name}'; allowed: an integer of 1 or more")
        self.name = name
        self.micro_steps = micro_steps
        self.loss = torch.zeros((), device=device)
        self._agreement = agreement
        self._forwards_communicate = forwards_communicate
        self._done = 0
        self._failure: BaseException | None = None

    @property
    def next_is_last(self) -> bool:
        """Whether the next micro-step is the last."""
        return self._done == self.micro_steps - 1

    def begin(self, first: bool) -> None:
        """Agree with the other ranks on this task. Collective.

        Args:
            first: whether it is the first of its step.

        Raises:
            BalancerError: ranks are in different tasks, or one has failed.
        """
        if self._agreement:
            self._agreement.check(f"task '{self.name}', {self.micro_steps} micro-steps", within_step=not first)

    def scaled(self, loss: Any) -> Tensor:
        """Return the loss of the next micro-step, divided by the number of micro-steps, after checking it.

        Raises:
            BalancerError: one micro-step too many, a loss that is not a scalar with a graph, or an earlier backward of
                this block failed.
        """
        self._refuse_after_failure()
        if self._done == self.micro_steps:
            raise BalancerError(
                f"task '{self.name}' got more than its {self.micro_steps} micro-steps; pass micro_steps=K to "
                "balancer.task() for K backward calls"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            kind = type(loss).__name__
            if isinstance(loss, Tensor):
                kind = f"a tensor of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a graph'}"
            raise BalancerError(f"the loss of task '{self.name}' is {kind}; pass a scalar tensor with requires_grad")
        return loss.reshape(()) / self.micro_steps

    @contextlib.contextmanager
    def micro_step(self, scaled: Tensor, communicates: bool) -> Iterator[None]:
        """Count the backward inside this block, and tell the other ranks if it fails.

        Args:
            scaled: what `scaled` returned.
            communicates: whether the backward is a collective operation, so that ranks agree on it first.

        Raises:
            BalancerError: other ranks do not run the same backward.
        """
        try:
            if self._agreement and communicates:
                place = f"backward {self._done + 1} of {self.micro_steps} of task '{self.name}'"
                self._agreement.check(place)
            yield
        except BaseException as error:
            self.fail(error, inside=communicates)
            raise
        self.loss += scaled.detach().float()
        self._done += 1

    def end(self) -> None:
        """Raise unless all micro-steps are done, here and on the other ranks. Collective.

        Raises:
            BalancerError: some are missing, or a rank has failed.
        """
        self._refuse_after_failure()
        if self._done != self.micro_steps:
            raise BalancerError(
                f"task '{self.name}' ended after {self._done} of {self.micro_steps} micro-steps; call "
                "balancer.backward(loss) exactly micro_steps times inside the block"
            )
        if self._agreement:
            self._agreement.check(f"the end of task '{self.name}'")

    def fail(self, error: BaseException, inside: bool | None = None) -> None:
        """Tell the other ranks that this rank leaves the task with an error, unless they know.

        Args:
            error: gets a note of what the other ranks do, where they do not have the same error.
            inside: whether other ranks may be in a collective operation that this rank has left; None: as forwards.
        """
        if self._failure is not None:
            return
        self._failure = error
        inside = self._forwards_communicate if inside is None else inside
        tell_failure(error, self._agreement, f"task '{self.name}'", inside)

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            kind = type(self._failure).__name__
            raise BalancerError(
                f"task '{self.name}' failed in this block before ({kind}: {self._failure}), so its gradient is not "
                "complete; let the error leave the block, then run the task again"
            ) from self._failure


def tell_failure(error: BaseException, agreement: Agreement | None, place: str, inside: bool) -> None:
    """Tell the other ranks that this rank has left a place with an error, and note on it what they do.

    Args:
        error: without a note where all ranks know of it, or have the same one.
        agreement: with the other ranks; None: they are not asked.
        place: such as "task 'det'".
        inside: whether other ranks may be in a collective operation that this rank has left.
    """
    if agreement is None or agreement.knows(error):
        return
    text = str(error).split("\n")[0][:200]
    others = agreement.fail(f"left {place} with {type(error).__name__}{f': {text}' if text else ''}", inside)
    if others is not None:
        error.add_note(f"The other ranks: {others}")


@contextlib.contextmanager
def undone_after_error(tell: Callable[[BaseException], None], *cleanups: Callable[[], Any]) -> Iterator[None]:
    """After an error in this block, tell the other ranks and clean up; the error stays the one that the user sees.

    Args:
        tell: gets the error.
        cleanups: called in order; an error of one of them becomes a note.
    """
    try:
        yield
    except BaseException as error:
        try:
            tell(error)
        finally:
            for cleanup in cleanups:
                try:
                    cleanup()
                except Exception as failed:
                    error.add_note(f"cleaning up failed as well: {failed!r}")
        raise
