"""What every command that runs a model does around its work: processes, devices, errors."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megarlx.checkpoint import CheckpointError
from megarlx.comm import launch
from megarlx.config import Config
from megarlx.printable import complain
from megarlx.rollouts.environments.process import BrokenEnvironment
from megarlx.rollouts.rewards.process import RewardError
from megarlx.run.assemble import choose_device, choose_layout
from megarlx.run.directory import SaidByFirstRank
from megarlx.run.hooks import TrainingError

FULL = "; checkpoints that are there are whole: make room, and the same command goes on"
Work = Callable[[launch.Launch, torch.device], int]


@contextmanager
def launched(config: Config) -> Iterator[tuple[launch.Launch, torch.device]]:
    """This process's part of a launch; a layout that cannot be is refused before it begins."""
    device = choose_device(config.training.device)
    started = launch.read()
    choose_layout(config, started.world_size)
    launch.start(started, device, config.layout.time_limit_seconds)
    try:
        yield started, device
    finally:
        launch.stop()


def session(command: str, config: Config, work: Work) -> int:
    """Works inside of `launched`; returns the exit code."""
    try:
        with launched(config) as (started, device):
            return work(started, device)
    except SaidByFirstRank:
        return 1
    except BrokenPipeError:  # who read the output has gone
        raise
    # What the user can mend is told in one line each; anything else keeps its traceback.
    except (
        *(ValueError, OSError, CheckpointError, TrainingError, RewardError),
        *(BrokenEnvironment, launch.LaunchError),
    ) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        complain(f"megarlx {command}: {error}{FULL if full else ''}")
        return 1
