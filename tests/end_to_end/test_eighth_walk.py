"""The walk done an eighth time: what is chosen, distilled and judged, and what is said of it."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from public_models import tiny_model

from megarlx.cli import main
from megarlx.config.reward import RewardConfig
from megarlx.rollouts.json_tensors import from_json
from megarlx.rollouts.rewards.process import RewardPool
from megarlx.rollouts.rewards.sample import Sample

RECIPE = """
[training]
sequence_length = 64
sequences_per_step = 1
[template]
user = "Q: {content} A:"
assistant = " {content}"
[sft]
conversations = "solved.jsonl"
[logging]
log_every_steps = 1
"""
TAUGHT = """
[[stages]]
steps = 2
objectives = { sft = { lr = 1e-2 } }
[evaluation]
[[evaluation.suites]]
name = "asked"
kind = "pass_at_k"
path = "solved.jsonl"
samples = 2
ks = [1]
max_new_tokens = 4
split = "validation"
"""
DISTILLED = """
[objectives.teach.distill]
teachers = ["taught@2", "taught@1"]
teacher_weights = [3.0, 1.0]
kl = "KIND"
MORE
rollout_every_steps = 3
temperature = 0.8
[[stages]]
steps = 3
[stages.objectives.teach]
lr = 1e-3
schedule = "constant"
[checkpoints]
save_every_steps = 1
"""
OWN = """prompts = "solved.jsonl"
prompts_per_rollout = 2
samples_per_prompt = 2
max_completion_tokens = 6"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("eighth")
    tiny_model(folder / "model")
    rows = [{"question": f"{n} buns ?", "answer": f"{2 * n}"} for n in range(1, 4)]
    (folder / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = "[checkpoints]\nsave_every_steps = 1\n"
    (folder / "taught.toml").write_text(RECIPE + TAUGHT + saved)
    reverse = DISTILLED.replace("KIND", "reverse").replace("MORE", OWN)
    (folder / "reverse.toml").write_text(RECIPE + reverse)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["convert", "model", "base"]) == 0
        assert main(["branch", "base", "taught.toml", "--out", "taught"]) == 0
    return folder


def test_a_transplant_is_chosen_by_the_suites_of_a_recipe_as_evaluate_takes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["transplant", "taught", "--onto", "base", "--out", "chosen", "--alphas", "0.5,1"]
    assert main([*words, "--config", "taught.toml"]) == 0, capsys.readouterr().err
    lineage = (folder / "chosen" / "lineage.json").read_text()
    assert json.loads(lineage)["chosen"]["suite"] == "asked"


def rollout_in(state: Any) -> Any:
    """Of a manifest: the rollout that is still to be trained on."""
    if isinstance(state, dict):
        if state.get("rollout"):
            return state["rollout"]
        state = list(state.values())
    found = map(rollout_in, state if isinstance(state, list) else [])
    return next((one for one in found if one), None)


def test_a_distilled_models_losses_are_those_of_a_plain_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(folder)
    assert main(["branch", "base", "reverse.toml", "--out", "reverse"]) == 0
    for run in ("base", "taught@1", "taught@2"):
        assert main(["convert", run, f"hf_{run}", "--quiet"]) == 0
    model, *teachers = (
        AutoModelForCausalLM.from_pretrained(f"hf_{run}")
        for run in ("base", "taught@2", "taught@1")
    )
    manifest = folder / "reverse/checkpoints/iter_00000001/manifest.json"
    text = manifest.read_text()
    kept = rollout_in(json.JSONDecoder().raw_decode(text)[0])
    fields = {name: from_json(value, torch.device("cpu")) for name, value in kept.items()}
    lengths = fields["lengths"].tolist()
    texts = list(
        zip(fields["tokens"].split(lengths), fields["written"].split(lengths), strict=True)
    )
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(3):
        total, count = torch.zeros(()), 0
        for ids, written in texts:
            own = (model(ids[None]).logits[0, :-1] / 0.8).log_softmax(-1)
            for teacher, share in zip(teachers, (0.75, 0.25), strict=True):
                with torch.no_grad():
                    theirs = (teacher(ids[None]).logits[0, :-1] / 0.8).log_softmax(-1)
                apart = (own.exp() * (own - theirs)).sum(-1)
                total = total + share * apart[written[1:]].sum()
            count += int(written[1:].sum())
        loss = total / count
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        losses.append(loss.item())
    lines = [json.loads(line) for line in (folder / "reverse/metrics.jsonl").open()]
    logged = [line["distill/teach/kl"] for line in lines if "distill/teach/kl" in line]
    # a divergence of 1e-3 is a difference of logarithms of 5, in fp32
    assert logged == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert losses[0] > 1e-2


class Slow(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        time.sleep(1.5)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_judge_that_is_too_slow_for_its_limit_is_told_with_the_limits_key() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    Thread(target=server.serve_forever, daemon=True).start()
    options = {"url": f"http://127.0.0.1:{server.server_port}", "model": "judge"}
    pool = RewardPool(RewardConfig(function="chat_judge", options=options, time_limit_seconds=0.5))
    try:
        outcome = pool.score([Sample("1 bun ?", "2", "2", {}, "stop")])
        assert "time_limit_seconds" in outcome.failures[0].detail
    finally:
        pool.close()
        server.shutdown()


def test_token_files_of_another_tokenizer_are_said_to_be_that(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "texts.txt").write_text("a bun\n")
    assert main(["prepare", "texts.txt", "--tokenizer", "model", "--out", "texts"]) == 0
    capsys.readouterr()
    assert main(["prepare", "texts.txt", "--tokenizer", "bytes", "--out", "texts"]) != 0
    assert "with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sft.lr=1e-3", "stages[0].objectives.sft.lr"),
        ("rl.num_generations=4", "rl.samples_per_prompt"),
        ("training.gradient_checkpointing=true", "training.recompute"),
        ("training.global_batch_size=8", "training.sequences_per_step"),
        ("optimizer.max_grad_norm=1", "optimizer.clip_norm"),
        ("stages.0.objectives.sft.grad_clip=1", "stages[0].objectives.sft.clip_norm"),
    ],
)
def test_a_key_as_others_call_it_is_answered_with_the_one_that_is_meant(
    key: str,
    meant: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    words = ["branch", "base", "taught.toml", "--out", "refused", "--set", key]
    assert main(words) == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_help_finds_a_key_by_what_others_call_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--help-config", "gradient_checkpointing"]) == 0
    assert capsys.readouterr().out.startswith("training.recompute = ")


@pytest.mark.parametrize(("given", "said"), [((), "Ctrl-C"), (("SIGTERM",), "SIGTERM")])
def test_a_command_that_is_interrupted_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    said: str,
) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt(*given)

    monkeypatch.setattr("megarlx.run.evaluate_command.run", interrupted)
    assert main(["evaluate", "nowhere"]) == 130
    assert f"stopped by {said}" in capsys.readouterr().err


def test_a_divergence_below_zero_by_rounding_has_no_sign() -> None:
    from megarlx.run.messages import OF_POLICY

    form = next(form for key, _, form in OF_POLICY if key == "kl")
    assert f"{-1e-9:{form}}" == "0.0000"
