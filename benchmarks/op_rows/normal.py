"""Normal numbers by a counter, against torch's own generator and a copy of as many bytes."""

from __future__ import annotations

import torch
from timing import Row, interleaved_seconds, row

from megarlx.ops.normal import normal_slice_


def rows() -> list[Row]:
    found: list[Row] = []
    for rows, columns in ((2048, 8192), (8192, 512)):
        whole, part = torch.empty(rows, columns), torch.empty(rows, 2 * columns)[:, :columns]
        other = torch.empty(rows, columns)
        seconds = interleaved_seconds(
            {
                "ours": lambda: normal_slice_(whole, key=1, step=columns, std=0.02),  # noqa: B023
                "part": lambda: normal_slice_(part, key=1, step=2 * columns, std=0.02),  # noqa: B023
                "torch": lambda: other.normal_(0.0, 0.02),  # noqa: B023
                "copy": lambda: other.copy_(whole),  # noqa: B023
            }
        )
        size = f"{rows}×{columns}"
        of = {name: 1e3 * value for name, value in seconds.items()}
        found += [
            row("normal_slice_", size, of["ours"], of["torch"], "torch normal_", "ms"),
            row("normal_slice_", size, of["ours"], of["copy"], "copy", "ms"),
            row("the same, half of each row", size, of["part"], of["torch"], "torch normal_", "ms"),
        ]
    return found
