"""The earlier place of `tests.tiny_run`."""

from tests.tiny_run import TEST_SAMPLES, launch, tiny_run

__all__ = ["TEST_SAMPLES", "launch", "tiny_run"]
