"""A judge behind HTTP: it gets {"samples": […]} and answers {"rewards": […]}."""

from __future__ import annotations

from dataclasses import asdict

from megarlx.rollouts.rewards.http import Server, variable
from megarlx.rollouts.rewards.sample import Sample


class Judge:
    """Runs in a worker process, whose time limit holds whatever the server does.

    `headers_from_env` maps headers to variables of the environment, in which their values are: a
    run keeps no secrets.
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
        secrets = {
            header: variable(name, f"headers_from_env: {header}")
            for header, name in (headers_from_env or {}).items()
        }
        self.server = Server(url, timeout_seconds, retries, pause_seconds, headers, secrets)

    def __call__(self, samples: list[Sample]) -> list[float | None]:
        rewards: list[float | None] = self.server.ask(
            {"samples": [asdict(sample) for sample in samples]}, "rewards"
        )
        return rewards
