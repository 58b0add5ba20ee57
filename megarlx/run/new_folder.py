"""A start that fails leaves nothing: neither an empty run in the tree nor a name that is taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Self

from megarlx.printable import complain
from megarlx.run.lock import is_free


class NewFolder:
    """Around a start, on every rank: an error before `keep` takes back what the start has made.

    A folder that was there stays, with all that was written into it.
    """

    def __init__(self, out: Path, *, first: bool) -> None:
        """`first`: only the first rank removes anything."""
        inside_out = (out.absolute(), *out.absolute().parents)
        self._made = list(takewhile(lambda path: not path.exists(), inside_out)) if first else []
        self.undo: list[Callable[[], None]] = []  # what was written elsewhere for the new folder

    def keep(self) -> None:
        """From here on the folder is a run's."""
        self._made, self.undo = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or not self._made:
            return
        out, *above = self._made
        # Another job may have begun in the same folder at the same time.
        if not out.exists() or not is_free(out):
            return
        try:
            for undo in self.undo:
                undo()
            shutil.rmtree(out)
            for folder in takewhile(lambda path: not any(path.iterdir()), above):
                folder.rmdir()
        except OSError as why:
            complain(f"warning: what this start has made in {out} could not be removed: {why}")
