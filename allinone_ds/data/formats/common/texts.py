"""Many texts in two arrays, such as the names of a million files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_CODEC = "utf-8", "surrogatepass"  # the second keeps bytes that are no UTF-8, which Python stores as surrogates


class Texts(Sequence[str]):
    """Texts of which a process holds two arrays, and workers that were forked from it nothing.

    A list of a million texts is a million objects. Each use of an object changes its count of references, and so copies
    the page of memory that holds it into the process that uses it. Arrays are only read.

    Args:
        texts: the texts, in their order.

    Example:
        >>> names = Texts(["a/1.jpg", "a/2.jpg"])
        >>> len(names), names[-1], list(names)
        (2, 'a/2.jpg', ['a/1.jpg', 'a/2.jpg'])
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode(*_CODEC) for text in texts]
        self._content = b"".join(encoded)
        self._ends = np.zeros(len(encoded) + 1, dtype=np.int64)  # text i lies between numbers i and i + 1
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=self._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return a text, or a list of those of a slice."""
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return self._content[self._ends[places] : self._ends[places + 1]].decode(*_CODEC)

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends.tolist()):
            yield self._content[start:end].decode(*_CODEC)
