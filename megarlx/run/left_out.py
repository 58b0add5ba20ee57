"""What of its data a run leaves out because it is too long."""

from __future__ import annotations

import warnings

from megarlx.comm.launch import EveryRankWarning


def tell_left_out(key: str, count: int, of: int, most: int) -> None:
    """`key`: what names the data; `most`: tokens that one may have."""
    if count:
        warnings.warn(
            f"{key}: {count:,} of {of:,} have more than {most:,} tokens and are left out",
            EveryRankWarning,
            stacklevel=3,
        )
