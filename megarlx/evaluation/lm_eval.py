"""megarlx models for lm-eval (lm-evaluation-harness): everybody else's tasks, on any layout.

Needs the package lm_eval. Every rank runs the whole harness and gets all scores: the data-parallel
ranks share the work of each call, and lm-eval knows of one process only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megarlx.data.tokenizer import Tokenizer
from megarlx.evaluation.capability import score_texts, windows
from megarlx.evaluation.sampled import gathered
from megarlx.generation.interface import generator_of
from megarlx.generation.requests import Request, SamplingSettings
from megarlx.generation.stop import text_of
from megarlx.model.build import ParallelModel
from megarlx.model.token_scores import Text

NEW_TOKENS = 256  # where a task does not say: lm-eval's own number


class MegarlxLM(TemplateLM):
    def __init__(
        self,
        model: ParallelModel,
        tokenizer: Tokenizer,
        *,
        tokens_per_pass: int = 4096,
        slots: int = 64,
        seed: int = 0,
        generator: str = "engine",
    ) -> None:
        super().__init__()
        self.generator = generator
        self.model, self.words = model, tokenizer
        self.tokens_per_pass, self.slots, self.seed = tokens_per_pass, slots, seed

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.start_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's cache keys."""
        return f"{self.words.name}-{self.words.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self.words.encode(string)
        return ids if add_special_tokens is False else self.words.begun(ids)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        texts = []
        for _strings, before, after in requests:
            ids = [*before, *after]
            cut = max(0, len(ids) - self.max_length - 1)
            texts.append(Text(ids[cut:], max(1, len(before) - cut)))
        found = score_texts(self.model, texts, tokens_per_pass=self.tokens_per_pass)
        answers = [(score.logprob, score.likeliest) for score in found]
        for (strings, _before, _after), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        parts = [
            windows([self.prefix_token_id, *self.words.encode(request.args[0])], self.max_length)
            for request in requests
        ]
        scores = iter(
            score_texts(
                self.model,
                [window for held in parts for window in held],
                tokens_per_pass=self.tokens_per_pass,
            )
        )
        answers = [sum(next(scores).logprob for _ in held) for held in parts]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """All requests with the same settings are generated together."""
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(at)
        found: dict[int, str] = {}
        for places in groups.values():
            settings = requests[places[0]].args[1]
            texts = self._generated([requests[i].args[0] for i in places], settings)
            found.update(zip(places, texts, strict=True))
        for at, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[at])
        return [found[at] for at in range(len(requests))]

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        new = int(settings.get("max_gen_toks", settings.get("max_new_tokens", NEW_TOKENS)))
        room = self.max_length - new
        if new < 1 or room < 1:
            raise ValueError(
                f"lm_eval: max_gen_toks is {new}; model.max_sequence_length allows 1 to "
                f"{self.max_length - 1}"
            )
        drawn = settings.get("do_sample", float(settings.get("temperature", 0.0)) > 0)
        sampling = SamplingSettings(
            temperature=float(settings.get("temperature", 1.0)) if drawn else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            top_k=int(settings.get("top_k", 0)),
            stop_tokens=(self.eot_token_id,),
            stop_strings=stops,
        )
        prompts = [(self.tok_encode(c) or [self.prefix_token_id])[-room:] for c in contexts]
        dp = self.model.mesh.dp
        generator = generator_of(
            self.generator,
            self.model,
            slots=min(self.slots, -(-len(prompts) // dp.size)),
            longest=max(map(len, prompts)) + new,
            detokenize=self.words.decode_sampled,
        )
        mine = range(dp.rank, len(prompts), dp.size)
        asked = [Request(prompts[i], (i,), new) for i in mine]
        completions = generator.generate(asked, sampling, self.seed) if asked else []
        texts = [
            text_of(c.tokens.tolist(), sampling, self.words.decode_sampled) for c in completions
        ]
        return gathered(texts, len(prompts), dp)
