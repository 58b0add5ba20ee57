"""The tests that need a GPU, the sanitizer, and whole runs on one GPU."""

from __future__ import annotations

import functools
import os
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu.pieces import (
    ROOT,
    Absent,
    Context,
    Failed,
    Piece,
    Result,
    call,
    environment,
    note,
    python,
    there,
)
from megarlx.training.metrics import read_metrics

# Where megarlx finds the reward of the RL branches.
REWARDS = {"PYTHONPATH": os.pathsep.join((str(ROOT / "benchmarks"), environment()["PYTHONPATH"]))}
# What is not named here is a test of ops.
TESTS = {
    "layouts": ("test_layouts_on_one_gpu.py",),
    "model": ("test_model_on_cuda.py", "test_generation_on_cuda.py"),
}
WORKERS = {"ops": 8, "layouts": 2, "model": 4}  # a layout has up to eight processes of its own
# The largest gap to the loss curve of fp32 on the CPU, relative; TF32 rounds products' inputs.
ROUNDED_BAND, FP32_BAND = 0.05, 0.01

TRUNK = """
[model]
family = "olmo2"
vocab_size = 384
hidden_size = 128
layers = 3
heads = 2
intermediate_size = 256
max_sequence_length = 192

[training]
steps = {steps}
sequences_per_step = 16
sequences_per_microbatch = 8
sequence_length = 128

[optimizer]
lr = 3e-3
schedule = "constant"
warmup_steps = 2

[data]
maker = "world"
folder = "{world}"
[data.options]
documents = {documents}
held_out_documents = 40
prompts = 128
test_questions = 32

[checkpoints]
save_every_steps = {half}

[logging]
log_every_steps = 1
validation_sequences = 16

[[evaluation.suites]]
name = "math"
kind = "pass_at_k"
made = "problems"
samples = 8
max_new_tokens = 40
group_size = 8
"""


def files_of(group: str) -> list[str]:
    named = {name for names in TESTS.values() for name in names}
    found = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    if missing := sorted(named - found):
        raise Failed(f"tests/gpu has no {', '.join(missing)}", {})
    return sorted(found - named) if group == "ops" else list(TESTS[group])


def tests(context: Context, group: str) -> Result:
    report = context.work / f"tests-{group}.xml"
    report.unlink(missing_ok=True)
    command = python("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    command += [f"tests/gpu/{name}" for name in files_of(group)] + [f"--junitxml={report}"]
    if there("xdist") and context.device.type == "cuda":
        command += ["--numprocesses", str(WORKERS[group])]
    code, output = call(command, context.seconds_left())
    if not report.exists():
        raise Failed(f"pytest ended with {code} and left no report", {"tail": output[-3000:]})
    found: Result = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    wrong, why = [], set()
    root = ElementTree.parse(report).getroot()
    for suite in root.iter("testsuite"):
        for key in found:
            found[key] += int(suite.get(key, 0))
    for case in root.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            wrong.append(f"{case.get('name')}")
        skipped = case.find("skipped")
        if skipped is not None:
            why.add(str(skipped.get("message")))
    found |= {"failed": wrong, "skipped_because": sorted(why)}
    passed = found["tests"] - found["skipped"] - len(wrong)
    note(f"{group}: {passed} passed, {len(wrong)} failed, {found['skipped']} skipped {sorted(why)}")
    for name in wrong:
        note(f"failed: {name}")
    if wrong or code not in (0, 5):
        raise Failed(f"pytest ended with {code}: {len(wrong)} of {found['tests']} failed", found)
    if not passed and context.device.type == "cuda":
        raise Failed("every test was skipped", found)
    return found


def sanitizer(context: Context, tool: str) -> Result:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Absent("compute-sanitizer is not on PATH")
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    script = ROOT / "benchmarks" / "gpu" / "kernels_once.py"
    # Every tensor an allocation of its own: a read behind its end is then an error to see.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    command = [program, *options, *python(script, "cuda")]
    code, output = call(command, context.seconds_left(), variables=variables)
    tail = output[-3000:].splitlines()
    if code != 0:
        raise Failed(f"{tool} ended with {code}", {"output": tail})
    note(f"{tool}: {' '.join(line for line in tail if 'SUMMARY' in line or 'ran ' in line)}")
    return {"output": tail}


def losses(run: Path) -> dict[int, float]:
    key = "loss/pretraining"
    return {int(x["step"]): x[key] for x in read_metrics(run / "metrics.jsonl") if key in x}


def whole_runs(context: Context) -> Result:
    """Train, stop and go on, branch three ways, evaluate; bf16 and fp32 against fp32 on the CPU."""
    folder = context.work / "whole_runs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps, documents = context.either(60, 6), context.either(6000, 600)
    config = folder / "trunk.toml"
    text = TRUNK.format(steps=steps, half=steps // 2, documents=documents, world=folder / "world")
    config.write_text(text)
    device = f"training.device={context.device.type}"

    def megarlx(*words: str | Path) -> None:
        code, output = call(
            python("-m", "megarlx", *words), context.seconds_left(), variables=REWARDS
        )
        if code != 0:
            raise Failed(f"megarlx {words[0]} ended with {code}", {"output": output[-3000:]})

    def train(name: str, *settings: str) -> dict[int, float]:
        sets = [word for setting in settings for word in ("--set", setting)]
        megarlx("train", config, "--out", folder / name, *sets)
        return losses(folder / name)

    bf16 = "training.precision=bf16"
    reference = train("cpu_fp32", "training.device=cpu")
    curves = {
        "fp32": train("fp32", device, "training.precision=fp32", "training.tf32=false"),
        "fp32 with TF32": train("tf32", device, "training.precision=fp32"),
        "bf16": train("bf16", device, bf16),
    }
    train("parts", device, bf16, f"training.steps={steps // 2}")
    curves["bf16, stopped and resumed"] = train("parts", device, bf16)
    bands = {"fp32": FP32_BAND}
    found: Result = {"steps": steps, "cpu_fp32": reference[max(reference)], "final": {}}
    apart = []
    for name, curve in curves.items():
        if curve.keys() != reference.keys():
            raise Failed(f"{name} logged other steps than the CPU's run", {"steps": list(curve)})
        gaps = {s: abs(curve[s] - reference[s]) / abs(reference[s]) for s in curve}
        found["final"][name] = curve[max(curve)]
        found[f"largest gap, {name}"] = max(gaps.values())
        if max(gaps.values()) > bands.get(name, ROUNDED_BAND):
            apart.append(name)
    gaps_found = {k: f"{v:.2%}" for k, v in found.items() if k.startswith("largest gap")}
    note(f"whole runs, against fp32 on the CPU: {gaps_found}")
    if apart:
        raise Failed(f"loss curves outside their band: {', '.join(apart)}", found)
    recipes = ROOT / "configs" / "recipes"
    for recipe in ("rl", "sft", "parallel"):
        out = folder / recipe
        sets = [device, bf16, "evaluation.at_end=false", "logging.log_every_steps=1"]
        sets += [f"stages.0.steps={context.either(10, 2)}"]
        names = ("rl", "sft") if recipe == "parallel" else (recipe,)
        sets += [f"stages.0.objectives.{name}.warmup_steps=1" for name in names]
        if recipe != "sft":
            sets += ["rl.prompts_per_step=4", "rl.samples_per_prompt=8"]
            # The recipe's own is 0 for every sample of so young a model: nothing would be learned.
            sets += ['rl.rewards=[{function="gpu.rewards:share_of_e", workers=0}]']
            sets += ["rl.max_completion_tokens=40"]
        words = [word for setting in sets for word in ("--set", setting)]
        megarlx(
            "branch", f"{folder / 'bf16'}@{steps}", recipes / f"{recipe}.toml", "--out", out, *words
        )
        last: dict[str, float] = {}
        for line in read_metrics(out / "metrics.jsonl"):
            last |= line
        found[recipe] = {k: v for k, v in last.items() if k.startswith(("loss/", "rl/", "step"))}
        if not any(key.startswith("loss/") for key in found[recipe]):
            raise Failed(f"{recipe} logged no loss", found)
        if recipe != "sft" and not found[recipe]["rl/informative_groups"] > 0:
            raise Failed(f"{recipe} had no group to learn from", found)
    megarlx("evaluate", folder / "rl", "--samples", "8")
    found["evaluated"] = [p.name for p in sorted((folder / "rl" / "evaluations").glob("*.json"))]
    if not found["evaluated"]:
        raise Failed("the evaluation left no file", found)
    note(f"rl, sft, parallel and evaluate ended well: {found['evaluated']}")
    return found


PIECES = [
    Piece("tests-ops", 75, functools.partial(tests, group="ops")),
    Piece("tests-layouts", 60, functools.partial(tests, group="layouts")),
    Piece("tests-model", 58, functools.partial(tests, group="model")),
    Piece("whole_runs", 140, whole_runs),
    Piece("memcheck", 11, functools.partial(sanitizer, tool="memcheck"), needs="compute-sanitizer"),
    Piece(
        "racecheck", 25, functools.partial(sanitizer, tool="racecheck"), needs="compute-sanitizer"
    ),
]
