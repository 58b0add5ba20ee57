"""Every command that a document shows is run, in the document's order, on a tiny model and little
data. What is not run is listed here with the reason, so that no command can be forgotten."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from documents import EXPLANATION, Shown, documents, fenced, shell_lines, shown, words_of
from public_models import tiny_model
from short_runs import MATH, RL, STEPS, TRUNK, WORLD, table
from training_runs import ROOT, run, tool

from megarlx.cli import main
from megarlx.data.tokenizer import ByteTokenizer
from megarlx.hf.tokenizer_files import hugging_face_tokenizer

PROCESSES = 2  # at most

# Each configuration that a documented command trains by, and what makes its runs short.
SHORT: dict[str, dict[str, str]] = {
    "configs/demo_trunk.toml": {**TRUNK, **MATH},
    "configs/demo_pretraining.toml": TRUNK,
    "configs/demo_rl.toml": {
        **WORLD,
        **STEPS,
        **RL,
        **MATH,
        "stages.0.steps": "4",
        "stages.0.objectives.pretraining.warmup_steps": "2",
        "stages.1.steps": "6",
    },
    "configs/demo_agent.toml": {
        **{
            f"data.options.environments.{i}.{key}": value
            for i in range(2)
            for key, value in (("tasks", "16"), ("test_tasks", "4"), ("demonstrations", "8"))
        },
        **{
            f"objectives.{name}.rl.{key}": value
            for name in ("sokoban", "calculator")
            for key, value in (("prompts_per_step", "2"), ("samples_per_prompt", "2"))
        },
        "stages.0.steps": "4",
        "stages.0.objectives.sft.warmup_steps": "2",
        "stages.1.steps": "4",
        "stages.1.objectives.sokoban.warmup_steps": "0",
        "stages.1.objectives.calculator.warmup_steps": "0",
        "evaluation.every_steps": "4",
        "evaluation.readiness_prompts": "2",
    },
    "configs/recipes/parallel.toml": {**RL, "stages.0.steps": "6"},
    "configs/recipes/sft.toml": {"stages.0.steps": "6"},
    "configs/recipes/sampo.toml": {
        "stages.0.steps": "6",
        "rl.prompts_per_step": "2",
        "rl.samples_per_prompt": "2",
        "evaluation.readiness_prompts": "2",
    },
    "configs/paper_1b/trunk.toml": {
        **STEPS,
        "model.vocab_size": "272",
        "model.hidden_size": "32",
        "model.layers": "2",
        "model.heads": "2",
        "model.intermediate_size": "64",
        "training.sequence_length": "32",
        "training.steps": "4",
        "optimizer.warmup_steps": "2",
        "data.sources": '[{name = "web", prefix = "data/dolmino/web"}]',
    },
    "configs/demo.toml": {
        "set": table({**TRUNK, **MATH}),
        "excursions.0.recipes": '["configs/recipes/parallel.toml"]',
        "evaluate": "[]",  # tests/end_to_end/test_converted_trunk.py has a sweep that measures
        "excursions.0.set": table({**RL, "stages.0.steps": "6"}),
        "threads_per_job": "1",
    },
    "configs/study_h100.toml": {
        "seeds": "[1]",
        "evaluate": "[]",
        "excursions": "[]",  # tests/unit/test_study_h100.py looks at each
        "axes": '{"model.layers" = [3]}',
        "set": table(
            {
                **TRUNK,
                **MATH,
                "evaluation.suites.0.group_size": "2",
                "model.hidden_size": "24",
                "model.heads": "2",
                "model.intermediate_size": "40",
                "training.sequence_length": "64",
            }
        ),
        "threads_per_job": "1",
    },
}

# What a line begins with, and the command that stands for it: for a pattern, for a placeholder, or
# for more processes than are needed.
INSTEAD = {
    "[mpirun -n N] megarlx prepare ": "megarlx prepare "
    "documents.jsonl documents.jsonl --tokenizer bytes --out data/mine",
    "megarlx prepare … --out data/dolmino/web": "megarlx prepare "
    "documents.jsonl --tokenizer data/dolmino/tokenizer.json --out data/dolmino/web",
    "megarlx inspect RUN --overlap": "megarlx inspect runs/trunk --overlap",
    "megarlx inspect RUN ": "megarlx inspect runs/trunk --verify",
    "megarlx train CONFIG.toml ": "megarlx train configs/demo_trunk.toml --out runs/trunk",
    "megarlx branch … --replay": "megarlx branch runs/trunk@6 configs/recipes/sft.toml "
    "--out runs/replayed --replay",
    "megarlx generate RUN[@ITER] ": "megarlx generate runs/trunk@4 --prompt 'max has' "
    "--samples 4 --temperature 0.6 --logprobs",
    "[torchrun … -m] megarlx evaluate RUN[@ITER] ": "megarlx evaluate runs/trunk@4 "
    "--config suites.toml --suite mine --samples 2 --temperature 0.6 --set layout.tensor=1",
    "megarlx report DIR ": "megarlx report runs --out elsewhere",
    "megarlx tree DIR": "megarlx tree runs",
    # README.md runs two processes that share each layer's matrices.
    "torchrun --standalone ": "torchrun --standalone --nproc-per-node 1 -m megarlx train "
    "configs/paper_1b/trunk.toml --out runs/olmo",
    "torchrun --nproc-per-node 8 -m megarlx train CONFIG.toml ": "torchrun --nproc-per-node 2 "
    "-m megarlx train configs/demo_trunk.toml --set layout.tensor=1 --set layout.pipeline=2",
}

# Steps of the documents' runs, and of these.
ITERATIONS = {"runs/trunk@1000 configs": "runs/trunk@4 configs"}

# Commands that a document takes for granted.
TRUNK_FIRST = ["megarlx train configs/demo_trunk.toml --out runs/trunk"]
PAPER_DATA = ["megarlx prepare … --out data/dolmino/web"]
BEFORE = {
    "agents.md": ["megarlx train configs/demo_agent.toml --out runs/demo_agent"],
    "data.md": TRUNK_FIRST,
    "evaluation.md": TRUNK_FIRST,
    "faq.md": TRUNK_FIRST,
    "launching.md": PAPER_DATA,
    "report.md": TRUNK_FIRST,
    "troubleshooting.md": TRUNK_FIRST,
}

CLUSTER = "needs a cluster; its launcher is tried in tests/faults/test_launch_scripts.py"
NODES = "needs several nodes; tests/faults/test_two_nodes.py has two, made of namespaces"
LONG = "takes up to an hour; tests/end_to_end/test_study_command.py has a short study"
DOCTOR = "asks the machine it is on, as tests/unit/test_doctor.py and test_doctor_ranks.py do"
# What a line begins with that is only parsed (test_documented_commands.py), and why.
NOT_RUN = {
    "sbatch ": CLUSTER,
    "srun ": CLUSTER,
    "mpirun ": CLUSTER,
    "tools/launch/mpirun.sh ": CLUSTER,
    "torchrun --nnodes ": NODES,
    "torchrun --nproc-per-node 8 -m megarlx train configs/paper_1b/trunk.toml --out runs/olmo; [": (
        "docs/launching.md has the same line, which is run; behind it stands Slurm's"
    ),
    "megarlx chat RUN": "talks; tests/unit/run/test_chat.py",
    "megarlx view DIR ": "tests/unit/report/test_report_viewer.py has all of it",
    "megarlx demo --study ": LONG,
    **dict.fromkeys(
        (
            f"megarlx sweep configs/{name}.toml"
            for name in (
                *("combinations", "group_size", "longer"),
                *("placement", "placement_agreeing", "composition"),
                *("study_gate", "tuning/1_rl"),
                *("kept", "kept_arithmetic", "kept_facts", "kept_matrix"),
                *("kept_mechanisms", "paper_1b/kept"),
                *(f"tuning/kept_{world}_1_alpha" for world in ("tables", "arithmetic", "facts")),
                *(f"tuning/kept_{world}_2_rates" for world in ("tables", "arithmetic")),
            )
        ),
        LONG,
    ),
    "megarlx report runs/kept": "tests/unit/study/test_kept.py has runs that it reads",
    "megarlx transplant ": "tests/end_to_end/test_transplant_command.py has all of it",
    "megarlx merge ": "tests/end_to_end/test_transplant_command.py has all of it",
    "megarlx study ": "reads what takes hours; tests/unit/study/test_gate.py has made-up runs",
    "torchrun … -m megarlx doctor": DOCTOR,
    "megarlx doctor": DOCTOR,
    "megarlx train configs/demo_pretraining.toml --set 'logging.trackers": "needs the service's "
    "package; tests/unit/test_trackers.py has stand-ins",
}

# Lines that call neither `megarlx` nor a tool: the programs they begin with, and who runs them.
PROGRAMS = ("make", "git", "pip", "python", "python3", "docker", "tensorboard", "bash", "torchrun")
INSTALLS = "installs: run by people, and by CI"
OTHERS = {
    "make ": "run by CI and by people; that the targets exist is tested",
    "python benchmarks/": "measures, alone on the machine; tests/unit/ops has what it measures",
    "git clone ": INSTALLS,
    "python3 -m venv ": INSTALLS,
    "pip install ": INSTALLS,
    "MEGARLX_CUDA=1 TORCH_CUDA_ARCH_LIST=": INSTALLS,
    "docker build ": INSTALLS,
    "tensorboard ": "another program; its files are read in tests/unit/test_metrics.py",
    "python -m megarlx.run.lm_eval_harness ": "tests/unit/evaluation/test_lm_eval.py",
    "torchrun … -m megarlx.run.lm_eval_harness ": "tests/unit/evaluation/test_lm_eval.py",
    "torchrun --max-restarts N": "no command: an option; tests/faults/test_killed_runs.py",
    "python - <<": "tests/end_to_end/test_own_model.py",
}


def run_by_another_test(one: Shown) -> bool:
    if one.document.name == "own_model.md":  # test_own_model.py
        blocks = "\n".join(fenced(one.document, "bash")).replace("\\\n    ", "")
        return one.line in blocks
    if one.document.name == "scaling.md":  # tests/unit/planning/test_plan_docs.py
        return any(f"$ {one.line}" in block for block in fenced(one.document, "text"))
    return False


def said_of(line: str, by_beginning: Mapping[str, str]) -> str | None:
    return next((said for begin, said in by_beginning.items() if line.startswith(begin)), None)


def to_run(document: Path) -> list[Shown]:
    return [
        one
        for one in shown(document)
        if said_of(one.line, NOT_RUN) is None and not run_by_another_test(one)
    ]


def shortened(line: str) -> tuple[list[str], list[str]]:
    """What launches it, and the words that `megarlx` or the tool gets."""
    text = said_of(line, INSTEAD) or line
    for long, short in ITERATIONS.items():
        text = text.replace(long, short)
    words = words_of(text)
    end = words.index(";") if ";" in words else len(words)
    at = next(i for i, word in enumerate(words) if word.endswith("megarlx") or "tools/" in word)
    at += 0 if "tools/" in words[at] else 1
    before, words = words[:at], words[at:end]
    if words[0] in ("train", "branch", "sweep") and not {"--list", "--slurm"} & set(words):
        configs = [word for word in words if word.startswith("configs/")]
        for config in configs:
            assert config in SHORT, f"{line}\nSHORT does not say how {config} is made short"
            for key, value in SHORT[config].items():
                words += ["--set", f"{key}={value}"]
    return before, words


def execute(line: str) -> None:
    before, words = shortened(line)
    if launcher := next((word for word in before if word.endswith("torchrun")), None):
        options = before[before.index(launcher) + 1 : before.index("-m")]
        processes = options.index("--nproc-per-node") + 1
        options[processes] = str(min(int(options[processes]), PROCESSES))
        alone = [] if "--standalone" in options else ["--standalone"]  # a port of its own
        start = [sys.executable, "-m", "torch.distributed.run", *alone, *options, "-m", "megarlx"]
        done = run([*start, *words])
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    elif words[0].startswith("tools/"):
        assert tool(Path(words[0]).stem).main(words[1:]) == 0, line
    else:
        assert main(words) == 0, line
    if "--out" in words:
        out = Path(words[words.index("--out") + 1])
        assert out.is_dir() or out.with_suffix(".bin").is_file(), line


def give_what_is_the_readers(folder: Path, document: Path) -> None:
    """Files that the documents take for granted: models, data, suites, a recipe."""
    (folder / "configs").symlink_to(ROOT / "configs")
    if document.name == "study.md":  # copied: a report writes beside what it reads
        records = Path("benchmarks/results/study")
        shutil.copytree(ROOT / records, folder / records)
    texts = "".join(json.dumps({"text": f"{n} plus {n} is {2 * n}. "}) + "\n" for n in range(99))
    (folder / "documents.jsonl").write_text(texts)
    questions = [{"question": f"{n} + 1 ?", "answer": str(n + 1)} for n in range(4)]
    lines = "".join(json.dumps(one) + "\n" for one in questions)
    (folder / "questions.jsonl").write_text(lines)
    (folder / "suites.toml").write_text(SUITES)
    (folder / "recipe.toml").write_text(RECIPE)
    dolmino = folder / "data" / "dolmino"
    dolmino.mkdir(parents=True)
    names = ("tokenizer.json", "tokenizer_config.json")
    for name, content in zip(names, hugging_face_tokenizer(ByteTokenizer()), strict=True):
        (dolmino / name).write_text(json.dumps(content))


TEMPLATE = """
[template]
user = "question : {content} answer :"
"""
SUITES = f"""{TEMPLATE}
[[suites]]
name = "mine"
kind = "pass_at_k"
path = "questions.jsonl"
samples = 2
max_new_tokens = 4
"""
RECIPE = f"""{TEMPLATE}
[training]
sequence_length = 48
sequences_per_step = 2
[sft]
conversations = "questions.jsonl"
[[stages]]
steps = 1
[stages.objectives.sft]
lr = 1e-3
"""

DOCUMENTS = [document for document in documents() if to_run(document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_document_runs_in_its_order(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of what a sweep starts
    give_what_is_the_readers(tmp_path, document)
    if document.name == "convert.md":
        pytest.importorskip("transformers")
        for name in ("OLMo-2-1B", "step1000", "step2000"):
            tiny_model(tmp_path / "models" / name)
    for line in [*BEFORE.get(document.name, ()), *(one.line for one in to_run(document))]:
        execute(line)


def others() -> list[str]:
    """Lines that begin with a program's name and call neither megarlx nor a tool of ours."""
    found = []
    for document in documents():
        ours = {one.line for one in shown(document)}
        for text in shell_lines(document):
            line = EXPLANATION.split(text.strip())[0]
            words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
            if line not in ours and words and words[0] in PROGRAMS:
                found.append(line)
    return found


def test_no_command_is_neither_run_nor_listed() -> None:
    for line in others():
        assert said_of(line, OTHERS), f"{line}\nis not run; OTHERS does not say why"
    for document in documents():
        for one in to_run(document):
            assert not one.is_pattern or said_of(one.line, INSTEAD), (
                f"{one}\nis a pattern; INSTEAD does not say what stands for it"
            )
            shortened(one.line)


def test_no_list_names_a_command_that_no_document_shows() -> None:
    lines = [one.line for document in documents() for one in shown(document)]
    for begin in (*NOT_RUN, *INSTEAD):
        assert any(line.startswith(begin) for line in lines), begin
    for begin in OTHERS:
        assert any(line.startswith(begin) for line in others()), begin
    for why in (*NOT_RUN.values(), *OTHERS.values()):
        assert all((ROOT / path).is_file() for path in re.findall(r"\S+/\S+\.(?:py|md)", why)), why
    assert {line for before in BEFORE.values() for line in before} <= set(lines)
    assert SHORT.keys() <= {word for line in [*lines, *INSTEAD.values()] for word in line.split()}


def test_a_command_that_is_new_would_be_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"how configs/study\.toml is made short"):
        shortened("megarlx sweep configs/study.toml")
    document = tmp_path / "new.md"
    document.write_text("    megarlx evaluate runs/new\n    megarlx doctor\n")
    assert [one.line for one in to_run(document)] == ["megarlx evaluate runs/new"]
