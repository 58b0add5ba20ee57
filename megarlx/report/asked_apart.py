"""Where runs of one checkpoint were measured in several ways: nothing is subtracted, and why."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from megarlx.evaluation.comparable import apart, shown
from megarlx.report.runs import Evaluation

if TYPE_CHECKING:
    from megarlx.report.study import Cell

Measured = list[tuple[str, Evaluation]]  # the run, and its result


def asked_apart(cells: Iterable[Cell], headline: str | None) -> Iterator[str]:
    """A line for each checkpoint and suite whose results cannot be compared."""
    for (_, tokens, suite), measured in _by_place(cells, headline or "").items():
        names = _apart(measured)
        in_templates = any(e.template != measured[0][1].template for _, e in measured)
        if not names and not in_templates:
            continue
        ways: defaultdict[str, list[str]] = defaultdict(list)
        said: dict[str, str] = {}
        for run, found in measured:
            parts = [f"in {_shown_template(found.template)}"] if in_templates else []
            parts += [f"with {shown(found.how, names)}"] if names else []
            way = json.dumps([found.template, [found.how.get(n) for n in names]], sort_keys=True)
            ways[way].append(run)
            said[way] = " ".join(parts)
        sides = "; ".join(f"{', '.join(runs)} {said[way]}" for way, runs in ways.items())
        yield (
            f"differences at {tokens:,} tokens, because {suite} was asked in {len(ways)} ways: "
            f"{sides}. Measure one side as the other"
        )


def _by_place(cells: Iterable[Cell], headline: str) -> dict[tuple[str, int, str], Measured]:
    """By trunk, checkpoint and suite; of a base the headline may be that with examples."""
    found: defaultdict[tuple[str, int, str], Measured] = defaultdict(list)
    for cell in cells:
        own = cell.run.parent.run if cell.run.parent else cell.run.name
        place = (cell.trunk.name if cell.trunk else own, cell.checkpoint_tokens)
        if cell.headline is not None:
            found[*place, headline].append((cell.run.name, cell.headline))
        for suite in cell.accuracy_suites:
            found[*place, suite].append((cell.run.name, cell.evaluations[suite]))
    return found


def in_several_ways(results: Sequence[Evaluation]) -> bool:
    """Whether the highest of them says nothing."""
    return any(not results[0].asked_like(other) for other in results)


def _apart(measured: Measured) -> list[str]:
    """Names of the settings in which any of them differs from the first."""
    first = measured[0][1].how
    return list(dict.fromkeys(n for _, other in measured for n in apart(first, other.how)))


def _shown_template(template: Mapping[str, str] | None) -> str:
    if template is None:
        return "none"
    if "chat" in template:
        digest = hashlib.sha256(template["chat"].encode()).hexdigest()[:8]
        return f"the chat template of a model ({digest})"
    return json.dumps(template, ensure_ascii=False)
