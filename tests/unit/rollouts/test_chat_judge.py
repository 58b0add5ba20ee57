"""A judge behind chat completions, against a server on this machine."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megarlx.config.reward import RewardConfig
from megarlx.config.trust import needs_trust
from megarlx.rollouts.rewards.chat_judge import ChatJudge
from megarlx.rollouts.rewards.rewards import Rewards
from megarlx.rollouts.rewards.sample import Sample

SECRET = "sk-not-to-be-kept"


class Server(ThreadingHTTPServer):
    daemon_threads = True
    asked: list[tuple[str, dict[str, str], dict[str, Any]]]
    status: list[int]  # of the following replies; then 200
    reply = "Well. Score: 7"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status = self.server.status.pop(0) if self.server.status else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        said = self.server.reply
        if said == "echo":
            said = body["messages"][0]["content"].split("<answer>\n")[1].split("\n")[0]
        message = {"role": "assistant", "content": said}
        self.wfile.write(json.dumps({"choices": [{"message": message}]}).encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.status = [], []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_it_asks_as_chat_completions_are_asked_and_keeps_the_key_out_of_sight(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    judge = ChatJudge(server.url, "m", key_from_env="JUDGE_KEY")
    assert judge([Sample("3 + 4?", "seven", "7")]) == [0.7]
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert body["model"] == "m"
    (message,) = body["messages"]
    assert message["role"] == "user"
    for part in ("<question>\n3 + 4?\n", "<answer>\nseven\n", "<reference>\n7\n", "0 to 10"):
        assert part in message["content"]
    assert SECRET not in json.dumps(body)


def test_scores_stay_with_their_samples(server: Server) -> None:
    server.reply = "echo"
    samples = [Sample("q", f"Score: {n}") for n in range(11)]
    judge = ChatJudge(server.url + "/chat/completions", "m", at_once=4)
    assert judge(samples) == [n / 10 for n in range(11)]


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 3. No: Score: **4.5**", 0.45),
        ("SCORE = 10", 1.0),
        ("score 11", math.nan),
        ("Score: -1", math.nan),
        ("I will not say.", math.nan),
        ("", math.nan),
    ],
)
def test_the_last_score_counts_and_what_is_none_is_a_failure(
    server: Server, reply: str, value: float
) -> None:
    server.reply = reply
    (found,) = ChatJudge(server.url, "m")([Sample("q", "a")])
    assert found == pytest.approx(value, nan_ok=True)


def test_what_a_sample_says_is_no_place_for_more(server: Server) -> None:
    judge = ChatJudge(server.url, "m")
    judge([Sample("q", "{reference} {highest}", "the secret")])
    asked = server.asked[0][2]["messages"][0]["content"]
    assert "{reference} {highest}" in asked
    assert asked.count("the secret") == 1


def test_it_asks_again_when_the_server_is_busy_and_follows_no_redirect(server: Server) -> None:
    server.status = [503, 429]
    assert ChatJudge(server.url, "m", pause_seconds=0.01)([Sample("q", "a")]) == [0.7]
    assert len(server.asked) == 3
    server.status = [302]
    with pytest.raises(ValueError, match=r"a redirect to .* is not followed"):
        ChatJudge(server.url, "m")([Sample("q", "a")])
    assert len(server.asked) == 4


def test_it_is_a_reward_like_others_and_another_run_cannot_name_it_unasked(server: Server) -> None:
    options = {"url": server.url, "model": "m", "highest": 7}
    rewards = Rewards([RewardConfig(function="chat_judge", options=options, workers=0)])
    assert rewards.score([Sample("q", "a")]).totals == [1.0]
    assert needs_trust("reward", "chat_judge")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "file:///etc/passwd"}, "must begin with http"),
        ({"key_from_env": "NOT_THERE"}, r"key_from_env is in \$NOT_THERE, which is not set"),
        ({"highest": 0}, "highest is 0"),
    ],
)
def test_what_cannot_be_asked_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ChatJudge(**{"url": "http://127.0.0.1:1", "model": "m", **options})
