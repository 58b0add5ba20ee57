"""A log line says of each objective what is known of it; times are readable."""

from __future__ import annotations

import itertools
import re

import pytest
from test_watch import CONFIG

from megarlx.config import Config
from megarlx.run.messages import OF_POLICY, headline
from megarlx.units import duration

SPEED = {"perf/tokens_per_second": 12_345.6, "perf/mfu": 0.25}


def with_kl(kl: str) -> Config:
    rl = CONFIG.named_objectives["rl"]
    policy = rl.policy.model_copy(update={"kl": kl})
    return CONFIG.model_copy(update={"rl": rl.model_copy(update={"policy": policy})})


@pytest.mark.parametrize("kl", ["none", "k3"])
@pytest.mark.parametrize(
    "known", [c for n in range(6) for c in itertools.combinations(range(5), n)], ids=str
)
def test_a_line_of_policy_optimisation_has_what_is_known(known: tuple[int, ...], kl: str) -> None:
    """A divergence only where one is asked for: else the metric is 0 and says nothing."""
    values = {f"rl/{OF_POLICY[i][0]}": 0.5 for i in known}
    text = headline(with_kl(kl), ["rl"], {"loss/rl": 0.0, **values, **SPEED}, 0.0)
    said = re.findall(r"(\S+) [\d.]+%?(?:  |$)", text)
    labels = [OF_POLICY[i][1] for i in known if OF_POLICY[i][0] != "kl" or kl != "none"]
    assert said[: len(labels) + 1] == ["loss", *labels]
    assert text.endswith("12,346 tokens/s  mfu 0.25")


def test_objectives_of_names_of_their_own_are_told_apart() -> None:
    values = {"loss/second": 0.25, "rl/reward": 0.1, "rl/second/reward": 0.9, **SPEED}
    text = headline(CONFIG, ["second"], values, 90.0)
    assert "reward 0.900" in text
    assert "0.100" not in text
    assert text.endswith("  90 s left")


def test_times_grow_in_words_as_in_seconds() -> None:
    units = {"s": 1, "min": 60, "h": 3600, "days": 86400}
    for seconds in (0.0, 3.2, 9.99, 10, 99, 100, 3599, 5999, 6000, 1e5, 1.7e5, 1.8e5, 1e7):
        number, unit = duration(seconds).split()
        assert float(number) * units[unit] == pytest.approx(seconds, rel=0.05, abs=0.1)
