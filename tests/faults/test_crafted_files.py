"""Crafted files of a stranger's are refused in one line that names them, whatever they hold."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "hf"))
from crafted import ENTRIES, FOLDERS, METRICS, SETTINGS, STATES
from fault_runs import newest_complete  # noqa: F401  puts the folder of training_runs on the path
from training_runs import train, write_config

from megarlx.checkpoint import checkpoint_name, read_manifest
from megarlx.checkpoint.folder import LATEST
from megarlx.checkpoint.manifest import NAME, render
from megarlx.config import ConfigError, load_config
from megarlx.data import documents
from megarlx.data.conversations import read_conversations
from megarlx.data.documents import InputError, Piece, Reading
from megarlx.data.prompts import read_prompts
from megarlx.data.tokenizer import TokenizerError
from megarlx.hf.errors import ConversionError
from megarlx.run.directory import RunError
from megarlx.run.reference import tokens_of

STEPS = "training.steps=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crafted")
    return write_config(folder, folder / "world")


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(config, run, STEPS) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_no_run_wrote_is_refused(
    run: Path, config: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = STATES[name]
    checkpoint = run / "checkpoints" / checkpoint_name(2)
    manifest = read_manifest(checkpoint)
    state: dict[str, Any] = json.loads(json.dumps(manifest.state))
    change(state)
    (checkpoint / NAME).write_text(render(replace(manifest, state=state)))
    digest = read_manifest(checkpoint).digest
    (checkpoint.parent / LATEST).write_text(f"{checkpoint.name} {digest}\n")
    before = (run / "metrics.jsonl").read_bytes()
    assert train(config, run, STEPS, "training.steps=3") == 1
    error = capsys.readouterr().err
    assert f"{checkpoint}: " in error
    assert said in error
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", METRICS)
def test_metrics_that_no_run_wrote_are_named_by_their_line(
    run: Path, config: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + METRICS[name])
    assert train(config, run, STEPS, "training.steps=3") == 1
    assert f"{path}:2: not a line of metrics" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [-1, "3", [3], {"sft": -1}, {"sft": 1.5}, {"sft": True}])
def test_counts_of_tokens_that_cannot_be_are_refused(tokens: Any) -> None:
    with pytest.raises(RunError, match="counts tokens as"):
        tokens_of({"run": {"tokens": tokens}})


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hf_cases import published, save
    from tokenizers import Tokenizer, models

    folder = save(published("llama"), tmp_path_factory.mktemp("hf") / "hf")
    words = {"<|endoftext|>": 0, "a": 1}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


@pytest.fixture
def folder(published_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published_folder, tmp_path / "hf"))


def refused(folder: Path, said: str) -> None:
    from hf_cases import convert

    with pytest.raises((ConversionError, TokenizerError), match=said):
        convert(folder, folder.parent / "converted")
    assert not (folder.parent / "converted").exists()


def test_the_folder_that_is_attacked_is_good(folder: Path) -> None:
    from hf_cases import convert

    assert convert(folder, folder.parent / "converted") == 0


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_lies_is_refused_before_anything_is_written(folder: Path, name: str) -> None:
    file, change, said = FOLDERS[name]
    (folder / file).write_text(change((folder / file).read_text()))
    refused(folder, said)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_header_that_lies_is_refused_before_anything_is_read(folder: Path, name: str) -> None:
    change, said = ENTRIES[name]
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(folder, said)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_beyond_all_limits_is_refused_in_a_short_line(config: Path, name: str) -> None:
    override, said = SETTINGS[name]
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load_config(config, [override])
    assert all(len(problem) < 1_000 for problem in caught.value.problems)


LINE = b'{"text": "' + b"a" * 5_000 + b'"}\n'


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt"])
def test_a_line_that_would_fill_the_memory_is_named_and_not_read(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 1_000)
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(packed(b"{}\n" + LINE, suffix))
    size = path.stat().st_size
    piece = Piece(str(path), "text" if suffix == ".txt" else "jsonl", 0, size, size)
    said = r"line 2: is longer than 1,000 bytes"
    with pytest.raises(InputError, match=said):
        list(documents.documents(piece, Reading()))
    for read in (read_conversations, read_prompts):
        with pytest.raises(InputError, match="is longer than 1,000 bytes"):
            list(read(path, on_bad_line="skip"))


def packed(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        import gzip

        return gzip.compress(data)
    if suffix.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        return zstandard.ZstdCompressor().compress(data)
    return data


@pytest.mark.parametrize("megabytes", [300, pytest.param(8_000, marks=pytest.mark.slow)])
def test_a_small_file_that_would_become_a_large_one_takes_little_memory(
    tmp_path: Path, megabytes: int
) -> None:
    """262 kB of zstd that hold one line of 8 GB once took the machine's memory."""
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "bomb.jsonl.zst"
    block = b"a" * (1 << 20)
    with path.open("wb") as file, zstandard.ZstdCompressor(3).stream_writer(file) as stream:
        for _ in range(megabytes):
            stream.write(block)
    assert path.stat().st_size < 1_000_000
    program = (
        "import resource, sys\n"
        "from megarlx.data.prompts import read_prompts\n"
        "try:\n    read_prompts(sys.argv[1])\n"
        "except ValueError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)\n"
    )
    words = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    said, megabytes_used = done.stdout.splitlines()
    assert said.endswith("line 1: is longer than 134,217,728 bytes")
    assert int(megabytes_used) < 1_500
