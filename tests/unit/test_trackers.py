"""Weights & Biases and MLflow get what metrics.jsonl gets. Both are stood in for by small modules;
where the real ones are installed they are tried too, without their servers."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megarlx.config import ConfigError, load_config
from megarlx.training.metrics import MetricsWriter, read_metrics
from megarlx.training.trackers import TRACKERS, Trackers, check_installed

STEPS: tuple[tuple[int, dict[str, float]], ...] = (
    (1, {"loss/rl": 0.5, "perf/mfu": 0.25}),
    (2, {"loss/rl": 0.25, "eval/math/pass_at_1": 0.125}),
)


class ServiceError(Exception):
    pass


class Service:
    """What either package was told, by run."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[int, dict[str, float]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.starts: list[dict[str, Any]] = []
        self.ended: list[str] = []
        self.away = False

    def start(self, run_id: str | None, **settings: Any) -> str:
        run_id = run_id or f"run{len(self.metrics)}"
        self.metrics.setdefault(run_id, {})
        self.starts.append({"run_id": run_id, **settings})
        return run_id

    def log(self, run_id: str, step: int, values: dict[str, float]) -> None:
        if self.away:
            raise ServiceError("the server is away")
        self.metrics[run_id].setdefault(step, {}).update(values)


def fake_wandb(service: Service) -> types.ModuleType:
    module: Any = types.ModuleType("wandb")

    class Html(str):
        pass

    class Run:
        def __init__(self, run_id: str) -> None:
            self.id = run_id

        def log(self, values: dict[str, Any], step: int) -> None:
            texts = {k: v for k, v in values.items() if isinstance(v, Html)}
            for text in texts.values():
                service.texts.setdefault(self.id, []).append(text)
            service.log(self.id, step, {k: v for k, v in values.items() if k not in texts})

        def finish(self) -> None:
            service.ended.append(self.id)

    def init(project: str, name: str, dir: str, config: Any, id: str | None, resume: str) -> Run:
        assert resume == "allow"
        return Run(service.start(id, project=project, name=name, config=config))

    module.Html, module.init = Html, init
    module.errors = types.SimpleNamespace(Error=ServiceError)
    return module


def fake_mlflow(service: Service) -> types.ModuleType:
    module: Any = types.ModuleType("mlflow")
    active: dict[str, Any] = {}

    def start_run(run_id: str | None, run_name: str | None) -> Any:
        active["id"] = service.start(run_id, project=active["experiment"], name=run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=active["id"]))

    module.set_experiment = lambda name: active.update(experiment=name)
    module.start_run = start_run
    module.log_dict = lambda content, path: service.starts[-1].update(config=content)
    module.log_metrics = lambda values, step: service.log(active["id"], step, values)
    module.log_text = lambda text, path: service.texts.setdefault(active["id"], []).append(text)
    module.end_run = lambda: service.ended.append(active["id"])
    module.exceptions = types.SimpleNamespace(MlflowException=ServiceError)
    return module


FAKES = {"wandb": fake_wandb, "mlflow": fake_mlflow}


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> dict[str, Service]:
    made = {name: Service() for name in FAKES}
    for name, service in made.items():
        monkeypatch.setitem(sys.modules, name, FAKES[name](service))
    return made


def written(run: Path, names: tuple[str, ...], resume_at: int = 0) -> None:
    trackers = Trackers(names, "study", run, {"training": {"seed": 3}})
    with MetricsWriter(run, resume_at=resume_at, trackers=trackers) as writer:
        for step, values in STEPS:
            if step >= resume_at:
                writer.scalars(step, values)
        writer.text(2, "samples/rl", "<b>1 + 1</b>")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_the_keys_and_numbers_of_metrics_jsonl(
    tmp_path: Path, services: dict[str, Service], name: str
) -> None:
    run, service = tmp_path / "rl_6B", services[name]
    written(run, (name,))
    lines = {line.pop("step"): line for line in read_metrics(run / "metrics.jsonl")}
    assert service.metrics == {"run0": lines}
    start = service.starts[0]
    assert (start["project"], start["name"]) == ("study", "rl_6B")
    assert start["config"] == {"training": {"seed": 3}}
    assert service.ended == ["run0"]
    assert "1 + 1" in service.texts["run0"][0]


def test_what_a_model_wrote_is_never_rendered(tmp_path: Path, services: dict[str, Service]) -> None:
    written(tmp_path, ("wandb",))
    assert "<b>" not in services["wandb"].texts["run0"][0]
    assert "&lt;b&gt;" in services["wandb"].texts["run0"][0]


def test_a_resumed_run_goes_on_under_its_own_name_in_both(
    tmp_path: Path, services: dict[str, Service]
) -> None:
    names = ("wandb", "mlflow")
    for resume_at in (0, 2):
        written(tmp_path, names, resume_at)
    for name in names:
        assert [start["run_id"] for start in services[name].starts] == ["run0", "run0"]
        assert list(services[name].metrics["run0"]) == [1, 2]
    assert json.loads((tmp_path / "trackers.json").read_text()) == dict.fromkeys(names, "run0")


def test_a_service_that_goes_away_is_told_of_once_and_the_others_go_on(
    tmp_path: Path, services: dict[str, Service], capsys: pytest.CaptureFixture[str]
) -> None:
    services["wandb"].away = True
    written(tmp_path, ("wandb", "mlflow"))
    said = capsys.readouterr().err
    assert said.count("warning: wandb gets no more metrics of this run") == 1
    assert "the server is away" in said
    assert list(services["mlflow"].metrics["run0"]) == [1, 2]
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 2


def test_an_error_of_our_own_is_not_taken_for_the_services(
    tmp_path: Path, services: dict[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("loss")

    monkeypatch.setattr(services["mlflow"], "log", broken)
    with pytest.raises(KeyError):
        written(tmp_path, ("mlflow",))


def test_without_trackers_nothing_is_imported_or_written(tmp_path: Path) -> None:
    written(tmp_path, ())
    assert not (tmp_path / "trackers.json").exists()
    assert not {"wandb", "mlflow"} & set(sys.modules)


def test_one_that_is_not_installed_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"names mlflow, .* pip install 'megarlx\[mlflow\]'"):
        check_installed(("mlflow",))


def test_trackers_are_off_by_default_and_others_are_refused() -> None:
    config = load_config("configs/demo_pretraining.toml")
    assert config.logging.trackers == ()
    given = load_config("configs/demo_pretraining.toml", ['logging.trackers=["wandb"]'])
    assert given.logging.trackers == ("wandb",)
    with pytest.raises(ConfigError, match=r"trackers\[0\] is \"comet\""):
        load_config("configs/demo_pretraining.toml", ['logging.trackers=["comet"]'])


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_the_real_mlflow_keeps_the_numbers_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sqlalchemy", reason="mlflow without its database: no place for runs")
    import mlflow

    monkeypatch.chdir(tmp_path)  # where it puts what is no number
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run = tmp_path / "run"
    for resume_at in (0, 2):
        written(run, ("mlflow",), resume_at)
    run_id = json.loads((run / "trackers.json").read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss/rl")
    assert {(m.step, m.value) for m in history} == {(1, 0.5), (2, 0.25)}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb_writes_its_files_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    written(run, ("wandb",))
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
