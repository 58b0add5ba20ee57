"""Our loss and gradient against those of TRL's GRPOTrainer on the same tensors."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from policy_cases import MAX_COMPLETION_TOKENS, Rectangle, ours, rectangle
from torch import Tensor

from megarlx.config.policy import PolicyConfig

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # ours, TRL's
    "grpo": (
        {"preset": "grpo", "clip_high": 0.3},
        {"loss_type": "grpo", "epsilon_high": 0.3, "beta": 0.04},
    ),
    "dapo": ({"preset": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo_capped": (
        {"preset": "dapo", "importance_cap": 1.2},
        {"loss_type": "dapo", "epsilon_high": 0.28, "cap": 1.2},
    ),
    "dr_grpo": ({"preset": "dr_grpo"}, {"loss_type": "dr_grpo"}),
    "gspo": (
        {"preset": "gspo", "clip_low": 0.05, "clip_high": 0.04},
        {"loss_type": "grpo", "level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.04},
    ),
    "cispo": ({"preset": "cispo", "clip_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": ({"loss": "sapo", "aggregation": "sequence_mean"}, {"loss_type": "sapo"}),
    "entropy": (
        {"entropy_coefficient": 0.3},
        {"loss_type": "dapo", "entropy_coef": 0.3},
    ),
    "sequence_mask": ({"sequence_mask": 0.05}, {"loss_type": "dapo", "mask_threshold": 0.05}),
}


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    module = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    return module.GRPOTrainer


def trls(
    trainer_class: Any,
    case: Rectangle,
    *,
    loss_type: str,
    level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    cap: float | None = None,
    entropy_coef: float = 0.0,
    mask_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The trainer's method with the few attributes that it reads; no model, no data, no run."""
    logits = case.logits.detach().requires_grad_()
    state = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            case.logprobs(logits),
            case.entropy(logits),
            None,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=False
        ),
        args=SimpleNamespace(
            use_bias_correction_kl=False,
            delta=None,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=mask_threshold,
        get_off_policy_mask=trainer_class.get_off_policy_mask,
        importance_sampling_level=level,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        max_completion_length=MAX_COMPLETION_TOKENS,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=entropy_coef != 0,
        entropy_coef=entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": case.ids[:, :0],
        "prompt_mask": case.ids[:, :0],
        "completion_ids": case.ids,
        "completion_mask": case.written.long(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
        "sampling_per_token_logps": case.rollout,
        "num_items_in_batch": case.written.sum(),
    }
    if cap is not None:
        inputs["importance_sampling_ratio"] = (case.old - case.rollout).exp().clamp_max(cap)
    loss = trainer_class._compute_loss(state, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", CASES)
def test_trl_computes_the_same_loss_and_gradient(name: str, trainer_class: Any) -> None:
    settings, theirs = CASES[name]
    case = rectangle()
    loss, gradient = ours(PolicyConfig(**settings), case)
    expected, expected_gradient = trls(trainer_class, case, **theirs)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-12)
    # and the comparison would see a difference
    moved = replace(case, old=case.old + 0.3 * case.written)
    assert not torch.allclose(trls(trainer_class, moved, **theirs)[1], gradient, rtol=1e-6)
