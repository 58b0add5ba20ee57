"""What a reward process serves: samples in, rewards out. (No torch here: it must start fast.)"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megarlx import plug
from megarlx.rollouts.rewards.sample import Sample
from megarlx.rollouts.rewards.values import numbers
from megarlx.rollouts.workers.worker_program import describe


def load(name: str, options: dict[str, Any]) -> Any:
    """A function with the options, or an instance of a class that was made with them."""
    named = plug.resolve("reward", name)
    called = inspect.getattr_static(named, "__call__") if inspect.isclass(named) else named
    if inspect.iscoroutinefunction(called):
        raise TypeError(
            f"{name} is `async def`; a reward is a plain function, and may call asyncio.run itself"
        )
    return named(**options) if inspect.isclass(named) else partial(named, **options)


def server(function: str, options: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    reward = load(function, options)

    def serve(request: list[dict[str, Any]]) -> dict[str, Any]:
        values = reward([Sample(**sample) for sample in request])
        try:
            return {"rewards": numbers(values)}
        except (TypeError, ValueError) as error:
            return {"wrong_shape": describe(error)}

    return serve
