"""The pipeline against the same model in one process, in fp64.

p  ranks    v  stages on each rank    m  micro-batches
B  rows of tokens in a step    S  tokens of a row    H  hidden    V  vocabulary
"""

from __future__ import annotations

import gc
import itertools
import os
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarlx.comm.collectives import CollectiveError, all_reduce_
from megarlx.comm.groups import Mesh
from megarlx.ops import LossInputs
from megarlx.ops.delayed_linear import DelayedGradients, delayed_linear
from megarlx.parallel.microbatches import Microbatch, Results, call_stage
from megarlx.parallel.pipeline import Pipeline
from megarlx.parallel.pipeline_plan import PipelinePlan

HIDDEN, VOCABULARY = 6, 11
KINDS = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2)]
GRID = [(p, schedule, v) for p in (2, 4) for schedule, v in KINDS]


class HeadLoss(torch.autograd.Function):
    """Loss from hidden states and head with both gradients made in forward, as the fused op does.

    Backward only scales what was saved, so it may run twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Any:
        logprobs = torch.log_softmax((hidden @ head.T).float() if hidden.dtype == torch.bfloat16
                                     else hidden @ head.T, -1)  # fmt: skip
        chosen = logprobs.gather(-1, targets[..., None])[..., 0]
        onto = F.one_hot(targets, head.shape[0]).to(logprobs.dtype)
        grad = (weights[..., None] * (logprobs.exp() - onto)).to(hidden.dtype)
        ctx.save_for_backward(grad @ head, grad.flatten(0, -2).T @ hidden.flatten(0, -2))
        ctx.mark_non_differentiable(chosen)
        return -(weights * chosen).sum().reshape(1), chosen

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _chosen: Tensor) -> Any:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * upstream, grad_head * upstream, None, None


class Product(nn.Module):
    """A linear layer as the model's: where backward is split its weight's gradient is put off."""

    def __init__(self, seed: int, *shape: int, dtype: torch.dtype, delays: bool) -> None:
        super().__init__()
        self.weight = parameter(seed, *shape, dtype=dtype)
        self.delayed = DelayedGradients() if delays else None

    def forward(self, x: Tensor) -> Tensor:
        if self.delayed is None:
            return F.linear(x, self.weight)
        return delayed_linear(x, self.weight, None, self.delayed)

    def backward_dw(self) -> None:
        if self.delayed is not None:
            self.delayed.add_oldest(self.weight)


class Layer(nn.Module):
    def __init__(self, number: int, dtype: torch.dtype, delays: bool) -> None:
        super().__init__()
        self.norm = parameter(10 * number, HIDDEN, dtype=dtype)
        options: Any = {"dtype": dtype, "delays": delays}
        self.qkv = Product(10 * number + 1, 3 * HIDDEN, HIDDEN, **options)
        self.up = Product(10 * number + 2, 8, HIDDEN, **options)
        self.down = Product(10 * number + 3, HIDDEN, 8, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(F.rms_norm(x, (HIDDEN,), self.norm)).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(~mask, -torch.inf)
        x = x + scores.softmax(-1) @ v
        return x + self.down(torch.tanh(self.up(x)))


class Stage(nn.Module):
    """A stage of a small transformer; the whole of it when it is given all layers."""

    def __init__(
        self,
        layers: tuple[int, int],
        first: bool,
        last: bool,
        dtype: torch.dtype,
        tied: bool,
        delays: bool = False,
    ) -> None:
        super().__init__()
        self.first_layer = layers[0]
        if first:
            self.embedding = parameter(1, VOCABULARY, HIDDEN, dtype=dtype)
        self.layers = nn.ModuleList(Layer(number, dtype, delays) for number in range(*layers))
        if last:
            tied_here = tied and first
            self.head = (
                self.embedding if tied_here
                else parameter(1 if tied else 2, VOCABULARY, HIDDEN, dtype=dtype)
            )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        loss_inputs: LossInputs,
        documents: Tensor | None = None,
        **others: Any,
    ) -> Any:
        assert others == {"longest": None, "positions": None, "loss": None}
        x = self.embedding[x] if hasattr(self, "embedding") else x
        length = x.shape[1]
        position = torch.arange(length)
        mask = position[:, None] >= position
        if documents is not None:  # [documents + 1], padded with the length
            document = torch.searchsorted(documents, position, right=True)
            mask = mask & (document[:, None] == document)
        for layer in self.layers:
            x = layer(x, mask)
        if not hasattr(self, "head"):
            return x
        targets, weights = loss_inputs.targets, loss_inputs.token_weights
        loss, logprobs = HeadLoss.apply(x, self.head, targets, weights)
        return loss, {"logprobs": logprobs}

    def named_globally(self) -> dict[str, nn.Parameter]:
        names = {}
        for name, value in self.named_parameters():
            parts = name.split(".")
            if parts[0] == "layers":
                parts[1] = str(int(parts[1]) + self.first_layer)
            names[".".join(parts)] = value
        return names


def parameter(seed: int, *shape: int, dtype: torch.dtype) -> nn.Parameter:
    """The same values in every layout."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter((values / shape[-1] ** 0.5).to(dtype))


def batch(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(VOCABULARY, (rows, length), generator=draw),
        "targets": torch.randint(VOCABULARY, (rows, length), generator=draw),
        "weights": torch.randn(rows, length, generator=draw, dtype=torch.float64),
        "normalizer": torch.tensor(float(rows * length), dtype=torch.float64),
    }


def split(inputs: dict[str, Any], count: int) -> list[Microbatch]:
    """The rows in equal parts; documents are one row's."""
    scaled = inputs["weights"] / inputs["normalizer"]
    parts = zip(
        *(t.chunk(count) for t in (inputs["tokens"], inputs["targets"], scaled)), strict=True
    )
    documents = inputs.get("cu_seqlens", [None] * count)
    return [
        Microbatch(tokens, LossInputs(targets, token_weights=weights), offsets)
        for (tokens, targets, weights), offsets in zip(parts, documents, strict=True)
    ]


def in_one_piece(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    result: tuple[Tensor, dict[str, Tensor]] = call_stage(model, None, split(inputs, 1)[0], None)
    return result


class Rank:
    """This process's stages and pipeline."""

    def __init__(
        self,
        p: int,
        schedule: str,
        v: int,
        *,
        layers: int | None = None,
        layers_per_stage: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float64,
        tied: bool = False,
        timeout_seconds: float = 20.0,
        stage: Any = Stage,
        mesh: Mesh | None = None,
    ) -> None:
        self.mesh = mesh or Mesh.build(pp=p, timeout_seconds=timeout_seconds)
        self.plan = PipelinePlan.make(
            layers or p * v + 1,
            p,
            schedule,
            v,
            layers_per_stage,  # type: ignore[arg-type]
        )
        end = self.plan.stages - 1
        self.held = self.plan.stages_of(self.mesh.pp.rank)
        delays = self.plan.splits_backward
        self.stages = [
            stage(self.plan.layers[s], s == 0, s == end, dtype, tied, delays) for s in self.held
        ]
        self.pipeline = Pipeline(
            self.stages, self.plan, self.mesh.pp, hidden_shape=lambda shape: (*shape, HIDDEN),
            dtype=dtype,
        )  # fmt: skip
        self.buffer = preset_gradients(self.stages)

    def parameters(self) -> list[nn.Parameter]:
        return [p for stage in self.stages for p in stage.parameters()]


def preset_gradients(stages: list[Any]) -> Tensor:
    """Every `.grad` a view of one zeroed buffer, as data parallelism has it."""
    parameters = list(dict.fromkeys(p for stage in stages for p in stage.parameters()))
    dtype = torch.float32 if parameters[0].dtype == torch.bfloat16 else parameters[0].dtype
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype)
    for p, view in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        p.grad_dtype = dtype
        p.grad = view.view_as(p)
    return buffer


def reference(layers: int, inputs: dict[str, Any]) -> tuple[Stage, Tensor, Tensor]:
    """The whole model over the whole batch in one piece: model, loss, log-probs."""
    model = Stage((0, layers), True, True, torch.float64, tied=False)
    loss, outputs = in_one_piece(model, inputs)
    loss.sum().backward()
    return model, loss.detach(), outputs["logprobs"]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check_results(rank: Rank, results: Results, loss: Tensor, logprobs: Tensor, m: int) -> None:
    if not rank.pipeline.holds_last_stage:
        assert results == Results()
        return
    assert [list(one.shape) for one in results.losses] == [[1]] * m
    assert difference(sum(results.losses, torch.zeros(1)), loss) < 1e-12
    together = torch.cat([outputs["logprobs"] for outputs in results.outputs])
    assert difference(together, logprobs) < 1e-12
    assert not any(one.requires_grad for one in [*results.losses, together])


def check_gradients(rank: Rank, model: Stage) -> None:
    expected = dict(model.named_parameters())
    for stage in rank.stages:
        for name, value in stage.named_globally().items():
            assert difference(value.grad, expected[name].grad) < 1e-12, name
            base = rank.buffer.untyped_storage().data_ptr()
            assert value.grad.untyped_storage().data_ptr() == base, f"{name}: grad was replaced"


def equals_one_process(p: int, schedule: str, v: int) -> list[int]:
    rank = Rank(p, schedule, v)
    counts = [m for m in (1, 2, 3, 4, 8) if rank.plan.allows(m)]
    for m in counts:
        # Evaluation before, between and after training steps, and two lengths in turn.
        for seed, (rows, length) in enumerate([(2 * m, 5), (m, 3), (2 * m, 5)]):
            inputs = batch(rows, length, seed)
            model, loss, logprobs = reference(rank.plan.layers[-1][1], inputs)
            check_results(
                rank, rank.pipeline.forward_only(split(inputs, m), None), loss, logprobs, m
            )
            rank.buffer.zero_()
            results = rank.pipeline.forward_backward(split(inputs, m), None)
            check_results(rank, results, loss, logprobs, m)
            check_gradients(rank, model)
        check_results(rank, rank.pipeline.forward_only(split(inputs, 1), None), loss, logprobs, 1)
    return counts


@pytest.mark.parametrize(("p", "schedule", "v"), [(1, "1f1b", 1), *GRID])
def test_losses_and_gradients_are_those_of_one_process(run, p, schedule, v):
    for counts in run(p, equals_one_process, p, schedule, v):
        assert {1, 2, 4, 8} <= set(counts)


def uneven_equals_one_process(schedule: str, v: int, layers_per_stage: tuple[int, ...]) -> None:
    rank = Rank(
        2, schedule, v, layers=sum(layers_per_stage), layers_per_stage=layers_per_stage
    )  # fmt: skip
    inputs = batch(4, 5)
    model, loss, logprobs = reference(sum(layers_per_stage), inputs)
    check_results(rank, rank.pipeline.forward_backward(split(inputs, 4), None), loss, logprobs, 4)
    check_gradients(rank, model)


@pytest.mark.parametrize(
    ("schedule", "v", "layers_per_stage"),
    [
        ("1f1b", 1, (3, 1)), ("1f1b", 1, (0, 2)), ("interleaved", 2, (1, 3, 2, 0)),
        ("zero_bubble", 1, (3, 0)), ("zero_bubble", 2, (0, 1, 2, 1)), ("zbv", 2, (0, 2, 1, 0)),
    ],
)  # fmt: skip
def test_uneven_splits_change_nothing(run, schedule, v, layers_per_stage):
    run(2, uneven_equals_one_process, schedule, v, layers_per_stage)


def gradients_when_ready(schedule: str, v: int, m: int) -> list[tuple[bool, int]]:
    """For each parameter as it became ready: was its gradient final, how many others were not."""
    rank = Rank(2, schedule, v)
    inputs = batch(m, 5)
    rank.pipeline.forward_backward(split(inputs, m), None)
    final = {p: p.grad.clone() for p in rank.parameters()}
    seen: list[tuple[nn.Parameter, bool, int]] = []

    def ready(parameter: nn.Parameter) -> None:
        behind = sum(not torch.equal(p.grad, final[p]) for p in final)
        seen.append((parameter, torch.equal(parameter.grad, final[parameter]), behind))

    for _ in range(2):  # the hooks of the first step must be gone in the second
        rank.buffer.zero_()
        seen.clear()
        rank.pipeline.forward_backward(split(inputs, m), None, on_gradient_ready=ready)
        assert len(seen) == len(final)
        assert {p for p, _, _ in seen} == set(final)
    kept = weakref.ref(ready)
    del ready
    gc.collect()
    assert kept() is None  # no hook is left on a parameter
    return [(complete, behind) for _, complete, behind in seen]


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_each_gradient_is_announced_once_when_final_and_before_the_last_ones_are(
    run, schedule, v, m
):
    for seen in run(2, gradients_when_ready, schedule, v, m):
        assert all(complete for complete, _ in seen)
        # Overlap is possible: when the first is announced others are still to come. A split
        # schedule announces stage by stage, so that needs two stages on the rank.
        if v == 2 or schedule == "1f1b":
            assert seen[0][1] > 0


def unused_parameter_is_announced(schedule: str, v: int) -> None:
    rank = Rank(2, schedule, v)
    for stage in rank.stages:
        stage.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        stage.unused.grad = torch.zeros(3, dtype=torch.float64)
    seen: list[nn.Parameter] = []
    rank.pipeline.forward_backward(split(batch(4, 5), 4), None, on_gradient_ready=seen.append)
    assert len(seen) == len(set(seen)) == len(rank.parameters())


@pytest.mark.parametrize(("schedule", "v"), [("1f1b", 1), ("zero_bubble", 2)])
def test_a_parameter_no_microbatch_used_is_announced_too(run, schedule, v):
    run(2, unused_parameter_is_announced, schedule, v)


def packed_equals_separate(schedule: str, v: int) -> None:
    rank = Rank(2, schedule, v)
    # Four micro-batches of one row; documents of 7 tokens in all, cu_seqlens padded with 7.
    edges = [[0, 3, 7, 7], [0, 7, 7, 7], [0, 2, 4, 7], [0, 1, 7, 7]]
    inputs = batch(4, 7)
    parts = split({**inputs, "cu_seqlens": torch.tensor(edges)}, 4)
    results = rank.pipeline.forward_backward(parts, None)
    model = Stage((0, rank.plan.layers[-1][1]), True, True, torch.float64, tied=False)
    logprobs = []
    for row, row_edges in enumerate(edges):
        for start, end in itertools.pairwise(row_edges):
            if start < end:
                part = {k: t[row : row + 1, start:end] for k, t in inputs.items() if t.ndim}
                loss, outputs = in_one_piece(model, {**inputs, **part})
                loss.sum().backward()
                logprobs.append(outputs["logprobs"])
    check_gradients(rank, model)
    if rank.pipeline.holds_last_stage:
        together = torch.cat([outputs["logprobs"] for outputs in results.outputs])
        assert difference(together.view(-1), torch.cat(logprobs, 1).view(-1)) < 1e-12


@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_packed_documents_travel_with_their_microbatch(run, schedule, v):
    run(2, packed_equals_separate, schedule, v)


def tied_gradients(schedule: str, v: int) -> float:
    rank = Rank(2, schedule, v, tied=True)
    return max(tied_difference(rank, m) for m in (2, 4))


def tied_difference(rank: Rank, m: int) -> float:
    inputs = batch(m, 5)
    if rank.plan.schedule == "zbv" and rank.mesh.pp.rank == 0:  # both ends: one parameter
        rank.stages[1].head = rank.stages[0].embedding
    rank.buffer = preset_gradients(rank.stages)
    announced: list[nn.Parameter] = []
    rank.pipeline.forward_backward(split(inputs, m), None, on_gradient_ready=announced.append)
    assert len(announced) == len(set(announced)) == len(set(rank.parameters()))
    own = [
        value for stage in rank.stages for name, value in stage.named_parameters()
        if name in ("embedding", "head")
    ]  # fmt: skip
    # The reduction of data parallelism, before its reduce-scatter: over the embedding group.
    total = sum({id(p): p.grad for p in own}.values(), torch.zeros(VOCABULARY, HIDDEN).double())
    all_reduce_(total, rank.mesh.embedding)
    model = Stage((0, rank.plan.layers[-1][1]), True, True, torch.float64, tied=True)
    in_one_piece(model, inputs)[0].sum().backward()
    return difference(total, model.embedding.grad)


@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_tied_weights_add_up_over_first_and_last_stage(run, schedule, v):
    assert max(run(2, tied_gradients, schedule, v)) < 1e-12


def bfloat16_gradients(p: int, schedule: str, v: int, m: int) -> dict[str, Tensor]:
    rank = Rank(p, schedule, v, layers=5, dtype=torch.bfloat16)
    inputs = batch(2 * m, 5)
    inputs["weights"] = inputs["weights"].bfloat16()
    inputs["normalizer"] = inputs["normalizer"].bfloat16()
    for _ in range(2):
        rank.buffer.zero_()
        rank.pipeline.forward_backward(split(inputs, m), None)
    assert all(p.grad.dtype == torch.float32 for p in rank.parameters())
    named = {name: p for stage in rank.stages for name, p in stage.named_globally().items()}
    return {name: p.grad.clone() for name, p in named.items()}


@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_bfloat16_gradients_add_up_in_fp32_bit_for_bit_as_on_one_rank(run, schedule, v):
    (alone,) = run(1, bfloat16_gradients, 1, "1f1b", 1, 4)
    parts = run(2, bfloat16_gradients, 2, schedule, v, 4)
    merged = {name: grad for part in parts for name, grad in part.items()}
    assert merged.keys() == alone.keys()
    assert all(torch.equal(merged[name], alone[name]) for name in alone)
    assert any(not torch.equal(g, g.bfloat16().float()) for g in alone.values())


def bytes_of_calls(p: int, schedule: str, v: int, m: int) -> list[dict[str, tuple[int, int]]]:
    rank = Rank(p, schedule, v)
    inputs = batch(2 * m, 5)
    counts = []
    calls = [rank.pipeline.forward_backward] * 2 + [rank.pipeline.forward_only] * 2
    for call in calls:
        rank.mesh.traffic.reset()
        call(split(inputs, m), None)
        counts.append({op: (c.calls, c.bytes) for (_, op), c in rank.mesh.traffic.counts.items()})
    return counts


@pytest.mark.parametrize(("p", "schedule", "v"), GRID)
def test_bytes_sent_are_those_of_the_formula(run, p, schedule, v):
    m, message = 4, 2 * 5 * HIDDEN * 8
    plan = PipelinePlan.make(p * v + 1, p, schedule, v)
    all_counts = run(p, bytes_of_calls, p, schedule, v, m)
    total = [0, 0]
    for rank, (first, second, first_evaluation, second_evaluation) in enumerate(all_counts):
        forward, backward = plan.sends_per_step(rank, m)
        hidden = {"send_hidden": (forward, forward * message)} if forward else {}
        gradient = {"send_gradient": (backward, backward * message)} if backward else {}
        assert second == hidden | gradient
        assert second_evaluation == hidden
        assert (first, first_evaluation) == (second, second_evaluation)
        total = [total[0] + forward, total[1] + backward]
    crossings = p * v - 1 - (schedule == "zbv")
    assert total == [crossings * m] * 2


class Transposed(Stage):
    """The gradient of its input has the strides of a transposed tensor."""

    def forward(self, x: Tensor, **fields: Any) -> Any:
        if x.is_floating_point():
            x = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        return super().forward(x, **fields)


class Expanded(Stage):
    """The gradient of the last stage's input is one number seen everywhere: strides of zero."""

    def forward(self, x: Tensor, **fields: Any) -> Any:
        return x.sum().reshape(1) if hasattr(self, "head") else super().forward(x, **fields)


def any_strides(schedule: str, v: int) -> None:
    inputs = batch(4, 5)
    rank = Rank(2, schedule, v, stage=Transposed)
    rank.pipeline.forward_backward(split(inputs, 2), None)
    check_gradients(rank, reference(rank.plan.layers[-1][1], inputs)[0])

    rank = Rank(2, schedule, v, stage=Expanded, mesh=rank.mesh)
    rank.pipeline.forward_backward(split(inputs, 2), None)
    before_last = 2 * v - 2
    assert before_last not in rank.held or all(
        p.grad.norm() > 0 for p in rank.stages[rank.held.index(before_last)].parameters()
    )


@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_gradients_of_any_strides_can_be_sent(run, schedule, v):
    run(2, any_strides, schedule, v)


def exchanged_tensors(p: int, schedule: str, v: int) -> tuple[int, int, int]:
    """Tensors of the hidden states' shape alive in the middle of a step, near its end, after."""
    rank = Rank(p, schedule, v)
    inputs = batch(32, 13)
    rank.pipeline.forward_backward(split(inputs, 32), None)  # makes the schedule
    seen: list[int] = []

    def alive() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.shape == (1, 13, HIDDEN) for o in gc.get_objects())

    calls = 0
    for stage in rank.stages:
        plain = stage.forward

        def counted(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls in (14 * v, 30 * v):
                seen.append(alive())
            return plain(*args, **kwargs)

        stage.forward = counted
    rank.pipeline.forward_backward(split(inputs, 32), None)
    return seen[0], seen[1], alive()


@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_what_is_exchanged_is_kept_for_microbatches_in_flight_only(run, schedule, v):
    for middle, late, afterwards in run(2, exchanged_tensors, 2, schedule, v):
        assert late <= middle + 2  # 16 micro-batches later
        assert afterwards == 0


class ScoresOnly(Stage):
    def forward(self, x: Tensor, **fields: Any) -> Any:
        output = super().forward(x, **fields)
        return output[1] if isinstance(output, tuple) else output


def scores_only(p: int, schedule: str, v: int) -> list[Any]:
    rank = Rank(p, schedule, v, layers=4, stage=ScoresOnly)
    found = []
    for m in (1, 3, 5):
        results = rank.pipeline.forward_only(split(batch(15, 5), m), None)
        assert results.losses == []
        found.append(torch.cat([o["logprobs"] for o in results.outputs]) if results.outputs else 0)
    return found


@pytest.mark.parametrize(("schedule", "v"), KINDS)
def test_evaluation_needs_no_loss_and_takes_counts_that_training_refuses(run, schedule, v):
    (alone_found,) = run(1, scores_only, 1, "1f1b", 1)
    results = run(2, scores_only, 2, schedule, v)
    found = results[0] if schedule == "zbv" else results[1]
    assert all(
        torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(found, alone_found, strict=True)
    )


class Wrong(Stage):
    fault = ""
    stage_of_fault = 1

    def forward(self, x: Tensor, **fields: Any) -> Any:
        output = super().forward(x, **fields)
        last = isinstance(output, tuple)
        if self.fault == "shape" and not last:
            return output[:, :-1]
        if self.fault == "raises" and last:
            raise KeyError("no such field")
        if self.fault == "loss" and last:
            return output[0].sum()
        if self.fault == "no loss" and last:
            return output[1]
        return output


def meets_a_fault(fault: str, schedule: str, v: int) -> tuple[str, str, list[str]]:
    Wrong.fault = fault
    rank = Rank(2, schedule, v, timeout_seconds=1.0, stage=Wrong)
    rank.mesh.traffic.step = 17
    with pytest.raises((CollectiveError, KeyError, ValueError)) as error:
        rank.pipeline.forward_backward(split(batch(4, 5), 4), None)
    notes = getattr(error.value, "__notes__", [])
    return type(error.value).__name__, str(error.value), notes


@pytest.mark.parametrize(
    ("schedule", "fault", "rank", "kind", "message"),
    [
        ("1f1b", "raises", 1, "KeyError", "no such field"),
        ("zero_bubble", "raises", 1, "KeyError", "no such field"),
        ("1f1b", "shape", 0, "ValueError", "returned [1, 4, 6] torch.float64; the next stage was"),
    ],
)
def test_what_a_stage_raises_comes_out_as_it_was(run, schedule, fault, rank, kind, message):
    results = run(2, meets_a_fault, fault, schedule, 1)
    name, text, notes = results[rank]
    assert name == kind
    assert message in text
    assert f"on rank {rank} at step 17" in notes[0]
    other, text, _ = results[1 - rank]
    assert other == "CollectiveError"
    assert f"failed on rank {1 - rank} at step 17" in text


def alone(**overrides: Any) -> Rank:
    return Rank(1, "1f1b", 1, **overrides)


def test_micro_batches_that_do_not_go_together_are_refused():
    rank = alone()
    parts = split(batch(4, 5), 2)
    with pytest.raises(ValueError, match=r"tokens of the shapes \[\(1, 5\), \(2, 5\)\]; all must"):
        rank.pipeline.forward_backward([*parts, *split(batch(1, 5), 1)], None)
    for call in (rank.pipeline.forward_backward, rank.pipeline.forward_only):
        with pytest.raises(ValueError, match="there are 0 micro-batches; at least 1 is needed"):
            call([], None)


class Reentrant(Stage):
    """Adds to its layers' gradients twice in each backward."""

    def forward(self, x: Tensor, **fields: Any) -> Any:
        hidden = self.embedding[x]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        for _ in range(2):
            hidden = checkpoint(self.layers[0], hidden, mask, use_reentrant=True)
        return (hidden @ self.head.T).sum().reshape(1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("loss", r"loss has the shape \[\]; it must be \[1\]"),
        ("no loss", "'logprobs'. and no loss"),
    ],
)
def test_a_last_stage_without_a_loss_is_refused(monkeypatch, fault, message):
    monkeypatch.setattr(Wrong, "fault", fault)
    with pytest.raises(ValueError, match=message):
        alone(stage=Wrong).pipeline.forward_backward(split(batch(4, 5), 4), None)


def test_a_gradient_that_grows_after_it_was_announced_is_an_error():
    rank = alone(stage=Reentrant)
    with pytest.raises(
        RuntimeError, match=r"shape \[\d+.*\] was added to after .* of 2 micro-batch"
    ):
        rank.pipeline.forward_backward(
            split(batch(2, 5), 2), None, on_gradient_ready=lambda _: None
        )


def test_modules_that_do_not_fit_the_plan_are_refused():
    group = Mesh.alone().pp
    options: Any = {"hidden_shape": tuple, "dtype": torch.float64}
    with pytest.raises(ValueError, match=r"holds the stages \(0,\), but was given 2 modules"):
        Pipeline([nn.Identity()] * 2, PipelinePlan.make(2, 1), group, **options)
    with pytest.raises(ValueError, match="plan is for 2 ranks; group 'pp' has 1"):
        Pipeline([nn.Identity()], PipelinePlan.make(2, 2), group, **options)


LIMIT_SECONDS = 1.0


def meets_a_bad_peer(p: int, schedule: str, v: int, peer: str, step: int) -> Any:
    rank = Rank(p, schedule, v, timeout_seconds=LIMIT_SECONDS)
    inputs = batch(p, 5)
    bad = rank.mesh.pp.rank == 1
    for number in range(step):
        rank.mesh.traffic.step = number
        rank.pipeline.forward_backward(split(inputs, p), None)
    rank.mesh.traffic.step = step
    dist.barrier()
    if bad and peer == "killed":
        os._exit(1)
    if bad:
        time.sleep(2 * LIMIT_SECONDS)
        return None
    begin = time.monotonic()
    with pytest.raises(CollectiveError) as error:
        rank.pipeline.forward_backward(split(inputs, p), None)
    return time.monotonic() - begin, str(error.value)


@pytest.mark.parametrize(
    ("schedule", "v", "peer", "step"),
    [
        ("1f1b", 1, "stuck", 1), ("1f1b", 1, "killed", 1),
        ("interleaved", 2, "stuck", 0), ("interleaved", 2, "stuck", 1), ("zbv", 2, "killed", 1),
    ],
)  # fmt: skip
def test_a_bad_peer_is_an_error_on_its_neighbours_within_the_limit(run, schedule, v, peer, step):
    results = run(
        2, meets_a_bad_peer, 2, schedule, v, peer, step, may_die=[1] if peer == "killed" else []
    )
    seconds, message = results[0]
    assert seconds < LIMIT_SECONDS + 1.0
    assert "pipeline forward and backward (stage 0" in message
    assert f"over pp failed on rank 0 at step {step}" in message
    if step == 1:
        assert "of micro-batch" in message
        assert "global rank 1" in message
