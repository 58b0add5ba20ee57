"""The HTTP judge against a server on this machine."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megarlx.config.reward import RewardConfig
from megarlx.rollouts.rewards.judge import Judge
from megarlx.rollouts.rewards.process import RewardError
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample


class Server(ThreadingHTTPServer):
    daemon_threads = True
    behaviour: list[str]  # of the following requests; the last one stays
    requests: list[Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/judge"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviours = self.server.behaviour
        how = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        self.server.requests.append((dict(self.headers), body))
        if how == "silent":
            time.sleep(5)
            return
        status, _, target = how.partition(" to ")
        codes = {"busy": 503, "refuse": 403}
        self.send_response(int(status) if target else codes.get(how, 200))
        if target:
            self.send_header("Location", target)
        self.end_headers()
        replies = {
            "good": json.dumps({"rewards": [len(s["completion"]) for s in body["samples"]]}),
            "garbage": "<html>",
            "shapeless": "[1, 2]",
            "short": '{"rewards": []}',
            "echo": json.dumps({"you": self.headers["Authorization"]}),
        }
        if how == "trickle":
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(replies.get(how, "").encode())

    def do_GET(self) -> None:
        self.server.requests.append((dict(self.headers), None))

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def serving() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.behaviour, made.requests = ["good"], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


SAMPLES = [Sample("q", "four", "#### 4", {"level": 2}), Sample("q", "sixsix")]


def test_judge_sends_whole_samples_and_takes_rewards(server: Server) -> None:
    judge = Judge(server.url, headers={"X-Key": "secret"})
    assert judge(SAMPLES) == [4, 6]
    ((headers, body),) = server.requests
    assert headers["X-Key"] == "secret"
    assert body["samples"][0] == {
        "prompt": "q", "completion": "four", "reference": "#### 4", "metadata": {"level": 2},
        "finish_reason": "stop", "tokens": 0,
    }  # fmt: skip


def test_busy_and_silent_servers_are_asked_again_but_not_one_that_refuses(server: Server) -> None:
    server.behaviour = ["busy", "silent", "good"]
    judge = Judge(server.url, timeout_seconds=1.0, retries=2, pause_seconds=0.01)
    assert judge(SAMPLES) == [4, 6]
    assert len(server.requests) == 3
    server.behaviour = ["busy"]
    with pytest.raises(OSError, match="503"):
        judge(SAMPLES)
    assert len(server.requests) == 6
    server.behaviour = ["refuse"]
    with pytest.raises(OSError, match=rf"judge {re.escape(server.url)}: .*403"):
        judge(SAMPLES)
    assert len(server.requests) == 7


@pytest.mark.parametrize("how", ["garbage", "shapeless"])
def test_nonsense_replies_are_errors(server: Server, how: str) -> None:
    server.behaviour = [how]
    with pytest.raises(ValueError):
        Judge(server.url)(SAMPLES)


def test_only_http_addresses_are_asked() -> None:
    with pytest.raises(ValueError, match=r"url is 'file:///etc/passwd'; it must begin with"):
        Judge("file:///etc/passwd")


def test_as_a_reward_a_bad_judge_loses_samples_within_its_time_limit(server: Server) -> None:
    limits = {"time_limit_seconds": 1.0, "start_limit_seconds": 30.0}
    options = {"url": server.url, "retries": 0, "timeout_seconds": 0.5}
    config = RewardConfig(function="judge", options=options, **limits)
    rewards = Rewards([config], allowed_failures=1.0)
    try:
        assert rewards.score(SAMPLES).totals == [4, 6]
        kinds = {"busy": "error", "trickle": "timeout"}
        for how, kind in kinds.items():
            server.behaviour = [how]
            assert {f.kind for f in rewards.score(SAMPLES[:1]).failures} == {kind}, how
        server.behaviour = ["good"]
        assert rewards.score(SAMPLES).totals == [4, 6]
        server.behaviour = ["short"]
        with pytest.raises(RewardError, match="judge: returned 0 values for 2 samples"):
            rewards.score(SAMPLES)
    finally:
        rewards.close()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_its_target_named_and_sent_nothing(
    server: Server, code: int
) -> None:
    with serving() as other:
        server.behaviour = [f"{code} to {other.url}"]
        judge = Judge(server.url, headers={"Authorization": "Bearer secret"})
        with pytest.raises(ValueError, match=rf"answered {code}, a redirect to '{other.url}'"):
            judge(SAMPLES)
        assert len(server.requests) == 1
        assert other.requests == []


def test_headers_may_be_read_from_the_environment_where_the_judge_runs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "Bearer a-long-secret")
    judge = Judge(server.url, headers_from_env={"Authorization": "JUDGE_TOKEN"})
    assert judge(SAMPLES) == [4, 6]
    assert server.requests[0][0]["Authorization"] == "Bearer a-long-secret"
    server.behaviour = ["echo"]
    with pytest.raises(ValueError, match="no list 'rewards'") as caught:
        judge(SAMPLES)
    assert "a-long-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "wrong"), [(None, "is not set"), ("a\nHost: b", "is not one line of ASCII")]
)
def test_a_variable_that_cannot_be_a_header_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch, value: str | None, wrong: str
) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(ValueError, match=rf"Authorization is in \$JUDGE_TOKEN, which {wrong}$"):
        Judge("http://127.0.0.1:1", headers_from_env={"Authorization": "JUDGE_TOKEN"})


def test_a_judge_that_is_down_is_named_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/judge"
    with pytest.raises(OSError, match=rf"judge {re.escape(url)}: .*refused"):
        Judge(url, retries=0)(SAMPLES)
