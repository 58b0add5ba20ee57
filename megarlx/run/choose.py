"""What `auto` in a configuration becomes on the machine that runs it.

A precision changes the numbers of a run, so it is chosen once: a run that goes on, an excursion and
an evaluation keep it. Layers, attention and the size of a prefill are code for the same formulas.
Each machine chooses its own, and a run that goes on keeps layers and attention where it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarlx.choices import (
    PREFILL_TOKENS,
    SERVES,
    Attention,
    Choice,
    Machine,
    Needs,
    choose_attention,
    choose_layers,
    choose_precision,
    without_attention,
    without_layers,
)
from megarlx.config import Config
from megarlx.parallel.pipeline_plan import SPLIT_BACKWARD
from megarlx.run.directory import RunError


@dataclass
class Chosen:
    """A configuration without `auto`, and what stands for it, by dotted key."""

    config: Config
    choices: dict[str, Choice] = field(default_factory=dict)

    def put(self, path: tuple[str, ...], value: Any, choice: Choice) -> None:
        self.config = _with(self.config, path, value)
        self.choices[".".join(path)] = choice


def choose(config: Config, machine: Machine, recorded: Mapping[str, str] | None = None) -> Chosen:
    """What was given is refused where it cannot be had; what is `auto` is chosen.

    `recorded`: what a run that goes on began with, by dotted key.
    """
    made, before = Chosen(config), recorded or {}
    _choose_precision(made, machine, before)
    training = made.config.training
    needs = Needs(
        training.precision,
        config.model.head_dim,
        config.layout.schedule in SPLIT_BACKWARD,
        config.model.needs_of_attention,
    )
    _choose_layers(made, machine, needs, before)
    _choose_attention(made, machine, needs, before)
    _choose_prefills(made, machine)
    return made


def _choose_precision(made: Chosen, machine: Machine, before: Mapping[str, str]) -> None:
    if made.config.training.precision != "auto":
        return
    choice = choose_precision(machine)
    if (kept := before.get("training.precision")) not in (None, choice.value):
        choice = Choice(str(kept), "the run began with it")
    made.put(("training", "precision"), choice.value, choice)


def _choose_layers(made: Chosen, machine: Machine, needs: Needs, before: Mapping[str, str]) -> None:
    training = made.config.training
    if training.layers == "te" and (why := without_layers(machine)):
        raise RunError(f"training.layers is 'te', but {why}; allowed here: 'auto', 'torch'")
    if training.layers == "auto":
        choice = choose_layers(machine, needs)
        kept = before.get("training.layers", choice.value)
        if kept != choice.value and not (kept == "te" and without_layers(machine)):
            choice = Choice(kept, "the run began with them")
        made.put(("training", "layers"), choice.value, choice)
    training = made.config.training
    if training.fp8 != "none" and (training.layers != "te" or needs.precision != "bf16"):
        said = [f"{key} = {choice}" for key, choice in made.choices.items()]
        raise RunError(
            f"training.fp8 is '{training.fp8}'; it needs Transformer Engine's layers in bf16, and "
            f"here {'; '.join(said)}"
        )


def _choose_attention(
    made: Chosen, machine: Machine, needs: Needs, before: Mapping[str, str]
) -> None:
    given = made.config.training.attention
    if given != "auto":
        fits = "blocks" if needs.of_attention else "sdpa"
        if why := without_attention(given, machine, needs):
            raise RunError(f"training.attention is '{given}', but {why}; allowed: 'auto', '{fits}'")
        return
    choice = choose_attention(machine, needs)
    kept: Attention
    for kept in SERVES:
        same = before.get("training.attention") == kept
        if same and kept != choice.value and not without_attention(kept, machine, needs):
            choice = Choice(kept, "the run began with it")
    made.put(("training", "attention"), choice.value, choice)


def _choose_prefills(made: Chosen, machine: Machine) -> None:
    config, tokens = made.config, PREFILL_TOKENS[machine.device]
    sections: dict[tuple[str, ...], Any] = {("rl",): config.rl, ("evaluation",): config.evaluation}
    sections |= {("objectives", name, "rl"): one.rl for name, one in config.objectives.items()}
    why = "of short prompts, a GPU is busy with them" if machine.gpu else "they fill a CPU's caches"
    for path, section in sections.items():
        if section is not None and section.prefill_tokens is None:
            made.put((*path, "prefill_tokens"), tokens, Choice(str(tokens), why))


def _with(section: Any, path: tuple[str, ...], value: Any) -> Any:
    """The same section with another value somewhere below it."""
    first, *rest = path
    table = isinstance(section, dict)
    if rest:
        value = _with(section[first] if table else getattr(section, first), tuple(rest), value)
    return {**section, first: value} if table else section.model_copy(update={first: value})
