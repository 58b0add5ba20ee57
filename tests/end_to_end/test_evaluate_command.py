"""`megarlx evaluate` and `generate`: any checkpoint, any layout, resumed, the run only read."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import command, run, train

from megarlx.checkpoint import CheckpointError
from megarlx.cli import main
from megarlx.evaluation.pass_at_k import pass_at_k
from megarlx.run.reference import resolve

SUITES = """
slots = 64

[[suites]]
name = "problems"
kind = "pass_at_k"
made = "problems"
questions = 6
samples = 4
ks = [1, 4]
group_size = 2
max_new_tokens = 5
path_is_absent = 0

[[suites]]
name = "choice"
kind = "choice"
made = "held_out_facts"
questions = 40
options = { choices = 3 }

[[suites]]
name = "stories"
kind = "perplexity"
made = "stories"
questions = 9
""".replace("path_is_absent = 0\n", "")


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of 256 tokens, saved after 4, 8 and 12; room for the world's questions."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    overrides = ("checkpoints.save_every_steps=4", "model.max_sequence_length=128")
    assert train(config, out, *overrides) == 0
    (out.parent / "suites.toml").write_text(SUITES)
    return out


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Bytes and times of every file below, but for what an evaluation writes."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("evaluations", "samples")
    }


def result(out: Path, suite: str, iteration: int = 12) -> dict[str, Any]:
    path = out / "evaluations" / f"iter_{iteration:08d}.{suite}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def evaluate(reference: str, suites: Path, *words: str) -> int:
    return main(["evaluate", reference, "--config", str(suites / "suites.toml"), *words])


def test_names_lead_to_checkpoints_and_errors_list_what_there_is(trained: Path) -> None:
    for name, iteration in (
        ("", 12),
        ("@latest", 12),
        ("@4", 4),
        ("@tokens:1025", 8),
        ("@tokens:1024", 4),
        ("@tokens:0.002M", 8),
    ):
        found = resolve(f"{trained}{name}")
        assert (found.run, found.iteration) == (trained, iteration)
        assert found.checkpoint == trained / "checkpoints" / f"iter_{iteration:08d}"
    for name, said in (
        ("@5", "iteration 5 was not saved; .* holds 4, 8, 12"),
        ("@tokens:1B", r"holds 4 \(1,024 tokens\), 8 \(2,048 tokens\), 12 \(3,072 tokens\)"),
        ("@best", "'best' names no checkpoint; allowed are RUN, RUN@latest"),
    ):
        with pytest.raises(ValueError, match=said):
            resolve(f"{trained}{name}")
    with pytest.raises(ValueError, match="is not there"):
        resolve(f"{trained}-elsewhere@4")


def test_damaged_latest_is_passed_over_and_nothing_is_mended(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (copy / "checkpoints" / "iter_00000012" / "manifest.json").unlink()
    before = digests(copy)
    with pytest.warns(UserWarning, match="Going on from .*iter_00000008"):
        assert resolve(str(copy)).iteration == 8
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        resolve(f"{copy}@12")
    assert digests(copy) == before


def test_results_hold_counts_of_every_question_and_the_run_is_only_read(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(trained)
    assert evaluate(f"{trained}@8", trained.parent) == 0
    assert digests(trained) == before
    assert "guessing" in capsys.readouterr().out
    found = result(trained, "problems", 8)
    assert [item["id"] for item in found["items"]] == [f"test/{i}" for i in range(6)]
    assert all(item["samples"] == 4 for item in found["items"])
    for k in (1, 4):
        each = [pass_at_k(4, item["correct"], k) for item in found["items"]]
        assert found["metrics"][f"pass_at_{k}"] == pytest.approx(sum(each) / 6)
        assert 0 < found["guessing"][f"pass_at_{k}"] < 0.1
    assert found["trunk_tokens"] == 8 * 256
    choice = result(trained, "choice", 8)
    right = [item["correct"] for item in choice["items"]]
    assert len(right) == 40
    assert choice["metrics"]["accuracy"] == pytest.approx(sum(right) / 40)
    assert all(item["correct"] == (item["margin"] > 0) for item in choice["items"])
    stories = result(trained, "stories", 8)
    total = sum(item["nll"] * item["tokens"] for item in stories["items"])
    tokens = sum(item["tokens"] for item in stories["items"])
    assert stories["metrics"]["nll"] == pytest.approx(total / tokens)
    # Hardly trained: near a guess among the vocabulary's 400 ids.
    assert 3 < stories["metrics"]["nll"] < math.log(400) + 1
    lines = (trained / "samples" / "iter_00000008.problems.jsonl").read_text().splitlines()
    assert len(lines) == 6 * 2
    keys = {"prompt", "completion", "reference", "reward", "finish_reason", "id", "group"}
    keys |= {"tokens", "logprobs"}
    assert all(json.loads(line).keys() == keys for line in lines)


def test_a_finished_suite_is_not_computed_again_unless_its_settings_changed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert evaluate(str(copy), trained.parent) == 0
    first = {name: result(copy, name) for name in ("problems", "choice", "stories")}
    (copy / "evaluations" / "iter_00000012.choice.json").unlink()  # as a kill would leave it
    capsys.readouterr()
    assert evaluate(str(copy), trained.parent) == 0
    said = capsys.readouterr().out
    assert said.count("there already") == 2
    assert "choice: accuracy" in said
    again = {name: result(copy, name) for name in first}
    assert again["problems"] == first["problems"]
    assert again["choice"]["items"] == first["choice"]["items"]
    assert evaluate(str(copy), trained.parent, "--samples", "6", "--suite", "problems") == 0
    assert "there already" not in capsys.readouterr().out
    assert result(copy, "problems")["items"][0]["samples"] == 6


def test_what_training_measured_is_not_computed_again_for_its_checkpoint(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suites = SUITES.replace("[[suites]]", "[[evaluation.suites]]").replace("slots = 64\n", "")
    given = tmp_path / "run.toml"
    given.write_text(config.read_text() + "[evaluation]\nslots = 64\nat_end = true\n" + suites)
    out = tmp_path / "run"
    overrides = ("checkpoints.save_every_steps=4", "model.max_sequence_length=128")
    assert train(given, out, *overrides, "evaluation.every_steps=8") == 0
    files = sorted((out / "evaluations").iterdir())
    before = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert len(before) == 6
    capsys.readouterr()
    assert main(["evaluate", f"{out}@all"]) == 0
    said = capsys.readouterr().out
    assert said.count("there already") == 6
    assert said.count("problems: pass_at_1") == 1  # of step 4, which training did not measure
    assert [(p, p.read_bytes(), p.stat().st_mtime_ns) for p, _, _ in before] == before
    assert main(["evaluate", f"{out}@8", "--suite", "problems", "--temperature", "0.9"]) == 0
    assert "there already" not in capsys.readouterr().out
    # Another run in the folder, of which no checkpoint is left, trusts nothing that lies there.
    shutil.rmtree(out / "checkpoints")
    other = ("optimizer.lr=1e-2", "evaluation.every_steps=8")
    assert train(given, out, *overrides, *other) == 0
    again = (out / "evaluations" / "iter_00000012.stories.json").read_bytes()
    assert again != next(held for path, held, _ in before if "12.stories" in path.name)


def test_masters_are_rounded_for_a_model_that_computes_in_bf16(
    trained: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert evaluate(str(copy), trained.parent, "--suite", "stories") == 0
    exact = result(copy, "stories")["metrics"]["nll"]
    (copy / "evaluations" / "iter_00000012.stories.json").unlink()
    bf16 = ("--set", "training.precision=bf16")
    assert evaluate(str(copy), trained.parent, "--suite", "stories", *bf16) == 0
    rounded = result(copy, "stories")["metrics"]["nll"]
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact


def test_a_pipeline_under_torchrun_finds_what_one_process_finds(
    trained: Path, tmp_path: Path
) -> None:
    """Other layouts: tests/distributed/test_evaluation_layouts.py."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert evaluate(str(copy), trained.parent) == 0
    alone = {name: result(copy, name) for name in ("problems", "choice", "stories")}
    shutil.rmtree(copy / "evaluations")
    words = command(Path("unused"), copy, processes=2)
    words = [*words[: words.index("train")], "evaluate", str(copy), "--config"]
    words += [str(trained.parent / "suites.toml"), "--set", "layout.pipeline=2"]
    done = run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, one in alone.items():
        two = result(copy, name)
        assert [i["id"] for i in two["items"]] == [i["id"] for i in one["items"]]
        assert two["settings"] == one["settings"]
        for a, b in zip(one["items"], two["items"], strict=True):
            for key in ("nll", "margin"):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)
        for key, value in one["metrics"].items():
            assert two["metrics"][key] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--suite", "probems"], 2, "--suite probems: there is none; allowed are problems, choice"),
        (["--samples", "0"], 2, "suite problems: "),
        (["--set", "layout.tensor=2"], 1, "needs 2 processes; there are 1"),
    ],
)
def test_what_cannot_work_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert evaluate(str(trained), trained.parent, *words) == code
    assert said in capsys.readouterr().err


def test_generate_prints_samples_of_the_seed(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        prompt = ["--prompt", "tom has 9 pears .", "--max-new-tokens", "6"]
        assert main(["generate", f"{trained}@4", *prompt, *words]) == 0
        return capsys.readouterr().out

    two = said("--samples", "2")
    assert len(two.splitlines()) == 2
    assert said("--samples", "2") == two
    assert said() == two.splitlines()[0] + "\n"
    assert said("--samples", "2", "--seed", "5") != two
    listed = said("--logprobs").splitlines()
    assert all(float(line.split()[0]) <= 0 for line in listed if line)
    words = [line.split("'")[1] for line in listed if line]
    assert " ".join(words).removesuffix(" <eos>") == two.splitlines()[0].strip()
    assert main(["generate", str(trained), "--prompt", "tom", "--max-new-tokens", "999"]) == 1
    assert "max_new_tokens is 999 behind a prompt of 5 tokens" in capsys.readouterr().err
