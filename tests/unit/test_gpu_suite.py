"""benchmarks/gpu_suite.py where there is no GPU: its list of pieces, and every piece tiny."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_suite
from gpu.compiled import NotCompiled, compiled, with_compiled
from gpu.counters import kernel_names, parsed
from gpu.order import CALLS, KNOWN, MODULES, everything
from gpu.pieces import Context
from gpu.pieces import environment as gpu_environment
from gpu.runner import turns
from gpu.trace import attention_of, traced

from megarlx.ops.product import is_own

ROOT = Path(__file__).resolve().parents[2]
# Seconds each on a CPU, since they start processes or train: the long form of the test has them.
LONG = ("doctor", "tests-ops", "tests-layouts", "tests-model", "whole_runs", "study", "compile")
ORDER = [piece.name for turn in turns(everything(), KNOWN) for piece in turn.pieces]
SHORT = [name for name in ORDER if name not in LONG]


def tiny(folder: Path, *words: str, time_limit: float = 300) -> tuple[int, str, dict[str, Any]]:
    """(exit status, output, results by piece) of the script, as it is called for a card."""
    script = ROOT / "benchmarks" / "gpu" / "first_minutes.sh"
    done = subprocess.run(
        [str(script), "--device", "cpu", "--out", str(folder), *words],
        capture_output=True,
        text=True,
        timeout=time_limit,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    path = folder / "results.json"
    held = json.loads(path.read_text())["pieces"] if path.exists() else []
    return done.returncode, done.stdout + done.stderr, {piece["name"]: piece for piece in held}


def archived(folder: Path) -> set[str]:
    with tarfile.open(folder / "logs.tar.gz") as tar:
        return set(tar.getnames())


def test_every_piece_is_in_the_list_once_and_a_name_is_a_file_name() -> None:
    assert sorted(ORDER) == sorted(KNOWN)
    assert len(KNOWN) == sum(len(module.PIECES) for module in MODULES)
    assert all(re.fullmatch(r"[\w-]+", name) for name in KNOWN)


@pytest.mark.parametrize("number", list(CALLS))
def test_a_call_has_room_for_its_pieces(number: int) -> None:
    call = CALLS[number]
    start = 13  # wheels and imports
    wanted = turns(call.words, KNOWN)
    assert start + sum(turn.seconds for turn in wanted) <= call.seconds
    assert all(turn.seconds <= turn.limit for turn in wanted)


def test_the_list_names_what_a_cpu_leaves_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--list"])
    assert gpu_suite.main() == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ORDER
    left_out = {line.split()[0] for line in lines if "not on a CPU" in line}
    assert left_out == {name for name, piece in KNOWN.items() if piece.needs}
    needs = {piece.needs for piece in KNOWN.values() if piece.needs}
    allowed = {
        "Transformer Engine",
        "Transformer Engine and flash-attn",
        "compute-sanitizer",
        "ncu",
    }
    assert needs == allowed


def test_every_short_piece_runs_tiny_and_says_little(tmp_path: Path) -> None:
    code, output, results = tiny(tmp_path, "--pieces", *SHORT)
    assert code == 0, output
    assert len(output) < 12_000
    for name in SHORT:
        wanted = "absent" if KNOWN[name].needs else "done"
        assert results[name]["status"] == wanted, (name, output)
    assert {f"logs/{name}.log" for name in SHORT} <= archived(tmp_path)
    ran = "megarlx" if is_own(torch.zeros(1)) else "torch's SDPA for CPUs"
    assert f"attention: {ran}" in output  # named by what ran
    rows = [row for piece in results.values() for row in piece.get("result", {}).get("rows", [])]
    assert not any("met" in row for row in rows)
    assert any(row["baseline_name"] == "torch.compile" for row in rows)


@pytest.mark.slow
def test_every_long_piece_runs_tiny(tmp_path: Path) -> None:
    words = [f"{name}:900" for name in LONG if name != "doctor"]  # it judges this machine
    code, output, results = tiny(tmp_path, "--pieces", *words, time_limit=1800)
    assert code == 0, output
    assert all(piece["status"] == "done" for piece in results.values())


def test_a_failure_and_a_time_out_in_each_third_leave_an_archive(tmp_path: Path) -> None:
    light = [name for name in ORDER if name in ("machine", "linear_loss-memory", "sample-growth")]
    third = len(ORDER) // 3
    words, bad = [], {}
    for i in range(3):
        part = [n for n in ORDER[i * third : (i + 1) * third] if n not in light]
        bad |= {part[0]: "fail", part[-1]: "hang"}
        words += [part[0], light[i], f"{part[-1]}:1"]
    # A hang may be begun only where there is time for the piece: the limit alone is short.
    inject = [f"{what}:{name}" for name, what in bad.items()]
    code, output, results = tiny(tmp_path, "--inject", *inject, "--pieces", *words)
    assert code == 1
    statuses = [piece["status"] for piece in results.values()]
    assert statuses == ["failed", "done", "timed out"] * 3, output
    assert archived(tmp_path) == {
        *(f"logs/{word.partition(':')[0]}.log" for word in words),
        *("results.json", "results.md"),
    }


def test_the_same_command_goes_on_and_again_repeats(tmp_path: Path) -> None:
    words = ("--inject", "fail:machine", "--pieces", "machine", "linear_loss-memory")
    assert tiny(tmp_path, *words)[0] == 1
    code, output, _ = tiny(tmp_path, *words[2:])
    assert code == 0
    assert "== machine: done" in output
    assert "== linear_loss-memory" not in output  # it was done before
    code, output, _ = tiny(tmp_path, "--again", *words[2:])
    assert "== linear_loss-memory: done" in output


@pytest.mark.parametrize(
    ("key", "value"), [("gpu", "another card"), ("revision", "another revision"), ("device", "cpu")]
)
def test_results_of_another_card_or_revision_are_not_gone_on_with(
    tmp_path: Path, key: str, value: str
) -> None:
    machine = {"device": "cuda", "gpu": "a card", "revision": "a revision", "command": "one"}
    path = tmp_path / "results.json"
    assert gpu_suite.kept(path, machine) == {}
    done = {"name": "a", "status": "done"}
    path.write_text(json.dumps({"machine": machine, "pieces": [done]}))
    assert gpu_suite.kept(path, {**machine, "command": "another"}) == {"a": done}
    assert gpu_suite.kept(path, {**machine, key: value}) == {}


def test_a_suite_that_is_told_to_stop_ends_its_pieces_and_leaves_the_archive(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "--device", "cpu"]
    command += ["--out", str(tmp_path), "--inject", "hang:grpo", "--pieces", "machine", "grpo:100"]
    environment = {**gpu_environment(), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as suite:
        assert suite.stdout is not None
        assert "== machine: done" in suite.stdout.readline()
        children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children")
        while not (begun := children.read_text().split()):
            time.sleep(0.01)
        suite.terminate()
        assert suite.wait(timeout=60) == 143
    assert not any(Path(f"/proc/{child}").exists() for child in begun)
    assert "logs/machine.log" in archived(tmp_path)


STOPPED_AS_IT_FORKS = """
import os, runpy, signal, sys
fork = os.fork
def forked():
    child = fork()
    if child:
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    return child
os.fork = forked
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_suite_that_is_told_to_stop_as_it_forks_ends_that_piece_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED_AS_IT_FORKS]
    command += [str(ROOT / "benchmarks" / "gpu_suite.py"), "--device", "cpu", "--out"]
    command += [str(tmp_path), "--inject", "hang:grpo", "--pieces", "grpo:100"]
    done = subprocess.run(command, env=gpu_environment(), stdout=subprocess.PIPE, text=True)
    assert done.returncode == 143
    assert not Path(f"/proc/{int(done.stdout.split()[0])}").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pieces", "decode-7"), "there is no piece decode-7; allowed: "),
        (("--inject", "burn:machine"), "allowed: fail:PIECE, hang:PIECE"),
        (("--wheels", "no/such/folder"), "--wheels 'no/such/folder' is no folder"),
    ],
)
def test_a_wrong_word_is_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, output, results = tiny(tmp_path, *words)
    assert code == 2
    assert message in output
    assert not results


def wheel(folder: Path, name: str) -> None:
    """A package of one file, as pip installs it without a network."""
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as made:
        for path, text in files.items():
            made.writestr(path, text)


def test_the_script_makes_a_bare_machine_ready(tmp_path: Path) -> None:
    tree, brought, prebuilt = tmp_path / "tree", tmp_path / "wheels", tmp_path / "prebuilt"
    for folder in (tree / "benchmarks" / "gpu", tree / "megarlx", brought, prebuilt):
        folder.mkdir(parents=True)
    wheel(brought, "brought_along")
    (prebuilt / "_C.so").write_text("code")
    (prebuilt / "_build.json").write_text("{}")
    script = tree / "benchmarks" / "gpu" / "first_minutes.sh"
    shutil.copy(ROOT / "benchmarks" / "gpu" / "first_minutes.sh", script)
    program = "import brought_along, json, os, sys\n"
    program += "print(json.dumps([sys.argv[1:], dict(os.environ), brought_along.__file__]))\n"
    (tree / "benchmarks" / "gpu_suite.py").write_text(program)
    variables = {"PYTHON": sys.executable, "TMPDIR": str(tmp_path), "LD_LIBRARY_PATH": "/of/torch"}
    command = [script, "--wheels", brought, "--call", "1", "--prebuilt", prebuilt, "--out", "a b"]
    for _ in range(2):  # a warm machine has the wheels
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            env={**os.environ, **variables},
            check=True,
        )
        words, seen, place = json.loads(done.stdout)
        assert words == ["--call", "1", "--out", "a b"]
        assert "LD_LIBRARY_PATH" not in seen
        assert str(tree) in seen["PYTHONPATH"].split(os.pathsep)
        assert Path(place).parent.parent == tmp_path
    assert sorted(p.name for p in (tree / "megarlx").iterdir()) == ["_C.so", "_build.json"]


def test_the_attention_that_ran_is_named_by_its_kernels() -> None:
    for kernel, name in {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "cuDNN",
        "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>": "FlashAttention 2",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd": "FlashAttention 2 in torch's SDPA",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<": (
            "FlashAttention 3"
        ),
        "kernel_cutlass_flash_attncuteflash_fwd_FlashAttentionForwardSm90": "FlashAttention 4",
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN": "none that is known by its kernels",
    }.items():
        assert attention_of([kernel]) == name
    both = ["void flash::flash_fwd_kernel<", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop"]
    assert attention_of(both) == "cuDNN and FlashAttention 2"


def test_a_trace_counts_what_ran() -> None:
    x = torch.randn(30, 20)
    trace = traced(lambda: [x @ x.t() for _ in range(3)], torch.device("cpu"))
    assert next(calls for name, _, calls in trace.kernels if name == "aten::mm") == 3
    assert 0 < trace.busy_seconds <= trace.wall_seconds
    assert trace.attention == "none that is known by its kernels"


def context_of(folder: Path) -> Context:
    return Context(torch.device("cpu"), True, folder, float("inf"))


def test_a_baseline_of_torch_compile_that_runs_eagerly_has_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(5)
    functions: dict[str, Any] = {}
    real = compiled(context_of(tmp_path), torch.sin)
    with_compiled(functions, "real", lambda _: real(x))
    assert torch.equal(functions["real"](0), x.sin())
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    eager = compiled(context_of(tmp_path), torch.sin)
    with pytest.raises(NotCompiled):
        eager(x)
    with_compiled(functions, "eager", lambda _: eager(x))
    assert list(functions) == ["real"]
    assert "no row of eager: NotCompiled" in capsys.readouterr().out


REPORT = """\
==WARNING== Note: Running with unmodified GPU clocks.
[889] python3.12@127.0.0.1
  void unnamed>::average_adamw_kernel<8, float>(AdamWArgs, const AdamWCoefficients<float> *) (1056, 1, 1)x(256, 1, 1), Context 1
    Section: GPU Speed Of Light Throughput
    Memory Throughput                 %        77.80
    DRAM Throughput                   %        49.77
    Duration                         ms         2.50
          This kernel issues an instruction every 7.3 cycles.
    Registers Per Thread             register/thread              75
    Achieved Occupancy                        %        35.33
  tile_kernel(sampling::SampleArgs, int) (2432, 1, 1)x(128, 1, 1), Context 1
    Duration                         us        53.86
"""  # noqa: E501 - as it is printed


def test_the_counters_of_each_kernel_are_read_from_the_report() -> None:
    assert parsed(REPORT) == [
        {
            "kernel": "average_adamw_kernel<8, float>",
            "DRAM": "49.77 %",
            "duration": "2.50 ms",
            "registers": "75",
            "warps resident": "35.33 %",
        },
        {"kernel": "tile_kernel", "duration": "53.86 us"},
    ]


def test_every_kernel_of_ours_is_counted() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.*"))
    assert len(kernel_names()) == len(re.findall(r"__global__", text))
    assert {"average_adamw_kernel", "token_loss_kernel", "tile_kernel"} <= set(kernel_names())


def test_times_of_a_call_are_medians_of_calls_with_rotating_inputs() -> None:
    from gpu.clock import fitted, interleaved

    seen: list[int] = []
    seconds = interleaved({"f": seen.append, "g": lambda i: None}, torch.device("cpu"), rounds=4)
    assert set(seconds) == {"f", "g"}
    assert seen[-4:] == [0, 1, 2, 3]
    line = fitted([1.0, 2.0, 3.0], [5.0, 7.0, 9.0])
    assert line["a"] == pytest.approx(3)
    assert line["b"] == pytest.approx(2)
    assert line["largest_miss"] == pytest.approx(0, abs=1e-12)
