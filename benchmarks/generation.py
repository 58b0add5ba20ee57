"""Generation on a CPU: ours and transformers' generate, and the arithmetic of it, in one run.

Same weights, prompts, lengths and batch; every round times each once and a 1024³ product and a copy
beside them, so that all meet the same machine. Nothing stops early: no stop token is set.

    python benchmarks/generation.py [--sizes 0.2M 2M 10M] [--batches 1 8 32 128 512]
        [--new-tokens 96] [--rounds 5] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peers import olmo2_of_transformers
from timing import Row, add_outputs, machine, row, shown, write_results
from training import SIZES

from megarlx.config.model import ModelConfig
from megarlx.generation.engine import Engine
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.model.transformer import Stage

PROMPT_TOKENS, SAMPLES_PER_PROMPT = 32, 8


def flop(c: ModelConfig, batch: int, new_tokens: int) -> float:
    """2 · (non-embedding parameters + head) a token, and attention over what is cached."""
    seen = PROMPT_TOKENS + (new_tokens + 1) / 2
    a_token = 2.0 * (c.non_embedding_parameters() + c.vocab_size * c.hidden_size)
    a_token += c.layers * 4 * c.heads * c.head_dim * seen
    prompts = -(-batch // SAMPLES_PER_PROMPT)
    return batch * new_tokens * a_token + prompts * PROMPT_TOKENS * 2.0 * (
        c.non_embedding_parameters()
    )


def bytes_read(c: ModelConfig, batch: int, new_tokens: int) -> float:
    """Every weight once a step, and every cached key and value."""
    seen = PROMPT_TOKENS + (new_tokens + 1) / 2
    cached = 2 * c.layers * c.kv_heads * c.head_dim * seen * batch
    return 4.0 * new_tokens * (c.non_embedding_parameters() + cached)


def measure(name: str, c: ModelConfig, batch: int, new_tokens: int, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    per_prompt = min(batch, SAMPLES_PER_PROMPT)
    prompts = torch.randint(c.vocab_size, (-(-batch // per_prompt), PROMPT_TOKENS))
    ids = iter(range(batch))
    requests = [
        Request(prompt, [next(ids) for _ in range(per_prompt)], new_tokens)
        for prompt in prompts.tolist()
    ]
    stage = Stage(c).initialise_(0)
    engine = Engine([stage], slots=batch, longest=PROMPT_TOKENS + new_tokens)
    settings = SamplingSettings()
    repeated, theirs = prompts.repeat_interleave(per_prompt, 0), olmo2_of_transformers(c).eval()
    attended = torch.ones_like(repeated)

    def their_generate() -> None:
        out = theirs.generate(
            repeated, attention_mask=attended, max_new_tokens=new_tokens, do_sample=True, top_k=0
        )
        assert out.shape == (batch, PROMPT_TOKENS + new_tokens)

    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: engine.generate(requests, settings, 0),
        "transformers": their_generate,
        "sgemm": lambda: torch.mm(a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    taken: dict[str, list[float]] = {key: [] for key in functions}
    for number in range(rounds + 1):
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            if number:  # the first round is a warm-up
                taken[key].append(time.perf_counter() - start)
    label = f"{name} ({c.parameters() / 1e6:.2f}M), {batch} × {new_tokens} new tokens"
    tokens = batch * new_tokens
    rate = {key: tokens / statistics.median(taken[key]) for key in ("ours", "transformers")}
    faster = statistics.median(
        x / y for x, y in zip(taken["transformers"], taken["ours"], strict=True)
    )
    rows = [row("generate", label, rate["ours"], rate["ours"] / faster, "transformers", "tokens/s")]
    # The least time: the larger of arithmetic at the sgemm rate and reading at the copy rate.
    bounds = [
        max(
            flop(c, batch, new_tokens) * g / (2 * 1024**3),
            bytes_read(c, batch, new_tokens) * m / (2 * 4 * (1 << 24)),
        )
        for g, m in zip(taken["sgemm"], taken["copy"], strict=True)
    ]
    share = statistics.median(x / y for x, y in zip(bounds, taken["ours"], strict=True))
    rows.append(
        row(
            "share of the floor",
            label,
            rate["ours"],
            rate["ours"] / share,
            "larger of sgemm and copy",
            "tokens/s",
        )
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.2M", "2M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a case")
    add_outputs(parser)
    options = parser.parse_args()
    facts = machine()
    rows: list[Row] = []
    for name in options.sizes:
        for batch in options.batches:
            config = SIZES[name].model
            for found in measure(name, config, batch, options.new_tokens, options.rounds):
                rows.append(shown(found))
    write_results(options, "Generation on a CPU", facts, rows)


if __name__ == "__main__":
    main()
