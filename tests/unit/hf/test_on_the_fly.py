"""A Hugging Face folder that stands for a run is converted once, by one process, and whole."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hf_cases import published, save

from megarlx.hf import on_the_fly
from megarlx.hf.errors import ConversionError
from megarlx.hf.on_the_fly import digest_of, run_of_model
from megarlx.run.reference import resolve


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(published("olmo2"), tmp_path / "models" / "tiny model")


def test_it_is_converted_once_and_named_by_what_it_holds(model: Path, tmp_path: Path) -> None:
    first = resolve(str(model), tmp_path / "runs")
    assert first.run.parent == tmp_path / "runs" / "converted"
    assert first.run.name == f"tiny-model-{digest_of(model)[:12]}"
    before = {path: path.stat().st_mtime_ns for path in first.run.rglob("*")}
    assert resolve(f"{model}@latest", tmp_path / "runs") == first
    assert resolve(f"{model}@0", tmp_path / "runs") == first
    assert {path: path.stat().st_mtime_ns for path in first.run.rglob("*")} == before


def test_a_model_without_a_tokenizer_is_said_to_have_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(str(model), tmp_path / "runs")
    assert "has no tokenizer.json: the run has no tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_file_that_has_changed_makes_another_run(model: Path, tmp_path: Path, name: str) -> None:
    before = digest_of(model)
    path = model / name
    if name == "model.safetensors":
        os.utime(path, ns=(0, 0))
    else:
        path.write_text(path.read_text() + "\n")
    assert digest_of(model) != before


def test_what_cannot_be_converted_leaves_no_run(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    for _ in range(2):
        with pytest.raises(ConversionError, match="the files hold 0 tensors"):
            resolve(str(model), tmp_path / "runs")
    assert not [p for p in (tmp_path / "runs/converted").iterdir() if p.name[0] != "."]


def test_several_jobs_make_it_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    convert = on_the_fly._convert

    def slowly(folder: Path, run: Path) -> None:
        made.append(run)
        time.sleep(0.2)
        convert(folder, run)

    monkeypatch.setattr(on_the_fly, "_convert", slowly)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(run_of_model(model, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


def test_other_ranks_wait_for_the_first_and_say_when_it_never_comes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"),
                        ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "29511")):  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(on_the_fly, "LONGEST_WAIT_SECONDS", 0.1)
    with pytest.raises(ConversionError, match=r"was not there after .*; rank 0 makes it"):
        run_of_model(model, tmp_path)
    monkeypatch.setattr(on_the_fly, "LONGEST_WAIT_SECONDS", 60.0)
    found: list[Path] = []
    waiting = threading.Thread(target=lambda: found.append(run_of_model(model, tmp_path)))
    waiting.start()
    (tmp_path / "converted" / f"tiny-model-{digest_of(model)[:12]}").mkdir(parents=True)
    waiting.join(timeout=30)
    assert found
