"""Documents in memory, as a source reads them from a token file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class HeldTokens:
    def __init__(self, name: str, documents: Sequence[Sequence[int]]) -> None:
        """`name` says where they come from, in errors."""
        self.prefix = name
        lengths = [len(document) for document in documents]
        self._lengths = np.array(lengths, np.int32)
        self.raw = np.array([i for document in documents for i in document], np.int32)
        self.tokens = len(self.raw)

    def document_lengths(self) -> npt.NDArray[np.int32]:
        return self._lengths

    def document_bounds(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *self._lengths], dtype=np.int64)

    def ids_are_valid(self, tokens: npt.NDArray[np.integer[Any]]) -> bool:
        """They were made by the run's own tokenizer, whose ids its model has."""
        return True

    def check_ids(self, tokens: npt.NDArray[np.integer[Any]], begin: int) -> None: ...

    def fingerprint(self) -> dict[str, int | str]:
        held = hashlib.sha256(self._lengths.tobytes() + self.raw.tobytes())
        return {"documents": len(self._lengths), "sha256": held.hexdigest()}
