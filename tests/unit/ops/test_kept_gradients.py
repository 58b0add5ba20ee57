"""Kept gradients by logits, and a chunk's loss beside the next product: nothing else changes.

Letters: T tokens, d hidden, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from distill_cases import case
from test_loss_seam import of_sequences
from torch import Tensor

from megarlx.config.model import family_config
from megarlx.model.transformer import Stage
from megarlx.ops import Head, LossInputs, TokenLoss, beside, linear_distill_loss
from megarlx.ops.beside import Beside, InTurn
from megarlx.ops.linear_token_loss import linear_token_loss
from megarlx.ops.loss_spec import LossSpec
from megarlx.ops.policy_loss import NATIVE, reinforce

T, D, V = 23, 5, 31
SPECS = {
    "nll": LossSpec("nll", z_loss=0.3),
    "ppo_clip": LossSpec("ppo_clip", kl="k3", kl_coefficient=0.2, entropy_coefficient=0.1),
    "function": LossSpec(reinforce, z_loss=0.1),
    "sequences": LossSpec(of_sequences, kl="k1", kl_coefficient=0.2),
}


def given(spec: LossSpec, tokens: int = T) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, D).requires_grad_(), normal(V, D).requires_grad_()
    inputs = {
        "targets": torch.randint(0, V, (tokens,), generator=generator),
        "mask": torch.rand(tokens, generator=generator) > 0.3,
        "advantages": None if spec.mode == "nll" else normal(tokens),
        "token_weights": normal(tokens).abs(),
        "sequence": torch.arange(tokens) // 6,
        "sequences": 1 + tokens // 6,
    }
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        inputs[name] = normal(tokens) / 2 - math.log(V)
    return hidden, weight, inputs


def found(spec: LossSpec, *, into: bool = False, fill: float | None = None, **options: Any) -> Any:
    """(loss, log-probs, entropy, metrics, gradients); `fill` is what masked hidden rows hold."""
    hidden, weight, inputs = given(spec)
    if fill is not None:
        masked = ~inputs["mask"][:, None]
        hidden = hidden.detach().masked_fill(masked, fill).requires_grad_()
    buffer = torch.full_like(weight, 2.0).detach() if into else None
    common = {"normalizer": 4.0, "temperature": 0.9, "weight_grad_": buffer, **inputs, **options}
    result = linear_token_loss(hidden, weight, spec=spec, **common)
    result.loss.backward()
    return (*result, hidden.grad, weight.grad if buffer is None else buffer)


def assert_same(a: Any, b: Any, bound: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=False)


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("drop_masked", [False, True])
@pytest.mark.parametrize("final_cap", [None, 3.0])
@pytest.mark.parametrize("name", SPECS)
def test_kept_gradients_change_nothing_but_rounding(
    name: str, final_cap: float | None, drop_masked: bool, into: bool
) -> None:
    spec = SPECS[name]
    options = {"final_cap": final_cap, "drop_masked": drop_masked, "into": into}
    for rows in (1, 4, 7, 1000):
        kept, plain = (
            found(spec, rows_per_chunk=rows, kept_gradients_mib=mib, **options) for mib in (1, 0)
        )
        assert_same(kept, plain)
        if rows >= T:
            assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_masked_hidden_rows_stay_out_of_a_kept_product(name: str) -> None:
    options = {"rows_per_chunk": 4, "kept_gradients_mib": 1, "drop_masked": False}
    spoilt = found(SPECS[name], fill=math.nan, **options)
    assert_same(spoilt, found(SPECS[name], fill=0.0, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_gradients_in_lower_precision(dtype: torch.dtype) -> None:
    for name in ("nll", "function"):
        hidden, weight, inputs = given(SPECS[name])
        inputs |= {
            k: v.float() for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()
        }
        gradients = []
        for mib in (0, 1):
            x, w = (one.detach().to(dtype).requires_grad_() for one in (hidden, weight))
            loss = linear_token_loss(
                x, w, spec=SPECS[name], normalizer=4.0, rows_per_chunk=4,
                kept_gradients_mib=mib, **inputs,
            ).loss  # fmt: skip
            gradients.append(torch.autograd.grad(loss, (x, w)))
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        for a, b in zip(*gradients, strict=True):
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_kept_gradients_of_a_divergence(kl: str) -> None:
    gradients = []
    for mib in (0, 1):
        made = case(rows_per_chunk=4, final_cap=3.0)
        head = made.head()
        object.__setattr__(head, "kept_gradients_mib", mib)
        linear_distill_loss(head, made.teachers, kl=kl, **made.rest).loss.backward()
        gradients.append((made.hidden.grad, made.weight.grad))
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("wrong", [-1, 1.0, None, "1"])
def test_what_is_no_number_of_mib_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"kept_gradients_mib is .*; allowed: an integer >= 0"):
        found(SPECS["nll"], kept_gradients_mib=wrong)


def test_a_stage_tells_its_loss_what_may_be_kept() -> None:
    shape = {"hidden_size": 8, "layers": 1, "heads": 1, "intermediate_size": 8}
    config = family_config("olmo2", vocab_size=V, **shape)
    stage = Stage(config, kept_gradients_mib=3).initialise_(0)
    tokens, told = torch.arange(6)[None], []

    def loss(head: Head, inputs: LossInputs) -> TokenLoss:
        told.append(head.kept_gradients_mib)
        return head.token_loss(inputs, LossSpec(), normalizer=6, rows_per_chunk=2)

    stage(tokens, loss_inputs=LossInputs(tokens), loss=loss).sum().backward()
    assert told == [3]


# A chunk's loss beside the next chunk's product.


class Late:
    """The second stream is as slow as can be: work is done when it is waited for."""

    parts = 2

    def begin(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work


class Early(InTurn):
    """It is as fast as can be."""

    parts = 2


@pytest.mark.parametrize("mib", [0, 1])
@pytest.mark.parametrize("final_cap", [None, 3.0])
@pytest.mark.parametrize("order", [Late, Early])
@pytest.mark.parametrize("name", ["function", "sequences"])
def test_when_the_second_stream_works_changes_nothing(
    name: str, order: type, final_cap: float | None, mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (2, 3, 4, 7, 12, 1000):
        options = {"rows_per_chunk": rows, "final_cap": final_cap, "kept_gradients_mib": mib}
        plain = found(SPECS[name], **options)
        with monkeypatch.context() as patch:
            patch.setattr(beside, "order", lambda *_, order=order: nullcontext(order()))
            other = found(SPECS[name], **options)
        assert_same(other, plain)


class OnCard:
    """Of hidden rows what the order is chosen by."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return 9


class Stream:
    """Of a card that is not there: what it was told, in one list for all."""

    told: list[tuple[Any, ...]]
    names = itertools.count()

    def __init__(self, *_: Any) -> None:
        self.name = f"stream {next(self.names)}"

    def wait_stream(self, other: "Stream") -> None:
        self.told.append((self.name, "waits for all of", other.name))

    def record_event(self) -> str:
        event = f"event {len(self.told)}"
        self.told.append((self.name, "records", event))
        return event

    def wait_event(self, event: str) -> None:
        self.told.append((self.name, "waits for", event))


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    main = Stream()
    monkeypatch.setattr(Stream, "told", [], raising=False)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        Stream.told.append((stream.name, "begins"))
        yield
        Stream.told.append((stream.name, "ends"))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    beside._second.cache_clear()
    yield main
    beside._second.cache_clear()


def test_work_is_between_what_was_launched_and_what_waits_for_it(main: Stream) -> None:
    with beside.order(OnCard(), 4) as order:
        assert isinstance(order, Beside)
        second = order.second.name
        ends = [order.begin(lambda: Stream.told.append(("work",)) or "result") for _ in range(2)]
        assert ends[0]() == "result"
    one = [
        (second, "waits for all of", main.name),
        (second, "begins"),
        ("work",),
        (second, "ends"),
    ]
    expected = [*one, (second, "records", "event 4"), *one, (second, "records", "event 9")]
    assert Stream.told == [*expected, (main.name, "waits for", "event 4")]


def test_what_fails_half_way_frees_nothing_that_the_second_stream_uses(main: Stream) -> None:
    def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError), beside.order(OnCard(), 4) as order:
        order.begin(fails)
    assert Stream.told[-1] == (main.name, "waits for all of", order.second.name)


def test_no_second_stream_without_a_second_chunk_and_bf16_on_a_card(main: Stream) -> None:
    on_cpu, wide = torch.zeros(9, 4).bfloat16(), OnCard(torch.float32)
    for hidden, rows in ((on_cpu, 4), (wide, 4), (OnCard(), 9), (OnCard(), 1)):
        with beside.order(hidden, rows) as order:
            assert isinstance(order, InTurn)
    assert not Stream.told


def test_native_chunks_may_take_turns() -> None:
    """Equal to the function's, whose turns are tested above; emulated, native chunks do too."""
    settings = {"kl": "k3", "kl_coefficient": 0.1}
    for mib in (0, 1):
        options = {"rows_per_chunk": 4, "kept_gradients_mib": mib}
        native = found(LossSpec("ppo_clip", **settings), **options)
        function = found(LossSpec(NATIVE["ppo_clip"], settings=LossSpec(), **settings), **options)
        assert_same(native, function)
