"""How recipes look in every figure: Okabe and Ito's colours, which the colour-blind can tell apart.

No line is told by its colour alone: each recipe has a marker and a dash pattern too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLACK, ORANGE, SKY, GREEN = "#0b0b0b", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#6B6B6B"
OTHERS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)  # yellow cannot be seen on white
MARKERS = "oXPdhp<>*"

INK, GRID = "#1c1c1c", "#dddddd"
# What becomes of colours on a dark page; the others can be read on both.
DARK = {
    BLACK.lower(): "#f2f2f0",
    INK: "#e4e4e2",
    GRID: "#3b3f44",
    GREY.lower(): "#a8a8a4",
    BLUE.lower(): "#4aa3df",
    "#e3e3e3": "#4a4e54",
    "#ffffff": "#16181b",
}

COLUMNS = 3  # panels beside one another
WIDE_INCHES, ONE_PANEL_INCHES = 12.2, 7.6
# With large letters: a phone shows a figure at about the size it is drawn in.
WIDTH_INCHES = 4.6
PARAMETERS: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    # The page's own colour, which may be a dark one, shows through.
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "text.parse_math": False,  # names are told as they are, dollar signs too
    "svg.hashsalt": "megarlx",  # the same data give the same file
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    name: str
    color: str
    marker: str = "o"
    dashes: Any = "-"


LOOKS: dict[str, Look] = {
    "base": Look("base", BLACK, "o", "-"),
    "rl": Look("RL", VERMILION, "s", "-"),
    "sft": Look("SFT", BLUE, "^", "-"),
    "sft_gold": Look("SFT-Gold", SKY, "v", "--"),
    "sft_then_rl": Look("SFT→RL", GREEN, "D", "-"),
    "sft_gold_then_rl": Look("SFT-Gold→RL", GREEN, "d", "--"),
    "parallel": Look("parallel", PURPLE, "P", "-"),
    "parallel_scheduled": Look("parallel, scheduled", PURPLE, "<", "--"),
    "parallel_adaptive": Look("parallel, adaptive", PURPLE, ">", ":"),
    "alternate": Look("alternating", ORANGE, "X", "-"),
    "pretraining_with_rl": Look("pre-training with RL", ORANGE, "p", "--"),
    "chord": Look("CHORD", GREY, "*", "--"),
}
ORDER = list(LOOKS)


def name_of(recipe: str) -> str:
    return LOOKS[recipe].name if recipe in LOOKS else recipe


def look_of(label: str, labels: Sequence[str]) -> Look:
    """Of a recipe, or of one with its setting; what is not known gets its place among `labels`."""
    if label in LOOKS:
        return LOOKS[label]
    start, over, other = label.partition(" over ")
    if over and start in LOOKS:
        known = LOOKS[start]
        return Look(f"{known.name} over {other}", known.color, known.marker, ":")
    if label.startswith("base ("):  # of another trunk than "base" is
        return Look(label, BLACK, "o", ":")
    others = [one for one in labels if one not in LOOKS and not one.startswith("base (")]
    at = others.index(label)
    recipe, _, setting = label.partition(" (")
    same = LOOKS.get(recipe)
    name = f"{same.name} ({setting}" if same and setting else label
    return Look(
        name, OTHERS[at % len(OTHERS)], MARKERS[at % len(MARKERS)], ("--", ":", "-.")[at % 3]
    )


def in_order(labels: set[str]) -> list[str]:
    """The paper's recipes in the paper's order, then the rest by name."""
    known = {name: place for place, name in enumerate(ORDER)}
    return sorted(
        labels, key=lambda label: (known.get(re.split(r" \(| over ", label)[0], 99), label)
    )
