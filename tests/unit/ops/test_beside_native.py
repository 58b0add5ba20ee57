"""The order of csrc/beside.h, which tells streams and events of any device."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
WORK = ["0 records 1", "1 waits for 1", "work on 1"]  # it begins behind all that 0 has so far
CALL = [
    "call on 0",
    *(*WORK, "1 records 2"),
    *(*WORK, "1 records 3"),
    *("0 waits for 2", *WORK, "1 records 2"),
    *(*WORK[:2], "failed on 0"),
    *("1 records 1", "0 waits for 1"),  # behind what had begun of it
]


@pytest.mark.not_emulated("there are no streams")
def test_works_are_ordered_by_events_and_the_stream_is_given_back(tmp_path: Path) -> None:
    torch_files = Path(torch.__file__).parent
    program = tmp_path / "beside_order"
    compiler = os.environ.get("CXX", "c++").split()[0]
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O0", f"-I{ROOT / 'csrc'}", f"-I{torch_files / 'include'}"),
            *(str(Path(__file__).with_name("beside_order.cpp")), "-o", str(program)),
            *(f"-L{torch_files / 'lib'}", "-lc10", f"-Wl,-rpath,{torch_files / 'lib'}"),
        ],
        check=True,
    )
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")
    assert said[:-1] == ["a stream of the pool", *CALL, *CALL]
