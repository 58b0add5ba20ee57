"""Parallel averaging without the trainer: two losses of one model, each with its own Adam state.

python docs/examples/average.py
"""

import torch

from megarlx.ops import average_adamw_


def main(steps: int = 200) -> tuple[float, float]:
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    one, other = inputs @ torch.randn(8, 1), inputs @ torch.randn(8, 1)
    model = torch.nn.Linear(8, 1, bias=False)
    master = model.weight.detach().reshape(-1).clone()  # a flat buffer of all weights
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(master) for _ in range(2)] for _ in range(2))
    done = torch.zeros(2, dtype=torch.int64)

    def gradient(target: torch.Tensor) -> tuple[float, torch.Tensor]:
        loss = (model(inputs) - target).square().mean()
        (found,) = torch.autograd.grad(loss, [model.weight])
        return loss.item(), found.reshape(-1)

    for _ in range(steps):
        (first, g1), (second, g2) = gradient(one), gradient(other)
        # θ ← θ + 0.8 Δ_1 + 0.2 Δ_2, where each Δ is AdamW's update with moments of its own.
        average_adamw_(
            master,
            [g1, g2],
            exp_avgs,
            exp_avg_sqs,
            lrs=[1e-2, 1e-2],
            steps=done,
            weights=[0.8, 0.2],
        )
        with torch.no_grad():
            model.weight.copy_(master.view_as(model.weight))
    print(f"loss of the first {first:.3f}, of the second {second:.3f}")
    return first, second


if __name__ == "__main__":
    main()
