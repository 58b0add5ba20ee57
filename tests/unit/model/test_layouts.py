"""Layouts are arithmetic: slices tile the model, copies are marked, bad ones are refused."""

from __future__ import annotations

import pytest
import torch
from small_models import FAMILIES, small
from torch import Tensor

from megarlx.comm.groups import Layout
from megarlx.config.model import ModelConfig
from megarlx.model.check_layout import LayoutError, check_layout, layers_of_stage
from megarlx.model.initialise import initialise_, key_of
from megarlx.model.metadata import TensorParallel, parameter_layouts
from megarlx.model.transformer import Stage
from megarlx.ops.normal import normal_slice_
from megarlx.parallel.metadata import ParameterLayout, fill_


def layouts_of(
    config: ModelConfig, tp: int, rank: int, sequence_parallel: bool = False
) -> dict[str, ParameterLayout]:
    return parameter_layouts(
        config,
        TensorParallel(tp, rank, sequence_parallel),
        first=0,
        last=config.layers,
        embedding=True,
        head=True,
    )


def drawn(config: ModelConfig, tp: int, rank: int, seed: int) -> dict[str, Tensor]:
    layouts = layouts_of(config, tp, rank)
    local = {name: torch.full(layout.shape, 7.0) for name, layout in layouts.items()}
    initialise_(local, layouts, seed=seed, std=0.3)
    return local


def whole(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    """The initial value of a global tensor."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    out = torch.empty(shape)
    normal_slice_(out.view(-1), key=key_of(name, seed), std=std)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_slices_of_every_tp_compose_to_the_same_bits(family: str, kv_heads: int) -> None:
    config = small(family, kv_heads=kv_heads)
    shapes = config.tensor_shapes()
    for tp in (1, 2, 4):
        seen = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
        tensors = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        for rank in range(tp):
            layouts, local = layouts_of(config, tp, rank), drawn(config, tp, rank, seed=9)
            for name, layout in layouts.items():
                covered = torch.zeros(layout.shape, dtype=torch.int64)
                for piece in layout.pieces:
                    covered_here = piece.of_parameter(covered)
                    covered_here += 1
                    piece.of_tensor(tensors[piece.name]).copy_(piece.of_parameter(local[name]))
                    if piece.counts_in_norm:
                        counted = piece.of_tensor(seen[piece.name])
                        counted += 1
                padding = covered == 0
                assert covered.max() <= 1
                assert not local[name][padding].any()
                assert not padding.any() or name in ("embedding.weight", "head.weight")
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole(name, shapes[name], seed=9, std=0.3)), name
            assert (seen[name] == 1).all(), f"{name} is not counted exactly once"


def test_each_seed_and_each_tensor_has_its_own_numbers() -> None:
    config = small("olmo2")
    real = slice(config.vocab_size)  # behind it the vocabulary is padded with zeros
    one, other = ({n: x[real] for n, x in drawn(config, 1, 0, seed).items()} for seed in (1, 2))
    matrices = [name for name, x in one.items() if x.dim() == 2]
    for name in matrices:
        assert not (one[name] == other[name]).any()
        assert abs(one[name].std().item() / 0.3 - 1) < 5 / (2 * one[name].numel()) ** 0.5, name
    rows = torch.stack([one[name].flatten()[:500] for name in matrices])
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 5 / 500**0.5
    again = drawn(config, 1, 0, seed=1)
    assert all(torch.equal(one[name], again[name][real]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_dtype_rounds_the_numbers_and_changes_no_other(dtype: torch.dtype) -> None:
    narrow = Stage(small("qwen3"), dtype=dtype).initialise_(4)
    for (name, a), b in zip(
        narrow.named_parameters(), Stage(small("qwen3")).initialise_(4).parameters(), strict=True
    ):
        assert torch.equal(a, b.to(dtype)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_describe_the_parameters_a_stage_has(family: str) -> None:
    stage = Stage(small(family), device="meta")
    shapes = {name: tuple(p.shape) for name, p in stage.named_parameters()}
    assert shapes == {name: layout.shape for name, layout in stage.layouts.items()}
    for name, layout in stage.layouts.items():
        assert layout.weight_decay == (len(layout.shape) == 2), name
    for first, last, embedding, head in (
        (0, 1, True, False),
        (1, 1, False, False),
        (1, 3, False, True),
    ):
        part = Stage(
            small(family), first=first, last=last, embedding=embedding, head=head, device="meta"
        )
        assert {n: tuple(p.shape) for n, p in part.named_parameters()} == {
            n: layout.shape for n, layout in part.layouts.items()
        }


def test_a_stage_on_meta_is_filled_like_one_made_in_place() -> None:
    config = small("olmo2")
    late = Stage(config, device="meta").to_empty(device="cpu").initialise_(4)
    for (name, a), b in zip(
        late.named_parameters(), Stage(config).initialise_(4).parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    tokens = torch.arange(20)[None]
    assert torch.equal(late(tokens), Stage(config).initialise_(4)(tokens))


def test_key_value_copies_are_marked_and_summed() -> None:
    config = small("olmo2", kv_heads=2)
    for rank in range(4):
        pieces = {
            p.name: p for layout in layouts_of(config, 4, rank).values() for p in layout.pieces
        }
        for kind in ("k", "v"):
            piece = pieces[f"layers.1.attention.{kind}.weight"]
            assert piece.replicated_over == ((0, 1) if rank < 2 else (2, 3))
            assert piece.sum_gradients
            assert piece.counts_in_norm == (rank in (0, 2))
            assert (piece.offset, piece.size) == (rank // 2 * 10, 10)
        assert pieces["layers.1.attention.k_norm.weight"].sum_gradients
        assert not pieces["layers.1.attention.q_norm.weight"].sum_gradients
        assert pieces["layers.1.attention.q.weight"].replicated_over == (rank,)
        assert pieces["norm.weight"].replicated_over == (0, 1, 2, 3)
        assert not pieces["norm.weight"].sum_gradients
    split = layouts_of(config, 4, 1, sequence_parallel=True)
    assert split["norm.weight"].pieces[0].sum_gradients
    per_head = layouts_of(small("qwen3"), 2, 0)
    assert per_head["layers.0.attention.q_norm.weight"].pieces[0].sum_gradients


def test_a_rank_with_nothing_but_vocabulary_padding_has_no_piece() -> None:
    config = small("llama3")
    assert config.padded_vocab(4) == 512
    sizes = [
        sum(p.size for p in layouts_of(config, 4, rank)["head.weight"].pieces) for rank in range(4)
    ]
    assert sizes == [97, 0, 0, 0]


def test_a_tensor_of_another_shape_is_refused() -> None:
    stage = Stage(small("llama3"))
    with pytest.raises(ValueError, match=r"embedding.weight has shape \(3, 3\)"):
        fill_(dict(stage.named_parameters()), stage.layouts, lambda _: torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({}, Layout(tp=3), r"4 heads cannot be split over tp=3"),
        (
            {"intermediate_size": 67},
            Layout(tp=2),
            r"intermediate_size 67 cannot be split over tp=2",
        ),
        ({"heads": 12, "kv_heads": 6}, Layout(tp=4), r"6 kv_heads can neither .* tp=4"),
        ({}, Layout(pp=4), r"3 layers are fewer than 4 pipeline stages"),
    ],
    ids=str,
)
def test_layouts_that_cannot_work_are_refused_with_ones_that_do(
    changes: dict, layout: Layout, message: str
) -> None:
    with pytest.raises(LayoutError, match=message) as refused:
        check_layout(small("qwen3", **changes), layout)
    offered = str(refused.value).split("processes: ")[1].split("; ")
    assert len(offered) >= 2
    for text in offered:
        sizes = {axis: int(n) for axis, n in (part.split("=") for part in text.split())}
        assert Layout(**sizes).world_size == layout.world_size
        check_layout(small("qwen3", **changes), Layout(**sizes))


def test_sequences_worlds_and_layer_splits_are_checked_too() -> None:
    config = small("llama3")
    check_layout(config, Layout(tp=2), sequence_length=31)
    with pytest.raises(
        LayoutError, match=r"31 tokens cannot be split over tp=2 .*nearest: 30 or 32"
    ):
        check_layout(config, Layout(tp=2), sequence_length=31, sequence_parallel=True)
    with pytest.raises(LayoutError, match=r"needs 2 processes; there are 6.*for 6 processes"):
        check_layout(config, Layout(tp=2), world_size=6)
    with pytest.raises(LayoutError, match=r"\[2, 2\].*add up to the model's 3 layers"):
        check_layout(config, Layout(pp=2), layers_per_stage=[2, 2])
    with pytest.raises(LayoutError, match="3 layers are fewer than 4 pipeline stages"):
        check_layout(config, Layout(pp=2), stages_per_rank=2)
    check_layout(config, Layout(pp=2), layers_per_stage=[3, 0])
    assert layers_of_stage(config, 2) == [range(2), range(2, 3)]
    assert layers_of_stage(config, 2, [0, 3]) == [range(0), range(3)]


def test_every_layout_that_passes_the_check_can_be_built() -> None:
    for heads, kv_heads, inner in ((4, 2, 68), (6, 3, 66), (8, 1, 64), (12, 6, 60)):
        config = small("olmo2", heads=heads, kv_heads=kv_heads, intermediate_size=inner)
        for tp in range(1, 9):
            try:
                check_layout(config, Layout(tp=tp))
            except LayoutError:
                continue
            for rank in range(tp):
                for layout in layouts_of(config, tp, rank).values():
                    for piece in layout.pieces:
                        assert piece.offset + piece.size <= piece.global_shape[piece.dim]


def test_shapes_that_no_transformer_has_are_refused() -> None:
    good = small("llama3")
    for change, message in (
        ({"heads": 5}, "kv_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"layers": 0}, "layers"),
        ({"qk_norm": "some"}, "qk_norm"),
        ({"norm_position": "mid"}, "norm_position"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate({**good.model_dump(), **change})


def test_flops_are_six_a_parameter_and_causal_attention() -> None:
    config = small("olmo2")
    head = config.vocab_size * config.hidden_size
    scores = 12 * config.layers * config.heads * config.head_dim
    assert config.flops_per_token(1) == 6 * (config.non_embedding_parameters() + head) + scores
    assert config.flops_per_token(65) - config.flops_per_token(1) == 32 * scores
