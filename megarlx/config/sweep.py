"""A sweep: trunks, the checkpoints that excursions start from, recipes and seeds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from megarlx.config.section import Section

Texts = Annotated[tuple[str, ...], Field(strict=False)]


class ExcursionConfig(Section):
    """Recipes and the checkpoints they start from."""

    recipes: Texts = Field(description="Recipe files; their names name the excursions")
    checkpoints: Texts = Field(
        default=("latest",), description="As behind RUN@: a step, latest, tokens:4B"
    )
    runs: Texts = Field(
        default=(),
        description="Runs of this sweep that these start from, in place of the trunk: their names "
        "without the seed, so rl-at-1750",
    )
    name: str | None = Field(
        default=None, min_length=1, description="Put into the names of these runs"
    )
    set: dict[str, Any] = Field(
        default={},
        description="Keys of these recipes with other values, as 'rl.slots' = 64; {run NAME} in a "
        "text is the folder of a run of this sweep",
    )
    axes: dict[str, list[Any]] = Field(
        default={}, description="Keys with the values each of which is run"
    )


class PartnerConfig(Section):
    """A second trunk of each seed."""

    name: str = Field(min_length=1, description="What these trunks are called")
    add: dict[str, int] = Field(
        default={}, description="Keys of the trunk to which this is added, as training.seed = 1000"
    )
    set: dict[str, Any] = Field(default={}, description="Keys of the trunk with other values")


class TransplantConfig(Section):
    """Sums of weights, as megarlx transplant makes them; each is measured."""

    name: str = Field(min_length=1, description="What these runs are called")
    excursions: Texts = Field(
        min_length=1, description="Runs of this sweep, by their names without the seed"
    )
    onto: str = Field(default="latest", description="Checkpoint of the trunk; as behind RUN@")
    starts: Texts = Field(
        default=(),
        description="RUN@K of this sweep that the differences are from; absent: their parents",
    )
    alpha: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        default=(1.0,), description="Times each difference: one for all, or one each"
    )
    each_alpha: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        default=(), description="In place of alpha: a run for each of these"
    )
    match: str | None = Field(
        default=None, description="In place of alpha: the run whose share of marked answers to have"
    )
    suite: str | None = Field(default=None, description="That match measures; as --suite")
    change: str | None = Field(
        default=None, description="A control: what is added in place of the difference; as --change"
    )

    def problems(self) -> list[tuple[str, str]]:
        given = [name for name in ("each_alpha", "match") if getattr(self, name)]
        if "alpha" in self.model_fields_set and self.alpha != (1.0,):
            given.insert(0, "alpha")
        if len(given) > 1:
            return [(given[1], f"and {given[0]} cannot be given together")]
        return []


class SweepConfig(Section):
    """Which runs a study is made of. Everything that is there already is not run again."""

    out: str = Field(description="Folder of all runs and of the report")
    trunk: str = Field(
        description="Configuration of the pre-training run; or the folder of a run that is there"
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] = Field(
        default=(0,), description="One trunk and its excursions for each"
    )
    trunks: str | None = Field(
        default=None,
        description="Folder of the trunks, if it is another sweep's: trained there unless they are "
        "there; absent: out",
    )
    set: dict[str, Any] = Field(default={}, description="Keys of the trunk with other values")
    axes: dict[str, list[Any]] = Field(
        default={}, description="Keys of the trunk with the values each of which is run"
    )
    seed_keys: Texts = Field(
        default=("training.seed",), description="Keys of the trunk that a seed is put into"
    )
    evaluate: Texts = Field(
        default=(), description="Checkpoints of each trunk whose suites are measured"
    )
    suites: str | None = Field(
        default=None, description="File of these suites; absent: those of the trunk itself"
    )
    excursions: Annotated[tuple[ExcursionConfig, ...], Field(strict=False)] = Field(
        default=(), description="What starts from the trunks, each an [[excursions]] table"
    )
    partners: Annotated[tuple[PartnerConfig, ...], Field(strict=False)] = Field(
        default=(), description="Second trunks of each seed, each a [[partners]] table"
    )
    transplants: Annotated[tuple[TransplantConfig, ...], Field(strict=False)] = Field(
        default=(), description="What runs have changed, added to a trunk's checkpoint"
    )
    records: str | None = Field(
        default=None,
        description="Folder of files, one a seed, in which finished runs leave their counts by "
        "question; what stands there of the same settings is not run again",
    )
    record_suites: Texts = Field(
        default=(),
        description="Suites that records keep, of every step; absent: all of a run's last step, "
        "and of earlier ones those that sample",
    )
    jobs: int = Field(default=1, ge=1, description="Runs at the same time")
    threads_per_job: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of a run; absent: OMP_NUM_THREADS, else its share of cores",
    )
    launcher: Texts = Field(
        default=(), description="Words before each command, as torchrun's with its options"
    )
    trust: Texts = Field(
        default=(),
        description="Code of yours that a trunk which is there may name; that of a trunk that is "
        "trained here is trusted",
    )
    budget_minutes: float | None = Field(
        default=None, gt=0, description="No run is begun after so long; a later sweep goes on"
    )

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            found.append(("seeds", f"are {list(self.seeds)}; at least one, none of them twice"))
        for name, values in self.axes.items():
            if not values:
                found.append(("axes", f"{name} has no values"))
        built = {"partners": self.partners, "transplants": self.transplants}
        for key in (key for key, value in built.items() if value and self.axes):
            found.append((key, "is for sweeps without axes of the trunk"))
        if self.trunk_is_there:
            given: dict[str, Any] = {"set": self.set, "axes": self.axes, "trunks": self.trunks}
            given["partners"] = self.partners
            found += [
                (key, f"is for trunks that are trained; {self.trunk} is a run")
                for key, value in given.items()
                if value
            ]
        return found

    @property
    def trunk_is_there(self) -> bool:
        """Whether the trunk is a run, converted ones too, and no configuration of one."""
        return not self.trunk.endswith(".toml")
