"""Errors of steps whose gradients are not finite."""

from __future__ import annotations

from allinone_ds.errors import NonFinite


def test_the_error_of_a_step_not_taken_names_its_tasks() -> None:
    assert "a, b" in str(NonFinite(("a", "b"))) and NonFinite(("a",)).tasks == ("a",)
