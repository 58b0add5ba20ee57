"""One static page: works from disk, loads nothing from elsewhere, readable on a phone.

Every text that comes from a file goes through `text`: completions are what a model wrote, and
names are what anybody gave a folder.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from megarlx.printable import printable
from megarlx.report.claims import TRUNKS_NEEDED, Finding
from megarlx.report.drawing import Figure, Table
from megarlx.report.samples import Example
from megarlx.report.settings import quantity
from megarlx.report.study import BASE, Study
from megarlx.report.tree import described

SIGNS = {"held": "✓", "not held": "✗", "undetermined": "?"}

STYLE = """
:root { color-scheme: light; --line: #d9d9d9; --soft: #f6f6f4; --ink: #1c1c1c; --dim: #595959; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 1.2rem 0 .2rem; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .3rem; font-size: 1.25rem; }
h3 { margin: 1rem 0 .3rem; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
a { color: #00558a; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .5rem 0;
  border-bottom: 1px solid var(--line); }
.facts { color: var(--dim); }
.note { border-left: 4px solid #e69f00; background: #fff8e8; padding: .5rem .8rem; }
.beside .scroll { max-height: 44rem; }
.beside { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); align-items: start; }
@media (min-width: 60rem) {
  .beside { grid-template-columns: 27rem minmax(0, 1fr); } }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 30rem; height: auto; }
figcaption { color: var(--dim); font-size: .85rem; }
.scroll { overflow: auto; border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: left; vertical-align: top; white-space: nowrap; }
.beside table { font-size: .8rem; }
.beside th, .beside td { padding: .26rem .42rem; }
td.wrap { white-space: normal; min-width: 12rem; }
td.differences { white-space: normal; min-width: 24rem; }
thead th { position: sticky; top: 0; background: var(--soft); white-space: normal; }
tbody tr:nth-child(even) { background: #fafaf9; }
@media (max-width: 44rem) {
  .claims thead { position: absolute; left: -200vw; }
  .claims tr { display: grid; grid-template-columns: 2.6rem minmax(0, 1fr); }
  .claims th { grid-row: span 4; }
  .claims td { grid-column: 2; padding: .12rem .6rem; min-width: 0 !important;
    white-space: normal; overflow-wrap: anywhere; } }
.verdict { font-weight: 600; }
.held { color: #00664a; } .not-held { color: #a34200; } .undetermined { color: var(--dim); }
pre { margin: .2rem 0 .8rem; padding: .6rem .8rem; background: var(--soft); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; }
pre.tree { white-space: pre; overflow-x: auto; }
details { margin: .6rem 0; } summary { cursor: pointer; }
li { overflow-wrap: anywhere; }
"""


def text(value: Any) -> str:
    """As it may stand in HTML, in an attribute too."""
    return html.escape(printable(str(value)), quote=True)


def page(
    study: Study,
    findings: dict[str, Finding],
    figures: Sequence[tuple[str, Sequence[Figure]]],
    examples: Sequence[Example],
) -> str:
    """`figures`: of each variant of the trunks, by the variant's name."""
    title = f"megarlx report: {study.root.resolve().name}"
    sections = [*_figure_sections(figures), ("lineage", "Lineage", _lineage(study))]
    claims = ("predicates", "The claims", _claims(study, findings))
    # With one seed nothing is claimed: the numbers come first.
    sections.insert(0 if len(study.trunks) >= TRUNKS_NEEDED else len(sections) - 1, claims)
    if examples:
        sections.append(("samples", "Completions", _examples(examples)))
    links = "".join(f'<a href="#{text(i)}">{text(t)}</a>' for i, t, _ in sections)
    body = "".join(
        f'<section id="{text(i)}"><h2>{text(t)}</h2>{content}</section>\n'
        for i, t, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(title)}</h1>{_facts(study)}</header>\n"
        f'<nav aria-label="sections">{links}</nav>\n<main>\n{body}</main>\n</body>\n</html>\n'
    )


def _facts(study: Study) -> str:
    tokens = ", ".join(quantity(t) for t in study.checkpoints)
    seeds = ", ".join(map(str, study.seeds))
    suites = study.headline or ", ".join(study.agent_suites) or "none yet"
    recipes = len({c.label for c in study.cells if c.recipe != BASE})
    facts = (
        f"{_count(len(study.trunks), 'trunk')}, {_count(len(study.excursions), 'excursion')} of "
        f"{_count(recipes, 'recipe')}; {_plural(study.seeds, 'seed')} {seeds}; "
        f"{_plural(study.checkpoints, 'checkpoint')} at {tokens} tokens; suite "
        f"{suites}; settings {study.settings_hash[:12]}."
    )
    found = [f'<p class="facts">{text(facts)}</p>']
    if len(study.trunks) < TRUNKS_NEEDED:
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
    head = ["", "verdict", "claim of the paper", "difference in points", "why"]
    rows = []
    for name, finding in findings.items():
        sign = f"{SIGNS[finding.verdict]} {finding.verdict}"
        comparisons = finding.evidence.get("comparisons", [])
        rows.append(
            f'<tr><th scope="row">{text(name)}</th>'
            f'<td class="verdict {text(finding.verdict.replace(" ", "-"))}">{text(sign)}</td>'
            f'<td class="wrap">{text(finding.evidence.get("claim", ""))}</td>'
            f'<td class="differences">{"<br>".join(text(_difference(c)) for c in comparisons)}</td>'
            f'<td class="wrap">{text(_why(finding))}</td></tr>'
        )
    told = (
        "A claim is held where all of the 95% t-interval over trunks lies in what the claim "
        "allows; not held where none of it does. Of a trunk, its mean over questions and "
        "checkpoints counts. Beside it stand the 95% interval over questions, for these trunks, "
        "and how many trunks lie above 0. Two trunks rarely decide: their interval is 12.7 "
        "standard errors to each side. A cell counts only where SFT's pass@1 is more than twice "
        "guessing. All evidence is in "
    )
    return (
        f'<p>{text(told)}<a href="summary.json">summary.json</a>.</p>'
        f'<div class="scroll"><table class="claims">{_head(head)}<tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


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
            parts.append((f"<h3>{text(variant)}</h3>" if variant else "") + _beside(figure))
    return [(kind, title, "".join(parts)) for kind, (title, parts) in found.items()]


def _beside(figure: Figure) -> str:
    name = text(figure.name)
    width, height = figure.canvas.get_size_inches() * 96
    return (
        f'<div class="beside"><figure><img src="figures/{name}.svg" alt="{text(figure.alt)}" '
        f'width="{width:.0f}" height="{height:.0f}" loading="lazy">'
        f'<figcaption><a href="figures/{name}.png">PNG</a> '
        f'<a href="figures/{name}.svg">SVG</a></figcaption></figure>{_table(figure.table)}</div>'
    )


def _table(table: Table) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in table[1:]
    )
    return f'<div class="scroll"><table>{_head(table[0])}<tbody>{rows}</tbody></table></div>'


def _head(names: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _lineage(study: Study) -> str:
    lines: list[str] = []

    def add(run: Any, depth: int) -> None:
        parts = filter(None, described(study, run))
        lines.append("  " * depth + ("└ " if depth else "") + "  ".join(parts))
        for other in study.runs:
            if study.parent_of(other) is run:
                add(other, depth + 1)

    for run in study.runs:
        if study.parent_of(run) is None:
            add(run, 0)
    return f'<pre class="tree">{text(chr(10).join(lines))}</pre>'


def _examples(examples: Sequence[Example]) -> str:
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
    return (
        "<p>The prompt, and in bold what the model wrote; of an episode what was seen first, and "
        "in bold what was done and seen in turn.</p>"
    ) + "".join(parts)


def _rewarded(example: Example) -> str:
    reward = "not known" if example.reward is None else f"{example.reward:g}"
    reference = f", reference {example.reference}" if example.reference else ""
    return f"reward {reward}{reference}, ended by {example.finish_reason}"
