"""The work: memory that does not grow, a kill at any moment, several ranks, the same bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from big_models import TOOL, command, environment, files_of, run, write_folder
from safetensors.torch import load_file

from megarlx.comm.share import Share
from megarlx.hf.command import Asked, Converter

MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=Path(sys.executable).parent)
MANY_FILES = ("--file-megabytes", "2", "--files-at-once", "1", "--quiet")

PEAK = """
import importlib.util, sys
sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("tool", sys.argv[0])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
status = tool.main()
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
sys.exit(status)
"""


def peak_megabytes(words: list[str]) -> float:
    done = run([sys.executable, "-c", PEAK, *words[1:]])
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak from")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Both ways, for a model eight times as large, whose largest tensor alone is 80 MB."""
    peaks = {}
    options = ("--files-at-once", "1", "--quiet")
    for megabytes in (20, 160):
        there = write_folder(tmp_path / f"hf{megabytes}", megabytes)
        to, back = tmp_path / f"run{megabytes}", tmp_path / f"back{megabytes}"
        peaks[megabytes] = [
            peak_megabytes(command(there, to, "hf>megarlx", *options)),
            peak_megabytes(command(to, back, "megarlx>hf", *options)),
        ]
    for small, large in zip(*peaks.values(), strict=True):
        assert large - small < 32


def convert(source: Path, target: Path, way: str = "hf>megarlx", **options: Any) -> int:
    """In this process, with the options of `command`."""
    kind_from, kind_to = way.split(">")
    settings = {"file_bytes": 2_000_000, "files_at_once": 1, "quiet": True, **options}
    return Converter(Asked(kind_from, kind_to, str(source), target, **settings), Share()).run()


def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    there = write_folder(tmp_path / "hf", 60)
    assert convert(there, tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    words = command(there, killed, "hf>megarlx", *MANY_FILES)
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
    done = killed / "checkpoints" / ".converting-iter_00000000" / "done"
    deadline = time.monotonic() + 60
    while len(list(done.glob("*.json"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "checkpoints" / "latest").exists()
    files = done.parent / "files"
    finished = {path.stem for path in done.glob("*.json")}
    before = {name: (files / name).stat().st_mtime_ns for name in finished}
    assert convert(there, killed) == 0
    assert not done.parent.exists()
    made = killed / "checkpoints" / "iter_00000000"
    assert {name: (made / name).stat().st_mtime_ns for name in finished} == before
    assert files_of(killed) == files_of(tmp_path / "whole")


def test_what_another_conversion_left_is_not_mixed_in(tmp_path: Path) -> None:
    there = write_folder(tmp_path / "hf", 4)
    left = tmp_path / "run" / "checkpoints" / ".converting-iter_00000000"
    left.mkdir(parents=True)
    (left / "plan.json").write_text('{"source": "elsewhere"}')
    with pytest.raises(ValueError, match="of another conversion, with another bytes, plan, source"):
        convert(there, tmp_path / "run")
    assert convert(there, tmp_path / "run", fresh=True) == 0


def test_a_file_that_was_damaged_after_it_was_made_is_made_anew(tmp_path: Path) -> None:
    there = write_folder(tmp_path / "hf", 8)
    asked = Asked("hf", "megarlx", str(there), tmp_path / "run", file_bytes=2_000_000, quiet=True)
    with pytest.raises(KeyboardInterrupt):  # rank 0 of two is stopped once it has prepared
        Converter(asked, Share(0, 2, _interrupt)).run()
    assert Converter(asked, Share(1, 2)).run() == 0
    files = tmp_path / "run" / "checkpoints" / ".converting-iter_00000000" / "files"
    some = sorted(files.iterdir())[0]
    some.write_bytes(some.read_bytes()[:-3])
    with pytest.raises(ValueError, match="Run again to make it anew"):
        Converter(asked, Share()).run()
    assert Converter(asked, Share()).run() == 0
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(
    MPIRUN is None or importlib.util.find_spec("mpi4py") is None,
    reason="no mpirun or no mpi4py here",
)
def test_two_ranks_of_mpirun_write_the_bytes_of_one(tmp_path: Path) -> None:
    there = write_folder(tmp_path / "hf", 12)
    launcher = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    for source, target, way in (("hf", "run", "hf>megarlx"), ("run", "back", "megarlx>hf")):
        origin = there if source == "hf" else tmp_path / "one" / source
        assert convert(origin, tmp_path / "one" / target, way) == 0
        done = run([*launcher, *command(origin, tmp_path / "two" / target, way, *MANY_FILES)])
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "one" / "run") == files_of(tmp_path / "two" / "run")
    one, two = files_of(tmp_path / "one" / "back"), files_of(tmp_path / "two" / "back")
    assert len(one) > 3
    assert one == two
    # And a rank that cannot go on ends the job with its reason.
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"short")
    failed = run([*launcher, *command(there, tmp_path / "three", "hf>megarlx", *MANY_FILES)])
    assert failed.returncode != 0
    assert "model.safetensors is truncated or no safetensors file" in failed.stderr


def test_the_parts_of_a_tensor_make_up_the_tensor(tmp_path: Path) -> None:
    """Larger than a part, in several files, and back in one."""
    there = write_folder(tmp_path / "hf", 30)
    for source, target, way in (("hf", "run", "hf>megarlx"), ("run", "back", "megarlx>hf")):
        assert convert(tmp_path / source, tmp_path / target, way, file_bytes=3_000_000) == 0
    held = load_file(there / "model.safetensors")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(held)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
    back = {}
    for name in set(index["weight_map"].values()):
        back |= load_file(tmp_path / "back" / name)
    assert all(back[name].equal(tensor) for name, tensor in held.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "hf", "--to", "hf", "a", "b"], "there is nothing to convert"),
        (["--from", "hf", "--to", "megarlx", "a"], "give either DST or --into RUN"),
        (["--from", "hf", "--to", "megarlx", "a", "--into", "b"], "--into needs --iteration"),
        (["--from", "megarlx", "--to", "hf", "a", "--into", "b"], "--into is for"),
        (["--from", "megarlx", "--to", "megarlx", "a", "b", "--verify"], "neither side is one"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(words) == 2
    assert said in capsys.readouterr().err
