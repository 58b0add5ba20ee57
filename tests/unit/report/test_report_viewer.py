"""The page of samples: its data, what it never does with a model's text, and in a browser."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import needs_browser, opened, with_script
from fake_samples import HOSTILE, lines, run_with_samples, write

from megarlx.cli import main
from megarlx.printable import printable
from megarlx.report import rollouts

VIEWER = Path(rollouts.__file__).parent / "viewer"
CALL = re.compile(r'megarlx\.(index|samples)\((?:"(?P<key>[^"]+)", )?(?P<json>.*)\);\n', re.DOTALL)
# What would make markup, or code, of a text.
FORBIDDEN = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment"),
    *("DOMParser", "eval(", "Function(", "setAttribute", "srcdoc", "fetch(", "XMLHttpRequest"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    run_with_samples(root / "runs" / "one")
    run_with_samples(root / "runs" / "two", steps=(0,), groups=2)
    assert main(["view", str(root / "runs")]) == 0
    return root / "runs"


def read(path: Path) -> tuple[str | None, Any]:
    text = path.read_text(encoding="ascii")
    made = CALL.fullmatch(text)
    assert made is not None, text[:200]
    assert "<" not in text
    return made["key"], json.loads(made["json"])


def index(root: Path) -> list[dict[str, Any]]:
    series: list[dict[str, Any]] = read(root / "view" / "data" / "index.js")[1]["series"]
    return series


def groups_of(root: Path, one: dict[str, Any], step: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for number, first in enumerate(step["firsts"]):
        assert first == len(found)
        path = root / "view" / "data" / one["folder"] / f"{step['file']}-{number:04d}.js"
        key, groups = read(path)
        assert key == f"{one['folder']}/{path.stem}"
        found += groups
    return found


def test_every_sample_of_every_file_is_there_in_its_group(root: Path) -> None:
    for one in index(root):
        for step in one["steps"]:
            groups = groups_of(root, one, step)
            file = root / one["run"] / "samples" / f"{step['file']}.{one['name']}.jsonl"
            given = [json.loads(line) for line in file.read_text().splitlines()]
            samples = [(g["prompt"], s["reward"]) for g in groups for s in g["samples"]]
            assert samples == [(printable(line["prompt"]), line["reward"]) for line in given]
            assert len(groups) == step["groups"] == len({line["prompt"] for line in given})
            assert len(samples) == step["samples"]
            rewards = [reward for _, reward in samples]
            assert step["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_training_stands_before_evaluations_and_steps_are_in_order(root: Path) -> None:
    found = index(root)
    names = [(one["run"], one["name"], one["kind"]) for one in found]
    assert names == [
        *(("one", "agent", "training"), ("one", "rl", "training")),
        *(("one", "math", "evaluation"), ("one", "old", "evaluation")),
        *(("two", "agent", "training"), ("two", "rl", "training")),
        *(("two", "math", "evaluation"), ("two", "old", "evaluation")),
    ]
    assert [step["step"] for step in found[1]["steps"]] == [0, 20, 40]


def test_large_files_are_split_between_groups(tmp_path: Path) -> None:
    run = run_with_samples(tmp_path / "run", steps=(0,))
    many = write(run / "samples" / "iter_00000009.many.jsonl", lines(900, 4, of_training=False))
    assert main(["view", str(run), "--out", str(tmp_path / "page")]) == 0
    (tmp_path / "view").symlink_to("page")
    one = next(one for one in index(tmp_path) if one["name"] == "many")
    (step,) = one["steps"]
    assert len(step["firsts"]) > 2
    files = [*(tmp_path / "page" / "data" / one["folder"]).iterdir()]
    assert len(files) == len(step["firsts"])
    assert max(file.stat().st_size for file in files) < 1.2 * rollouts.PIECE
    groups = groups_of(tmp_path, one, step)
    assert [g["id"] for g in groups] == [f"test/{n}" for n in range(900)]
    assert all(len(g["samples"]) == 4 for g in groups)
    many.unlink()  # what is written again holds nothing of before
    assert main(["view", str(run), "--out", str(tmp_path / "page")]) == 0
    assert not any("many" in one["name"] for one in index(tmp_path))
    assert len([*(tmp_path / "page" / "data").rglob("*-*.js")]) == 4


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"prompt": "a"}', '{"prompt": 1, "completion": 2, "reward": "x"}', "\xff"]
)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    run = run_with_samples(tmp_path / "run", steps=(0,))
    file = run / "samples" / "step_00000007.rl.jsonl"
    file.write_bytes(bad.encode("latin-1") + b"\n")
    assert main(["view", str(run)]) == 0
    shown = capsys.readouterr()
    assert "samples/step_00000007.rl.jsonl: cannot be used: " in shown.err
    assert str(run / "view" / "index.html") in shown.out
    (rl,) = [one for one in index(run) if one["name"] == "rl"]
    assert [step["step"] for step in rl["steps"]] == [0]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    run = run_with_samples(tmp_path / "run", steps=(0,))
    file = run / "samples" / "step_00000000.rl.jsonl"
    file.write_text(file.read_text()[:-20])
    assert main(["view", str(run)]) == 0
    (rl,) = [one for one in index(run) if one["name"] == "rl"]
    assert rl["steps"][0]["samples"] == 11


def test_a_run_without_samples_and_a_folder_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
    run = run_with_samples(tmp_path / "run")
    for file in (run / "samples").iterdir():
        file.unlink()
    assert main(["view", str(run)]) == 0
    assert capsys.readouterr().out.startswith("0 samples: ")


def test_the_page_makes_no_markup_of_texts_and_loads_only_its_own_files() -> None:
    code = "".join((VIEWER / name).read_text() for name in ("draw.js", "viewer.js"))
    assert not [word for word in FORBIDDEN if word in code]
    page = (VIEWER / "index.html").read_text()
    assert not re.search(r"<script(?! src=)|\son\w+=|style=|https?:", page)
    assert "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {
        *("viewer.css", "draw.js", "viewer.js", "data/index.js"),
    }
    assert "url(" not in (VIEWER / "viewer.css").read_text()


def test_every_element_that_the_code_names_is_on_the_page() -> None:
    page = (VIEWER / "index.html").read_text()
    code = (VIEWER / "viewer.js").read_text()
    named = set(re.findall(r'find\("(\w+)"\)', code))
    assert named
    assert named <= set(re.findall(r'id="(\w+)"', page))
    for key in re.findall(r"<kbd>(\w|\[|\]|/)</kbd>", page):
        assert f'"{key}":' in code or f"\n  {key}:" in code, key


def test_every_colour_of_the_code_is_in_the_style_and_the_legend() -> None:
    code, style = ((VIEWER / name).read_text() for name in ("draw.js", "viewer.css"))
    page = (VIEWER / "index.html").read_text()
    for name, kinds in (("SURPRISES", ("surprise",)), ("SIZES", ("better", "worse"))):
        made = re.search(rf"const {name} = (\[.*\]);", code)
        assert made is not None
        for kind in kinds:
            for level in range(1, len(json.loads(made[1])) + 1):
                assert f".{kind}{level} {{" in style
                assert f'class="{kind}{level}"' in page


# In a browser.


class Seen(HTMLParser):
    """The texts and classes of a page that a browser has run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.title, self.count, self.classes = "", "", list[str]()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.classes += (given.get("class") or "").split()
        if tag not in ("meta", "link", "input", "br", "img"):
            self._open.append((tag, given.get("id") or given.get("class") or tag))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            self.texts.setdefault(name, []).append(data)

    def text(self, name: str) -> str:
        return "".join(self.texts.get(name, []))


@needs_browser
def test_a_browser_shows_groups_side_by_side_from_disk(root: Path) -> None:
    seen = Seen(opened(root / "view" / "index.html", "#run=one&series=rl&step=20"))
    assert seen.text("at") == "step 20"
    assert "3 of the 3 groups" in seen.text("count")
    assert seen.tags.count("article") == 12
    assert "surprise3" in seen.classes
    assert "advantage " in seen.text("groups")
    assert re.search(r"\d+ tokens", seen.text("groups"))


@needs_browser
def test_a_browser_shows_markup_of_a_model_and_never_runs_it(root: Path) -> None:
    html = opened(root / "view" / "index.html", "#run=one&series=rl&step=0")
    seen = Seen(html)
    assert seen.text("title") == "Samples"
    assert "img" not in seen.tags
    assert printable(HOSTILE) in seen.text("groups")
    assert "\\u202e" in seen.text("groups")


@needs_browser
@pytest.mark.parametrize(
    ("address", "articles"),
    [
        ("run=one&series=math&step=40", 40),  # 20 of 30 groups at first
        ("run=one&series=math&step=40&group=25", 10),
        ("run=one&series=rl&step=40&finish=length", None),
        ("run=one&series=rl&step=40&low=0.5", None),
        ("run=one&series=math&step=0&which=mixed", None),
        ("run=one&series=math&step=0&text=question 7:", 2),
        ("run=one&series=old&step=40", 6),
        ("run=nobody&series=nothing&step=x&group=-4&colour=red", None),
    ],
)
def test_an_address_leads_to_what_was_shown(root: Path, address: str, articles: int | None) -> None:
    seen = Seen(opened(root / "view" / "index.html", "#" + address.replace(" ", "%20")))
    if articles is None:
        words = dict(word.split("=") for word in address.split("&"))
        made = next(
            (o for o in index(root) if (o["run"], o["name"]) == (words["run"], words["series"])),
            index(root)[0],
        )
        step = next((s for s in made["steps"] if str(s["step"]) == words["step"]), made["steps"][0])
        groups = [g["samples"] for g in groups_of(root, made, step)]
        if "which" in words:
            groups = [g for g in groups if len({s["reward"] for s in g}) > 1][:20]
        articles = sum(
            (s["finish"] == words.get("finish", s["finish"]))
            and s["reward"] >= float(words.get("low", 0))
            for g in groups
            for s in g
        )
        assert articles
    assert seen.tags.count("article") == articles


@needs_browser
def test_keys_go_through_steps_groups_and_colours(root: Path) -> None:
    page = root / "view" / "index.html"
    script = """
    const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
    const note = (id) => { document.body.dataset[id] = location.hash; };
    addEventListener("load", async () => {
      const wait = () => new Promise((done) => setTimeout(done, 200));
      const pressed = async (...keys) => {
        for (const key of keys) { press(key); await wait(); }
      };
      await wait();
      await pressed("ArrowLeft"); note("left");
      await pressed("ArrowRight", "ArrowRight"); note("right");
      await pressed("j", "j", "k"); note("walked");
      await pressed("c"); note("colour");
      await pressed("]"); note("series");
    });
    """
    copy = with_script(page, root / "view" / "keys.html", script)
    html = opened(copy, "#run=one&series=rl&step=20", milliseconds=8000)
    found = {key: unescape(text) for key, text in re.findall(r'data-(\w+)="#([^"]*)"', html)}
    assert "step=0&" in found["left"]
    assert "step=40&" in found["right"]
    assert "group=1" in found["walked"]
    assert "colour=advantage" in found["colour"]
    assert "series=math" in found["series"]


@needs_browser
def test_100_000_samples_are_shown_in_a_moment(tmp_path: Path) -> None:
    run = run_with_samples(tmp_path / "run", steps=(0,))
    for file in (run / "samples").iterdir():
        file.unlink()
    few = list(lines(8, 16, of_training=False))
    made = (
        {**few[(group * 16 + at) % len(few)], "id": f"test/{group}", "prompt": f"prompt {group}",
         "reward": float(group == 6_200 and at == 3)}
        for group in range(6_250) for at in range(16)
    )  # fmt: skip
    write(run / "samples" / "iter_00000100.many.jsonl", made)
    assert main(["view", str(run)]) == 0
    page = run / "view" / "index.html"
    first = Seen(opened(page))
    assert "6,250 groups, 100,000 samples" in first.text("count")
    assert first.tags.count("section") == 20
    html = opened(page, "#low=1", milliseconds=60_000)  # the only one, near the end
    assert Seen(html).tags.count("article") == 1
    assert "test/6200" in html
    # What is loaded at first is little: the rest comes as it is looked at.
    assert (run / "view" / "data" / "index.js").stat().st_size < 10_000


def test_the_page_is_xml_but_for_its_void_elements() -> None:
    page = (VIEWER / "index.html").read_text().replace("<!DOCTYPE html>\n", "")
    page = re.sub(r"<(meta|link|input)([^>]*)>", r"<\1\2/>", page).replace("' '", "''")
    page = re.sub(r"\b(hidden)(?=[ >])(?!=)", r'\1="\1"', page)
    ElementTree.fromstring(page)
