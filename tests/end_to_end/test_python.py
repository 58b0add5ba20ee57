"""What `import megarlx` gives does what the commands do."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from short_runs import RL, TRUNK
from test_evaluate_command import SUITES, digests
from training_runs import ROOT, train

import megarlx
from megarlx.cli import main
from megarlx.config.load import ConfigError
from megarlx.run.directory import RunError
from megarlx.run.loop import _Loop


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("python") / "run"
    assert train(config, out, "training.steps=2", "model.max_sequence_length=128") == 0
    (out.parent / "suites.toml").write_text(SUITES)
    return out


@pytest.mark.parametrize("temperature", [0, 0.0, 1, 1.0], ids=repr)
def test_what_streams_is_what_is_generated(trained: Path, temperature: float) -> None:
    with megarlx.open(str(trained)) as run:
        (whole,) = run.generate(["ann has"], samples=3, temperature=temperature, max_new_tokens=12)
        streamed = [
            "".join(
                piece.text
                for piece in run.stream(
                    "ann has", temperature=temperature, max_new_tokens=12, number=number
                )
            )
            for number in range(3)
        ]
    assert streamed == whole
    assert len(set(whole)) == (1 if temperature == 0 else 3)


def test_a_stream_fills_the_model_and_says_what_has_no_room(trained: Path) -> None:
    with megarlx.open(str(trained)) as run:
        prompt = "ann has 7 books"
        given = len(run.tokenizer.encode(prompt))
        *_, last = pieces = list(run.stream(prompt, raw=True))
        assert last.finish_reason == "stop" or given + len(pieces) == 128
        for wanted in (0, 128 - given + 1):
            with pytest.raises(ValueError, match=f"max_new_tokens is {wanted} .* allows 1 to"):
                next(run.stream(prompt, raw=True, max_new_tokens=wanted))
        with pytest.raises(ValueError, match="leaves no room for an answer"):
            next(run.stream("books " * 200, raw=True))


def test_prompts_are_a_list_of_texts_or_of_messages(trained: Path) -> None:
    with megarlx.open(str(trained)) as run:
        asked = [[{"role": "user", "content": "ann has"}], "ann has"]
        said = run.generate(asked, temperature=0, max_new_tokens=8)
        assert said[0] == said[1]
        assert run.generate([]) == []
        with pytest.raises(RunError, match="prompts is 'ann has'; give a list of them"):
            run.generate("ann has")
        with pytest.raises(RunError, match="samples is 0; allowed are 1 and more"):
            run.generate(["ann has"], samples=0)


def test_results_are_those_of_the_command_and_are_kept_only_where_asked(trained: Path) -> None:
    suites = trained.parent / "suites.toml"
    before = digests(trained)
    with megarlx.open(str(trained)) as run:
        found = run.evaluate(suites)
        assert not (trained / "evaluations").exists()
        assert list(run.evaluate(suites, names=["stories"])) == ["stories"]
        (kept,) = run.evaluate(suites, names=["choice"], keep=True).values()
    assert (trained / "evaluations" / "iter_00000002.choice.json").exists()
    assert main(["evaluate", str(trained), "--config", str(suites)]) == 0
    assert digests(trained) == before
    assert list(found) == ["problems", "choice", "stories"]
    for name, result in found.items():
        path = trained / "evaluations" / f"iter_00000002.{name}.json"
        written = json.loads(path.read_text())
        assert written["metrics"] == json.loads(json.dumps(result["metrics"]))
    assert kept["metrics"] == found["choice"]["metrics"]


def test_a_loop_of_ones_own_learns_what_it_is_paid_for_and_writes_nothing(trained: Path) -> None:
    before = digests(trained)

    with megarlx.open(str(trained)) as run:
        learner = run.learner(lr=3e-3, policy={"preset": "dr_grpo"})
        rewards = []
        for step in range(12):
            samples = run.sample(["ann has", "tom has"], samples=16, max_new_tokens=8, seed=step)
            paid = [[float(len(text)) for text in texts] for texts in samples.texts]
            metrics = learner.step(samples, paid)
            rewards.append(metrics["rl/reward"])
        assert {"loss", "gradient_norm", "rl/entropy", "rl/informative_groups"} <= set(metrics)
        assert metrics["rl/logprob_gap"] < 1e-4  # what is drawn is what is trained
        with pytest.raises(ValueError, match=r"rewards are for .*1.* samples; drawn were .*16, 16"):
            learner.step(samples, [[1.0]])
        with pytest.raises(ValueError, match="a list for each prompt, with one number a sample"):
            learner.step(samples, [1.0] * 32)  # type: ignore[list-item]
        with pytest.raises(
            ConfigError, match=r"presett: unknown key; did you mean 'policy\.preset'"
        ):
            run.learner(lr=3e-3, policy={"presett": "dr_grpo"})
        cold = run.sample(["ann has"], samples=2, temperature=0.5, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"drawn at temperature 0\.5, and the learner's is 1"):
            learner.step(cold, [[1.0, 0.0]])
        with pytest.raises(ValueError, match="a learner has changed the weights"):
            run.evaluate(trained.parent / "suites.toml", keep=True)
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert digests(trained) == before


def test_rewards_that_are_not_known_or_equal_move_nothing(trained: Path) -> None:
    with megarlx.open(str(trained)) as run:
        weights = [p.detach().clone() for s in run.model.stages for p in s.parameters()]
        learner = run.learner(lr=1e-2, policy={"preset": "dr_grpo"})
        samples = run.sample(["ann has", "tom has"], samples=2, max_new_tokens=4)
        learner.step(samples, [[1.0, 1.0], [None, 3.0]])
        after = [p for s in run.model.stages for p in s.parameters()]
        assert all(one.equal(other) for one, other in zip(weights, after, strict=True))


def test_an_opened_run_branches_and_reports_and_stays_open_without_with(
    trained: Path, tmp_path: Path
) -> None:
    recipe = ROOT / "configs" / "recipes" / "rl.toml"
    small = [f"{key}={value}" for key, value in RL.items()]
    small += ["stages.0.steps=2", "stages.0.objectives.rl.warmup_steps=0", "evaluation={}"]
    small += ["training.sequences_per_microbatch=1", "rl.tokens_per_microbatch=256"]
    run = megarlx.open(str(trained))
    try:
        assert run.branch(recipe, tmp_path / "out" / "rl", small) is True
        lineage = json.loads((tmp_path / "out" / "rl" / "lineage.json").read_text())
        assert lineage["parent"]["run"] == str(trained)
        assert len(run.generate(["ann has"], max_new_tokens=2)) == 1
    finally:
        run.close()
    with megarlx.open(str(tmp_path / "out" / "rl")) as excursion:
        assert excursion.report() == tmp_path / "out" / "report" / "index.html"


def test_a_report_is_a_page_of_the_runs_in_a_folder(trained: Path, tmp_path: Path) -> None:
    page = megarlx.report_on(trained.parent, tmp_path / "report")
    assert page == tmp_path / "report" / "index.html"
    assert "<html" in page.read_text(encoding="utf-8")
    assert {path.name for path in page.parent.iterdir()} >= {"index.html", "summary.json"}


def test_what_a_notebook_pastes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, on a smaller world and for fewer steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    small = [f"{key}={value}" for key, value in {**TRUNK, "training.steps": "2"}.items()]
    rl = ["stages.0.steps=6", *(f"{key}={value}" for key, value in RL.items())]
    short = block.replace('["training.steps=200"]', repr(small))
    short = short.replace('["stages.0.steps=10"]', repr(rl)).replace("samples=8", "samples=2")
    assert repr(small) in short
    assert repr(rl) in short
    exec(compile(short, "python.md", "exec"), {})
    assert (tmp_path / "runs" / "report" / "index.html").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_is_told_to_stop_knows_that_training_is_not_done(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Ctrl-C ends the program too, once the run is saved: a loop over runs would go on else."""
    step = _Loop._step

    def told(loop: _Loop, steps: int) -> None:
        step(loop, steps)
        if loop.run.trainer.steps_done == 1:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "_step", told)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                megarlx.train(config, tmp_path, ["training.steps=3"])
        else:
            assert megarlx.train(config, tmp_path, ["training.steps=3"]) is False
    assert (tmp_path / "checkpoints" / "iter_00000001").is_dir()
    assert megarlx.train(config, tmp_path, ["training.steps=3"]) is True
