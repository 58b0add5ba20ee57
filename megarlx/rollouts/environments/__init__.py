"""Worlds that a policy acts in over several turns, each turn a text.

    environment.reset(task, seed) -> observation
    environment.step(action) -> (observation, reward, done, info)

(No torch here: environments run in processes that must start fast.)
"""

from megarlx.rollouts.environments.interface import BuiltIn, Environment, Step, Task

__all__ = ["BuiltIn", "Environment", "Step", "Task"]
