"""The walk done a sixth time: measured in two ways, and RL's arithmetic against plain loops."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_models import tiny_model
from torch import Tensor

import megarlx
from megarlx.cli import main

RECIPE = """
[training]
sequence_length = 128
sequences_per_step = 1
[template]
user = "Q: {content} A:"
assistant = " {content}"
[sft]
conversations = "solved.jsonl"
[rl]
prompts = "asked.jsonl"
prompts_per_step = 1
samples_per_prompt = 4
max_completion_tokens = 6
rewards = [{ function = "mine.py:letters", workers = 0 }]
bank = { tokens = true }
[logging]
log_every_steps = 1
[evaluation]
readiness_prompts = 0
"""
REUSED = """
[rl.policy]
preset = "grpo"
kl_coefficient = 0.1
entropy_coefficient = 0.01
[[stages]]
steps = 4
[stages.objectives.rl]
lr = 0.01
schedule = "constant"
weight_decay = 0.05
clip_norm = 0.5
"""
AVERAGED = """
[rl.policy]
preset = "rloo"
[[stages]]
steps = 3
combine = "average"
[stages.objectives.rl]
lr = 0.004
weight = { first = 0.75, last = 0.25 }
[stages.objectives.sft]
lr = 0.002
betas = [0.8, 0.9]
weight = { first = 0.25, last = 0.75 }
[checkpoints]
average_decay = 0.5
"""
SFT = """
[[stages]]
steps = 1
objectives = { sft = { lr = 1e-3 } }
"""
SUITES = """
[[evaluation.suites]]
name = "asked"
kind = "pass_at_k"
path = "asked.jsonl"
samples = 2
ks = [1, 2]
max_new_tokens = 4
rewards = [{ function = "mine.py:letters", workers = 0 }]
correct_from = 0.5
group_size = 2
[[evaluation.suites]]
name = "texts"
kind = "perplexity"
path = "texts.jsonl"
[[evaluation.suites]]
name = "which"
kind = "choice"
path = "which.jsonl"
"""
REWARD = """
def letters(samples):
    return [sum(map(ord, s.completion)) % 7 / 6 for s in samples]
"""
FILES = {
    "asked": [{"question": f"{n} knots ?", "answer": f"{n}"} for n in range(2)],
    "solved": [{"question": f"{n} nm ?", "answer": f"in {n} h"} for n in range(2)],
    "silent": [{"question": f"{n} nm ?", "answer": ""} for n in range(2)],
    "texts": [{"text": "a fresh breeze"}],
    "which": [{"context": "a fresh", "choices": [" breeze", " knot"], "answer": 0}],
}
Answer = tuple[list[int], list[int]]  # the prompt, and what was written behind it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sixth")
    tiny_model(folder / "model")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(REWARD)
    for name, rest in {"reused": REUSED, "averaged": AVERAGED, "sft": SFT + SUITES}.items():
        (folder / f"{name}.toml").write_text(RECIPE + rest)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def branch(recipe: str, *sets: str) -> Path:
    words = [word for one in sets for word in ("--set", one)]
    assert main(["branch", "model", f"{recipe}.toml", "--out", f"runs/{recipe}", *words]) == 0
    return Path("runs", recipe)


def logged(run: Path, key: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def kept(run: Path, rollout: int) -> list[dict[str, Any]]:
    with gzip.open(run / "rollouts" / "rl" / f"step_{rollout:08d}.jsonl.gz", "rt") as stream:
        return [json.loads(line) for line in stream]


class Plain:
    """A model and a tokenizer of transformers, and what a user would compute with them."""

    def __init__(self, folder: str) -> None:
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        self.model = self.model.to(torch.float64)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def answer(self, question: str, written: str | Sequence[int]) -> Answer:
        prompt = self.tokenizer(f"Q: {question} A:", add_special_tokens=False).input_ids
        if isinstance(written, str):
            written = self.tokenizer(f" {written}", add_special_tokens=False).input_ids
            written = [*written, self.tokenizer.eos_token_id]
        return prompt, list(written)

    def adamw(self, **settings: Any) -> torch.optim.AdamW:
        decayed = [p for n, p in self.model.named_parameters() if "norm" not in n]
        norms = [p for n, p in self.model.named_parameters() if "norm" in n]
        groups = [{"params": decayed}, {"params": norms, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, eps=1e-8, **settings)

    def away_from(self, folder: str) -> float:
        other = Plain(folder).model
        pairs = zip(self.model.parameters(), other.parameters(), strict=True)
        return max(float((a - b).detach().abs().mean()) for a, b in pairs)


def of_tokens(model: Any, answer: Answer) -> tuple[Tensor, Tensor]:
    """The log-probability of each token that was written, and the entropy at its place."""
    prompt, written = answer
    logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    every = torch.log_softmax(logits, -1)
    chosen = every.gather(1, torch.tensor(written)[:, None])[:, 0]
    return chosen, -(every.exp() * every).sum(1)


def test_a_rollout_that_is_used_four_times_is_trained_on_as_a_plain_loop_of_ppo_does() -> None:
    """Ratios that are not 1 and are clipped, k3 to the first weights, entropy, one AdamW."""
    run = branch("reused", "rl.steps_per_rollout=2", "rl.epochs_per_rollout=2")
    plain = Plain("model")
    rows, reference = kept(run, 0), copy.deepcopy(plain.model)
    groups = [[r for r in rows if r["prompt"] == row["question"]] for row in FILES["asked"]]
    optimizer = plain.adamw(lr=0.01, betas=(0.9, 0.95), weight_decay=0.05)

    def of_group(group: list[dict[str, Any]]) -> tuple[Tensor, float, float]:
        """Loss, share of clipped tokens, mean k3."""
        rewards = torch.tensor([row["reward"] for row in group], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        losses, clipped, kls = [], [], []
        for row, advantage in zip(group, advantages, strict=True):
            answer = plain.answer(row["prompt"], row["tokens"])
            now, entropy = of_tokens(plain.model, answer)
            with torch.no_grad():
                old = of_tokens(reference, answer)[0]
            ratio = (now - old).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            k3 = (old - now).exp() - (old - now) - 1
            losses.append((-gain + 0.1 * k3 - 0.01 * entropy).mean())
            clipped.append(gain < ratio * advantage)
            kls.append(k3.detach())
        share = torch.cat(clipped).double().mean()
        return torch.stack(losses).mean(), float(share), float(torch.cat(kls).mean())

    told = logged(run, "loss/rl")
    for row in told:
        made = [of_group(group) for group in groups]  # one a step, in an order of each epoch
        loss, clipped, kl = min(made, key=lambda one: abs(float(one[0].detach()) - row["loss/rl"]))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        optimizer.step()
        assert row["loss/rl"] == pytest.approx(float(loss.detach()), rel=1e-3, abs=1e-5)
        assert row["grad_norm/rl"] == pytest.approx(float(norm), rel=1e-3)
        assert row["rl/kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert row["rl/clip_fraction"] == pytest.approx(clipped)
    assert max(row["rl/clip_fraction"] for row in told) > 0.1
    assert main(["convert", str(run), "models/reused", "--quiet"]) == 0
    assert plain.away_from("models/reused") < 2e-5  # of 0.01 a step; fp32 turns what is near 0


def test_averaged_updates_are_those_of_two_plain_adamws() -> None:
    """RLOO with its divergence off the reward, and SFT; weights that move; a moving average."""
    run = branch("averaged")
    plain, average = Plain("model"), Plain("model")
    reference, moments = copy.deepcopy(plain.model), dict[str, Any]()

    def rloo(model: Any, rows: list[dict[str, Any]]) -> Tensor:
        answers = [plain.answer(row["prompt"], row["tokens"]) for row in rows]
        found = [of_tokens(model, answer)[0].sum() for answer in answers]
        with torch.no_grad():
            before = [of_tokens(reference, answer)[0].sum() for answer in answers]
            away = torch.stack([a.detach() - b for a, b in zip(found, before, strict=True)])
        rewards = torch.tensor([row["reward"] for row in rows]) - 0.05 * away
        advantages = rewards - (rewards.sum() - rewards) / (len(rows) - 1)
        return -(advantages * torch.stack(found)).mean()

    def sft(model: Any) -> Tensor:
        answers = [plain.answer(row["question"], row["answer"]) for row in FILES["solved"]]
        return -torch.cat([of_tokens(model, answer)[0] for answer in answers]).mean()

    for step, row in enumerate(logged(run, "loss/rl")):
        made = {}
        for name, betas in (("rl", (0.9, 0.95)), ("sft", (0.8, 0.9))):
            own = copy.copy(plain)
            own.model = copy.deepcopy(plain.model)
            optimizer = own.adamw(lr=row[f"lr/{name}"], betas=betas, weight_decay=0.1)
            if name in moments:
                for group in moments[name]["param_groups"]:
                    group["lr"] = row[f"lr/{name}"]
                optimizer.load_state_dict(moments[name])
            loss = rloo(own.model, kept(run, step)) if name == "rl" else sft(own.model)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(own.model.parameters(), 1.0)
            optimizer.step()
            moments[name], made[name] = optimizer.state_dict(), own.model
            assert row[f"loss/{name}"] == pytest.approx(float(loss.detach()), rel=1e-3, abs=1e-5)
            assert row[f"grad_norm/{name}"] == pytest.approx(float(norm), rel=1e-3)
        assert row["share/rl"] == pytest.approx((0.75, 0.5, 0.25)[step])
        with torch.no_grad():
            every = (model.parameters() for model in (plain.model, average.model, *made.values()))
            for kept_weights, mean, of_rl, of_sft in zip(*every, strict=True):
                kept_weights.copy_(row["share/rl"] * of_rl + row["share/sft"] * of_sft)
                mean.mul_(0.5).add_(kept_weights, alpha=0.5)
    assert main(["convert", str(run), "models/last", "--quiet"]) == 0
    assert main(["convert", str(run), "models/mean", "--weights", "average", "--quiet"]) == 0
    assert plain.away_from("models/last") < 1e-6
    assert average.away_from("models/mean") < 1e-6
    assert average.away_from("models/last") > 1e-4


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder / branch("sft", "evaluation.at_end=true")


def test_a_base_that_was_asked_at_another_temperature_is_not_subtracted(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base,) = Path("runs/converted").glob("model-*")
    ask = ["evaluate", str(base), "--config", "sft.toml", "--suite", "asked"]
    assert main(ask) == 0
    capsys.readouterr()
    assert main([*ask, "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    assert "asked: with temperature 0.0; replaces the result with temperature 0.6" in said
    assert main(["report", "runs", "--out", "apart"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "because asked was asked in 2 ways" in printed
    assert "with temperature 0.0" in printed
    assert "takes pass@1" not in printed
    assert main(ask) == 0
    assert main(["report", "runs", "--out", "alike"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "takes pass@1 of asked" in printed
    assert "ways" not in printed


def test_an_evaluations_line_has_every_suite(trained: Path) -> None:
    (log,) = [path.read_text() for path in (trained / "logs").iterdir()]
    (line,) = [line for line in log.splitlines() if "eval/asked" in line]
    assert "eval/texts/nll" in line
    assert "eval/which/accuracy" in line


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["evaluate", "{run}", "--trust", "mine.py:letters", "--samples", "0"],
            "suite asked: sam",
        ),
        (["generate", "{run}", "--prompt", "3 knots ?", "--samples", "0"], "--samples is 0; allow"),
    ],
)
def test_no_samples_are_refused_by_their_name(
    command: list[str], said: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=trained) for word in command]) != 0
    assert said in capsys.readouterr().err


def test_answers_that_are_empty_are_told_and_a_line_without_suites_is_not_written() -> None:
    sets = ["sft.conversations=silent.jsonl", "evaluation.suites=[]", "evaluation.at_end=true"]
    words = [word for one in sets for word in ("--set", one)]
    command = ["branch", "model", "sft.toml", "--out", "runs/silent", *words]
    with pytest.warns(UserWarning, match=r"silent.jsonl: 2 of 2 answers are empty"):
        assert main(command) == 0
    log = Path("runs/silent/logs/rank_00000.log").read_text()
    assert [line for line in log.splitlines() if line.rstrip().endswith("step 1/1:")] == []


def test_a_learner_takes_rewards_as_an_array_or_a_tensor(trained: Path) -> None:
    with megarlx.open(str(trained), trusted=["mine.py:letters"]) as run:
        samples = run.sample(["3 knots ?", "4 ?"], samples=2, max_new_tokens=4)
        learner = run.learner(lr=1e-4)
        rewards = np.array([[0.0, 1.0], [0.5, 0.25]])
        for given in (rewards, torch.tensor(rewards)):
            assert learner.step(samples, given)["rl/reward"] == rewards.mean()
        for flat in (rewards[0], torch.tensor(rewards[0])):
            with pytest.raises(ValueError, match="a list for each prompt"):
                learner.step(samples, flat)
