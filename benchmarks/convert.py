"""Conversion against transformers' own load and save of the same model: MB/s and peak memory.

Every measurement is a process of its own; the clock runs without its imports, and the peak is what
came on top of them. Ours hashes what it reads and writes and syncs every file; transformers does
neither. Both ways turn bf16 into fp32 or back, so that both sides read and write the same bytes.

    python benchmarks/convert.py [--megabytes 200] [--rounds 2] [--json PATH] [--markdown PATH]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from timing import Row, add_outputs, machine, row, shown, write_results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3


def ours(source: Path, target: Path, way: str) -> Callable[[], object]:
    from megarlx.comm.share import Share
    from megarlx.hf.command import Asked, Converter

    kind_from, kind_to = way.split(">")
    dtype = "bfloat16" if kind_to == "hf" else None
    asked = Asked(kind_from, kind_to, str(source), target, dtype=dtype, quiet=True)
    asked = Asked(**{**asked.__dict__, "file_bytes": 50_000_000})
    return Converter(asked, Share()).run


def theirs(source: Path, target: Path, dtype: torch.dtype) -> Callable[[], object]:
    from transformers import AutoModelForCausalLM, utils
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401  else loaded by the clock

    utils.logging.disable_progress_bar()

    def load_and_save() -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        model.save_pretrained(target)

    return load_and_save


def child(kind: str, source: Path, target: Path) -> None:
    """One measurement; prints seconds and megabytes."""
    work = {
        "ours in": lambda: ours(source, target, "hf>megarlx"),
        "ours out": lambda: ours(source, target, "megarlx>hf"),
        "theirs in": lambda: theirs(source, target, torch.float32),
        "theirs out": lambda: theirs(source, target, torch.bfloat16),
    }[kind]()
    before, start = peak_megabytes(), time.perf_counter()
    work()
    print(json.dumps([time.perf_counter() - start, peak_megabytes() - before]))


def write_model(folder: Path, megabytes: float) -> float:
    """A Qwen3 of random numbers in bf16; returns its size as fp32 in MB."""
    from safetensors.torch import save_file

    from megarlx.config.model import family_config
    from megarlx.config.parameters import published_names
    from megarlx.hf.config_map import hugging_face_config

    hidden, inner = 768, 2048
    each = 4 * hidden * hidden + 3 * hidden * inner
    rows = 16_000
    layers = max(1, round((megabytes * 1e6 / 4 - rows * hidden) / each))
    config = family_config(
        "qwen3",
        vocab_size=rows,
        hidden_size=hidden,
        layers=layers,
        heads=12,
        intermediate_size=inner,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config, "bfloat16")))
    shapes = config.tensor_shapes()
    names = published_names(config)
    held = {theirs: torch.randn(shapes[o]).bfloat16() for o, theirs in names.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in held.values()) * 2 / 1e6


def measure(kind: str, source: Path, target: Path) -> tuple[float, float]:
    words = [sys.executable, __file__, "--child", kind, str(source), str(target)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="of the model as fp32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    add_outputs(parser)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, source, target = options.child
        child(kind, Path(source), Path(target))
        return
    facts = machine()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = write_model(folder / "hf", options.megabytes)
        for number in range(options.rounds):
            run, wide = folder / f"run{number}", folder / f"wide{number}"
            for kind, source, target in (
                ("ours in", folder / "hf", run),
                ("theirs in", folder / "hf", wide),
                ("ours out", run, folder / f"out{number}"),
                ("theirs out", wide, folder / f"narrow{number}"),
            ):
                found.setdefault(kind, []).append(measure(kind, source, target))
    rows: list[Row] = []
    label = f"{size:.0f} MB as fp32"
    for way, name in (("in", "hf to megarlx"), ("out", "megarlx to hf")):
        mine, other = (
            [median(values) for values in zip(*found[f"{side} {way}"], strict=True)]
            for side in ("ours", "theirs")
        )
        peer = "transformers load + save"
        rows.append(row(name, label, size / mine[0], size / other[0], peer, "MB/s"))
        rows.append(row(f"{name}, peak memory", label, mine[1], other[1], peer, "MB"))
    for line in rows:
        shown(line)
    notes = (
        "Ours checks the SHA-256 of what it reads from a checkpoint, takes that of what it "
        "writes into one, and syncs every file to the disk; transformers does none of that. "
        "Peak memory is what came on top of the imports."
    )
    write_results(options, "Conversion of checkpoints on a CPU machine", facts, rows, notes)


if __name__ == "__main__":
    main()
