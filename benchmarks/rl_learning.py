"""Does reinforcement learning learn? Sums of two numbers, of which one way to answer is rewarded.

python benchmarks/rl_learning.py [--seeds 0 1 2] [--json PATH] [--markdown PATH]

The start checkpoint is trained here, on the sums of all pairs, each answered in every one of
FORMATS: it knows how to add, and answers in the rewarded format about once in FORMATS. RL then
sees three quarters of the pairs and their sums, and no answer of anybody. The rest is held out: on
it pass@1 is measured, as the mean over samples at temperature 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timing import Row, add_outputs, machine, write_json

from megarlx.checkpoint import Saver
from megarlx.comm.groups import Mesh
from megarlx.config.model import family_config
from megarlx.config.objectives import RlConfig
from megarlx.data.conversations import Conversation, Frames, Turn
from megarlx.data.loader import BatchLayout, Loader
from megarlx.data.packing import ConversationData
from megarlx.data.prompts import Prompt, PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.generation.requests import SamplingSettings
from megarlx.model.build import ParallelModel, build_model
from megarlx.objectives.policy import Reinforcement
from megarlx.objectives.supervised import Supervised
from megarlx.rollouts.player import Player, Start
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rollout import Sampler
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

FORMATS = ("#### {}", "= {}", "is {}", "so {}", "answer {}", "result {}", "{}", "says {} !")
SAMPLES = 32  # of each held-out question
TEMPLATE = Frames("question : {content} answer :")


@dataclass(frozen=True)
class Task:
    """Sums of two numbers below `largest`."""

    largest: int = 10

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for a in range(self.largest) for b in range(self.largest)]

    @property
    def tokenizer(self) -> WordTokenizer:
        words = {word: None for form in FORMATS for word in form.format("").split()}
        numbers = map(str, range(2 * self.largest - 1))
        return WordTokenizer(
            list(dict.fromkeys([*["question", ":", "+", "answer"], *words, *numbers]))
        )

    @property
    def conversations(self) -> list[Conversation]:
        return [
            Conversation((Turn("user", f"{a} + {b}"), Turn("assistant", form.format(a + b))))
            for a, b in self.pairs
            for form in FORMATS
        ]

    def prompts(self, *, held_out: bool) -> list[Prompt]:
        order = random.Random(5).sample(self.pairs, len(self.pairs))
        border = len(order) // 4
        chosen = order[:border] if held_out else order[border:]
        return [Prompt(f"{a} + {b}", str(a + b)) for a, b in chosen]


def model_of(task: Task, seed: int) -> ParallelModel:
    config = family_config(
        "olmo2",
        vocab_size=task.tokenizer.vocab_size,
        hidden_size=64,
        layers=2,
        heads=2,
        intermediate_size=160,
        max_sequence_length=64,
    )
    return build_model(config, Mesh.alone(), seed=seed)


def train_start(task: Task, steps: int, seed: int, folder: Path) -> Path:
    """The checkpoint that RL starts from."""
    data = ConversationData(
        task.conversations, TEMPLATE, task.tokenizer, 64, seed, demonstrations="all"
    )
    loader = Loader(data, BatchLayout(32, 32), prefetch_steps=0)
    peak, warmup = 5e-3, 20

    def rate(step: int) -> float:
        return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))

    member = TrainedObjective(Supervised("sft", loader), UpdateSettings(weight_decay=0.01), rate)
    trainer = Trainer(model_of(task, seed), [TrainingStage([member], combine="single")])
    for _ in range(steps):
        trainer.step()
    saver = Saver(folder, trainer.mesh.world)
    trainer.save(saver, {}, blocking=True)
    assert saver.last is not None
    return saver.last.path


def reinforcement(task: Task, model: ParallelModel, config: RlConfig, seed: int) -> Reinforcement:
    tokenizer = task.tokenizer
    engine = Engine.of(model, slots=config.slots, longest=32)
    prompts = PromptData(task.prompts(held_out=False), TEMPLATE, tokenizer, seed)
    game = QuestionGame(Rewards(config.rewards), config.max_completion_tokens, model.mesh)
    player = Player(lambda: engine, game, tokenizer)
    sampler = Sampler(config, player, prompts, model.mesh.dp, seed)
    return Reinforcement("rl", config, model, sampler)


def pass_at_1(task: Task, objective: Reinforcement, seed: int) -> float:
    """On the held-out questions, by the objective's own engine and rewards."""
    sampler, tokenizer = objective.sampler, task.tokenizer
    assert isinstance(sampler, Sampler)
    questions = PromptData(task.prompts(held_out=True), TEMPLATE, tokenizer, seed)
    drawn = questions.take(len(questions.prompts))
    starts = [
        Start(
            one.number,
            tuple(range(one.number * SAMPLES, (one.number + 1) * SAMPLES)),
            one.prompt,
            one.ids,
        )
        for one in drawn
    ]
    settings = SamplingSettings(stop_tokens=(tokenizer.eos_id,))
    found = sampler.player.play(starts, settings, 1_000_003 + seed, sampler.group)
    return sum(one.reward() for one in found) / len(found)


def rl_config(prompts: int, samples: int) -> RlConfig:
    return RlConfig.model_validate(
        {
            "prompts_per_step": prompts,
            "samples_per_prompt": samples,
            "max_completion_tokens": 8,
            "tokens_per_microbatch": 2048,
            "rewards": [{"function": "marked_answer", "workers": 0}],
        }
    )


@dataclass(frozen=True)
class Outcome:
    seed: int
    before: float
    after: float
    seconds: float  # of RL
    rewards: list[float]  # of each step, on the questions that were drawn


def learn(
    task: Task, start: Path, config: RlConfig, *, steps: int, lr: float, seed: int
) -> Outcome:
    model = model_of(task, seed)
    objective = reinforcement(task, model, config, seed)
    adam = UpdateSettings(weight_decay=0.0)
    member = TrainedObjective(objective, adam, lambda step: lr * min(1.0, (step + 1) / 5))
    trainer = Trainer(model, [TrainingStage([member], combine="single")])
    trainer.start_from(start)
    before, rewards = pass_at_1(task, objective, seed), []
    begun = time.perf_counter()
    for _ in range(steps):
        trainer.step()
        rewards.append(objective.metrics()["rl/reward"])
    seconds = time.perf_counter() - begun
    return Outcome(seed, before, pass_at_1(task, objective, seed), seconds, rewards)


def report(found: Sequence[Outcome], start_seconds: float, arguments: argparse.Namespace) -> str:
    pairs, questions = len(Task().pairs), len(Task().prompts(held_out=True))
    lines = [
        "# Reinforcement learning from a start checkpoint",
        "",
        f"Command: `python {' '.join(sys.argv)}`",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in machine().items()),
        "",
        f"Sums of two numbers below {Task().largest}, {len(FORMATS)} ways to answer, one of them "
        f"rewarded. The start checkpoint ({arguments.start_steps} supervised steps on all {pairs} "
        f"sums in all formats, {start_seconds:.0f} s here) knows the sums and answers in any "
        f"format. Then {arguments.steps} steps of GRPO, {arguments.prompts} questions of "
        f"{arguments.samples} samples each, lr {arguments.lr:g}, without the {questions} "
        f"held-out questions. On those: pass@1 at temperature 1, {SAMPLES} samples of each. The "
        "seed is that of the questions' order and of all samples.",
        "",
        "| seed | held-out pass@1 before | after | seconds of RL | reward, steps 1–5 | last 5 |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        first, last = sum(one.rewards[:5]) / 5, sum(one.rewards[-5:]) / 5
        numbers = (one.before, one.after, one.seconds, first, last)
        texts = [f"{x:.1f}" if x is one.seconds else f"{x:.3f}" for x in numbers]
        lines.append(f"| {one.seed} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, ""])


def rows(found: Sequence[Outcome]) -> list[Row]:
    return [
        {
            "name": "held-out pass@1 after RL",
            "size": f"seed {one.seed}, {one.seconds:.1f} s",
            "ours": one.after,
            "baseline": one.before,
            "baseline_name": "start checkpoint",
            "ratio": one.after / one.before,
            "unit": "pass@1",
        }
        for one in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    add_outputs(parser)
    arguments = parser.parse_args()
    task, config = Task(), rl_config(arguments.prompts, arguments.samples)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        start = train_start(task, arguments.start_steps, 0, Path(folder))
        start_seconds = time.perf_counter() - begun
        found = []
        for seed in arguments.seeds:
            found.append(
                learn(task, start, config, steps=arguments.steps, lr=arguments.lr, seed=seed)
            )
            one = found[-1]
            print(f"seed {seed}: {one.before:.3f} -> {one.after:.3f} in {one.seconds:.1f} s")
    text = report(found, start_seconds, arguments)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    if arguments.json is not None:
        write_json(arguments.json, machine(), rows(found))


if __name__ == "__main__":
    main()
