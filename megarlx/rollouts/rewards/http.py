"""A server that is asked in JSON: waits, repeats, and keeps to the address that it was given."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from megarlx.redact import hidden

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


class Server:
    """`timeout_seconds` is the wait for one reply, after which (or after a server error) it is
    asked again, `retries` times, with pauses that double. A refusal (4xx) is not asked again, but
    for 429, too many at once.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        retries: int,
        pause_seconds: float,
        headers: dict[str, str] | None = None,
        secrets: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge: url is {url!r}; it must begin with http:// or https://")
        self.url, self.timeout_seconds = url, timeout_seconds
        self.retries, self.pause_seconds = retries, pause_seconds
        self.secrets = secrets or {}
        content = {"Content-Type": "application/json"}
        self.headers = {**content, **(headers or {}), **self.secrets}
        self._open = urllib.request.build_opener(_NoRedirects).open

    def ask(self, question: dict[str, Any], key: str) -> Any:
        """What its reply has under `key`, in which it must be a list."""
        body = json.dumps(question).encode()
        for attempt in range(self.retries + 1):
            try:
                return self._reply(body, key)
            except urllib.error.HTTPError as error:
                error.close()
                if (error.code < 500 and error.code != 429) or attempt == self.retries:
                    raise OSError(f"judge {self.url}: {error}") from error
            except OSError as error:  # URLError and TimeoutError are OSErrors
                if attempt == self.retries:
                    raise OSError(f"judge {self.url}: {error}") from error
            time.sleep(self.pause_seconds * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _reply(self, body: bytes, key: str) -> Any:
        request = urllib.request.Request(self.url, body, self.headers)
        with self._open(request, timeout=self.timeout_seconds) as response:
            text = response.read(LONGEST_REPLY + 1)
        if len(text) > LONGEST_REPLY:
            raise ValueError(f"judge {self.url}: the reply is longer than {LONGEST_REPLY} bytes")
        try:
            reply: Any = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not isinstance(reply.get(key), list):
            shown = hidden(text.decode(errors="replace"), set(self.secrets.values()))[:200]
            raise ValueError(f"judge {self.url}: the reply has no list '{key}': {shown!r}")
        return reply[key]


def variable(name: str, what: str) -> str:
    """A secret: out of the environment, so that no file of a run keeps it."""
    value = os.environ.get(name, "")
    if not value or not value.isprintable() or not value.isascii():
        wrong = "is not one line of ASCII" if value else "is not set"
        raise ValueError(f"judge: {what} is in ${name}, which {wrong}")
    return value
