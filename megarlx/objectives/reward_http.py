"""A judge behind HTTP: it gets {"samples": […]} and answers {"rewards": […]}."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from typing import Any

from megarlx.objectives.samples import Sample

LONGEST_REPLY = 1 << 24  # bytes


class Judge:
    """Runs in a worker process, whose time limit holds whatever the server does.

    `timeout_seconds` is the wait for one reply, after which (or after a server error) it is asked
    again, `retries` times, with pauses that double. A refusal (4xx) is not asked again.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float = 3.0,
        retries: int = 2,
        pause_seconds: float = 0.2,
        headers: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge: url is {url!r}; it must begin with http:// or https://")
        self.url, self.timeout_seconds = url, timeout_seconds
        self.retries, self.pause_seconds = retries, pause_seconds
        self.headers = {"Content-Type": "application/json", **(headers or {})}

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
        with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
            text = response.read(LONGEST_REPLY + 1)
        if len(text) > LONGEST_REPLY:
            raise ValueError(f"judge {self.url}: the reply is longer than {LONGEST_REPLY} bytes")
        reply: Any = json.loads(text)
        if not isinstance(reply, dict) or not isinstance(reply.get("rewards"), list):
            raise ValueError(f"judge {self.url}: the reply has no list 'rewards': {text[:200]!r}")
        rewards: list[float | None] = reply["rewards"]
        return rewards
