"""lm-eval's own command line, with `--model megarlx` among its models:

[torchrun … -m] python -m megarlx.run.lm_eval_harness run \\
    --model megarlx --model_args run=RUN@ITER,tensor=2 --tasks lambada_openai,piqa
"""

from __future__ import annotations

import os
import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from megarlx.comm import launch
from megarlx.evaluation.lm_eval import MegarlxLM
from megarlx.run.assemble import choose_device
from megarlx.run.opened import open_run
from megarlx.run.opening import open_config
from megarlx.run.reference import resolve


@register_model("megarlx")
class RunLM(MegarlxLM):
    """The checkpoint that `run` names; with `tensor` or `pipeline`, in that layout."""

    def __init__(
        self,
        run: str,
        tensor: int | None = None,
        pipeline: int | None = None,
        tokens_per_pass: int = 4096,
        slots: int = 64,
        seed: int = 0,
        **ignored: Any,  # batch_size and device, which lm-eval hands to every model
    ) -> None:
        started = launch.read()
        reference = resolve(run)
        given = {"tensor": tensor, "pipeline": pipeline}
        layout = [f"layout.{axis}={size}" for axis, size in given.items() if size is not None]
        config = open_config(reference.run, started.world_size, layout)
        device = choose_device(config.training.device)
        launch.start(started, device, config.layout.time_limit_seconds)
        opened = open_run(reference, config, started, device)
        super().__init__(
            opened.model,
            opened.tokenizer,
            tokens_per_pass=int(tokens_per_pass),
            slots=int(slots),
            seed=int(seed),
        )


def main() -> None:
    if launch.read().rank:
        # Every rank has the same results; the first one tells them.
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        sys.argv = [word for word in sys.argv if word != "--log_samples"]
    try:
        cli_evaluate()
    finally:
        launch.stop()


if __name__ == "__main__":
    main()
