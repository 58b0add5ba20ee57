"""What update rules keep of this rank's shard: an objective's tensors by name, and its steps.

Which objectives' states are here depends on who trains them: all of them, or in a replica one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megarlx.checkpoint import OPTIMIZER, CheckpointError
from megarlx.comm.collectives import all_reduce_
from megarlx.comm.groups import Group
from megarlx.training.parts import UpdateSettings
from megarlx.training.update_rules import UpdateRule, rule_of


class RuleStates:
    def __init__(
        self, settings: Mapping[str, UpdateSettings], here: Sequence[str], master: Tensor
    ) -> None:
        """`settings` of all whose states a rank has; `here` are those of this rank."""
        self.settings, self.owners = dict(settings), list(here)
        self._like = master
        self.rules: dict[str, UpdateRule] = {k: rule_of(one) for k, one in settings.items()}
        self.shards: dict[str, dict[str, Tensor]] = {
            owner: {name: torch.zeros_like(master) for name in self.rules[owner].state}
            for owner in here
        }
        self.steps = torch.zeros(len(self.owners), dtype=torch.int64, device=master.device)
        self._places: dict[tuple[str, ...], Tensor] = {}

    def named(self, owners: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Under the names that checkpoints have for them; of those that are here."""
        for owner in owners:
            for name, shard in self.shards.get(owner, {}).items():
                yield f"{OPTIMIZER}{owner}/{name}/", shard

    def place_of(self, owners: Sequence[str]) -> Tensor:
        """Index of these in `steps`; made once, since the host waits for the device to make it."""
        key = tuple(owners)
        if key not in self._places:
            places = [self.owners.index(owner) for owner in owners]
            self._places[key] = torch.tensor(places, device=self.steps.device)
        return self._places[key]

    def steps_of(self, owner: str) -> Tensor:
        """[1], a view."""
        at = self.owners.index(owner)
        return self.steps[at : at + 1]

    def take(
        self, before: RuleStates, owner: str, from_owner: Callable[[Tensor, str], Tensor]
    ) -> None:
        """An objective's, as another stage left it; `from_owner` gives it to all replicas."""
        count = before.steps.new_zeros(1)
        if owner in before.owners:
            count.copy_(before.steps_of(owner))
        for name in self.rules[owner].state:
            held = before.shards.get(owner, {}).get(name)
            moved = from_owner(self._like.clone() if held is None else held, owner)
            if owner in self.owners:
                self.shards[owner][name].copy_(moved)
        from_owner(count, owner)
        if owner in self.owners:
            self.steps_of(owner).copy_(count)

    def state(self, replicas: Group) -> dict[str, Any]:
        """What of a checkpoint is in no shard; all ranks call it together."""
        mine = dict(zip(self.owners, self.steps, strict=True))
        none = self.steps.new_zeros(())
        steps = torch.stack([mine.get(owner, none) for owner in self.settings])
        all_reduce_(steps, replicas, "max")
        return {
            "steps": dict(zip(self.settings, steps.tolist(), strict=True)),
            "rules": {owner: one.whole_rule for owner, one in self.settings.items()},
        }

    def check_rules(self, state: Mapping[str, Any], owners: Sequence[str]) -> None:
        """Whether a checkpoint's states of these were made by the rules that go on with them."""
        rules = state.get("rules")
        for name in owners:
            if name not in self.settings:  # its stage has one state for all
                continue
            saved = rules.get(name) if isinstance(rules, Mapping) else None
            if saved != (wanted := self.settings[name].whole_rule):
                raise CheckpointError(
                    f"the state of '{name}' was made by the update rule {saved!r}; '{wanted}' "
                    "cannot go on with it"
                )

    def restore(self, state: Mapping[str, Any], owners: Sequence[str]) -> None:
        """The steps of these; their shards were filled."""
        steps = state.get("steps")
        if not isinstance(steps, Mapping) or any(
            type(steps.get(name)) is not int or steps[name] < 0 for name in owners
        ):
            raise CheckpointError(
                f"optimizer steps are {steps!r}; expected one count each of {', '.join(owners)}"
            )
        self.check_rules(state, owners)
        for name in owners:
            if name in self.owners:
                self.steps_of(name).fill_(steps[name])
