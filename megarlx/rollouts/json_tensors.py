"""Small tensors inside of JSON, bit for bit: what a checkpoint's state holds of a rollout."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.int32, torch.int64, torch.float32, torch.float64)
}


def to_json(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "base64": base64.b64encode(raw).decode(),
    }


def from_json(value: Mapping[str, Any], device: torch.device | str = "cpu") -> Tensor:
    dtype = DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        allowed = ", ".join(DTYPES)
        raise ValueError(f"tensor in a state: dtype is {value.get('dtype')!r}; allowed: {allowed}")
    raw = base64.b64decode(value["base64"], validate=True)
    shape = [int(n) for n in value["shape"]]
    expected = torch.Size(shape).numel() * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(
            f"tensor in a state: {len(raw)} bytes for shape {shape} of {value['dtype']}; expected "
            f"{expected}"
        )
    if not raw:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape).to(device)
