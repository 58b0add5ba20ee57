"""A judge behind HTTP: it gets {"samples": […]} and answers {"rewards": […]}."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import Any

from megarlx.redact import hidden
from megarlx.rollouts.rewards.sample import Sample

LONGEST_REPLY = 1 << 24  # bytes


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another host would be sent the headers, and what is in them."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        target = headers.get("location") or headers.get("uri")
        raise ValueError(
            f"judge {req.full_url}: answered {code}, a redirect to {target!r}, which is not "
            "followed; if that is where the judge is, give it as url"
        )

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class Judge:
    """Runs in a worker process, whose time limit holds whatever the server does.

    `timeout_seconds` is the wait for one reply, after which (or after a server error) it is asked
    again, `retries` times, with pauses that double. A refusal (4xx) is not asked again, and a
    redirect is not followed. `headers_from_env` maps headers to variables of the environment, in
    which their values are: a run keeps no secrets.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float = 3.0,
        retries: int = 2,
        pause_seconds: float = 0.2,
        headers: dict[str, str] | None = None,
        headers_from_env: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge: url is {url!r}; it must begin with http:// or https://")
        self.url, self.timeout_seconds = url, timeout_seconds
        self.retries, self.pause_seconds = retries, pause_seconds
        self.secrets = {
            header: _variable(name, header) for header, name in (headers_from_env or {}).items()
        }
        content = {"Content-Type": "application/json"}
        self.headers = {**content, **(headers or {}), **self.secrets}
        self._open = urllib.request.build_opener(_NoRedirects).open

    def __call__(self, samples: list[Sample]) -> list[float | None]:
        body = json.dumps({"samples": [asdict(sample) for sample in samples]}).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._rewards(body)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 or attempt == self.retries:
                    raise
            except (TimeoutError, OSError):  # URLError is an OSError
                if attempt == self.retries:
                    raise
            time.sleep(self.pause_seconds * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _rewards(self, body: bytes) -> list[float | None]:
        request = urllib.request.Request(self.url, body, self.headers)
        with self._open(request, timeout=self.timeout_seconds) as response:
            text = response.read(LONGEST_REPLY + 1)
        if len(text) > LONGEST_REPLY:
            raise ValueError(f"judge {self.url}: the reply is longer than {LONGEST_REPLY} bytes")
        try:
            reply: Any = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not isinstance(reply.get("rewards"), list):
            shown = hidden(text.decode(errors="replace"), set(self.secrets.values()))[:200]
            raise ValueError(f"judge {self.url}: the reply has no list 'rewards': {shown!r}")
        rewards: list[float | None] = reply["rewards"]
        return rewards


def _variable(name: str, header: str) -> str:
    value = os.environ.get(name, "")
    if not value or not value.isprintable() or not value.isascii():
        wrong = "is not one line of ASCII" if value else "is not set"
        raise ValueError(f"judge: headers_from_env: {header} is in ${name}, which {wrong}")
    return value
