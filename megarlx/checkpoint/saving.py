"""Saving: the pause, the background, and the moment at which a checkpoint counts.

A save is called by all ranks. Each copies its shards to the host (or, blocking, does not) and
writes its files in a thread. No thread talks to another rank: when all are done is found out in
the main threads, in `poll` (one number reduced over the ranks, while a save is under way), `wait`
or the next save. Then a thread of the first rank writes the manifest, gives the folder its name,
moves `latest`, and deletes what is old; when it is done is found out in the same way.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from megarlx.checkpoint.errors import CheckpointError, raise_together, together
from megarlx.checkpoint.folder import (
    LATEST,
    SAVING,
    checkpoint_name,
    commit,
    iterations,
    leftovers,
    point_latest_at,
    recover,
)
from megarlx.checkpoint.manifest import read_manifest
from megarlx.checkpoint.planner import SavePlanner, plan_save
from megarlx.checkpoint.retention import Retention, referenced
from megarlx.checkpoint.shards import FlatShards
from megarlx.checkpoint.storage import SafetensorsWriter
from megarlx.comm.collectives import all_reduce_, gather_values
from megarlx.comm.groups import Group

POLL_SECONDS = 0.02  # between looks, while the main thread has nothing else to do


@dataclass(frozen=True)
class Pause:
    """What a call to `save` cost the training."""

    seconds: float  # all of the call, but for what is in the next line
    waited_seconds: float  # for the save before it
    bytes: int  # of this rank's shards


@dataclass(frozen=True)
class Saved:
    """A checkpoint that counts: `latest` points at it."""

    path: Path
    iteration: int
    digest: str
    seconds: float  # from the call to `save`
    deleted: tuple[int, ...]  # iterations whose time was over


@dataclass
class _Plans:
    """What stays the same from save to save."""

    shards: FlatShards
    plans: list[SavePlan]
    metadata: Metadata
    live: SavePlanner
    copies: dict[str, Tensor] = field(default_factory=dict)  # on the host, used again and again
    copied: SavePlanner | None = None


@dataclass
class _Job:
    iteration: int
    folder: Path
    writer: SafetensorsWriter
    metadata: Metadata
    started: float
    thread: threading.Thread | None = None
    results: list[WriteResult] = field(default_factory=list)
    problem: str | None = None
    committing: bool = False  # every rank has written
    committed: tuple[str, list[int]] = ("", [])  # digest, deleted iterations; on the first rank


class Saver:
    """Saves into the checkpoints folder of one run; all ranks of `world` have one each."""

    def __init__(self, folder: Path, world: Group, retention: Retention | None = None) -> None:
        self.folder, self.world = folder, world
        self.retention = retention or Retention()
        self.last: Saved | None = None
        self._plans: _Plans | None = None
        self._job: _Job | None = None

    @property
    def under_way(self) -> bool:
        return self._job is not None

    def save(
        self, iteration: int, shards: FlatShards, state: dict[str, Any], *, blocking: bool = False
    ) -> Pause:
        """Begins a save, or does all of it; `state` is JSON, the same on every rank.

        Raises what went wrong in the save before it, if nobody has asked yet; that one is then
        lost, and nothing of the new one is begun.
        """
        started = time.perf_counter()
        self.wait()
        begun = time.perf_counter()
        plans = self._planned(shards)
        folder = self._begin(iteration, state)
        writer = SafetensorsWriter(folder, self.world.rank, plans.plans)
        writer.iteration, writer.state = iteration, state
        job = _Job(iteration, folder, writer, plans.metadata, started)
        self._job = job
        self._in_background(job, self._write, plans.live if blocking else self._copy(plans))
        if blocking:
            self.wait()
        now = time.perf_counter()
        return Pause(now - begun, begun - started, shards.bytes)

    def poll(self) -> Saved | None:
        """Takes the save under way further, if every rank is ready for it; cheap to call often.

        All ranks must call it at the same point of their work. The Saved comes once.
        """
        job = self._job
        if job is None:
            return None
        ready = torch.tensor([int(job.thread is None or not job.thread.is_alive())])
        if not all_reduce_(ready, self.world, "min").item():
            return None
        if job.thread is not None:
            job.thread.join()
        if job.committing:
            return self._conclude(job)
        self._begin_commit(job)
        return None

    def wait(self) -> Saved | None:
        """Finishes the save under way, however long it takes; None if there is none."""
        while self._job is not None:
            if self._job.thread is not None:
                self._job.thread.join(POLL_SECONDS)
            # Ranks whose disks are slower keep the others here, within the collectives' limit.
            saved = self.poll()
            if saved is not None:
                return saved
        return None

    def _planned(self, shards: FlatShards) -> _Plans:
        if self._plans is None or self._plans.shards is not shards:
            live, plans, metadata = plan_save(shards.tensors(counted_only=True), self.world)
            self._plans = _Plans(shards, plans, metadata, live)
        return self._plans

    def _begin(self, iteration: int, state: dict[str, Any]) -> Path:
        """A new folder, and every rank's consent."""
        task = f"saving iteration {iteration}"
        name = f"{SAVING}{checkpoint_name(iteration)}-{secrets.token_hex(4)}"
        with together(self.world, task):
            if iteration < 0:
                raise CheckpointError(f"iteration is {iteration}; expected 0 or more")
            text = _as_json(state)
            if self.world.is_first:
                self._make_folder(iteration, name)
        rows = gather_values([name, text], self.world)
        for rank, (_, other) in enumerate(rows):
            if other != rows[0][1]:
                if self.world.is_first:
                    (self.folder / name).rmdir()
                raise CheckpointError(
                    f"{task}: the state differs between rank {self.world.ranks[0]} and rank "
                    f"{self.world.ranks[rank]}: {_first_difference(rows[0][1], other)}"
                )
        return self.folder / rows[0][0]

    def _make_folder(self, iteration: int, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        exists = iteration in iterations(self.folder)
        if exists and (iteration in referenced(self.folder) or self.retention.protected(iteration)):
            raise CheckpointError(
                f"{self.folder / checkpoint_name(iteration)} is there, and other runs started "
                "from it: it cannot be replaced"
            )
        recover(self.folder)
        for leftover in leftovers(self.folder):
            shutil.rmtree(leftover)
        (self.folder / name).mkdir()

    def _copy(self, plans: _Plans) -> SavePlanner:
        """The shards as they are now, in host memory that the next save will use again."""
        if plans.copied is None:
            for prefix, shard in plans.shards.shards.items():
                plans.copies[prefix] = torch.empty(
                    shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda
                )
            plans.copied = SavePlanner(plans.shards.tensors(counted_only=True, shards=plans.copies))
        for prefix, shard in plans.shards.shards.items():
            plans.copies[prefix].copy_(shard.detach(), non_blocking=True)
        if any(shard.is_cuda for shard in plans.shards.shards.values()):
            torch.cuda.current_stream().synchronize()
        return plans.copied

    def _in_background(self, job: _Job, function: Callable[..., None], *arguments: Any) -> None:
        """Whatever happens there is told in the main thread, to all ranks."""

        def run() -> None:
            try:
                function(job, *arguments)
            except (CheckpointError, OSError) as error:
                job.problem = str(error)
            except BaseException as error:  # noqa: BLE001  a thread's error would be nobody's
                job.problem = f"{type(error).__name__}: {error}"

        job.thread = threading.Thread(target=run, name=f"save-{job.iteration}")
        job.thread.start()

    def _write(self, job: _Job, planner: SavePlanner) -> None:
        plan = job.writer.plans[self.world.rank]
        job.results = job.writer.write_data(plan, planner).wait()

    def _begin_commit(self, job: _Job) -> None:
        """Every rank has written, or failed to."""
        mine = [[r.index.fqn, r.size_in_bytes, r.storage_data] for r in job.results]
        everyone = gather_values({"problem": job.problem, "files": mine}, self.world)
        if any(rank["problem"] for rank in everyone):
            self._give_up(job)
        job.committing, job.thread = True, None
        if self.world.is_first:
            self._in_background(job, self._commit, [rank["files"] for rank in everyone])

    def _commit(self, job: _Job, files: list[list[Any]]) -> None:
        results = [
            [WriteResult(MetadataIndex(name), size, digest) for name, size, digest in rank]
            for rank in files
        ]
        job.writer.finish(job.metadata, results)
        digest = read_manifest(job.folder).digest
        path = commit(job.folder, self.folder, job.iteration)
        point_latest_at(path, digest)
        deleted: list[int] = []
        try:
            deleted = self.retention.apply(self.folder)
        except OSError as error:  # the new checkpoint is good all the same
            warnings.warn(f"an old checkpoint could not be deleted: {error}", stacklevel=2)
        job.committed = digest, deleted

    def _conclude(self, job: _Job) -> Saved:
        problem, (digest, deleted) = gather_values([job.problem, job.committed], self.world)[0]
        if problem is not None:
            self._give_up(job)
        self._job = None
        path = self.folder / checkpoint_name(job.iteration)
        seconds = time.perf_counter() - job.started
        self.last = Saved(path, job.iteration, digest, seconds, tuple(deleted))
        return self.last

    def _give_up(self, job: _Job) -> NoReturn:
        self._job = None
        if self.world.is_first:
            shutil.rmtree(job.folder, ignore_errors=True)
        task = f"saving iteration {job.iteration} (the last good checkpoint is {self._last_good()})"
        raise_together(self.world, task, job.problem)
        raise AssertionError("a save without a problem was given up")

    def _last_good(self) -> str:
        if self.last is not None:
            return str(self.last.path)
        return "none of this run" if not (self.folder / LATEST).exists() else "what `latest` names"


def _as_json(state: dict[str, Any]) -> str:
    try:
        text = json.dumps(state, allow_nan=False)
        same = json.loads(text) == state
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state cannot be written as JSON: {error}") from error
    if not same:
        raise CheckpointError(
            "the state would come back changed from JSON: keys must be texts, and tuples lists"
        )
    return text


def _first_difference(one: str, other: str) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    start = max(place - 40, 0)
    return f"…{one[start : place + 40]}… against …{other[start : place + 40]}…"
