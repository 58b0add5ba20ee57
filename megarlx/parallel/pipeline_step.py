"""One rank's part of a pipeline step: a list of actions, done one after another.

A buffer is made when its receive is posted and dropped when it has been used, so memory follows the
micro-batches in flight, not their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from megarlx.comm.collectives import CollectiveError, Pending, start_receive, start_send
from megarlx.comm.groups import Group
from megarlx.parallel.microbatches import Loss, Microbatch, Results, call_stage
from megarlx.parallel.pipeline_actions import Actions
from megarlx.parallel.pipeline_plan import PipelinePlan

Exchanged = Literal["hidden", "gradient"]
Place = tuple[Exchanged, int, int]  # what, the stage that takes it, the micro-batch


class PipelineStep:
    """All ranks make one with the same plan and number of micro-batches, and run it."""

    def __init__(
        self,
        stages: Sequence[nn.Module],  # those of plan.stages_of(group.rank), in that order
        plan: PipelinePlan,
        group: Group,
        parts: Sequence[Microbatch],
        loss: Loss | None,
        *,
        shape: torch.Size,  # of the hidden states between stages
        dtype: torch.dtype,
        device: torch.device,
        training: bool,
        stage_is_complete: Callable[[int], None] | None,
    ) -> None:
        held = plan.stages_of(group.rank)
        self.stages = dict(zip(held, stages, strict=True))
        self.plan, self.group, self.parts, self.loss = plan, group, parts, loss
        self.shape, self.dtype, self.device = shape, dtype, device
        self.training, self.stage_is_complete = training, stage_is_complete
        self.what = "pipeline forward and backward" if training else "pipeline forward"
        self.results = Results()
        self.last = plan.stages - 1
        self.kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}  # input and output
        self.there: dict[Place, Tensor | tuple[Tensor, Pending]] = {}
        self.to_send: dict[Place, Tensor] = {}
        self.sends: deque[Pending] = deque()
        self.weights_left = dict.fromkeys(held, len(parts))
        self.last_exchange = dict.fromkeys(held, "nothing exchanged yet")

    def run(self, actions: Actions) -> Results:
        do = {
            "forward": self._forward,
            "backward": self._backward,
            "backward_inputs": self._backward,  # the stage's own layers put their weights off
            "backward_weights": self._backward_weights,
            "send_hidden": lambda stage, part: self._send("hidden", stage, stage + 1, part),
            "send_gradient": lambda stage, part: self._send("gradient", stage, stage - 1, part),
            "receive_hidden": lambda stage, part: self._receive("hidden", stage, stage - 1, part),
            "receive_gradient": lambda stage, part: self._receive(
                "gradient", stage, stage + 1, part
            ),
        }
        try:
            for kind, stage, part in actions:
                do[kind](stage, part)
            self._wait_for_sends(0)
        except CollectiveError:
            raise
        except Exception as error:
            where = f"{self._where()} on rank {self.group.global_rank}"
            error.add_note(f"in {where} at step {self.group.traffic.step}")
            raise
        return self.results

    def _forward(self, stage: int, part: int) -> None:
        hidden = None if stage == 0 else self._take("hidden", stage, part)
        if self.training and hidden is not None:
            hidden.requires_grad_()
        output = call_stage(self.stages[stage], hidden, self.parts[part], self.loss)
        if stage == self.last:
            output = self.results.take(output, needs_loss=self.training)
        elif output.shape != self.shape or output.dtype != self.dtype:
            raise ValueError(
                f"pipeline: a stage returned {list(output.shape)} {output.dtype}; the next stage "
                f"was promised {list(self.shape)} {self.dtype}"
            )
        if self.training:
            self.kept[stage, part] = hidden, output
        if stage < self.last:
            self._hand_on("hidden", stage, stage + 1, part, output.detach())

    def _backward(self, stage: int, part: int) -> None:
        hidden, output = self.kept.pop((stage, part))
        gradient = None if stage == self.last else self._take("gradient", stage, part)
        torch.autograd.backward(output, gradient)
        if hidden is not None:
            used = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
            self._hand_on("gradient", stage, stage - 1, part, used)

    def _backward_weights(self, stage: int, part: int) -> None:
        for module in self.stages[stage].modules():
            add_weight_gradient = getattr(module, "backward_dw", None)
            if add_weight_gradient is not None:
                add_weight_gradient()
        self.weights_left[stage] -= 1
        if self.weights_left[stage] == 0 and self.stage_is_complete is not None:
            self.stage_is_complete(list(self.stages).index(stage))

    def _hand_on(self, what: Exchanged, stage: int, to: int, part: int, value: Tensor) -> None:
        if to in self.stages:
            self.there[what, to, part] = value
        else:
            self.to_send[what, to, part] = value

    def _take(self, what: Exchanged, stage: int, part: int) -> Tensor:
        found = self.there.pop((what, stage, part))
        if isinstance(found, Tensor):
            return found
        buffer, pending = found
        pending.wait()
        return buffer.to(self.device)

    def _send(self, what: Exchanged, stage: int, to: int, part: int) -> None:
        value = self.to_send.pop((what, to, part))
        rank = self.plan.rank_of(to)
        self._note(stage, f"send the {what} of micro-batch {part} to", rank)
        operation = f"send_{what}"
        self.sends.append(start_send(value, self.group, rank, operation, self._where()))
        # However far a neighbour is behind, little of what it was sent is kept here.
        self._wait_for_sends(2 * self.plan.stages)

    def _wait_for_sends(self, under_way: int) -> None:
        while len(self.sends) > under_way:
            self.sends.popleft().wait()

    def _receive(self, what: Exchanged, stage: int, source: int, part: int) -> None:
        rank = self.plan.rank_of(source)
        self._note(stage, f"receive the {what} of micro-batch {part} from", rank)
        self.there[what, stage, part] = start_receive(
            self.shape, self.dtype, self.device, self.group, rank, self._where()
        )

    def _note(self, stage: int, exchange: str, rank: int) -> None:
        global_rank = self.group.ranks[rank]
        self.last_exchange[stage] = f"last began to {exchange} global rank {global_rank}"

    def _where(self) -> str:
        exchanges = (f"stage {stage} {text}" for stage, text in self.last_exchange.items())
        return f"{self.what} ({'; '.join(exchanges)})"
