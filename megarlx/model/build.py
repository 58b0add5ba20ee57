"""A model laid out over a mesh: this rank's stages, its flat buffers and its pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Mesh
from megarlx.config.model import ModelConfig
from megarlx.model.check_layout import check_layout
from megarlx.model.core_attention import AttentionKind
from megarlx.model.transformer import Stage
from megarlx.model.transformer_layer import Recompute
from megarlx.parallel.data_parallel import DataParallel
from megarlx.parallel.metadata import ParameterLayout, sum_partial_gradients_
from megarlx.parallel.pipeline import Pipeline
from megarlx.parallel.pipeline_plan import PipelinePlan, Schedule


@dataclass(frozen=True)
class ParallelModel:
    """What a trainer works with. Parameter names are unique over the stages of a rank."""

    config: ModelConfig
    mesh: Mesh
    stages: list[Stage]
    layouts: dict[str, ParameterLayout]
    data_parallel: DataParallel
    pipeline: Pipeline

    def layouts_at(self, tp_rank: int) -> dict[str, ParameterLayout]:
        """What another tensor-parallel rank holds of the same stages."""
        return {k: v for stage in self.stages for k, v in stage.layouts_at(tp_rank).items()}


def build_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    seed: int,
    schedule: Schedule = "1f1b",
    virtual_stages: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    backend: str = "torch",
    attention: AttentionKind = "auto",
    fp8: str | None = None,
    kept_gradients_mib: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bucket_elements: int = 25_000_000,
) -> ParallelModel:
    """The same model for every mesh: its weights depend on `config` and `seed` alone."""
    check_layout(
        config,
        mesh.layout,
        sequence_parallel=sequence_parallel,
        stages_per_rank=virtual_stages,
        layers_per_stage=layers_per_stage,
    )
    plan = PipelinePlan.make(
        config.layers, mesh.pp.size, schedule, virtual_stages, layers_per_stage
    )
    stages = []
    for index in plan.stages_of(mesh.pp.rank):
        first, last = plan.layers[index]
        stage = Stage(
            config,
            group=mesh.tp,
            first=first,
            last=last,
            embedding=index == 0,
            head=index == plan.stages - 1,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            backend=backend,
            attention=attention,
            fp8=fp8,
            kept_gradients_mib=kept_gradients_mib,
            delay_weight_gradients=plan.splits_backward,
            dtype=dtype,
            device=device,
        )
        stages.append(stage.initialise_(seed))
    parameters: dict[str, nn.Parameter] = {}
    layouts: dict[str, ParameterLayout] = {}
    for stage in stages:
        parameters.update(stage.named_parameters())
        layouts.update(stage.layouts)
    split_sequence = mesh.tp.size if sequence_parallel else 1

    def hidden_shape(tokens: torch.Size) -> tuple[int, int]:
        return tokens.numel() // split_sequence, config.hidden_size

    partial = any(
        layout.tied or any(piece.sum_gradients for piece in layout.pieces)
        for layout in layouts.values()
    )
    return ParallelModel(
        config,
        mesh,
        stages,
        layouts,
        DataParallel(
            parameters,
            layouts,
            mesh.dp,
            complete_gradients=(lambda grads: _complete(layouts, grads, mesh)) if partial else None,
            bucket_elements=bucket_elements,
        ),
        Pipeline(
            stages,
            plan,
            mesh.pp,
            hidden_shape=hidden_shape,
            dtype=dtype,
            device=device,
        ),
    )


def _complete(
    layouts: Mapping[str, ParameterLayout], gradients: Mapping[str, Tensor], mesh: Mesh
) -> None:
    """Sums gradients that several ranks hold parts of: tensor-parallel copies, tied weights."""
    sum_partial_gradients_(layouts, gradients, mesh.tp)
    tied = [gradients[name] for name, layout in layouts.items() if layout.tied]
    if len(tied) == 2:  # first and last stage on one rank, as in a V-shaped schedule
        tied[0].add_(tied[1])
        tied[1].copy_(tied[0])
    elif tied:
        all_reduce_(tied[0], mesh.embedding)
