"""Which facts can be kept from text: those beside which it tells enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megarlx.config import load_config
from megarlx.config.sweep import SweepConfig
from megarlx.study.world.often import LEAD, OFTEN, Beside
from megarlx.study.world.problems import problem_at
from megarlx.study.world.settings import WorldSettings
from megarlx.study.world.tables import Tables

ROOT = Path(__file__).resolve().parents[3]
PLAIN = WorldSettings(operation_kind="table", quantities=1, steps=(0.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["kept_facts", "tuning/kept_facts_1_alpha"])
def test_every_world_of_the_study_has_two_sets_of_facts_that_can_be_asked_of(name: str) -> None:
    sweep = load_config(ROOT / "configs" / f"{name}.toml", (), SweepConfig)
    before = "data.options.settings."
    own = {k.removeprefix(before): v for k, v in sweep.set.items() if k.startswith(before)}
    trunk = load_config(ROOT / sweep.trunk).data.options
    for seed in sweep.seeds:
        settings = {**trunk["settings"], **own, "seed": seed}
        tables = Tables(WorldSettings.from_json(settings))
        assert (len(tables.withheld), len(tables.told_wrongly)) == (64, 64)
        kept = np.zeros(len(tables), np.bool_)
        kept[[*tables.withheld, *tables.told_wrongly]] = True
        assert Beside(tables).leads(kept)[kept].min() >= LEAD


def test_what_is_told_often_is_what_problems_are_drawn_from() -> None:
    """A fact counts where its share of problems is enough, and a way leads to it."""
    tables = Tables(replace(PLAIN, tables=4, table_values=4))
    drawn = np.zeros(len(tables))
    for index in range(8000):
        for at in problem_at(tables.settings, "train", index, "text").lookups:
            drawn[tables.number(at)] += 1 / 8000
    leads = Beside(tables).leads(np.zeros(len(tables), np.bool_))
    for number in range(len(tables)):
        at = tables[number]
        if at.operation < 4:
            beside = [n for n in range(64, 128) if tables[n].value == tables.result(at)]
        else:
            beside = [n for n in range(len(tables)) if tables.result(tables[n]) == at.value]
        if at.operation < 8:  # a fact of the first slot needs nothing before it
            sure = sum(drawn[n] > 1.5 * OFTEN for n in beside)
            might = sum(drawn[n] > 0.6 * OFTEN for n in beside)
            assert sure <= leads[number] <= might


def test_a_fact_that_is_kept_leads_nowhere() -> None:
    tables = Tables(replace(PLAIN, tables=4, table_values=4))
    beside = Beside(tables)
    none = np.zeros(len(tables), np.bool_)
    before = beside.leads(none)
    for number in range(0, len(tables), 7):
        kept = none.copy()
        kept[number] = True
        assert (beside.leads(kept) <= before).all()
    assert not beside.leads(~none).any()
