"""What a stage computes must not depend on packing, caching, cutting or recomputing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import FAMILIES, small
from torch import Tensor

from megarlx.model.documents import Documents
from megarlx.model.kv_cache import CacheStep, PageTable
from megarlx.model.transformer import Stage
from megarlx.ops import Head, LossInputs


def summed_loss(head: Head, inputs: LossInputs) -> Any:
    """Stands for head.token_loss."""
    logits = F.linear(head.hidden, head.weight[: head.vocab_size])
    loss = F.cross_entropy(logits, inputs.targets.reshape(-1), reduction="sum")
    return SimpleNamespace(loss=loss)


def stage_of(family: str, **options: Any) -> Stage:
    return Stage(small(family), dtype=torch.float64, **options).initialise_(11)


def gradients(stage: Stage) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None}


def random_tokens(count: int) -> Tensor:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_packed_documents_are_the_sum_of_separate_ones(family: str) -> None:
    lengths = [5, 17, 33, 17, 1]
    tokens, targets = random_tokens(sum(lengths)), random_tokens(sum(lengths) + 1)[1:]
    packed, separate = stage_of(family), stage_of(family)
    learned = LossInputs(targets)
    documents = Documents.of(lengths)
    loss = packed(tokens, documents=documents, loss=summed_loss, loss_inputs=learned)
    assert loss.shape == (1,)
    loss.backward()
    total = torch.zeros(1, dtype=torch.float64)
    for part, target in zip(tokens.split(lengths), targets.split(lengths), strict=True):
        one = separate(part[None], loss=summed_loss, loss_inputs=LossInputs(target[None]))
        one.backward()
        total += one.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-12, atol=0)
    expected = gradients(separate)
    assert expected.keys() == dict(packed.named_parameters()).keys()
    for name, gradient in gradients(packed).items():
        assert (gradient - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_document_leaves_the_others_bits(family: str) -> None:
    stage = Stage(small(family)).initialise_(5)
    documents = Documents.of([12, 30, 21])
    tokens = random_tokens(63)
    changed = tokens.clone()
    changed[12:42] = (changed[12:42] + 1) % 97
    before, after = (stage(t, documents=documents) for t in (tokens, changed))
    assert torch.equal(before[:12], after[:12])
    assert torch.equal(before[42:], after[42:])
    assert not torch.equal(before[12:42], after[12:42])


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_no_gradient(family: str, recompute: Any) -> None:
    tokens, targets = random_tokens(40).view(2, 20), random_tokens(40).flip(0).view(2, 20)
    kept, again = stage_of(family), stage_of(family, recompute=recompute)
    for stage in (kept, again):
        stage(tokens, loss=summed_loss, loss_inputs=LossInputs(targets)).backward()
    expected = gradients(kept)
    for name, gradient in gradients(again).items():
        assert torch.equal(gradient, expected[name]), name


def test_recomputing_keeps_less_between_forward_and_backward() -> None:
    kept: dict[str, int] = {}
    for mode in ("none", "selective", "full"):
        stage = stage_of("qwen3", recompute=mode)
        seen: dict[int, int] = {}

        def pack(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = stage(random_tokens(160).view(2, 80))
        kept[mode] = sum(seen.values())
        hidden.sum().backward()
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_full_forward(family: str) -> None:
    stage = stage_of(family)
    lengths, new = [7, 1, 12], 9
    rows = [random_tokens(n + new) for n in lengths]
    full = [stage(row[None]) for row in rows]
    cache = stage.kv_cache(PageTable.of_slots(4, 32))
    slots = torch.tensor([2, 0, 3])
    with torch.no_grad():
        documents = Documents.of(lengths)
        step = CacheStep(
            cache, documents, slots, torch.zeros(3, dtype=torch.int64), max(lengths), fresh=True
        )
        prompt = torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
        out = stage(prompt, cache=step)
        starts = torch.tensor(lengths)
        expected = torch.cat([f[:n] for f, n in zip(full, lengths, strict=True)])
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        each_one = Documents.of([1, 1, 1])
        for position in range(new - 3):
            step = CacheStep(cache, each_one, slots, starts, max(lengths) + position + 1)
            token = torch.stack([r[n + position] for r, n in zip(rows, lengths, strict=True)])
            out = stage(token, cache=step)
            starts = starts + 1
            want = torch.stack([f[n + position] for f, n in zip(full, lengths, strict=True)])
            torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
        # and three tokens at once behind them, as after another turn of a conversation
        three = Documents.of([3, 3, 3])
        step = CacheStep(cache, three, slots, starts, max(lengths) + new)
        out = stage(torch.cat([row[-3:] for row in rows]), cache=step)
        torch.testing.assert_close(out, torch.cat([f[-3:] for f in full]), rtol=1e-10, atol=1e-10)


def test_a_shared_prompt_continues_like_one_of_a_slots_own() -> None:
    """Slots 1, 2 and 3 name the pages of one prompt; slot 0 has the same tokens for itself."""
    stage = stage_of("llama3")
    rows = [[0, 0, 0, 1, 2], [6, 3, 4, 5, 6], [6, 3, 4, 7, 8], [6, 3, 4, 9, 10]]
    table = PageTable(torch.tensor(rows, dtype=torch.int32), 11, 5, shares=True)
    cache = stage.kv_cache(table)
    tokens, start = random_tokens(6), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        for slot in (0, 2):
            step = CacheStep(cache, Documents.of([6]), torch.tensor([slot]), start, 6, fresh=True)
            stage(tokens, cache=step)
        assert not cache.keys[:, 5:].any()  # a prompt of 6 tokens fills its own pages alone
        slots, three = torch.tensor([3, 0, 1]), Documents.of([1, 1, 1])
        for new in range(2):
            step = CacheStep(cache, three, slots, torch.full((3,), 6 + new), 7 + new)
            out = stage(torch.tensor([5, 5, 5]) + new, cache=step)
            torch.testing.assert_close(out[0], out[1])
            torch.testing.assert_close(out[2], out[1])
        step = CacheStep(cache, Documents.of([2, 2, 2]), slots, torch.full((3,), 8), 10)
        first, *others = stage(torch.tensor([7, 8] * 3), cache=step).split(2)
    for other in others:
        torch.testing.assert_close(first, other)


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_one_after_another_are_the_model(family: str, cut: int) -> None:
    whole = stage_of(family)
    front = stage_of(family, first=0, last=cut, embedding=True, head=False)
    back = stage_of(family, first=cut, last=3, embedding=False, head=True)
    documents = Documents.of([11, 4, 9])
    tokens, targets = random_tokens(24), random_tokens(24).flip(0)
    learned = LossInputs(targets)
    whole(tokens, documents=documents, loss=summed_loss, loss_inputs=learned).backward()
    # a pipeline sends offsets as a tensor, cut into rows a micro-batch
    offsets = torch.tensor([[0, 11, 15, 24, 24]], dtype=torch.int32)
    hidden = front(tokens[None], documents=offsets, longest=11)
    learned = LossInputs(targets[None])
    back(hidden, documents=offsets, loss=summed_loss, loss_inputs=learned).backward()
    expected = gradients(whole)
    parts = gradients(front)
    for name, gradient in gradients(back).items():
        if back.layouts[name].tied:
            assert front.layouts["embedding.weight"].tied
            assert not back.layouts[name].pieces[0].counts_in_norm
            parts["embedding.weight"] += gradient
        else:
            parts[name] = gradient
    assert parts.keys() == expected.keys()
    for name, gradient in parts.items():
        assert (gradient - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


def test_bad_calls_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"layers \[2, 9\) of a model with 3"):
        Stage(small("llama3"), first=2, last=9)
    with pytest.raises(ValueError, match="recompute is 'some'; allowed: none, selective, full"):
        Stage(small("llama3"), recompute="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'jax'; allowed: torch, te"):
        Stage(small("llama3"), backend="jax")
    stage = Stage(small("llama3")).initialise_(0)
    with pytest.raises(ValueError, match="7 tokens, but documents of 8"):
        stage(random_tokens(7), documents=Documents.of([8]))
    with pytest.raises(ValueError, match=r"do not lie in \[0, 3\]"):
        stage(random_tokens(7), documents=torch.tensor([0, 7]), longest=3)
    with pytest.raises(ValueError, match="where documents begin"):
        stage(random_tokens(7))
    with pytest.raises(ValueError, match="fp8 is 'delayed'"):
        Stage(small("llama3"), fp8="delayed").initialise_(0)(random_tokens(7)[None])


def test_importing_and_running_the_model_imports_no_cuda_only_package() -> None:
    program = (
        "import sys, torch\n"
        "from megarlx.config.model import family_config\n"
        "from megarlx.model.transformer import Stage\n"
        "sizes = dict(vocab_size=5, hidden_size=8, layers=1, heads=2, kv_heads=1, head_dim=4)\n"
        "stage = Stage(family_config('qwen3', intermediate_size=6, **sizes)).initialise_(0)\n"
        "stage(torch.zeros(1, 3, dtype=torch.long))\n"
        "print(*(m for m in ('transformer_engine', 'flash_attn') if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
