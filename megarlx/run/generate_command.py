"""`megarlx generate`: what a checkpoint says to a prompt, token by token."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megarlx import plug
from megarlx.config.arguments import add_overrides, add_trust, add_weights
from megarlx.printable import complain, printable

if TYPE_CHECKING:
    from megarlx.run.opened import OpenedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN[@ITER]", help="RUN, RUN@latest, RUN@1000, …")
    parser.add_argument("--prompt", required=True, help="what the model is asked")
    parser.add_argument(
        "--raw", action="store_true", help="give the prompt as it stands, without the template"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="one of the run's [templates]; default: its [template]"
    )
    parser.add_argument("--samples", type=int, default=1, help="completions, one after another")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the probability kept")
    parser.add_argument("--max-new-tokens", type=int, help="default: as many as the model can take")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument(
        "--generator",
        default="engine",
        metavar="NAME",
        help=f"what draws the samples: {plug.allowed('generator')}; default: engine",
    )
    parser.add_argument(
        "--logprobs", action="store_true", help="a token a line, behind its log-probability"
    )
    add_overrides(parser, "override a key of the run's configuration, as layout.tensor=2")
    add_trust(parser)
    add_weights(parser)


def run(arguments: argparse.Namespace) -> int:
    from megarlx.checkpoint import CheckpointError
    from megarlx.comm import launch
    from megarlx.config import ConfigError
    from megarlx.config.objectives import unknown_template
    from megarlx.run.assemble import choose_device
    from megarlx.run.directory import RunError
    from megarlx.run.opened import open_run
    from megarlx.run.opening import open_config
    from megarlx.run.reference import resolve

    try:
        if arguments.samples < 1:
            raise RunError(f"--samples is {arguments.samples}; allowed: 1 or more")
        started = launch.read()
        reference = resolve(arguments.run)
        config = open_config(
            reference.run, started.world_size, arguments.overrides, trusted=arguments.trusted
        )
        if arguments.raw and arguments.template is not None:
            raise RunError("--template and --raw were both given; allowed is one of them")
        if arguments.template is not None and arguments.template not in config.templates:
            wrong = unknown_template(arguments.template, config.templates)
            raise RunError(f"--template {wrong}")
        if config.template is None and arguments.template is None and not arguments.raw:
            raise RunError(
                f"{reference.run} has no [template]: how its model is asked is not said. --raw "
                "gives the prompt as it stands; a template is given by, for example, "
                r"""--set 'template.user="Question: {content}\nAnswer:"'"""
            )
        device = choose_device(config.training.device)
        launch.start(started, device, config.layout.time_limit_seconds)
        try:
            opened = open_run(reference, config, started, device, weights=arguments.weights)
            _generate(arguments, opened)
        finally:
            launch.stop()
    except ConfigError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # who read the output has gone
        raise
    except (ValueError, OSError, CheckpointError, launch.LaunchError) as error:
        complain(f"megarlx generate: {error}")
        return 1
    return 0


def _generate(arguments: argparse.Namespace, opened: OpenedRun) -> None:
    mesh = opened.model.mesh
    # Tokens are known as they come where the last stage is; one such rank prints them.
    prints = mesh.pp.is_last and mesh.tp.is_first and mesh.dp.is_first
    for number in range(arguments.samples):
        pieces = opened.stream(
            arguments.prompt,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_new_tokens=arguments.max_new_tokens,
            seed=arguments.seed,
            number=number,
            raw=arguments.raw,
            template=arguments.template,
            generator=arguments.generator,
        )
        for piece in pieces:
            if prints and arguments.logprobs:
                shown = opened.tokenizer.decode_sampled([piece.token])
                print(f"{piece.logprob:9.4f}  {shown!r}", flush=True)
            elif prints:
                print(printable(piece.text), end="", flush=True)
        if prints:
            print(flush=True)
