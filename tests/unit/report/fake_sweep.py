"""Writes the files of a sweep whose outcomes are known, in the formats that runs leave behind.

Of each outcome: `mean` is pass@1, `coverage` the share of questions that can be solved at all. The
questions' difficulties are the same everywhere, so recipes differ in what they are said to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megarlx.config.model import ModelConfig
from megarlx.evaluation.pass_at_k import pass_at_k

SAMPLES = 64
GUESSING = {"pass_at_1": 0.004, "pass_at_8": 0.03, "pass_at_32": 0.09}
SUITES = {"facts-choice": "choice", "facts-cloze": "cloze"}
SMALL_MODEL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "heads": 4,
    "layers": 2,
    "intermediate_size": 128,
}


@dataclass(frozen=True)
class Outcome:
    mean: float
    coverage: float
    accuracy: float = 0.60
    nll: float = 0.65

    def between(self, other: Outcome, share: float) -> Outcome:
        def mix(a: float, b: float) -> float:
            return a + share * (b - a)

        return Outcome(
            mix(self.mean, other.mean),
            mix(self.coverage, other.coverage),
            mix(self.accuracy, other.accuracy),
            mix(self.nll, other.nll),
        )


# Every claim from P1 to P13 is true of these.
AS_IN_THE_PAPER = {
    "base": Outcome(0.05, 0.45),
    "rl": Outcome(0.40, 0.60),
    "sft": Outcome(0.25, 0.75, 0.545, 0.72),
    "sft_gold": Outcome(0.32, 0.88, 0.545, 0.72),
    "sft_then_rl": Outcome(0.48, 0.60, 0.55, 0.71),
    "parallel": Outcome(0.32, 0.93, 0.60, 0.652),
}


@dataclass
class Sweep:
    root: Path
    outcomes: dict[str, Outcome] = field(default_factory=lambda: dict(AS_IN_THE_PAPER))
    checkpoints: Sequence[int] = (1_000_000, 2_000_000, 4_000_000)
    seeds: Sequence[int] = (0, 1)
    questions: int = 200
    tests: int = 600
    model: dict[str, int] = field(default_factory=lambda: dict(SMALL_MODEL))
    problems_share: float = 0.5
    prefix: str = ""  # of the trunks' names
    steps: int = 60
    rl_settings: dict[str, Any] = field(default_factory=dict)
    halfway: float = 0.5  # of what RL changes, in the middle of its steps
    grows: float = 0.02  # what every pass@1 gains from checkpoint to checkpoint

    def write(self, recipes: Sequence[str] | None = None) -> Path:
        for seed in self.seeds:
            trunk = self.trunk(seed)
            for tokens in self.checkpoints:
                for recipe in recipes or [r for r in self.outcomes if r != "base" and "@" not in r]:
                    self.excursion(trunk, recipe, tokens, seed)
        return self.root

    def trunk(self, seed: int) -> Path:
        run = self.root / "trunks" / f"{self.prefix}seed{seed}"
        shares = {"problems": self.problems_share, "facts": 1 - self.problems_share}
        _json(run / "lineage.json", {**_lineage(seed), "composition": {}})
        _json(
            run / "resolved.json",
            {
                "model": json.loads(ModelConfig(**self.model).to_json()),
                "training": {"steps": self.checkpoints[-1] // 1000, "seed": seed},
                "data": {
                    "maker": "world",
                    "folder": f"runs/worlds/{seed}",
                    "options": {"seed": seed, "problems_share": self.problems_share},
                },
            },
        )
        lines = []
        for tokens in self.checkpoints:
            step = tokens // 1000
            data = {f"data/{name}_tokens": share * tokens for name, share in shares.items()}
            cost = {"cost/seconds": step / 10, "cost/trained_tokens": tokens, "cost/flop": tokens}
            lines.append({"step": step, "loss/pretraining": 2.0, **data, **cost})
            self.evaluate(run, step, tokens, self.outcome("base", tokens), seed)
        _lines(run / "metrics.jsonl", lines)
        return run

    def outcome(self, recipe: str, tokens: int) -> Outcome:
        """Of a recipe everywhere, or ("rl@2000000") at one checkpoint."""
        found = self.outcomes.get(f"{recipe}@{tokens}", self.outcomes.get(recipe))
        assert found is not None, f"no outcome of {recipe}"
        return replace(found, mean=found.mean + self.grows * self.checkpoints.index(tokens))

    def excursion(
        self, trunk: Path, recipe: str, tokens: int, seed: int, *, name: str | None = None
    ) -> Path:
        run = self.root / "excursions" / (name or f"{self.prefix}{recipe}-{tokens}-seed{seed}")
        parent = {"run": str(trunk), "iteration": tokens // 1000, "digest": "0" * 64}
        lineage = _lineage(seed) | {"recipe": recipe, "trunk_tokens": tokens}
        composition = {
            "problems": self.problems_share * tokens,
            "facts": (1 - self.problems_share) * tokens,
        }
        parent["trunk_tokens"] = tokens
        _json(run / "lineage.json", {**lineage, "parent": parent, "composition": composition})
        first = self.steps // 3 if recipe == "sft_then_rl" else 0
        names = ["sft", "rl"] if first else [recipe]
        stages = [
            {"objective": n, "steps": s}
            for n, s in zip(names, [first, self.steps - first][-len(names) :], strict=True)
        ]
        rl = {"prompts_per_step": 16, "samples_per_prompt": 16, **self.rl_settings}
        objectives = {"rl": rl} if "rl" in names else {}
        _json(
            run / "resolved.json",
            {"stages": stages, "objectives": objectives, "training": {"seed": seed}},
        )
        end = self.outcome(recipe, tokens)
        lines = []
        for step in range(1, self.steps + 1):
            values = {"cost/seconds": step * 1.5, "cost/trained_tokens": step * 4000.0}
            flop = step * 1e9 * rl["samples_per_prompt"]
            values |= {"cost/generated_tokens": step * 9000.0, "cost/flop": flop}
            is_rl = "rl" in names and step > first
            values |= {"rl/reward": 0.5} if is_rl else {"loss/sft": 1.0}
            lines.append({"step": step, **values})
        _lines(run / "metrics.jsonl", lines)
        start = self.outcome("base", tokens)
        if first:
            start = self.outcome("sft", tokens)
            self.evaluate(run, first, tokens, start, seed, only_headline=True)
        if "rl" in names:
            middle = (first + self.steps) // 2
            halfway = start.between(end, self.halfway)
            self.evaluate(run, middle, tokens, halfway, seed, only_headline=True)
        self.evaluate(run, self.steps, tokens, end, seed)
        return run

    def evaluate(
        self,
        run: Path,
        iteration: int,
        tokens: int,
        outcome: Outcome,
        seed: int,
        *,
        only_headline: bool = False,
        suite: str = "math",
    ) -> None:
        generator = np.random.default_rng((seed, iteration, len(run.name)))
        difficulty = np.random.default_rng(7).permutation(self.questions) / self.questions
        chance = np.where(difficulty < outcome.coverage, outcome.mean / outcome.coverage, 0.0)
        correct = generator.binomial(SAMPLES, chance)
        items = [
            {"id": f"test/{q}", "samples": SAMPLES, "correct": int(c), "truncated": 0}
            for q, c in enumerate(correct)
        ]
        metrics = {
            f"pass_at_{k}": sum(pass_at_k(SAMPLES, int(c), k) for c in correct) / self.questions
            for k in (1, 8, 32)
        }
        write = self._writer(run, iteration, tokens)
        write(suite, "pass_at_k", metrics, items, {"guessing": GUESSING})
        if only_headline:
            return
        for number, (name, kind) in enumerate(SUITES.items()):
            difficulty = np.random.default_rng(11 + number).permutation(self.tests) / self.tests
            right = difficulty < outcome.accuracy
            answers = [{"id": f"t/{q}", "correct": bool(r)} for q, r in enumerate(right)]
            write(name, kind, {"accuracy": float(right.mean())}, answers, {})
        texts = [{"id": "text/0", "nll": outcome.nll, "tokens": 100}]
        write("general-text", "perplexity", {"nll": outcome.nll}, texts, {})

    def _writer(self, run: Path, iteration: int, tokens: int) -> Callable[..., None]:
        def write(suite: str, kind: str, metrics: Any, items: Any, more: dict[str, Any]) -> None:
            _json(
                run / "evaluations" / f"iter_{iteration:08d}.{suite}.json",
                {
                    "format": 1,
                    "suite": suite,
                    "kind": kind,
                    "iteration": iteration,
                    "trunk_tokens": tokens,
                    "metrics": metrics,
                    "standard_errors": dict.fromkeys(metrics),
                    "items": items,
                    "settings": {},
                    "seconds": 1.0,
                    **more,
                },
            )

        return write


def _lineage(seed: int) -> dict[str, Any]:
    return {
        "parent": None,
        "recipe": None,
        "seed": seed,
        "trunk_tokens": 0,
        "restored": [],
        "reset": [],
        "versions": {},
        "started": "2026-01-01T00:00:00Z",
    }


def _json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def _lines(path: Path, lines: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
