"""`megarlx branch`: an excursion from any iteration of any run, in any layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megarlx.config import Config, ConfigError
from megarlx.config.arguments import add_overrides, add_trust, add_weights
from megarlx.printable import complain

if TYPE_CHECKING:
    import torch

    from megarlx.comm.launch import Launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN@ITER",
        help="where it starts: RUN, RUN@latest, RUN@1000, RUN@tokens:4B, or a Hugging Face model",
    )
    parser.add_argument("recipe", metavar="RECIPE.toml", type=Path, help="what it does")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="RUN2", help="the excursion's own folder"
    )
    add_overrides(parser)
    add_trust(parser)
    add_weights(parser)
    parser.add_argument(
        "--replay",
        action="store_true",
        help="reach an iteration that was not saved, by training on from the one before it",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="refuse a folder that already holds checkpoints"
    )


def run(arguments: argparse.Namespace) -> int:
    from megarlx.run.branch import earlier, excursion_config, replay_cost
    from megarlx.run.directory import RunError
    from megarlx.run.reference import resolve
    from megarlx.run.session import session

    wanted = None
    try:
        try:
            parent = resolve(arguments.run, arguments.out.parent).run
        except RunError as error:
            run, _, which = arguments.run.rpartition("@")
            if not which.isdecimal() or not (Path(run) / "resolved.json").exists():
                raise
            if not arguments.replay:
                raise RunError(f"{error}\n{replay_cost(*earlier(arguments.run))}") from None
            parent, wanted, _ = earlier(arguments.run)
        config = excursion_config(parent, arguments.recipe, arguments.overrides, arguments.trusted)
    except ConfigError as error:
        complain(error)
        return 2
    except (ValueError, OSError) as error:
        complain(f"megarlx branch: {error}")
        return 1

    def work(started: Launch, device: torch.device) -> int:
        return _branch(arguments, parent, config, wanted, started, device)

    return session("branch", config, work)


def _branch(
    arguments: argparse.Namespace,
    parent: Path,
    config: Config,
    wanted: int | None,
    started: Launch,
    device: torch.device,
) -> int:
    from megarlx.run.begin import start_excursion
    from megarlx.run.branch import replay
    from megarlx.run.directory import RunDirectory
    from megarlx.run.reference import RunReference, resolve
    from megarlx.run.stopped import exit_code

    recipe, out, replayed = arguments.recipe, arguments.out, None
    if wanted is None:
        reference = resolve(arguments.run, out.parent)
    else:
        trusted = arguments.trusted
        replayed = replay(arguments.run, RunDirectory(out), config, started, device, trusted)
        reference = RunReference(parent, wanted, replayed)
    stopped = start_excursion(
        *(reference, config, recipe, out, started, device),
        fresh=arguments.fresh,
        replayed=replayed,
        weights=arguments.weights,
    )
    return exit_code(started.launcher) if stopped else 0
