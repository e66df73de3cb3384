"""The task that runs now: its micro-steps counted, its losses checked and averaged, other ranks told how it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from allinone_ds.balance.agreement import Agreement
from allinone_ds.balance.assignment import TaskGroups
from allinone_ds.balance.combiners.base import Combiner
from allinone_ds.balance.combiners.exact import require_exact
from allinone_ds.balance.joint.counts import LabelCounts
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


def opening_of_block(name: str, micro_steps: int) -> str:
    """Return the point at which the ranks agree that the block of a task, or of joint tasks, begins."""
    return f"task '{name}', {micro_steps} micro-steps"


Backward = Callable[..., None]
"""The engine's backward: (loss, whether it averages the gradient over ranks, retain_graph=False, local=False).
`local`: the gradient stays on the rank and is averaged later."""


class RunningTask:
    """One task of a step, from the beginning of its block to the end.

    Args:
        name: of the task.
        micro_steps: number of micro-batches that its gradient is the mean of.
        combiner: takes the task's gradient.
        agreement: with the other ranks; None: they are not asked.

    Attributes:
        tasks: names of the tasks that the block runs: this one.
        loss: mean of the losses so far over all micro-steps, 0-dim.

    Raises:
        BalancerError: `micro_steps` is not an integer of 1 or more.
    """

    def __init__(
        self,
        name: str,
        micro_steps: int,
        combiner: Combiner,
        agreement: Agreement | None = None,
    ):
        if not isinstance(micro_steps, int) or isinstance(micro_steps, bool) or micro_steps < 1:
            raise BalancerError(f"micro_steps = {micro_steps!r} for task '{name}'; allowed: an integer of 1 or more")
        self.name = name
        self.tasks: tuple[str, ...] = (name,)
        self.micro_steps = micro_steps
        self.loss = torch.zeros((), device=combiner.adapter.compute_device)
        self._combiner, self._agreement = combiner, agreement
        self._forwards_communicate = combiner.adapter.stage == 3
        self._labels: LabelCounts | None = None
        self._done = 0
        self._failure: BaseException | None = None

    @property
    def next_is_last(self) -> bool:
        """Whether the next micro-step is the last."""
        return self._done == self.micro_steps - 1

    def begin(self) -> None:
        """Agree with the other ranks on this task. Collective.

        Raises:
            BalancerError: ranks are in different tasks, or one has failed.
        """
        if self._agreement:
            self._agreement.reach(opening_of_block(self.name, self.micro_steps), self._forwards_communicate)

    def forwards(self) -> contextlib.AbstractContextManager[None]:
        """Return the block in which the user's forwards run."""
        return contextlib.nullcontext()

    def backward(self, loss: Any, count: Any, run: Backward) -> None:
        """Run the backward of the next micro-step.

        Args:
            loss: mean over this rank's labels, scalar.
            count: number of these labels; None: the micro-steps of all ranks count the same.
            run: the engine's backward.

        Raises:
            BalancerError: one micro-step too many, a loss that is not a scalar with a graph, an earlier backward of the
                block failed, or ranks do not run the same backward.
        """
        self.check_next()
        check_loss(self.name, loss)
        last = self.next_is_last
        with self.micro_step(self._combiner.communicates(last)):
            weight, part = self._weight(count), loss.reshape(())
            part = part if weight == 1.0 else part * weight
            run(part, self._combiner.reduces(last))
            self.loss += part.detach().float() if count is None or count else 0.0  # without labels it may be nan

    def hand_over(self) -> None:
        """Give the gradient to the combiner, after the last micro-step. Collective."""
        if self._labels is None:
            self._combiner.add(self.name, self.loss)
        elif self._labels.totals[0]:
            self._combiner.add(self.name, self.loss, self._labels.units()[0])  # type: ignore[call-arg]
        else:
            self._combiner.drop()  # no rank has a label

    def _weight(self, count: Any) -> float:
        """Return what the loss of the micro-step is multiplied by. Collective if labels are counted."""
        if self._done and (count is None) != (self._labels is None):
            raise BalancerError(f"task '{self.name}': give count in every micro-step of the block, or in none")
        if count is None:
            return 1 / self.micro_steps
        if self._labels is None:
            require_exact(self._combiner, "count")
            self._labels = LabelCounts(1, self.micro_steps, self._agreement)
        return self._labels.weights([count])[0]

    def check_next(self) -> None:
        """Raise unless another micro-step may follow.

        Raises:
            BalancerError: one micro-step too many, or an earlier backward of this block failed.
        """
        self._refuse_after_failure()
        if self._done == self.micro_steps:
            raise BalancerError(
                f"task '{self.name}' got more than its {self.micro_steps} micro-steps; pass micro_steps=K to "
                "balancer.task() for K backward calls"
            )

    @contextlib.contextmanager
    def micro_step(self, communicates: bool) -> Iterator[None]:
        """Count the backward inside this block, and tell the other ranks if it fails.

        Args:
            communicates: whether the backward is a collective operation, so that ranks agree on it first.

        Raises:
            BalancerError: other ranks do not run the same backward.
        """
        try:
            if self._agreement and communicates:
                place = f"backward {self._done + 1} of {self.micro_steps} of task '{self.name}'"
                self._agreement.reach(place)
            yield
        except BaseException as error:
            self.fail(error, inside=communicates)
            raise
        self._done += 1

    def end(self, order: int = 0) -> None:
        """Raise unless all micro-steps are done, here and on the other ranks. Collective.

        Args:
            order: a number for the order in which parameters got their gradients, where all ranks must have the same:
                DeepSpeed would add gradients of different parameters.

        Raises:
            BalancerError: some are missing, ranks have run the model in different orders, or a rank has failed.
        """
        self._refuse_after_failure()
        if self._done != self.micro_steps:
            raise BalancerError(
                f"task '{self.name}' ended after {self._done} of {self.micro_steps} micro-steps; call "
                "balancer.backward(loss) exactly micro_steps times inside the block"
            )
        if self._agreement:
            model = f", whose layers and heads ran in the order {order:08x}" if order else ""
            self._agreement.reach(f"the end of task '{self.name}'{model}")

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


def check_loss(task: str, loss: Any) -> None:
    """Raise unless a loss is a scalar with a graph.

    Raises:
        BalancerError: names the task and what was given.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        kind = type(loss).__name__
        if isinstance(loss, Tensor):
            kind = f"a tensor of shape {tuple(loss.shape)}{'' if loss.requires_grad else ' without a graph'}"
        raise BalancerError(f"the loss of task '{task}' is {kind}; pass a scalar tensor with requires_grad")


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
