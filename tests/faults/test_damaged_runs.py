"""A disk that is full, a byte that flipped, a `latest` that lies: a run says so and stays good."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from fault_runs import check_same, newest_complete, settings
from training_runs import train, write_config

from megarlx.checkpoint import verify

STEPS = 8
FILES = ("manifest.json", "model-00000.safetensors", "optimizer-00000.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    return write_config(folder, folder / "world")


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert train(config, out, *settings(STEPS)) == 0
    return out


def half(config: Path, out: Path) -> Path:
    """A run of four steps, whose checkpoints of steps 2 and 4 are there."""
    assert train(config, out, *settings(STEPS), "training.steps=4") == 0
    return out / "checkpoints" / "iter_00000004"


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("room", [0, 1000])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_good(
    tmp_path: Path,
    config: Path,
    undisturbed: Path,
    background: str,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the third save on, tensor files get `room` bytes and then an error, as they would."""
    write = os.write

    def full(file: int, data: Any) -> int:
        path = os.readlink(f"/proc/self/fd/{file}")
        if "iter_00000006" not in path or not path.endswith(".safetensors"):
            return write(file, data)
        left = room - os.fstat(file).st_size
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:left])

    monkeypatch.setattr("megarlx.checkpoint.files.os.write", full)
    overrides = (*settings(STEPS), f"checkpoints.in_background={background}")
    assert train(config, tmp_path, *overrides) == 1
    error = capsys.readouterr().err
    good = tmp_path / "checkpoints" / "iter_00000004"
    assert f"saving iteration 6 (the last good checkpoint is {good})" in error
    assert "No space left on device" in error
    monkeypatch.undo()
    assert newest_complete(tmp_path) == good
    assert train(config, tmp_path, *overrides) == 0  # there is room again
    assert f"going on from {good}" in capsys.readouterr().out
    check_same(tmp_path, undisturbed, STEPS)


@pytest.mark.parametrize("file", FILES[1:])
def test_a_flipped_byte_is_named_and_the_run_does_not_start(
    tmp_path: Path, config: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = half(config, tmp_path) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config, tmp_path, *settings(STEPS)) == 1
    assert f"{path} is damaged: its SHA-256 is" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["nowhere", "gone", "pickle", "manifest"])
def test_a_run_whose_latest_misleads_goes_on_from_the_newest_complete_checkpoint(
    tmp_path: Path,
    config: Path,
    undisturbed: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newest = half(config, tmp_path)
    pointer = newest.parent / "latest"
    if damage == "nowhere":
        pointer.write_text(f"iter_00000099 {'0' * 64}\n")
    elif damage == "gone":
        pointer.unlink()
    elif damage == "pickle":
        pointer.write_bytes(pickle.dumps({"latest": 4}))
    else:
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"iteration": 4', '"iteration": 5'))
        newest = newest.with_name("iter_00000002")
    with pytest.warns(UserWarning, match=f"Going on from {newest}"):
        assert train(config, tmp_path, *settings(STEPS)) == 0
    assert f"going on from {newest}, step {newest.name[-1]}" in capsys.readouterr().out
    verify(tmp_path / "checkpoints" / "iter_00000008")
    check_same(tmp_path, undisturbed, STEPS)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", [*FILES, "../../resolved.json"])
def test_a_pickle_in_the_place_of_any_file_of_a_run_is_named_and_never_run(
    tmp_path: Path, config: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, marker = half(config, tmp_path / "run"), tmp_path / "marker"
    (newest.parent / "iter_00000002").rename(tmp_path / "iter_00000002")  # no way around it
    (newest / place).write_bytes(pickle.dumps(Malicious(marker)))
    assert train(config, tmp_path / "run", *settings(STEPS)) == 1
    assert Path(place).name in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", "documents_problems.bin: is truncated"),
        ("changed", "problems lies in {world}/documents_problems.bin"),
        ("foreign", "documents_problems.bin: token"),
    ],
)
def test_damaged_data_is_named_and_never_trained_on(
    tmp_path: Path, damage: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`foreign`: ids that the vocabulary does not have, in a run that is new."""
    config, out = write_config(tmp_path, tmp_path / "world"), tmp_path / "run"
    half(config, out)
    tokens = tmp_path / "world" / "documents_problems.bin"
    data = tokens.read_bytes()
    changed = {
        "cut": data[:-2],
        "changed": data[2:4] + data[:2] + data[4:],
        "foreign": b"\xff" * len(data),
    }
    tokens.write_bytes(changed[damage])
    out = out if damage != "foreign" else tmp_path / "new"
    assert train(config, out, *settings(STEPS)) == 1
    assert said.format(world=tmp_path / "world") in capsys.readouterr().err
    assert not (out / "checkpoints" / "iter_00000006").exists()
