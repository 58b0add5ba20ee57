"""python -m cuda_emulation: builds the kernels, runs their cases and the tests of ops on them.

    --quick    without the sanitizers
Further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from .build import KINDS, ROOT, build, environment, why_not

TESTS = [
    "tests/emulation",
    *(f"tests/gpu/test_{name}_cuda.py" for name in ("averaging", "sample", "token_loss")),
    *(f"tests/gpu/test_{name}_cuda.py" for name in ("elementwise", "narrow_product")),
    "tests/gpu/test_registration_on_cuda.py",
    *(f"tests/unit/ops/test_{name}.py" for name in ("averaging", "replica_average_halves")),
    *(
        f"tests/unit/ops/test_{name}.py"
        for name in ("elementwise", "decode_parts", "narrow_product", "e4m3")
    ),
    *(
        f"tests/unit/ops/test_{name}.py"
        for name in ("sample", "token_loss", "loss_seam", "linear_token_loss")
    ),
]


def run(name: str, command: list[str], kind: str) -> int:
    began = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=environment(KINDS[kind]), check=False).returncode
    print(f"cuda_emulation: {name}: {code or 'ok'}, {time.monotonic() - began:.0f} s", flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the sanitizers")
    options, others = parser.parse_known_args()
    began = time.monotonic()
    failed = 0
    for kind in KINDS.values():
        if kind.preloaded and options.quick:
            continue
        if (reason := why_not(kind)) is not None:
            print(f"cuda_emulation: {kind.name} sanitizer skipped, it does not start: {reason}")
            continue
        library = build(kind)
        print(f"cuda_emulation: {library.name}, at {time.monotonic() - began:.0f} s", flush=True)
        cases = [sys.executable, "-m", "cuda_emulation.cases", str(library)]
        failed |= run(f"a case for each kernel, {kind.name}", cases, kind.name)
    pytest = [sys.executable, "-m", "pytest", "-p", "cuda_emulation.plugin", "-q"]
    pytest += ["--numprocesses", "logical", "--maxprocesses", "8", "--dist", "loadfile"]
    failed |= run("tests", [*pytest, "-m", "not slow", *others, *TESTS], "plain")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
