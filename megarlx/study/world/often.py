"""Which facts can be asked of beside others that text tells often.

    F   facts        V   values of all slots

A question about a fact of slot s > 1 ends with it: facts of the slots before lead to its value, one
after the other. Of slot 1 it begins with it, and a fact of slot 2 follows. What text is expected to
tell is worked out as if no problem had a kept fact, so it is rather too low than too high.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from megarlx.study.world.tables import Tables

# So many facts have to lead to a kept one, and each is to be told in such a share of problems.
LEAD, OFTEN = 2, 1 / 250


class Beside:
    def __init__(self, tables: Tables) -> None:
        settings = tables.settings
        self.slots, self.in_slot = settings.slots, tables.in_slot
        self.per_slot = settings.tables * tables.in_slot  # facts
        facts = [tables[number] for number in range(len(tables))]
        self.value = np.array([at.value for at in facts])  # [F]
        self.result = np.array([tables.result(at) for at in facts])  # [F]
        weights = np.array(tables.weights) / sum(tables.weights)
        self.drawn = np.tile(np.repeat(weights, tables.in_slot), settings.slots)  # [F]
        self.begun = np.zeros(tables.values)  # [V], of slot 0 as problems start
        self.begun[: tables.in_slot] = np.repeat(weights, settings.table_values)
        self.begun /= settings.table_values
        steps = np.array(settings.steps) / sum(settings.steps)
        self.long = np.array([steps[slot:].sum() for slot in range(settings.slots)])

    def leads(self, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """[F]: how many facts told often a question about it can have next to it."""
        reached, leading = self.begun.copy(), np.zeros(len(self.begun), np.int64)
        following = leading.copy()
        leading[: self.in_slot] = 1  # a problem may start there
        for slot in range(self.slots):
            own = slice(slot * self.per_slot, (slot + 1) * self.per_slot)
            value, result, told = self.value[own], self.result[own], ~kept[own]
            share = self.drawn[own] * reached[value]
            often = told & (share * self.long[slot] >= OFTEN) & (leading[value] > 0)
            np.add.at(reached, result, share * told)
            np.add.at(leading, result, often)
            if slot == 1:
                np.add.at(following, value, often)
        first = np.arange(len(kept)) < self.per_slot
        return np.where(first, following[self.result], leading[self.value])


def asked_often(tables: Tables, among: Iterable[int]) -> Iterator[int]:
    """Of these, in their order, those that leave every fact taken before and themselves enough."""
    beside, taken = Beside(tables), list[int]()
    kept = np.zeros(len(tables), np.bool_)
    for number in among:
        kept[number] = True
        if beside.leads(kept)[[*taken, number]].min() >= LEAD:
            taken.append(number)
            yield number
        else:
            kept[number] = False
