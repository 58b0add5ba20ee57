"""Learning-rate courses: where they start, turn and end."""

import pytest

from megarlx.config.sections import OptimizerConfig
from megarlx.training.learning_rate import learning_rate

STEPS = 100


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_warm_up_rises_to_the_full_rate_and_the_end_is_the_final_fraction(
    schedule: str, warmup: int
) -> None:
    config = OptimizerConfig(lr=2.0, schedule=schedule, warmup_steps=warmup, final_lr_fraction=0.1)
    rates = [learning_rate(config, STEPS)(step) for step in range(STEPS)]
    rising = rates[: warmup + 1]
    assert rising == sorted(rising)
    assert rates[0] > 0
    assert rates[warmup] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)


def test_wsd_is_stable_until_its_last_steps() -> None:
    config = OptimizerConfig(lr=1.0, schedule="wsd", decay_steps=20, final_lr_fraction=0.0)
    rates = [learning_rate(config, STEPS)(step) for step in range(STEPS)]
    assert rates[:81] == [1.0] * 81
    assert rates[81] < 1.0
    assert rates[-1] == 0.0


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine", final_lr_fraction=0.0)
    assert learning_rate(config, 101)(50) == pytest.approx(0.5)


def test_a_rate_past_the_last_step_stays_at_the_end() -> None:
    config = OptimizerConfig(lr=1.0, schedule="linear", final_lr_fraction=0.25)
    assert learning_rate(config, STEPS)(10 * STEPS) == pytest.approx(0.25)
