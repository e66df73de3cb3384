"""Errors of the balancer's use."""


class BalancerError(RuntimeError):
    """The balancer was used wrongly; no weight, optimizer state or schedule was changed."""


class NonFinite(RuntimeError):
    """Tasks whose loss or gradient was not finite, in a step that is not to be taken; nothing was changed.

    Args:
        tasks: their names.
    """

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__(f"task(s) {', '.join(tasks)}: loss or gradient is not finite; no weight was changed")
        self.tasks = tasks
