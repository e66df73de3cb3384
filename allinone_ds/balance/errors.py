"""Errors of the balancer's use."""


class BalancerError(RuntimeError):
    """The balancer was used wrongly; no weight, optimizer state or schedule was changed."""
