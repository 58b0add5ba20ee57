"""One whole GRPO step on a CPU: ours and TRL's GRPOTrainer, interleaved in one run, each in a
process of its own: beside TRL in one process our step takes up to three times as long.

Same model shape, prompts, group size, reward and limit of the completion's length; no completion
ends before the limit in either, so both do the same work. A step is: generate, score, advantages,
log-probs where needed, forward and backward, AdamW.

    python benchmarks/rl_step.py [--sizes 0.2M 2M] [--prompts 16] [--samples 8] [--new-tokens 96]
        [--rounds 5] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from peers import olmo2_of_transformers
from timing import Row, add_outputs, machine, row, shown, write_results
from training import SIZES

from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig
from megarlx.config.objectives import RlConfig
from megarlx.config.reward import RewardConfig
from megarlx.data.conversations import Frames
from megarlx.data.prompts import Prompt, PromptData
from megarlx.data.tokenizer import WordTokenizer
from megarlx.generation.engine import Engine
from megarlx.model.build import ParallelModel, build_model
from megarlx.objectives.policy import Reinforcement
from megarlx.rollouts.player import Player
from megarlx.rollouts.question_game import QuestionGame
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample
from megarlx.rollouts.rollout import Sampler
from megarlx.training.parts import UpdateSettings
from megarlx.training.trainer import TrainedObjective, Trainer, TrainingStage

PROMPT_TOKENS = 24


def even_words(samples: list[Sample]) -> list[float]:
    """A reward that differs within groups: the share of words with an even number."""
    return [_even(sample.completion) for sample in samples]


def _even(text: str) -> float:
    words = text.split()
    return sum(word[1:].isdecimal() and int(word[1:]) % 2 == 0 for word in words) / len(words)


@dataclasses.dataclass(frozen=True)
class Case:
    model: ModelConfig
    prompts: int
    samples: int
    new_tokens: int

    @property
    def words(self) -> list[str]:
        return [f"w{i}" for i in range(1, self.model.vocab_size)]

    def questions(self) -> list[str]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self.model.vocab_size, (256, PROMPT_TOKENS), generator=generator)
        return [" ".join(f"w{i}" for i in line) for line in ids.tolist()]

    def flop(self) -> float:
        """Of a step: sampling, and training on the samples; every prompt read once to sample."""
        model, n = self.model, self.prompts * self.samples
        length = PROMPT_TOKENS + self.new_tokens
        a_token = model.flops_per_token(length)
        generated = n * self.new_tokens + self.prompts * PROMPT_TOKENS
        return a_token * (n * length + generated / 3)


def policy(case: Case, model: ParallelModel) -> Reinforcement:
    """The objective of a step: nothing that is sampled ends before the limit."""
    tokenizer = WordTokenizer(case.words)
    config = RlConfig(
        prompts_per_step=case.prompts,
        samples_per_prompt=case.samples,
        max_completion_tokens=case.new_tokens,
        tokens_per_microbatch=8192,
        rewards=(RewardConfig(function="rl_step:even_words", workers=0),),
    )
    prompts = PromptData(
        [Prompt(question) for question in case.questions()],
        Frames(user="{content}"),
        tokenizer,
        seed=0,
    )
    engine = Engine.of(
        model, slots=case.prompts * case.samples, longest=PROMPT_TOKENS + case.new_tokens
    )
    game = QuestionGame(Rewards(config.rewards), config.max_completion_tokens, model.mesh)
    player = Player(lambda: engine, game, tokenizer)
    sampler = Sampler(config, player, prompts, model.mesh.dp, seed=0)
    sampler.sampling = dataclasses.replace(sampler.sampling, stop_tokens=())
    return Reinforcement("rl", config, model, sampler)


def our_step(case: Case, **options: Any) -> tuple[Callable[[], object], Reinforcement]:
    """`options` are those of `build_model`."""
    model = build_model(case.model, Mesh.alone(), seed=0, **options)
    objective = policy(case, model)
    trained = TrainedObjective(objective, UpdateSettings(weight_decay=0.0), lambda step: 1e-6)
    return Trainer(model, [TrainingStage([trained])]).step, objective


# Its defaults on a CPU recompute activations and multiply in emulated bf16.
BASELINES: dict[str, dict[str, Any]] = {
    "TRL GRPOTrainer, fp32": {"bf16": False, "gradient_checkpointing": False},
    "TRL GRPOTrainer, its defaults": {},
}


def with_trl(
    case: Case, settings: dict[str, Any], rounds: int, each: Callable[[], None]
) -> list[float]:
    """Runs `each` after every step of TRL's trainer; returns the seconds of its steps."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    vocabulary = {"<eos>": 0, **{word: i for i, word in enumerate(case.words, start=1)}}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    model = olmo2_of_transformers(case.model, end=0)
    taken: list[float] = []

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken.append(time.perf_counter() - self.start)
            each()

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        found: list[float | None] = [_even(completion or "w1") for completion in completions]
        return found

    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model,
            reward,
            GRPOConfig(
                folder,
                max_steps=rounds,
                per_device_train_batch_size=case.prompts * case.samples,
                num_generations=case.samples,
                max_completion_length=case.new_tokens,
                generation_kwargs={"min_new_tokens": case.new_tokens},
                beta=0.0,
                learning_rate=1e-6,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=Dataset.from_dict({"prompt": case.questions()}),
            processing_class=tokenizer,
            callbacks=[Timed()],
        ).train()
    return taken


def trl_process(case: Case, settings: dict[str, Any], rounds: int, connection: Connection) -> None:
    """Waits for a word before and after every step, so that only one process ever works."""

    def wait() -> None:
        connection.send(None)
        connection.recv()

    connection.send(with_trl(case, settings, rounds, wait))


def compare(name: str, case: Case, rounds: int) -> tuple[list[Row], dict[str, float]]:
    step, objective = our_step(case)
    ours: list[float] = []
    parts: dict[str, list[float]] = {}
    product: list[float] = []
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    processes: list[BaseProcess] = []
    for baseline, settings in BASELINES.items():
        connections[baseline], there = context.Pipe()
        arguments = (case, settings, rounds + 1, there)
        processes.append(context.Process(target=trl_process, args=arguments, daemon=True))
        processes[-1].start()
        there.close()  # so that the end of the process is seen here
        connections[baseline].recv()  # its first step, a warm-up
    theirs: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        step()
        ours.append(time.perf_counter() - start)
        for key, seconds in spent(objective).items():
            parts.setdefault(key, []).append(seconds)
        product.append(sgemm_seconds())
        for baseline, connection in connections.items():
            connection.send(None)
            if (said := connection.recv()) is not None:
                theirs[baseline] = said[1:]
    for process in processes:  # still busy ending, they would slow what is timed next
        process.join()
    ours, product = ours[1:], product[1:]
    label = f"{name}, {case.prompts} × {case.samples} × {case.new_tokens} tokens"
    median = statistics.median(ours)
    share = statistics.median(
        case.flop() / (2 * 1024**3) * p / o for p, o in zip(product, ours, strict=True)
    )
    rows = []
    for baseline, taken in theirs.items():
        faster = statistics.median(t / o for t, o in zip(taken, ours, strict=True))
        rows.append(row("GRPO step", label, median, median * faster, baseline, "s"))
    rows.append(
        row("share of sgemm", label, median, median * share, "arithmetic at the sgemm rate", "s")
    )
    split = {key: statistics.median(values[1:]) for key, values in parts.items()}
    split["train"] = median - sum(split.values())
    return rows, split


def spent(objective: Reinforcement) -> dict[str, float]:
    assert objective.current is not None
    metrics = objective.current.metrics
    return {
        "generate": metrics["perf/generate_seconds"],
        "reward": metrics["perf/reward_seconds"],
    }


_A, _B, _OUT = (torch.randn(1024, 1024) for _ in range(3))


def sgemm_seconds() -> float:
    start = time.perf_counter()
    torch.mm(_A, _B, out=_OUT)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.2M", "2M"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a case")
    add_outputs(parser)
    options = parser.parse_args()
    facts = machine()
    rows: list[Row] = []
    notes = (
        "## Where our time goes\n\n| size | " + " | ".join(("generate", "reward", "train")) + " |"
    )
    notes += "\n|---|---|---|---|\n"
    for name in options.sizes:
        model = SIZES[name].model
        case = Case(model, options.prompts, options.samples, options.new_tokens)
        found, split = compare(name, case, options.rounds)
        rows += map(shown, found)
        print("  " + "  ".join(f"{key} {seconds:.3f} s" for key, seconds in split.items()))
        cells = (f"{split[key]:.3f} s" for key in ("generate", "reward", "train"))
        notes += f"| {name} | " + " | ".join(cells) + " |\n"
    notes += "\n`train` is forward, backward and AdamW; one step on fresh samples needs no other\n"
    notes += "pass for log-probs.\n"
    write_results(options, "A GRPO step on a CPU", facts, rows, notes)


if __name__ == "__main__":
    main()
