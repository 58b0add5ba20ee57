"""A stage of a configuration as a job: what its objectives are, and what of them a rank holds."""

from __future__ import annotations

from dataclasses import replace

from megarlx import plug
from megarlx.config import Config, RlConfig, SftConfig, StageConfig
from megarlx.config.distill import DistillConfig
from megarlx.config.objectives import PRETRAINING, AnyObjective, OwnConfig
from megarlx.config.own_samples import FP8_GENERATOR
from megarlx.model.check_layout import LayoutError
from megarlx.planning.job import Job
from megarlx.planning.memory import worst_rank
from megarlx.planning.pieces import Held, Rollouts
from megarlx.training.combine import buffers_of
from megarlx.training.parts import UpdateSettings
from megarlx.training.update_rules import rule_of

PROMPT_TOKENS = 512  # of time, where a configuration says no more than what there is room for


def jobs_by_stage(config: Config, gpus: int) -> dict[str, Job]:
    """Of every stage, by its number and name."""
    return {
        f"{index + 1} {stage.label}": job_of_stage(config, gpus, index)
        for index, stage in enumerate(config.all_stages)
    }


def chosen_stage(jobs: dict[str, Job], wanted: str | None) -> Job:
    """By name or number; else the one that needs most memory."""
    if wanted is None:
        return max(jobs.values(), key=lambda job: worst_rank(job)[1].peak)
    found = [job for name, job in jobs.items() if wanted in name.split(" ", 1)]
    if not found:
        raise ValueError(f"--stage is '{wanted}'; allowed are {', '.join(jobs)}")
    return found[0]


def job_of_stage(config: Config, gpus: int, index: int) -> Job:
    """The stage's first objective, the others beside it; the batch of each as configured."""
    stage = config.all_stages[index]
    replicas, count = config.layout.replica, len(stage.objectives)
    in_replicas = stage.placement == "replicas"
    if in_replicas and replicas != count:
        raise LayoutError(
            f"layout.replica is {replicas}; stage '{stage.label}' has placement = 'replicas' for "
            f"{count} objectives: allowed is {count}, one each"
        )
    if replicas > 1 and not any(s.placement == "replicas" for s in config.all_stages):
        raise LayoutError(
            f"layout.replica is {replicas}; replicas run one objective each, and no stage has "
            "placement = 'replicas': allowed is 1"
        )
    common = replace(
        Job.configured(config, gpus),
        in_replicas=in_replicas,
        generates_together=stage.generate_together and stage.sync_every == 1,
        sync_every=stage.sync_every,
        averages_per_step=stage.times.averages / stage.steps,
        shared_moments=stage.of == "gradients",
        combination=stage.combination,
    )
    first, *others = (
        replace(
            _objective(config, stage, name, common),
            held=_held(config, index, name),
            update=UpdateSettings.of(one),
        )
        for name, one in stage.objectives.items()
    )
    job = replace(first, others=tuple(others))
    job.check(gpus)
    return job


def _held(config: Config, index: int, name: str) -> Held:
    """As `Optimizer` has it, on a rank that trains an objective, alone or beside the others."""
    stage = config.all_stages[index]
    waiting = config.timeline.waiting(index)
    in_replicas = stage.placement == "replicas" and len(stage.objectives) > 1
    trained = [name] if in_replicas else list(stage.objectives)
    shared, local = stage.of == "gradients", stage.sync_every > 1
    owners = [stage.objectives[one] for one in (trained[:1] if shared else trained)]
    owners += [
        next(
            later.objectives[one] for later in config.all_stages[index:] if one in later.objectives
        )
        for one in waiting
    ]
    named = config.named_objectives
    frozen = sum(_frozen(named.get(name)) for name in (*stage.objectives, *waiting))
    return Held(
        gradients=len(trained),
        states=sum(len(rule_of(UpdateSettings.of(owner)).state) for owner in owners),
        locals=len(trained) if local else 0,
        exchange=buffers_of(
            plug.resolve("combination", stage.combination),
            len(stage.objectives),
            in_replicas=in_replicas,
            apart=shared or local,
        ),
        frozen=frozen,
        average=int(config.checkpoints.average_decay is not None),
        outer=0 if stage.outer is None else 2,
        masks=sum(one.protect is not None for one in stage.objectives.values()),
    )


def _frozen(given: AnyObjective | None) -> int:
    """Shards of other weights that an objective holds."""
    if isinstance(given, DistillConfig):
        return len(given.teachers)
    return int(isinstance(given, RlConfig) and given.policy.needs_reference)


def _objective(config: Config, stage: StageConfig, name: str, common: Job) -> Job:
    share = stage.times.steps_of(name) / stage.steps
    common = replace(common, name=name, alternates=stage.times.alternates, share_of_steps=share)
    if name == PRETRAINING:
        return common
    given = config.named_objectives[name]
    if isinstance(given, SftConfig):
        return replace(
            common,
            said_in=common.said_in if given.sequences_per_step is None else name,
            sequences_per_step=given.sequences_per_step or common.sequences_per_step,
            sequences_per_microbatch=given.sequences_per_microbatch
            or common.sequences_per_microbatch,
            sequence_length=given.sequence_length or common.sequence_length,
        )
    if isinstance(given, OwnConfig):
        return common  # what its batch is, only the objective knows
    if isinstance(given, DistillConfig):
        return _distillation(config, given, common)
    # Of a rollout that feeds several steps in several passes, this is a step's part.
    each_step = given.prompts_per_step * given.samples_per_prompt
    return _on_samples(config, given, common, each_step, given.epochs_per_rollout)


def _distillation(config: Config, given: DistillConfig, common: Job) -> Job:
    """Each step trains on a whole rollout."""
    samples = given.prompts_per_rollout * given.samples_per_prompt
    made = _on_samples(config, given, common, samples, given.rollout_every_steps)
    return made if given.samples else replace(made, rollouts=None)


def _on_samples(
    config: Config, given: RlConfig | DistillConfig, common: Job, samples: int, shared_by: int
) -> Job:
    """A step on so many samples, which are drawn once for `shared_by` such steps."""
    rollouts = _rollouts(config, given)
    each = rollouts.prompt_tokens + rollouts.completion_tokens
    return replace(
        common,
        sequences_per_microbatch=1,
        sequence_length=given.tokens_per_microbatch,
        packed_tokens=samples * each,
        document_length=each,
        rollouts=rollouts,
        samples_per_step=-(-samples // shared_by),
    )


def _rollouts(config: Config, given: RlConfig | DistillConfig) -> Rollouts:
    """Completions as long as they may become; prompts as long as is said, or a usual length."""
    most = config.model.max_sequence_length
    played = given.environment if isinstance(given, RlConfig) else None
    if played is not None:
        most = played.max_episode_tokens
    completion = min(given.most_written_tokens, most - 1)
    room = most - completion
    longest = min(given.max_prompt_tokens or room, room)
    prompt = given.max_prompt_tokens and longest
    return Rollouts(
        given.slots,
        prompt_tokens=prompt or min(PROMPT_TOKENS, longest),
        completion_tokens=completion,
        most_tokens=longest + completion if played is None else most,
        cache_tokens=given.cache_tokens,
        fp8=given.generator == FP8_GENERATOR,
    )
