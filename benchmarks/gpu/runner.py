"""Runs pieces: forked from a warm parent, each with a limit, a log and a place in one archive.

The parent has imported torch and megarlx, which takes seconds, and never touches CUDA: a process
forked after that could not use the card. After every piece the archive, the table and the results
are replaced whole, so that whatever ends the parent takes at most the piece that is running.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timing import number

from gpu.pieces import (
    NOTE,
    ROW,
    Absent,
    Context,
    Failed,
    Piece,
    Result,
    end_tree,
    show,
    write_json,
)

LOG_BYTES = 4 << 20  # the end of a longer log is archived
LAST_LINE = 150  # characters kept for what is said at the end
TAIL = 600  # characters of the log of a piece that failed, on the screen


@dataclass(frozen=True)
class Turn:
    """Pieces that run side by side."""

    pieces: tuple[Piece, ...]
    limit: float

    @property
    def seconds(self) -> float:
        return max(piece.seconds for piece in self.pieces)


def turns(words: Sequence[str], known: Mapping[str, Piece]) -> list[Turn]:
    """Of "name", "name:seconds" and "name+name+name:seconds"."""
    found = []
    for word in words:
        names, _, limit = word.partition(":")
        unknown = [name for name in names.split("+") if name not in known]
        if unknown:
            raise ValueError(f"{word}: there is no piece {unknown[0]}; allowed: {', '.join(known)}")
        pieces = tuple(known[name] for name in names.split("+"))
        if limit and not limit.replace(".", "", 1).isdecimal():
            raise ValueError(f"{word}: the limit is '{limit}'; allowed: seconds")
        found.append(Turn(pieces, float(limit or max(piece.limit for piece in pieces))))
    twice = [p.name for turn in found for p in turn.pieces]
    if again := sorted({name for name in twice if twice.count(name) > 1}):
        raise ValueError(f"{', '.join(again)}: named more than once")
    return found


class Screen:
    """Prints at most so many characters: where a program's output is cut, its begin is lost."""

    def __init__(self, characters: int = 11_500) -> None:
        self.left = characters

    def tell(self, header: str, body: str = "", pieces_to_come: int = 0) -> None:
        """What one piece leaves of its share is there for the pieces to come."""
        share = max(self.left - LAST_LINE, 0) // (pieces_to_come + 1)
        header = header[: max(share, LAST_LINE)]
        text = f"{header}\n{body[: max(share - len(header) - 2, 0)]}".rstrip()[: self.left]
        if text:
            print(text, flush=True)
        self.left -= len(text) + 1


@contextmanager
def stops_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come inside act behind it."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(signal.Signals(one))


@dataclass
class _Running:
    piece: Piece
    log: Path
    begun: float


@dataclass
class Runner:
    device: torch.device
    small: bool
    out: Path  # results.json, results.md, logs.tar.gz
    work: Path  # logs, and what pieces write
    about: Result  # the machine
    screen: Screen = field(default_factory=Screen)
    # For the test of this file: pieces that are made to "fail" or to "hang".
    injected: Mapping[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)

    def run(self, wanted: Sequence[Turn], budget_seconds: float) -> bool:
        """False where a piece failed or was ended. Pieces that are done are not run again."""
        begun = time.monotonic()
        for turn in wanted:
            for piece in turn.pieces:
                self.results.setdefault(piece.name, {"name": piece.name, "status": "not run"})
        to_come = sum(len(turn.pieces) for turn in wanted)
        for turn in wanted:
            to_come -= len(turn.pieces)
            todo = [p for p in turn.pieces if self.results[p.name]["status"] != "done"]
            left = budget_seconds - (time.monotonic() - begun)
            if todo and left < turn.seconds:
                reason = f"{max(left, 0):.0f} s left, {turn.seconds:.0f} s expected"
                for piece in todo:
                    self.results[piece.name] |= {"status": "not run", "reason": reason}
                    self.screen.tell(f"== {piece.name}: not run, {reason}", "", to_come)
            elif todo:
                self._side_by_side(todo, min(turn.limit, left), to_come, begun)
            self.save()
        names = [piece.name for turn in wanted for piece in turn.pieces]
        return all(self.results[n]["status"] not in ("failed", "timed out") for n in names)

    def _side_by_side(
        self, pieces: Sequence[Piece], limit: float, to_come: int, since: float
    ) -> None:
        running: dict[int, _Running] = {}
        try:
            for piece in pieces:
                with stops_wait():  # else one that comes as a piece is forked leaves it to itself
                    running |= self._start(piece, limit)
            while running:
                for process, one in list(running.items()):
                    ended, status = os.waitpid(process, os.WNOHANG)
                    seconds = time.monotonic() - one.begun
                    if not ended:
                        if seconds < limit:
                            continue
                        end_tree(process)
                        os.waitpid(process, 0)
                    del running[process]
                    result = self._result_of(one, status if ended else None, limit)
                    result["seconds"] = round(seconds, 1)
                    self.results[one.piece.name] = result
                    self._tell(one, result, to_come + len(running), time.monotonic() - since)
                    self.save()
                time.sleep(0.02)
        finally:  # interrupted
            for process in running:
                end_tree(process)
                os.waitpid(process, 0)

    def _start(self, piece: Piece, limit: float) -> dict[int, _Running]:
        if torch.cuda.is_initialized():
            raise RuntimeError("the parent has touched CUDA: what is forked from it cannot use it")
        log = self.work / "logs" / f"{piece.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._path(piece).unlink(missing_ok=True)
        sys.stdout.flush()
        begun = time.monotonic()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
                code = self._run_here(piece, begun + limit)
            finally:
                os._exit(code)  # nothing of the parent's is to be ended by the child
        return {process: _Running(piece, log, begun)}

    def _path(self, piece: Piece) -> Path:
        return self.work / "pieces" / f"{piece.name}.json"

    def _run_here(self, piece: Piece, deadline: float) -> int:
        """In the child. Its result goes to a file."""
        context = Context(self.device, self.small, self.work, deadline)
        result: Result
        try:
            match self.injected.get(piece.name):
                case "fail":
                    raise RuntimeError("injected")
                case "hang":
                    time.sleep(1e6)
            if piece.needs and self.device.type == "cpu":
                raise Absent(f"not on a CPU: {piece.needs}")
            result = {"status": "done", "result": piece.run(context)}
        except Absent as absent:
            result = {"status": "absent", "reason": str(absent)}
        except Failed as failed:
            result = {"status": "failed", "reason": str(failed), "result": failed.result}
        except Exception as error:  # noqa: BLE001 - written down, and the status says so
            traceback.print_exc()
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
        for row in result.get("result", {}).get("rows", []):
            if self.small:  # a tiny size passes no gate and misses none
                row.pop("needed", None)
                row.pop("met", None)
            show(row)
        write_json(self._path(piece), result)
        sys.stdout.flush()
        return 0 if result["status"] in ("done", "absent") else 1

    def _result_of(self, one: _Running, status: int | None, limit: float) -> Result:
        name = one.piece.name
        if status is None:
            return {"name": name, "status": "timed out", "reason": f"ended after {limit:.0f} s"}
        path = self._path(one.piece)
        if path.exists():
            return {"name": name, **json.loads(path.read_text())}
        code = os.waitstatus_to_exitcode(status)
        return {"name": name, "status": "failed", "reason": f"the process ended with {code}"}

    def _tell(self, one: _Running, result: Result, to_come: int, at: float) -> None:
        log = one.log.read_text(errors="replace") if one.log.exists() else ""
        body = "\n".join(line for line in log.splitlines() if line.startswith((NOTE, ROW)))
        if result["status"] in ("failed", "timed out"):
            body = f"{body[:TAIL]}\n{log[-TAIL:]}"
        reason = f": {result['reason']}" if "reason" in result else ""
        status = f"{result['status']}, {result['seconds']} s, at {at:.0f} s{reason}"
        self.screen.tell(f"== {result['name']}: {status}".replace("\n", " "), body.strip(), to_come)

    def save(self) -> None:
        found = list(self.results.values())
        write_json(self.out / "results.json", {"machine": self.about, "pieces": found})
        (self.out / "results.md").write_text(table(found, self.about))
        archive = self.out / "logs.tar.gz"
        beside = archive.with_name(f".{archive.name}")
        with tarfile.open(beside, "w:gz", compresslevel=3) as tar:
            for path in sorted((self.work / "logs").glob("*.log")):
                content = path.read_bytes()[-LOG_BYTES:]
                entry = tarfile.TarInfo(f"logs/{path.name}")
                entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(content))
            for name in ("results.json", "results.md"):
                tar.add(self.out / name, arcname=name)
        os.replace(beside, archive)


def table(found: Sequence[Result], about: Result) -> str:
    """The pieces as Markdown: rows with their gates, notes, and what did not come to an end."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| piece | status | seconds | reason |", "|---|---|---|---|"]
    lines += [
        f"| {p['name']} | {p['status']} | {p.get('seconds', '')} | {_cell(p.get('reason', ''))} |"
        for p in found
    ]
    rows = [row for p in found for row in (p.get("result") or {}).get("rows", [])]
    if rows:
        lines += ["", "| name | size | ours | baseline | | unit | ratio | needed | |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        gate = "" if "met" not in row else ("met" if row["met"] else "missed")
        cells = [row[k] for k in ("name", "size", "ours", "baseline", "baseline_name", "unit")]
        cells += [row["ratio"], row.get("needed", ""), gate]
        lines.append("| " + " | ".join(number(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: object) -> str:
    return str(text).replace("\n", " ").replace("|", "/")[:300]
