"""A plan follows the stages of a configuration: objectives, replicas, local steps, rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlx.cli import main
from megarlx.comm.hardware import GPUS
from megarlx.config import load_config
from megarlx.generation.engine import Engine
from megarlx.planning.dry_run import build, dry_run, fake_world, trainer_of
from megarlx.planning.memory import optimizer_bytes, rank_memory, worst_rank
from megarlx.planning.report import compare, differing
from megarlx.planning.stages import job_of_stage
from megarlx.planning.step_time import step_time

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
[model]
vocab_size = 1000
hidden_size = 96
layers = 4
heads = 6
intermediate_size = 256
max_sequence_length = 512

[training]
sequences_per_step = 16
sequences_per_microbatch = 2
sequence_length = 128
precision = "{precision}"

[layout]
replica = {replica}
tensor = {tensor}

[data]
tokenizer = "bytes"
[[data.sources]]
name = "text"
prefix = "text"

[template]
user = "Q: {{content}}"

[sft]
sequence_length = 256
sequences_per_step = 16
sequences_per_microbatch = 1

[rl]
prompts_per_step = 2
samples_per_prompt = 16
max_prompt_tokens = 56
max_completion_tokens = 200
tokens_per_microbatch = 512
slots = 32
policy.kl = "{kl}"
policy.kl_coefficient = {coefficient}

[[stages]]
name = "both"
steps = 4
combine = "average"
of = "{of}"
placement = "{placement}"
sync_every = {sync}
generate_together = {together}
[stages.objectives.rl]
lr = 1e-5
[stages.objectives.sft]
lr = 1e-5

[[stages]]
name = "after"
steps = 4
[stages.objectives.pretraining]

[[stages]]
name = "again"
steps = 6
combine = "alternate"
[stages.objectives.rl]
lr = 1e-5
turns = 2
inherit = true
[stages.objectives.sft]
lr = 1e-5
"""
USUAL: dict[str, Any] = {
    "precision": "bf16",
    "replica": 1,
    "tensor": 1,
    "kl": "none",
    "coefficient": 0.0,
    "of": "updates",
    "placement": "colocated",
    "sync": 1,
    "together": "true",
}
IN_REPLICAS = {"placement": "replicas", "replica": 2}
CASES: dict[str, dict[str, Any]] = {
    "colocated": {},
    "one Adam": {"of": "gradients"},
    "local steps": {"sync": 2},
    "a reference": {"kl": "k3", "coefficient": 0.1},
    "replicas": IN_REPLICAS,
    "replicas, one Adam": {**IN_REPLICAS, "of": "gradients"},
    "replicas, local steps, tensor": {**IN_REPLICAS, "sync": 2, "tensor": 2},
    "replicas in fp32": {**IN_REPLICAS, "precision": "fp32", "kl": "k3", "coefficient": 0.1},
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def writing(**changes: Any) -> Path:
        path = tmp_path / "stages.toml"
        path.write_text(CONFIG.format(**{**USUAL, **changes}))
        return path

    return writing


WALKED = [(name, 0) for name in CASES]
WALKED += [(name, stage) for name in ("colocated", "replicas in fp32") for stage in (1, 2)]


@pytest.mark.parametrize(("case", "stage"), WALKED)
def test_a_walked_step_of_every_stage_sends_what_the_formula_says(
    write: Any, case: str, stage: int
) -> None:
    job = job_of_stage(load_config(write(**CASES[case])), 8, stage)
    for rank in {0, job.gpus - 1} if case == "replicas" else {job.gpus - 1}:
        assert differing(compare(dry_run(job, rank), job)) == []


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_what_a_stage_holds_is_what_its_optimizer_holds(
    write: Any, changes: dict[str, Any], gpus: int
) -> None:
    """Of a stage with all its objectives: tensors of the real optimizer, on the meta device."""
    config = load_config(write(**{**changes, "tensor": 1}))
    job, device = job_of_stage(config, gpus, 0), torch.device("meta")
    with fake_world(0, gpus):
        trainer = trainer_of(job, build(job, device), device)
    optimizer, parallel = trainer.optimizer, trainer.model.data_parallel
    tensors: list[Tensor | None] = [
        *(parallel.weights, parallel.gradients, optimizer.master, optimizer.masters.out),
        optimizer.combiner.buffers,
        *optimizer.gradients.values(),
        *optimizer.masters.locals.values(),
        *(shard for shards in optimizer.kept.shards.values() for shard in shards.values()),
    ]
    held = sum({id(t): t.nbytes for t in tensors if t is not None}.values())
    reference = parallel.shard_of_weights().nbytes if changes.get("kl") else 0
    assert rank_memory(job, 0).persistent == held + reference


def test_outer_steps_masks_and_teachers_are_counted(write: Any) -> None:
    path = write()
    taught = '[objectives.teach.distill]\nteachers = ["a@1", "b@2"]\n[[stages]]\nname = "both"'
    path.write_text(path.read_text().replace('[[stages]]\nname = "both"', taught))

    def held(*changes: str) -> tuple[int, int, int]:
        """Bytes of the optimizer, and numbers and bytes of one of its shards."""
        job = job_of_stage(load_config(path, list(changes)), 4, 0)
        numbers = job.sizes(0).flat
        return rank_memory(job, 0).optimizer, numbers // job.dp, job.wide_bytes

    local, numbers, wide = held("stages.0.sync_every=2")
    outer, *_ = held("stages.0.sync_every=2", "stages.0.outer={momentum=0.5}")
    assert outer - local == 2 * numbers * wide
    masked, *_ = held(
        "stages.0.sync_every=2", 'stages.0.objectives.sft.protect={run="a@1", share=0.1}'
    )
    assert masked - local == numbers
    two = job_of_stage(load_config(path, ["stages.0.objectives.teach.lr=1e-5"]), 4, 0)
    one = job_of_stage(load_config(path), 4, 0)
    assert (two.kept.frozen, one.kept.frozen) == (2, 0)
    assert two.kept.gradients == one.kept.gradients + 1
    teach = next(each for each in two.all_objectives if each.name == "teach")
    assert teach.rollouts is not None
    assert teach.packed_tokens == 64 * teach.document_length


def test_a_moving_average_of_the_weights_is_one_more_shard(write: Any) -> None:
    without, with_one = (
        job_of_stage(load_config(write(), changes), 4, 0)
        for changes in ([], ["checkpoints.average_decay=0.99"])
    )
    numbers = without.sizes(0).flat
    assert (
        optimizer_bytes(with_one, numbers) == optimizer_bytes(without, numbers) + numbers // 4 * 4
    )


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ("sequences_per_step = 16", "sft.sequences_per_step is 16; .* x dp = 7 must divide it"),
        ("", "training.sequences_per_step is 28; .* x dp = 21 must divide it"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_named_by_the_key_that_says_it(
    write: Any, batch: str, said: str
) -> None:
    path = write()
    own = "sequences_per_step = 16\nsequences_per_microbatch = 1\n"
    changed = path.read_text().replace(
        own, f"{batch}\nsequences_per_microbatch = {1 if batch else 3}\n"
    )
    path.write_text(changed)
    # What the stage trains besides has a batch that 7 processes can share.
    given = ["training.sequences_per_microbatch=1", "training.sequences_per_step=28"]
    with pytest.raises(ValueError, match=said):
        job_of_stage(load_config(path, given), 7, 0)


def test_moments_that_wait_for_a_later_stage_are_held(write: Any) -> None:
    config = load_config(write())
    both, after, again = (job_of_stage(config, 4, stage) for stage in range(3))
    numbers = both.sizes(0).flat
    shard = numbers // 4
    # bf16 weights: a master, a gradient shard and two moments each in fp32, new weights in bf16.
    assert optimizer_bytes(both, numbers) == shard * (4 + 2 * 12 + 2)
    assert optimizer_bytes(after, numbers) == shard * (4 + 12 + 8 + 2)  # RL's moments wait
    assert optimizer_bytes(again, numbers) == shard * (4 + 2 * 12 + 2)


def test_replicas_hold_one_objective_and_each_has_its_own_batch(write: Any) -> None:
    config = load_config(write(**IN_REPLICAS, together="false"))
    job = job_of_stage(config, 8, 0)
    assert (job.replica, job.dp) == (2, 4)
    rl, sft = (rank_memory(job, rank) for rank in (0, 4))
    assert rl.optimizer == sft.optimizer
    assert rl.kv_cache > 0 == sft.kv_cache  # only the policy's replica generates
    assert rl.activations != sft.activations
    together = job_of_stage(load_config(write(**IN_REPLICAS)), 8, 0)
    assert rank_memory(together, 4).kv_cache == rank_memory(together, 0).kv_cache == rl.kv_cache
    assert worst_rank(job)[0] == 0
    # After it, the replicas share out the batches of the one objective there is.
    after = job_of_stage(config, 8, 1)
    assert after.microbatches == 16 // (2 * 2 * 4)


def test_caches_are_those_of_the_engine_that_the_configuration_makes(write: Any) -> None:
    job = job_of_stage(load_config(write()), 1, 0)
    device = torch.device("meta")
    with fake_world(0, 1):
        model = build(job, device)
        engine = Engine(model.stages, slots=32, longest=256, one_width=False)
    held = sum(cache.keys.nbytes + cache.values.nbytes for cache in engine.caches)
    assert rank_memory(job, 0).kv_cache == held


def test_time_of_a_step_is_the_sum_of_colocated_objectives_and_the_slowest_of_replicas(
    write: Any,
) -> None:
    gpu = GPUS["h100"]
    config = load_config(write())
    both = job_of_stage(config, 4, 0)
    alone = [both.changed(others=()), *both.others]
    products = [step_time(one, gpu).products for one in alone]
    assert step_time(both, gpu).products == pytest.approx(sum(products))
    apart = job_of_stage(load_config(write(**IN_REPLICAS)), 8, 0)
    assert step_time(apart, gpu).products == pytest.approx(max(products))
    # Two of three turns are RL's.
    again = job_of_stage(config, 4, 2)
    assert step_time(again, gpu).products == pytest.approx((2 * products[0] + products[1]) / 3)


def test_the_command_shows_every_stage_and_plans_the_one_asked_for(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(write(**IN_REPLICAS)), "--gpus", "4"]
    assert main([*words, "--stage", "both"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("1 both", "2 after", "3 again", "rl and sft averaged in replicas", "kv cache"):
        assert part in text
    assert "a step's 32 samples take" in text
    for stage in ("2", "after"):
        assert main([*words, "--stage", stage, "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["tokens_per_step"] == 16 * 128
        assert values["configured"]["layout"]["layout.replica"] == 2
    assert main([*words, "--stage", "none"]) == 2
    assert "--stage is 'none'; allowed are 1 both, 2 after, 3 again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replica": 2}, "no stage has placement = 'replicas': allowed is 1"),
        ({"placement": "replicas"}, "'replicas' for 2 objectives: allowed is 2, one each"),
        ({**IN_REPLICAS, "replica": 3}, "allowed is 2, one each"),
    ],
)
def test_replicas_that_are_no_objectives_are_refused(
    write: Any, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(["plan", str(write(**changes)), "--gpus", "6"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_papers_recipe_is_planned_over_its_trunk_and_fits(
    capsys: pytest.CaptureFixture[str], replicas: int
) -> None:
    folder = ROOT / "configs/paper_1b"
    words = [str(folder / "recipes/parallel.toml"), "--trunk", str(folder / "trunk.toml")]
    words += ["--gpus", str(8 * replicas), "--json", "--best", "1"]
    if replicas == 2:
        words += ["--set", "layout.replica=2", "--set", "stages.0.placement=replicas"]
    assert main(["plan", *words]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["objectives"] == ["rl", "sft"]
    # Keys and values of 256 sequences of 512 + 512 tokens, in pages of 256 and an idle one; bf16.
    assert values["configured"]["memory"]["kv_cache"] == 2 * 16 * (256 * 4 + 1) * 256 * 2048 * 2
    assert values["configured"]["fits"]
    assert values["generate_seconds"] > 0
