"""A run made of the weights of others: θ = base + Σ wᵢ (plusᵢ − minusᵢ), and never trained.

The sum is in fp64, in the order of its terms, and is rounded once. A slice is in memory at a time,
whatever layouts the parts were saved in; ranks that see one folder share the files.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megarlx.checkpoint import WEIGHTS_ONLY, complete, read_manifest
from megarlx.checkpoint.manifest import Manifest
from megarlx.checkpoint.verify import check_digests
from megarlx.comm.share import Share, share_of_this_process
from megarlx.config.objectives import PRETRAINING
from megarlx.config.trust import check_trust, names_in
from megarlx.hf.command import parse_layout
from megarlx.hf.conversion import Conversion, begin, to_do, work
from megarlx.hf.plan import PlannedFile, files_by_layout, files_by_size, saved_tensors
from megarlx.hf.sources import CheckpointSource
from megarlx.hf.trunk import CONVERTING, finish, model_of_run
from megarlx.run.branch import composition_of, keep_parent, parent_of, read_config
from megarlx.run.directory import Parent, RunDirectory, RunError, versions
from megarlx.run.reference import RunReference
from megarlx.run.tokenizer import load_tokenizer_of
from megarlx.run.vectors import vector_of

COPIED = ("config.toml", "resolved.json", "tokenizer.json")  # from the run that it stands beside
FILE_BYTES = 10**9
FILES_AT_ONCE = 2


@dataclass(frozen=True)
class Term:
    """`weight` times a checkpoint's weights, or times their difference from another's."""

    weight: float
    plus: RunReference
    minus: RunReference | None = None
    change: str | None = None  # a control in place of it, as vectors.py has them


@dataclass(frozen=True)
class WeightSum:
    """What is made: of `beside` it has the iteration, the pre-training and all that is no weight.

    base     what the terms are added to; None: nothing
    recipe   what such a run is called in its lineage
    """

    recipe: str
    beside: RunReference
    base: RunReference | None
    terms: tuple[Term, ...]

    @property
    def references(self) -> list[RunReference]:
        """Every checkpoint that has a part in it, once."""
        found = [self.beside, *([] if self.base is None else [self.base])]
        for term in self.terms:
            found += [term.plus, *([] if term.minus is None else [term.minus])]
        return list(dict.fromkeys(found))

    def scaled(self, weights: Sequence[float]) -> WeightSum:
        terms = (replace(t, weight=w) for t, w in zip(self.terms, weights, strict=True))
        return replace(self, terms=tuple(terms))

    def check(self, trusted: Collection[str] = ()) -> None:
        """Refuses parts of another model, shape or tokenizer by their first difference."""
        run = self.beside.run
        for other in dict.fromkeys(one.run for one in self.references):
            if other.resolve() != run.resolve():
                _check_same_model(run, other)
                _check_same_tokenizer(run, other, trusted)
        model = model_of_run(run)
        for one in self.references:
            CheckpointSource(one.checkpoint).check_model(model)

    def tokens(self) -> dict[str, int]:
        """Of pre-training those of `beside`; of other objectives also what the terms were trained
        on: such a model has learned to answer."""
        found = dict(parent_of(self.beside).tokens)
        for term in self.terms:
            before = {} if term.minus is None else parent_of(term.minus).tokens
            for name, count in parent_of(term.plus).tokens.items():
                if name == PRETRAINING:
                    continue
                have, new = found.get(name, 0), max(0, count - before.get(name, 0))
                found[name] = max(have, new) if term.minus is None else have + new
        return found

    def description(self) -> dict[str, Any]:
        """For lineage.json: every part with its digest."""
        return {
            "base": None if self.base is None else _part(self.base),
            "terms": [
                {
                    "weight": term.weight,
                    "plus": _part(term.plus),
                    "minus": None if term.minus is None else _part(term.minus),
                    "change": term.change,
                }
                for term in self.terms
            ],
        }


def _part(reference: RunReference) -> dict[str, Any]:
    lineage = RunDirectory(reference.run).lineage
    return {
        "run": str(reference.run.resolve()),
        "iteration": reference.iteration,
        "digest": read_manifest(reference.checkpoint).digest,
        "recipe": lineage.get("recipe"),
    }


def _check_same_model(run: Path, other: Path) -> None:
    ours, theirs = (model_of_run(one).model_dump(mode="json") for one in (run, other))
    for key in ours:
        if ours[key] != theirs[key]:
            raise RunError(
                f"{other}: model.{key} is {json.dumps(theirs[key])}; that of {run} is "
                f"{json.dumps(ours[key])}: only weights of one model can be added"
            )


def _check_same_tokenizer(run: Path, other: Path, trusted: Collection[str]) -> None:
    ours, theirs = (_fingerprint(one, trusted) for one in (run, other))
    if ours != theirs:
        raise RunError(
            f"{other}: its tokenizer has the fingerprint {theirs}; that of {run} has {ours}: only "
            "weights for the same tokens can be added"
        )


def _fingerprint(run: Path, trusted: Collection[str]) -> str | None:
    config, directory = read_config(run), RunDirectory(run)
    if not directory.tokenizer.exists():  # its maker, which may be anybody's, says where it is
        check_trust(names_in(config, {"data"}), str(run), trusted)
    tokenizer = load_tokenizer_of(config, directory)
    return None if tokenizer is None else tokenizer.fingerprint


def add(base: Tensor | None, terms: Iterable[tuple[float, Callable[[], Tensor]]]) -> Tensor:
    """base + Σ weight · vector, in fp64. A weight of 0 leaves every bit of the base."""
    total = None if base is None else base.double()
    for weight, vector in terms:
        if weight == 0 and total is not None:
            continue
        part = weight * vector()
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a sum without a base needs at least one term")
    return total


class SummedSource:
    """The sum as tensors to read, a block at a time; rounded where it is written."""

    def __init__(self, made: WeightSum) -> None:
        opened = {one: CheckpointSource(one.checkpoint) for one in made.references}
        like = opened[made.beside]
        names = [name for name in like.shapes if not name.startswith(WEIGHTS_ONLY)]
        self.shapes = {name: like.shapes[name] for name in names}
        self.dtypes = {name: like.dtypes[name] for name in names}
        self._base = None if made.base is None else opened[made.base]
        self._terms = []
        for term in made.terms:
            minus = None if term.minus is None else opened[term.minus]
            vector = vector_of(opened[term.plus], minus, self.shapes, term.change)
            self._terms.append((term.weight, vector))

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        base = None if self._base is None else self._base.read(name, start, size)
        block = (name, start, size)
        return add(base, ((weight, partial(one.read, *block)) for weight, one in self._terms))


def write_sum(made: WeightSum, out: Path, layout: str | None = None) -> bool:
    """Writes the run; False where it is there already. Called by all processes of a launch."""
    share, _, end = share_of_this_process()
    written = write_shared(made, out, share, layout)
    end()
    return written


def write_shared(
    made: WeightSum,
    out: Path,
    share: Share,
    layout: str | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> bool:
    """The same inside of a launch, by all its ranks.

    layout   tp,pp,dp: the files that a run in this layout would write
    chosen   how its weights were chosen, for lineage.json
    """
    directory, source = RunDirectory(out), SummedSource(made)
    job = Conversion(
        source,
        _files(made, source, layout),
        directory.checkpoints / f"{CONVERTING}{made.beside.checkpoint.name}",
        {"sum": made.description()},
    )
    if share.is_first and _begin(made, directory, job, chosen):
        begin(job, fresh=False)
    share.meet()  # nobody works before the first has looked at what is there
    wanted = job.folder.exists()
    todo = to_do(job, share) if wanted else []
    share.meet()
    if not wanted:
        return False
    saved = work(job, todo, share, FILES_AT_ONCE, show=False)
    if share.is_first:
        tensors = saved_tensors(job.files, source.shapes, saved)
        state = _state(made)
        manifest = Manifest(made.beside.iteration, tuple(saved), tensors, state)
        finish(job, directory.checkpoints, manifest)
    share.meet()
    return True


def _files(made: WeightSum, source: SummedSource, layout: str | None) -> list[PlannedFile]:
    if layout is None:
        return files_by_size(source.shapes, source.dtypes, FILE_BYTES)
    model = model_of_run(made.beside.run)
    return files_by_layout(model, parse_layout(layout), source.shapes, source.dtypes)


def _begin(
    made: WeightSum, out: RunDirectory, job: Conversion, chosen: Mapping[str, Any] | None
) -> bool:
    """Whether there is anything to do, after the folder has become this run's and no other's."""
    parent, lineage = parent_of(made.beside), out.lineage
    if lineage and (lineage.get("recipe"), lineage.get("sum")) != (made.recipe, made.description()):
        raise RunError(f"{out.path} holds another run; choose another --out")
    if not lineage and out.has_checkpoints:
        raise RunError(f"{out.path} holds checkpoints; choose another --out")
    for one in made.references:
        # Its run may prune, but not what the sum is of.
        keep_parent(parent_of(one), out.path, one.checkpoint.parent)
        _check_digests(one)
    if out.has_checkpoints:
        complete(out.checkpoints / made.beside.checkpoint.name)
        return False
    out.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (made.beside.run / name).is_file():
            shutil.copyfile(made.beside.run / name, out.path / name)
    out.write_json("lineage.json", _lineage(made, parent, chosen))
    return True


def _check_digests(one: RunReference) -> None:
    """Of the files with weights; the others are not read."""
    manifest = read_manifest(one.checkpoint)
    weights = [t for name, t in manifest.tensors.items() if not name.startswith(WEIGHTS_ONLY)]
    used = {chunk.file for tensor in weights for chunk in tensor.chunks}
    check_digests(one.checkpoint, [manifest.files[number] for number in sorted(used)])


def _lineage(made: WeightSum, parent: Parent, chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "parent": asdict(parent),
        "recipe": made.recipe,
        "seed": RunDirectory(made.beside.run).lineage.get("seed", 0),
        "trunk_tokens": parent.trunk_tokens,
        "composition": composition_of(parent),
        "restored": ["weights"],
        "reset": [],
        "sum": made.description(),
        **({} if chosen is None else {"chosen": dict(chosen)}),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }


def _state(made: WeightSum) -> dict[str, Any]:
    """Of the manifest: as of a converted checkpoint, nothing that training could go on with."""
    return {
        "steps_done": made.beside.iteration,
        "optimizer": {"steps": {}},
        "positions": {},
        "objectives": {},
        "run": {"tokens": made.tokens(), "sum": made.recipe},
    }
