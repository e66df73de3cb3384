"""Random numbers that depend on what they are for alone, the same in every process and release."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def digest(*parts: int | str) -> bytes:
    """Return 32 bytes that depend on the parts alone (`hash` differs between processes)."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()


def random_state(*parts: int | str) -> np.random.RandomState:
    """Return a generator that depends on the parts alone.

    numpy guarantees the numbers of RandomState, so a run can be resumed with a different release of numpy.
    """
    return np.random.RandomState(np.frombuffer(digest(*parts), dtype="<u4"))
