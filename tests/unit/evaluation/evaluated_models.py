"""A small untrained model, its tokenizer, and likelihoods from their definition."""

from __future__ import annotations

import torch

from megarlx.comm.groups import Mesh
from megarlx.config.model import family_config
from megarlx.data.conversations import Frames
from megarlx.data.making import Made
from megarlx.evaluation.interface import Subject
from megarlx.model.build import ParallelModel, build_model
from megarlx.study.world.settings import WorldSettings
from megarlx.study.world.suites import suites_of
from megarlx.study.world.tables import tables_of
from megarlx.study.world.tellings import Counts
from megarlx.study.world.world import World

WORLD = World(WorldSettings(seed=3, entities=9, steps=(1.0, 1.0)))
MADE = Made("never read", suites=suites_of(WORLD))
TABLES = World(
    WorldSettings(
        operation_kind="table",
        seed=3,
        entities=9,
        steps=(0.0, 1.0, 1.0),
        quantities=1,
        tables=3,
        table_values=4,
        slots=3,
    )
)
TOLD = Counts.of(
    [told for i in range(200) for told in TABLES.problem_document(i).told],
    len(tables_of(TABLES.settings)),
)
MADE_OF_TABLES = Made("never read", suites=suites_of(TABLES, TOLD))
TEMPLATE = Frames("question : {content} answer :")


def small_model(
    longest: int = 96, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32
) -> ParallelModel:
    """A vocabulary larger than the world's, and weights large enough that tokens differ much."""
    config = family_config(
        "olmo2",
        vocab_size=301,
        hidden_size=20,
        layers=2,
        heads=2,
        head_dim=10,
        intermediate_size=28,
        max_sequence_length=longest,
        init_std=0.3,
    )
    return build_model(config, Mesh.alone() if mesh is None else mesh, seed=5, dtype=dtype)


def subject(
    model: ParallelModel | None = None, *, is_base: bool = True, tables: bool = False
) -> Subject:
    return Subject(
        small_model() if model is None else model,
        (TABLES if tables else WORLD).tokenizer(),
        TEMPLATE,
        is_base,
        iteration=7,
        trunk_tokens=700,
        made=MADE_OF_TABLES if tables else MADE,
    )


def logits_behind(model: ParallelModel, tokens: list[int]) -> torch.Tensor:
    """fp64 log-probs of what may follow the tokens, from a pass over just these."""
    (stage,) = model.stages
    with torch.no_grad():
        logits = stage.logits(stage(torch.tensor([tokens])))[-1]
    return logits.double().log_softmax(-1)


def logprob(model: ParallelModel, before: list[int], tokens: list[int]) -> float:
    """Token by token."""
    total = 0.0
    for at, token in enumerate(tokens):
        total += float(logits_behind(model, before + tokens[:at])[token])
    return total
