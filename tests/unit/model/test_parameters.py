"""Shapes, counts, layouts, bytes and published names follow from one table, without torch."""

from __future__ import annotations

import subprocess
import sys
from math import prod
from typing import Any

import pytest
import torch
from small_models import FAMILIES, small

from megarlx.config import parameters
from megarlx.config.families import Family
from megarlx.config.model import ModelConfig, family_config, resolved_model
from megarlx.config.parameters import Parameter, published_names, table, tensor_shapes
from megarlx.model.layers_torch import RMSNorm
from megarlx.model.metadata import TensorParallel, parameter_layouts
from megarlx.model.transformer import Stage
from megarlx.planning.job import Job
from megarlx.planning.memory import rank_memory


def layouts(config: ModelConfig, tp: int, rank: int) -> dict[str, Any]:
    place = TensorParallel(tp, rank)
    return parameter_layouts(config, place, first=0, last=config.layers, embedding=True, head=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_table_a_family(family: str) -> None:
    config = small(family)
    rows = table(config)
    shapes = tensor_shapes(config)
    assert config.tensor_shapes() == shapes
    assert config.parameters() == sum(map(prod, shapes.values()))
    of_layers = [row for row in rows if "{n}" in row.name]
    assert len(shapes) == config.layers * len(of_layers) + len(rows) - len(of_layers)
    assert list(published_names(config)) == list(shapes)
    assert len(set(published_names(config).values())) == len(shapes)
    # what is built has these parameters, in this order
    built = Stage(config, device="meta")
    assert list(layouts(config, 1, 0)) == [
        n for n, _ in built.named_parameters() if "head" not in n
    ] + ([] if config.tied_embeddings else ["head.weight"])
    by_name = {row.name.format(n=n): row for row in rows for n in range(config.layers)}
    for tp in (1, 2, 4):
        held = dict.fromkeys(shapes, 0)
        for rank in range(tp):
            for local, layout in layouts(config, tp, rank).items():
                for piece in layout.pieces:
                    row = by_name[piece.name]
                    assert row.local.format(n=local.split(".")[1]) == local
                    assert layout.weight_decay == row.decay
                    assert piece.is_split <= (row.split == piece.dim)
                    held[piece.name] += prod(piece.shape) * piece.counts_in_norm
        assert held == {name: prod(shape) for name, shape in shapes.items()}


def test_one_row_more_is_one_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    before = small("qwen2")
    numbers = before.parameters()
    memory = rank_memory(Job(before, 4, 1, 32, tp=2, on_gpu=False, precision="fp32"), 0)
    row = Parameter(
        "layers.{n}.mlp.gate.bias",
        ("inner",),
        "model.layers.{n}.mlp.gate_proj.bias",
        split=0,
        decay=False,
        only=("family", ("qwen2",)),
    )
    monkeypatch.setattr(parameters, "LAYER", (*parameters.LAYER, row))
    config = small("qwen2", init_std=0.3)
    assert config.tensor_shapes()["layers.2.mlp.gate.bias"] == (68,)
    assert config.parameters() == numbers + 3 * 68
    assert published_names(config)["layers.1.mlp.gate.bias"] == "model.layers.1.mlp.gate_proj.bias"
    layout = layouts(config, 2, 1)["layers.0.mlp.gate.bias"]
    assert (layout.shape, layout.pieces[0].offset, layout.weight_decay) == ((34,), 34, False)
    more = rank_memory(Job(config, 4, 1, 32, tp=2, on_gpu=False, precision="fp32"), 0)
    assert more.weights > memory.weights
    assert "layers.0.mlp.gate.bias" not in small("qwen3").tensor_shapes()


def test_the_table_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from megarlx.config.model import family_config\n"
        "from megarlx.config.parameters import published_names\n"
        "shape = dict(vocab_size=97, hidden_size=48, layers=3, heads=4, intermediate_size=68)\n"
        "for family in ('olmo2', 'llama3', 'qwen2', 'qwen3', 'gemma2', 'gemma3'):\n"
        "    config = family_config(family, **shape)\n"
        "    assert len(published_names(config)) == len(config.tensor_shapes()) > 20\n"
        "    config.parameters(), config.flops_per_token(40)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


SHAPE = {"vocab_size": 97, "hidden_size": 48, "layers": 2, "heads": 4, "intermediate_size": 68}
MINE = Family({"norm_position": "both", "qk_norm": "full", "window": 8, "full_attention_every": 2})


def test_a_family_of_a_module_is_imported_for_ones_own_configuration_only() -> None:
    name = f"{__name__}:MINE"
    config = family_config(name, **SHAPE)
    assert (config.norm_position, config.window, config.activation) == ("both", 8, "silu")
    again = resolved_model(config.model_dump(mode="json"))
    assert again == config
    stranger = "no_such_module:FAMILY"
    read = resolved_model({**config.model_dump(mode="json"), "family": stranger})
    assert read.norm_position == "both"
    with pytest.raises(ValueError, match="is not imported for a configuration that another run"):
        resolved_model({"family": stranger, **SHAPE})
    with pytest.raises(ValueError, match="'no_such_module:FAMILY' cannot be imported"):
        family_config(stranger, **SHAPE)


def test_norms_of_one_plus_weight_begin_at_one() -> None:
    stage = Stage(small("gemma3")).initialise_(3)
    norm = stage.layers["0"].attention_norm
    assert not norm.weight.any()
    x = torch.randn(5, 52)
    expected = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    torch.testing.assert_close(norm(x), expected)
    options: Any = {"eps": 1e-6, "device": "cpu"}
    half = RMSNorm(52, **options, plus_one=True, sequence_parallel=False, dtype=torch.bfloat16)
    with torch.no_grad():
        half.weight.fill_(2**-9)  # in bf16, 1 + it is 1
    rounded = x.bfloat16().float()
    wide = rounded * (rounded.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(
        half(x.bfloat16()), (wide * (1 + 2**-9)).bfloat16(), rtol=2**-8, atol=0
    )
    assert not torch.equal(half(x.bfloat16()), wide.bfloat16())
