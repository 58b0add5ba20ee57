"""One static page: works from disk, loads nothing from elsewhere, readable on a phone.

Every text that comes from a file goes through `text`: completions are what a model wrote, and
names are what anybody gave a folder.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from megarlx.printable import printable
from megarlx.report.claims import TRUNKS_NEEDED, Finding
from megarlx.report.drawing import Figure, Table
from megarlx.report.folded import has_data, is_of_the_paper
from megarlx.report.headline import said
from megarlx.report.page_style import STYLE
from megarlx.report.runs import Run
from megarlx.report.samples import Example
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, Study
from megarlx.report.tree import described

SAMPLES = "samples"  # the folder of the page of samples
ROWS_SHOWN = 13  # of a table that stands open
INTERVAL = re.compile(r"\[(\S+), (\S+)\]")
SIGNS = {"held": "✓", "not held": "✗", "undetermined": "?"}


def text(value: Any) -> str:
    """As it may stand in HTML, in an attribute too."""
    return html.escape(printable(str(value)), quote=True)


def page(
    study: Study,
    findings: dict[str, Finding],
    figures: Sequence[tuple[str, Sequence[Figure]]],
    examples: Sequence[Example],
    *,
    samples: int = 0,
    claims_asked: bool = False,
) -> str:
    """`figures`: of each variant of the trunks, by the variant's name. `samples`: how many the page
    of samples beside this one has. `claims_asked`: whether these claims were asked for by name."""
    title = f"megarlx report: {study.root.resolve().name}"
    sections = _figure_sections(figures)
    claims = claims_asked or is_of_the_paper(study, findings)
    if claims:
        sections.insert(
            min(2, len(sections)), ("predicates", "The claims", _claims(study, findings))
        )
    sections.append(("lineage", "Lineage", _lineage(study)))
    if examples:
        sections.append(("samples", "Completions", _examples(examples, samples)))
    links = "".join(f'<a href="#{text(i)}">{text(t)}</a>' for i, t, _ in sections)
    if samples:
        links += f'<a href="{SAMPLES}/index.html">All samples ↗</a>'
    body = "".join(
        f'<section id="{text(i)}"><h2><a href="#{text(i)}">{text(t)}</a></h2>{content}</section>\n'
        for i, t, content in sections
    )
    first = said(study)
    sentence = f'<p class="said">{text(first)}</p>' if first else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1>{sentence}{_facts(study, claims)}</header>\n"
        f'<nav aria-label="sections">{links}</nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def _facts(study: Study, claims: bool) -> str:
    tokens = ", ".join(quantity(t) for t in study.checkpoints)
    seeds = ", ".join(map(str, study.seeds))
    suites = study.headline or ", ".join(study.agent_suites)
    recipes = len({c.label for c in study.cells if c.recipe != BASE})
    facts = [
        f"{_count(len(study.trunks), 'trunk')}, {_count(len(study.excursions), 'excursion')} of "
        f"{_count(recipes, 'recipe')}",
        f"{_plural(study.seeds, 'seed')} {seeds}" if study.seeds else "",
        f"{_plural(study.checkpoints, 'checkpoint')} at {tokens} tokens" if tokens else "",
        f"suite {suites}" if suites else "",
        "in brackets 95% intervals over questions",
    ]
    found = [f'<p class="facts">{text("; ".join(filter(None, facts)))}.</p>']
    if claims and len(study.trunks) < TRUNKS_NEEDED:
        found.append('<p class="note">One trunk: numbers are shown, no verdict is claimed.</p>')
    missing = study.missing()
    if missing:
        rows = "".join(f"<li>{text(line)}</li>" for line in missing)
        found.append(
            f'<details class="note"{" open" if len(missing) <= 5 else ""}><summary>'
            f"{_count(len(missing), 'thing')} missing or unfinished; the report shows the rest."
            f"</summary><ul>{rows}</ul></details>"
        )
    return "".join(found)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plural(things: Sequence[Any], noun: str) -> str:
    return noun if len(things) == 1 else f"{noun}s"


def _claims(study: Study, findings: dict[str, Finding]) -> str:
    told = (
        "A claim is held where all of the 95% t-interval over trunks lies in what the claim "
        "allows; not held where none of it does. Of a trunk, its mean over questions and "
        "checkpoints counts. Beside it stand the 95% interval over questions, for these trunks, "
        "and how many trunks lie above 0. Two trunks rarely decide: their interval is 12.7 "
        "standard errors to each side. A cell counts only where SFT's pass@1 is more than twice "
        "guessing. All evidence is in "
    )
    head = ["", "verdict", "claim", "difference in points", "why"]
    rows = "".join(_claim(name, f, head) for name, f in findings.items() if has_data(f))
    without = [name for name, finding in findings.items() if not has_data(finding)]
    table = f"<table>{_head(head)}<tbody>{rows}</tbody></table>"
    if len(study.trunks) < TRUNKS_NEEDED:
        table = f"<details><summary>What one trunk says of them</summary>{table}</details>"
    no_data = f"<p>Nothing here speaks of {text(', '.join(without))}.</p>" if without else ""
    return f'<p>{text(told)}<a href="summary.json">summary.json</a>.</p>{table}{no_data}'


def _claim(name: str, finding: Finding, head: Sequence[str]) -> str:
    verdict = f"verdict {finding.verdict.replace(' ', '-')}"
    comparisons = finding.evidence.get("comparisons", [])
    cells = (
        ("th", "", text(name)),
        ("td", verdict, text(f"{SIGNS[finding.verdict]} {finding.verdict}")),
        ("td", "", text(finding.evidence.get("claim", ""))),
        ("td", "", "<br>".join(_unbroken(text(_difference(c))) for c in comparisons)),
        ("td", "", text(_why(finding))),
    )
    made = "".join(
        f'<{tag} data-label="{text(label)}" class="{text(kind)}"><div>{content}</div></{tag}>'
        for (tag, kind, content), label in zip(cells, head, strict=True)
    )
    return f"<tr>{made}</tr>"


def _difference(comparison: dict[str, Any]) -> str:
    if comparison["points"] is None:
        return f"{comparison['difference']}: –"
    these = _between(comparison["these_trunks"]["interval_over_questions"])
    trunks, above = comparison["trunks"], comparison["signs"]["above"]
    return (
        f"{comparison['difference']}: {comparison['points']:+.1f}"
        f"{_between(comparison['interval'])}; these trunks{these}; {above} of {trunks} above 0"
    )


def _between(bounds: list[float | None]) -> str:
    low, high = (math.inf if v is None else v for v in bounds)
    return f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) and math.isfinite(high) else ""


def _why(finding: Finding) -> str:
    comparisons = finding.evidence.get("comparisons", [])
    counted = sum(c["cells"] for c in comparisons)
    left_out = len({reason for c in comparisons for reason in c["left_out"]})
    parts = [finding.evidence.get("reason", ""), *finding.evidence.get("against", [])]
    for suite, change in finding.evidence.get("nll_change", {}).items():
        parts.append(f"loss of {suite} {change:+.3f} nats")
    for metric, points in finding.evidence.get("since_the_checkpoint", {}).items():
        if points is not None:
            parts.append(f"{metric} since the checkpoint {points:+.1f}")
    if direction := finding.evidence.get("direction"):
        parts.append(f"{direction['claim']}: {direction['verdict']}")
    if counted:
        parts.append(f"{_count(counted, 'cell')} compared")
    if left_out:
        parts.append(f"{left_out} left out")
    return "; ".join(filter(None, parts))


def _figure_sections(
    figures: Sequence[tuple[str, Sequence[Figure]]],
) -> list[tuple[str, str, str]]:
    """A section for each kind of figure, all variants in it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for variant, drawn in figures:
        for figure in drawn:
            kind = figure.name.partition("-")[0]
            parts = found.setdefault(kind, (figure.title, []))[1]
            if not parts:
                parts.append(f"<p>{text(figure.caption)}</p>")
            head = f"<h3>{text(variant)}</h3>" if variant else ""
            note = f"<p>{text(figure.note)}</p>" if figure.note else ""
            parts.append(head + note + _drawn(figure))
    return [(kind, title, "".join(parts)) for kind, (title, parts) in found.items()]


def _drawn(figure: Figure) -> str:
    """The picture, wide or narrow as the page is, and its numbers below it."""
    name = text(figure.name)
    picture = ""
    if figure.draw is not None:
        width, height = figure.wide.get_size_inches() * 96
        narrow, tall = figure.narrow.get_size_inches() * 96
        picture = (
            f'<figure><picture><source media="(max-width: 44rem)" '
            f'srcset="figures/{name}-narrow.svg" width="{narrow:.0f}" height="{tall:.0f}">'
            f'<img src="figures/{name}.svg" alt="{text(figure.alt)}" '
            f'width="{width:.0f}" height="{height:.0f}" loading="lazy"></picture>'
            f'<figcaption><a href="figures/{name}.png">PNG</a> '
            f'<a href="figures/{name}.svg">SVG</a></figcaption></figure>'
        )
    opened = " open" if len(figure.table) <= ROWS_SHOWN or not picture else ""
    numbers = f"<details{opened}><summary>Numbers</summary>{_table(figure.table)}</details>"
    return picture + numbers


def _table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        labelled = zip(table[0], cells, strict=True)
        made = (f'<td data-label="{text(n)}">{_unbroken(text(cell))}</td>' for n, cell in labelled)
        return f"<tr>{''.join(made)}</tr>"

    rows = "".join(map(row, table[1:]))
    return f'<div class="rows"><table>{_head(table[0])}<tbody>{rows}</tbody></table></div>'


def _unbroken(shown: str) -> str:
    """An interval stays in one line."""
    return INTERVAL.sub("[\\1,\u00a0\\2]", shown)


def _head(names: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _lineage(study: Study) -> str:
    def tree(above: Run | None) -> str:
        below = [run for run in study.runs if study.parent_of(run) is above]
        items = "".join(
            f"<li>{text(' · '.join(filter(None, described(study, run))))}{tree(run)}</li>"
            for run in below
        )
        return f"<ul>{items}</ul>" if items else ""

    return (
        f'<div class="lineage">{tree(None)}</div><p class="facts">Hash of all settings but seeds '
        f"and paths, the same for the same study: {text(study.settings_hash[:12])}.</p>"
    )


def _examples(examples: Sequence[Example], samples: int) -> str:
    parts: list[str] = []
    by_file: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        by_file.setdefault((example.run, example.file), []).append(example)
    for (name, file), made in by_file.items():
        inner = "".join(
            f"<h3>{text(_rewarded(e))}</h3><pre>{text(e.prompt)}<b>{text(e.completion)}</b></pre>"
            for e in made
        )
        head = f"{name}, {file}"
        parts.append(f"<details><summary>{text(head)}</summary>{inner}</details>")
    page = (
        f'<a href="{SAMPLES}/index.html">All {samples:,} samples</a> stand on a page of their own. '
    )
    return (
        f"<p>{page if samples else ''}The prompt, and in bold what the model wrote; of an episode "
        "what was seen first, and in bold what was done and seen in turn.</p>"
    ) + "".join(parts)


def _rewarded(example: Example) -> str:
    reward = "not known" if example.reward is None else f"{example.reward:g}"
    reference = f", reference {example.reference}" if example.reference else ""
    return f"reward {reward}{reference}, ended by {example.finish_reason}"
