"""The three conversions, put together from their parts; see convert_command.py."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megarlx.checkpoint.manifest import Manifest, SavedFile
from megarlx.checkpoint.storage import AVERAGE
from megarlx.checkpoint.verify import check_digests
from megarlx.comm.groups import Layout
from megarlx.comm.share import Share
from megarlx.config.model import ModelConfig
from megarlx.config.objectives import TemplateConfig
from megarlx.config.parameters import published_names
from megarlx.data.conversations import ConversationError
from megarlx.data.tokenizer import Tokenizer, load_tokenizer
from megarlx.hf import export
from megarlx.hf.conversion import Conversion, begin, to_do, work
from megarlx.hf.errors import ConversionError
from megarlx.hf.families import published_as
from megarlx.hf.plan import (
    PlannedFile,
    files_by_layout,
    files_by_size,
    hugging_face_files,
    saved_tensors,
)
from megarlx.hf.sources import AveragedSource, CheckpointSource, HuggingFaceFolder, TensorSource
from megarlx.hf.tokenizer_files import (
    chat_of,
    kept_files,
    not_taught,
    tokenizer_of_model,
    tokenizer_of_run,
)
from megarlx.hf.trunk import (
    CONVERTING,
    Trunk,
    copy_description,
    find_checkpoint,
    finish,
    model_of_run,
    parse_tokens,
    run_of,
)
from megarlx.hf.verify import compare
from megarlx.printable import complain

FILES_AT_ONCE = 4  # hashing is the slow part, and runs on another core for each file
DIFFERENT = 3  # exit status of a verification that failed


@dataclass(frozen=True)
class Asked:
    """The command line."""

    kind_from: str
    kind_to: str
    source: str
    target: Path
    iteration: int = 0
    tokens: str = "0"
    layout: str | None = None
    weights: str = "last"
    dtype: str | None = None
    verify: bool = False
    tolerance: float = 1e-4
    eos: str | None = None
    file_bytes: int = 10**9
    files_at_once: int | None = None
    fresh: bool = False
    quiet: bool = False


class Converter:
    """One command on one rank."""

    def __init__(self, asked: Asked, share: Share, ranks_here: int = 1) -> None:
        self.asked, self.share = asked, share
        cores = max(1, (os.cpu_count() or 1) // ranks_here)
        self.files_at_once = asked.files_at_once or min(FILES_AT_ONCE, cores)

    def run(self) -> int:
        if self.asked.kind_from == "hf":
            return self._from_hugging_face()
        checkpoint = find_checkpoint(self.asked.source)
        averaged = self.asked.weights == "average"
        source = AveragedSource(checkpoint) if averaged else CheckpointSource(checkpoint)
        model = model_of_run(run_of(checkpoint))
        source.check_model(model)
        if self.asked.kind_to == "hf":
            return self._to_hugging_face(source, model)
        return self._to_layout(source, model)

    def _from_hugging_face(self) -> int:
        asked = self.asked
        source = HuggingFaceFolder(Path(asked.source))
        wide = [n for n, dtype in source.dtypes.items() if dtype == torch.float64]
        if wide:
            raise ConversionError(f"{asked.source}: {wide[0]} is float64; masters are float32")
        tokens = parse_tokens(asked.tokens)
        trunk = Trunk(asked.target, asked.iteration, tokens)
        tokenizer = _tokenizer_beside(source, asked.eos)
        dtypes = dict.fromkeys(source.shapes, torch.float32)
        job = Conversion(
            source,
            self._files(source.config, source.shapes, dtypes),
            trunk.folder,
            {"source": asked.source, "bytes": _bytes_of(source), "tokens": tokens},
        )

        def check() -> bool:
            return trunk.check(source.folder, source.config, tokenizer, asked.fresh)

        saved = self._work(job, check)
        status = 0
        if self.share.is_first and not saved:
            self._say(f"{trunk.checkpoint} is there already")
        elif self.share.is_first:
            origin = export.types_of_origin(source.dtypes)
            state = {
                "steps_done": asked.iteration,
                # No objective has been trained here that an excursion could go on with.
                "optimizer": {"steps": {}},
                "positions": {},
                "objectives": {},
                "run": {
                    "tokens": {"pretraining": tokens, "sft": 0, "rl": 0},
                    "converted": {"source": asked.source, **origin},
                },
            }
            template = self._template_beside(source, tokenizer)
            if tokenizer is not None and asked.eos is None:
                _say_end(source.folder, tokenizer)
            trunk.describe(source.config, tokenizer, source.folder, template)
            tensors = saved_tensors(job.files, source.shapes, saved)
            manifest = Manifest(asked.iteration, tuple(saved), tensors, state)
            path = finish(job, trunk.checkpoints, manifest)
            self._say(f"{path}: {len(tensors)} tensors, {job.bytes / 1e6:,.1f} MB")
            if tokenizer is None and not (trunk.run / "tokenizer.json").exists():
                complain(
                    f"{asked.source} has no tokenizer.json: the run has no tokenizer, and no text "
                    "can be given to it. AutoTokenizer.save_pretrained of transformers writes one"
                )
            if asked.verify:
                written = CheckpointSource(path)
                status = self._compare(source.config, written, dtypes, source.folder)
        return status

    def _to_hugging_face(self, source: CheckpointSource, model: ModelConfig) -> int:
        asked, share = self.asked, self.share
        published, names = published_as(model), published_names(model)
        held = {name: source.dtypes[name] for name in names}
        dtypes = export.export_types(asked.dtype, source.manifest.state, held)
        shapes = {name: source.shapes[name] for name in names}
        job = Conversion(
            source,
            hugging_face_files(names, shapes, dtypes, asked.file_bytes),
            export.working_folder(asked.target),
            {"checkpoint": source.manifest.digest, "weights": asked.weights},
        )
        prefix = AVERAGE if asked.weights == "average" else ""
        used = {c.file for name in names for c in source.manifest.tensors[prefix + name].chunks}
        self._check_digests(source, used)

        def check() -> bool:
            export.check_target(asked.target, asked.fresh)
            return True

        self._work(job, check)
        if not share.is_first:
            return 0
        run = run_of(source.path)
        kept = kept_files(run)
        tokenizer = tokenizer_of_run(run)
        template = export.learned_template(run, source.manifest.state)
        export.write_beside_tensors(job, model, kept, tokenizer, template)
        export.give_name(job, asked.target)
        self._say(f"{asked.target}: {published.architecture}, {job.bytes / 1e6:,.1f} MB")
        if kept is None and tokenizer is None:
            self._say(f"{run} has no tokenizer: none was written")
        return self._compare(model, source, dtypes, asked.target) if asked.verify else 0

    def _to_layout(self, source: CheckpointSource, model: ModelConfig) -> int:
        asked, manifest = self.asked, source.manifest
        run, checkpoints = run_of(source.path), asked.target / "checkpoints"
        job = Conversion(
            source,
            self._files(model, source.shapes, source.dtypes),
            checkpoints / f"{CONVERTING}{source.path.name}",
            {"checkpoint": manifest.digest},
        )

        def check() -> bool:
            if asked.target.resolve() == run:
                raise ConversionError(f"{asked.target} is the run itself; give another folder")
            if (checkpoints / source.path.name).exists() and not asked.fresh:
                raise ConversionError(
                    f"{checkpoints / source.path.name} is there already; --fresh replaces it"
                )
            if (asked.target / "resolved.json").exists() and model_of_run(asked.target) != model:
                raise ConversionError(f"{asked.target} is a run of another model")
            return True

        self._check_digests(source, set(range(len(manifest.files))))
        saved = self._work(job, check)
        if self.share.is_first:
            copy_description(run, asked.target)
            tensors = saved_tensors(job.files, source.shapes, saved)
            made = Manifest(manifest.iteration, tuple(saved), tensors, manifest.state)
            path = finish(job, checkpoints, made)
            self._say(f"{path}: {len(saved)} files, {job.bytes / 1e6:,.1f} MB")
        return 0

    def _files(
        self,
        model: ModelConfig,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, torch.dtype],
    ) -> list[PlannedFile]:
        if self.asked.layout is None:
            return files_by_size(shapes, dtypes, self.asked.file_bytes)
        return files_by_layout(model, parse_layout(self.asked.layout), shapes, dtypes)

    def _work(self, job: Conversion, check: Callable[[], bool]) -> list[SavedFile]:
        """The files made; none where `check` finds that there is nothing to do."""
        if self.share.is_first:
            if check():
                begin(job, self.asked.fresh)
            else:
                shutil.rmtree(job.folder, ignore_errors=True)
        self.share.meet()  # nobody works before rank 0 has looked at what is there
        wanted = job.folder.exists()
        todo = to_do(job, self.share) if wanted else []
        self.share.meet()  # nor ends the job before all have
        if not wanted:
            return []
        return work(job, todo, self.share, self.files_at_once, not self.asked.quiet)

    def _check_digests(self, source: CheckpointSource, used: set[int]) -> None:
        mine = sorted(used)[self.share.rank :: self.share.ranks]
        check_digests(source.path, [source.manifest.files[i] for i in mine])

    def _compare(
        self,
        model: ModelConfig,
        source: TensorSource,
        dtypes: dict[str, torch.dtype],
        folder: Path,
    ) -> int:
        found = compare(model, source, dtypes, folder)
        good = found.relative <= self.asked.tolerance
        print(f"verify: {found}; tolerance {self.asked.tolerance:g}: {'good' if good else 'BAD'}")
        return 0 if good else DIFFERENT

    def _template_beside(
        self, source: HuggingFaceFolder, tokenizer: Tokenizer | None
    ) -> TemplateConfig | None:
        try:
            found = chat_of(source.folder, tokenizer)
        except ConversationError as error:
            complain(f"{source.folder}: the run gets no [template]: {error}")
            return None
        if found is not None and tokenizer is not None and (why := not_taught(found, tokenizer)):
            complain(f"{source.folder}: it can be asked, and not be taught, in its {why}")
        return found

    def _say(self, text: str) -> None:
        if not self.asked.quiet:
            print(text)


def parse_layout(text: str) -> Layout:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(re.fullmatch(r"[1-9]\d*", size) for size in sizes):
        raise ConversionError(f"layout is {text!r}; expected tp,pp,dp such as 2,1,4")
    tp, pp, dp = map(int, sizes)
    return Layout(pp=pp, dp=dp, tp=tp)


def _tokenizer_beside(source: HuggingFaceFolder, eos: str | None) -> Tokenizer | None:
    path = source.folder / "tokenizer.json"
    if eos is None or not path.is_file():
        return tokenizer_of_model(source.folder)
    return load_tokenizer(path, eos)


def _say_end(folder: Path, tokenizer: Tokenizer) -> None:
    usual = load_tokenizer(folder)
    if usual.eos_text != tokenizer.eos_text:
        complain(
            f"{folder}: answers of its chat template end in {tokenizer.eos_text!r}, not in "
            f"{usual.eos_text!r}; so do texts of this run"
        )


def _bytes_of(source: HuggingFaceFolder) -> dict[str, Any]:
    """So that other files under the same names are noticed at a restart."""
    found = {p.name: p.stat() for p in sorted(source.folder.glob("*.safetensors"))}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
