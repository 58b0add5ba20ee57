import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import needs_browser, opened, with_script
from fake_sweep import AS_IN_THE_PAPER, Sweep

from megarlx.cli import main
from megarlx.report.page import text
from megarlx.report.style import INK

VOID = {"meta", "img", "br", "link", "input", "hr", "source"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section"),
    *("h1", "h2", "h3", "p", "a", "div", "figure", "figcaption", "img", "table", "thead", "tbody"),
    *("tr", "th", "td", "br", "pre", "b", "details", "summary", "ul", "li"),
    *("picture", "source"),
}
HOSTILE = '<img src=x onerror="alert(1)"> & <script>alert(2)</script>'


class Page(HTMLParser):
    """Raises where tags are not nested as they should be."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def with_samples(run: Path, completion: str) -> None:
    line = {"prompt": "1 + 1 = ", "completion": completion, "reference": "2", "reward": 0.0}
    (run / "samples").mkdir()
    more = {"finish_reason": "stop", "id": "test/0"}
    (run / "samples" / "iter_00000060.math.jsonl").write_text(json.dumps(line | more) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sweep = Sweep(tmp_path_factory.mktemp("sweep"), questions=40, tests=20)
    sweep.checkpoints = (1_000_000, 2_000_000)
    sweep.outcomes = AS_IN_THE_PAPER | {HOSTILE: AS_IN_THE_PAPER["rl"]}
    trunks = [sweep.trunk(seed) for seed in (0, 1)]
    for seed, trunk in enumerate(trunks):
        for tokens in sweep.checkpoints:
            for recipe in ("rl", "sft", "sft_then_rl"):
                sweep.excursion(trunk, recipe, tokens, seed)
    run = sweep.excursion(trunks[0], HOSTILE, 2_000_000, 0, name='"><svg onload=x>')
    with_samples(run, "2</pre><script>alert(3)</script>\x00\x1b[31m\ud83d")
    assert main(["report", str(sweep.root)]) == 0
    return sweep.root


def test_the_page_is_well_formed_and_holds_only_known_tags(root: Path) -> None:
    page = Page(root / "report" / "index.html")
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in page.all("a") if (a["href"] or "").startswith("#")} == {
        f"#{i}" for i in ids
    }


def test_what_files_say_is_shown_and_never_run(root: Path) -> None:
    page = Page(root / "report" / "index.html")
    shown = "".join(page.words)
    assert HOSTILE in shown
    assert '"><svg onload=x>' in shown
    assert r"2</pre><script>alert(3)</script>\x00\x1b[31m\ud83d" in shown


def test_the_page_loads_nothing_from_elsewhere(root: Path) -> None:
    out = root / "report"
    page = Page(out / "index.html")
    places = [a[key] or "" for _, a in page.tags for key in ("src", "href") if key in a]
    for place in places:
        assert place.startswith("#") or (out / place).is_file(), place
    written = (out / "index.html").read_text()
    for word in ("http:", "https:", "@import", "url(", "//cdn"):
        assert word not in written


NAMES = (
    *("pass_at_k", "gains", "dynamics", "training", "pretraining"),
    *("capability", "held_out", "consistency", "cost"),
)


def test_every_figure_has_a_text_a_size_a_table_and_a_narrow_form(root: Path) -> None:
    page = Page(root / "report" / "index.html")
    images = page.all("img")
    assert [image["src"] for image in images] == [f"figures/{name}.svg" for name in NAMES]
    narrow = page.all("source")
    assert [one["srcset"] for one in narrow] == [f"figures/{name}-narrow.svg" for name in NAMES]
    for image in images:
        assert len(image["alt"] or "") > 30
    for one in (*images, *narrow):
        assert int(one["width"] or 0) > 100
        assert int(one["height"] or 0) > 100
    assert all(int(one["width"] or 0) < 450 for one in narrow)
    assert len(page.all("table")) == len(images) + 1  # and the claims


def test_every_cell_tells_its_column_where_there_is_no_head(root: Path) -> None:
    page = Page(root / "report" / "index.html")
    assert page.all("td")
    assert all("data-label" in cell for cell in page.all("td"))


def test_figures_are_pictures_in_both_formats(root: Path) -> None:
    figures = root / "report" / "figures"
    assert {file.stem for file in figures.glob("*.png")} == set(NAMES)
    assert len(list(figures.glob("*.svg"))) == 2 * len(NAMES)
    for file in figures.glob("*.svg"):
        assert ElementTree.parse(file).getroot().tag.endswith("}svg")
        written = file.read_text()
        assert "prefers-color-scheme: dark" in written
        assert written.count(INK) > 10  # what is written and drawn changes with the page
    for file in figures.glob("*.png"):
        png = file.read_bytes()
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20], "big") > 800  # pixels wide


def test_the_first_thing_is_a_sentence_with_its_number_and_one_figure(root: Path) -> None:
    html = (root / "report" / "index.html").read_text()
    sentence = re.search(r'<p class="said">([^<]*)</p>', html)
    assert sentence is not None
    assert sentence[1].startswith("From 2M tokens of pre-training, SFT→RL takes pass@1 of math")
    assert re.search(r"\+\d+\.\d points \[\+\d+\.\d, \+\d+\.\d\], the most of", sentence[1])
    first = html.index("<img")
    assert html.index("</header>") < first < html.index("<table")
    assert "pass_at_k" in html[first : first + 60]


def test_every_heading_is_a_link_to_its_section(root: Path) -> None:
    html = (root / "report" / "index.html").read_text()
    found = re.findall(r'<section id="(\w+)"><h2><a href="#(\w+)">', html)
    assert len(found) == html.count("<h2>") > 8
    assert all(here == there for here, there in found)


def test_samples_stand_on_a_page_of_their_own(root: Path) -> None:
    page = root / "report" / "samples" / "index.html"
    assert page.is_file()
    assert 'href="samples/index.html"' in (root / "report" / "index.html").read_text()


def test_a_phone_is_told_the_width_and_the_language_is_named(root: Path) -> None:
    page = Page(root / "report" / "index.html")
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )


def test_the_same_files_give_the_same_report(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert main(["report", str(root), "--out", str(out)]) == 0
    for file in ("index.html", "summary.json", "figures/pass_at_k.svg", "figures/cost.png"):
        assert (out / file).read_bytes() == (root / "report" / file).read_bytes(), file


@pytest.mark.parametrize("given", ["<", "&", '"', "'", "a\x00b", "\ud800"])
def test_text_can_stand_anywhere_in_html(given: str) -> None:
    made = text(given)
    made.encode("utf-8")
    assert not set("<\"'\x00") & set(made)


# Which elements reach over the page, or their contents over them.
CUT = """
const outside = (one) => {
  const head = one.closest("thead"), box = one.getBoundingClientRect();
  if (head && getComputedStyle(head).position === "absolute") return false; // told in each cell
  const over = box.right > document.documentElement.clientWidth + 1 || box.left < -1;
  const field = ["SELECT", "INPUT"].includes(one.tagName);
  const inside = !field && one.clientWidth && one.scrollWidth > one.clientWidth + 1;
  return box.width && (over || inside);
};
addEventListener("load", () => setTimeout(() => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const cut = [...document.querySelectorAll("body *")].filter(outside);
  const said = cut.map((one) => one.outerHTML.slice(0, 120)).join(" | ");
  parent.postMessage({ width: innerWidth, cut: said }, "*");
}, 1500));
"""


@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("page", ["index.html", "samples/index.html"])
def test_nothing_is_cut_off_in_a_browser(root: Path, width: int, page: str) -> None:
    found = root / "report" / page
    with_script(found, found.with_name("cut.html"), CUT)
    around = found.with_name("around.html")  # a browser's own window may not be as narrow
    around.write_text(
        f'<iframe src="cut.html" width="{width}" height="900" style="border: 0"></iframe>'
        "<script>onmessage = (event) => Object.assign(document.body.dataset, event.data)</script>"
    )
    html = opened(around, width=1500)
    assert f'data-width="{width}"' in html
    cut = re.search(r'data-cut="([^"]*)"', html)
    assert cut is not None
    assert cut[1] == ""
