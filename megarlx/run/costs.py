"""What a run has cost so far: seconds, tokens, arithmetic; and the tokens of all its ancestors."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from megarlx.comm.hardware import gpu_named
from megarlx.config import Config
from megarlx.config.objectives import PRETRAINING
from megarlx.training.trainer import Trainer


class Costs:
    def __init__(self, config: Config, trainer: Trainer, inherited: Mapping[str, int]) -> None:
        """`inherited`: tokens by objective that the ancestors had trained on."""
        self.config, self.trainer, self.inherited = config, trainer, dict(inherited)
        self.seconds = 0.0
        self._last = self._totals()

    def _totals(self) -> dict[str, float]:
        """Since this run began, on all ranks together; they all call it."""
        self.trainer.replicas.share_counts()
        trained = {name: float(tokens) for name, tokens in self.trainer.tokens.items()}
        generated = forwarded = 0.0
        for objective in self.trainer.objectives.values():
            generated += objective.work.generated_tokens
            forwarded += objective.work.forward_tokens
        a_token = self.config.model.flops_per_token(self.config.training.sequence_length)
        forwards = generated + forwarded  # a third of what training does with a token
        return {
            "trained_tokens": sum(trained.values()),
            "generated_tokens": generated,
            "flop": a_token * (sum(trained.values()) + forwards / 3),
        }

    def since_last(self, seconds: float) -> dict[str, float]:
        """What the last `seconds` were spent on; to be called once for each piece of time."""
        now = self._totals()
        spent = {key: value - self._last[key] for key, value in now.items()}
        self._last = now
        self.seconds += seconds
        return spent

    def metrics(self) -> dict[str, float]:
        return {"cost/seconds": self.seconds} | {f"cost/{k}": v for k, v in self._last.items()}

    @property
    def trunk_tokens(self) -> int:
        """Of pre-training, ancestors' included, as this rank knows it without asking others."""
        own = self.trainer.tokens.get(PRETRAINING)
        return self.inherited.get(PRETRAINING, 0) + (0 if own is None else int(own))

    def tokens(self) -> dict[str, int]:
        self.trainer.replicas.share_counts()
        found = dict(self.inherited)
        for name, tokens in self.trainer.tokens.items():
            found[name] = found.get(name, 0) + int(tokens)
        return found

    def state(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seconds = float(state["seconds"])
        self._last = self._totals()


def peak_flop_per_second(device: torch.device) -> float:
    """What MFU is measured against: a GPU's data sheet in bf16, or this machine's own sgemm."""
    if device.type == "cuda":
        known = gpu_named(torch.cuda.get_device_name(device))
        return math.inf if known is None else known.flops
    a = torch.randn(512, 512)
    torch.mm(a, a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / min(times)
