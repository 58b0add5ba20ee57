"""Calls every CPU op with arguments that fit, and then with some that do not.

    python fuzz_ops.py SEED FIRST COUNT

Prints `call NUMBER OP …` before each call and `ok` or `refused` after it. The process ends when a
call does: by a signal, or by SIGALRM where it takes longer than SECONDS. Every tensor ends where a
page begins that may not be touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megarlx.ops  # noqa: F401  registers the ops

ROOT = Path(__file__).resolve().parents[2]
REGISTRATION = ROOT / "csrc" / "registration.cpp"
OPS = sorted(set(re.findall(r'"([a-z_]+)\(', REGISTRATION.read_text())))
SECONDS = 5.0
MEMORY = 8 << 30  # bytes
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)

# tokens, vocabulary, hidden, heads, key/value heads, head size, slots, places, layers, MLP width,
# elements of an optimizer shard, objectives
T, V, D, H, K, E, S, M, L, F, N, J = 5, 130, 12, 4, 2, 6, 3, 8, 2, 7, 40, 2
FUSED, PANEL = (H + 2 * K) * E, 32


def panels(columns: int) -> int:
    return -(-columns // PANEL)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def doubles(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def below(limit: int, *shape: int) -> Tensor:
    return torch.randint(0, limit, shape)


def table(pages: int) -> Tensor:
    """Of S slots, which have half of their places in each of two pages of their own."""
    own = below(pages, S, 2)
    return torch.cat((torch.zeros(S, 1), below(pages, 1, 2).expand(S, 2), own), 1).int()


# What fits, by the argument's name; some ops use a name in their own way.
FITTING: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("logits", "x_of_logits"), lambda: floats(T, V)),
    "targets": lambda: below(V, T),
    "mask": lambda: torch.rand(T) < 0.7,
    **dict.fromkeys(
        ("advantages", "old_logprobs", "ref_logprobs", "token_weights"), lambda: floats(T)
    ),
    **dict.fromkeys(("by_logprob", "by_entropy", "by_log_z"), lambda: floats(T)),
    **dict.fromkeys(("normalizer", "temperature", "factor"), lambda: torch.tensor(1.0)),
    "vocab_size": lambda: V,
    "vocab_start": lambda: 0,
    "first_id": lambda: 0,
    "objective": lambda: "ppo_clip",
    "kl": lambda: "k3",
    **dict.fromkeys(("clip_low", "clip_high"), lambda: 0.2),
    "dual_clip": lambda: 3.0,
    **dict.fromkeys(("kl_coefficient", "entropy_coefficient", "z_loss"), lambda: 0.01),
    "with_gradient": lambda: True,
    "partials": lambda: floats(4, T).abs() + 1,
    "hidden": lambda: floats(T, D),
    "weight": lambda: floats(V, D),
    "grad_weight": lambda: floats(V, D),
    "rows_per_chunk": lambda: 2,
    "kept_gradients_mib": lambda: 1,
    "drop_masked": lambda: True,
    "gradient": lambda: None,
    **dict.fromkeys(("logprobs", "entropy"), lambda: floats(T)),
    "fields": lambda: doubles(T, 8),
    "seed": lambda: torch.tensor([7]),
    "keys": lambda: below(99, T, 2),
    "top_k": lambda: below(V, 1) + 1,
    "top_p": lambda: torch.full((1,), 0.9),
    "min_p": lambda: torch.full((1,), 0.1),
    "counters": lambda: below(2**31, 4, 4),
    "key": lambda: below(2**31, 2),
    "bits": lambda: below(2**31, 9),
    "master": lambda: floats(N),
    "grads": lambda: [floats(N) for _ in range(J)],
    **dict.fromkeys(("exp_avgs", "exp_avg_sqs"), lambda: [floats(N).abs() for _ in range(J)]),
    "lrs": lambda: doubles(J),
    **dict.fromkeys(("beta1s", "beta2s", "eps"), lambda: [0.9] * J),
    "weight_decays": lambda: doubles(J),
    "steps": lambda: below(9, J) + 1,
    **dict.fromkeys(("clips", "weights"), lambda: doubles(J)),
    "found_inf": lambda: torch.zeros(J, dtype=torch.bool),
    "param_out": lambda: None,
    "grad": lambda: floats(N),
    **dict.fromkeys(("exp_avg", "exp_avg_sq", "delta"), lambda: floats(N).abs()),
    **dict.fromkeys(("lr", "weight_decay", "clip"), lambda: doubles(1)),
    **dict.fromkeys(("beta1", "beta2"), lambda: 0.9),
    **dict.fromkeys(("input", "packed", "target", "summed"), lambda: floats(N)),
    "add": lambda: True,
    "qkv": lambda: floats(T, FUSED),
    "values": lambda: floats(S, M // 2, K, E),
    "slots": lambda: below(S, T),
    "table": lambda: table(S),
    "positions": lambda: below(M, T),
    **dict.fromkeys(("cosines", "sines"), lambda: floats(M, E // 2)),
    **dict.fromkeys(("cos", "sin"), lambda: floats(T, 1, E // 2)),
    **dict.fromkeys(("q_weight", "k_weight"), lambda: floats(E)),
    **dict.fromkeys(("inverse", "sums"), lambda: None),
    "ranks": lambda: 1,
    **dict.fromkeys(("scale",), lambda: 0.5),
    "rows": lambda: T,
    "out": lambda: floats(T, H * E),
    "x": lambda: floats(T, D),
    "y": lambda: floats(T, D),
    "residual": lambda: floats(T, D),
    "gate_up": lambda: floats(T, 2 * F),
    "heads": lambda: H,
    "kv_heads": lambda: K,
    "intermediate": lambda: F,
    "post": lambda: False,
    "with_weight": lambda: True,
    "with_weights": lambda: True,
}
OPTIMIZER = {"eps": lambda: 1e-8, "steps": lambda: below(9, 1) + 1}
NORM = {"weight": lambda: floats(D), "eps": lambda: 1e-6}
PACKED = {
    "q": lambda: floats(T, H, E),
    **dict.fromkeys(("k", "v"), lambda: floats(T, K, E)),
    "offsets": lambda: torch.tensor([0, 1, T], dtype=torch.int32),
}
OWN: dict[str, dict[str, Callable[[], Any]]] = {
    "adamw_update_": {**OPTIMIZER, "found_inf": lambda: torch.zeros(1, dtype=torch.bool)},
    "sample_combine": {"partials": lambda: None},  # made by sample_partials, see below
    "replica_average_pack": {
        "weight": lambda: doubles(1),
        "found_inf": lambda: torch.zeros(1, dtype=torch.bool),
    },
    "replica_average_skip_": {"found_inf": lambda: torch.zeros(1, dtype=torch.bool)},
    "rms_norm": NORM,
    "rms_norm_backward": {**NORM, "grad": lambda: floats(T, D), "inverse": lambda: floats(T)},
    "decode_norm_": {**NORM, "out": lambda: floats(T, D)},
    "decode_swiglu_": {"out": lambda: floats(T, F)},
    "decode_attention_": {"keys": lambda: floats(S, M // 2, K, E), "eps": lambda: 1e-6},
    "swiglu_backward": {"grad": lambda: floats(T, F)},
    "_heads": {"eps": lambda: 1e-6},
    "decode_heads_": {
        "eps": lambda: 1e-6,
        **dict.fromkeys(("keys", "values"), lambda: floats(S * 2, M // 2, K, E)),
        "table": lambda: table(S * 2),
        "q": lambda: floats(T, H, E),
    },
    "merge_attention": {
        **dict.fromkeys(("a", "b"), lambda: floats(T, H, E)),
        **dict.fromkeys(("a_lse", "b_lse"), lambda: floats(T, H)),
    },
    "decode_advance_": {
        **dict.fromkeys(("drawn", "tokens"), lambda: below(V, T)),
        **dict.fromkeys(("logprob", "sampled_logprob"), lambda: floats(T)),
        "ends": lambda: below(V, 2),
        **dict.fromkeys(("last_positions", "positions"), lambda: below(M, T)),
        "idle_slot": lambda: 0,
        "frozen": lambda: torch.rand(T) < 0.5,
        "step": lambda: below(4, 1),
        "history": lambda: below(V, 4, T),
        "logprobs": lambda: floats(2, 4, T),
    },
    "narrow_product_": {
        "weight": lambda: floats(F, D),
        **dict.fromkeys(("bias", "scales"), lambda: None),
        "dependent": lambda: False,
        "out": lambda: floats(T, F),
    },
    "product_": {"out": lambda: floats(T, F), "a": lambda: floats(T, D), "b": lambda: floats(D, F)},
    "linear": {"bias": lambda: floats(V)},
    "packed_attention": PACKED,
    "packed_attention_backward": {
        **PACKED,
        "grad": lambda: floats(T, H, E),
        "out": lambda: floats(T, H, E),
        "lse": lambda: floats(T, H),
    },
    "e4m3_rows_": {
        "values": lambda: floats(T, D).to(torch.float8_e4m3fn),
        "scales": lambda: floats(T),
    },
    "_heads_backward_sums": {
        "grad_q": lambda: floats(T, H, E),
        "grad_k": lambda: floats(T, K, E),
        "q_weight": lambda: floats(H * E),
        "k_weight": lambda: floats(K * E),
    },
    "_heads_backward": {
        "grad_q": lambda: floats(T, H, E),
        "grad_k": lambda: floats(T, K, E),
        "grad_v": lambda: floats(T, K, E),
        "inverse": lambda: floats(T, H + K),
    },
    "decode_step_": {
        "eps": lambda: 1e-6,
        "tokens": lambda: below(V, T),
        "embedding": lambda: floats(V, D),
        "qkv": lambda: floats(L, panels(FUSED), D, PANEL),
        "qkv_bias": lambda: None,
        "o": lambda: floats(L, panels(D), H * E, PANEL),
        "gate_up": lambda: floats(L, panels(2 * F), D, PANEL),
        "down": lambda: floats(L, panels(D), F, PANEL),
        **dict.fromkeys(("attention_norm", "mlp_norm"), lambda: floats(L, D)),
        **dict.fromkeys(("q_norm", "k_norm"), lambda: floats(L, E)),
        "norm": lambda: floats(D),
        "head": lambda: floats(panels(V), D, PANEL),
        **dict.fromkeys(("keys", "values"), lambda: floats(L, S, M // 2, K, E)),
        "scratch": lambda: floats(T * (2 * D + FUSED + H * E + F)),
        "logits": lambda: floats(T, V),
    },
    "_scale_gradient_": {"gradient": lambda: floats(T, D)},
    "normal_slice_": {"key": lambda: 7, "first": lambda: 3, "step": lambda: 40, "std": lambda: 0.5},
}


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last before a page that nobody may touch."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // PAGE)
    region = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if LIBC.mprotect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(
        region, dtype=tensor.dtype, count=tensor.numel(), offset=pages * PAGE - size
    )
    return flat.view(tensor.shape).copy_(tensor)


NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 127, 128, 2**20, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1),
    *(-2, -(2**31), -(2**63), 3 * 2**61),
)
REALS = (0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300, 1e38, -0.5)
TYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32),
    *(torch.bool, torch.uint8, torch.complex64),
)
WORDS = ("nll", "reinforce", "ppo_clip", "cispo", "none", "k1", "k2", "k3", "", "x" * 999, "\0")


def another(value: Any, draw: random.Random) -> Any:
    """In the place of a fitting argument."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(NUMBERS)
    if isinstance(value, float):
        return draw.choice(REALS)
    if isinstance(value, str):
        return draw.choice(WORDS)
    if isinstance(value, list):
        return draw.choice(([], value[:1], value * 2, value * 20, [*value[:-1], value[0]]))
    if value is None:
        return draw.choice((None, floats(T), floats(T, D), doubles(1)))
    return another_tensor(value, draw)


def another_tensor(tensor: Tensor, draw: random.Random) -> Tensor | None:
    shape = list(tensor.shape)
    kind = draw.choice(("shape", "shape", "dtype", "values", "strides", "rank", "empty", "none"))
    if kind == "none":
        return None
    if kind == "dtype":
        return tensor.to(draw.choice(TYPES))
    if kind == "rank":
        return draw.choice((tensor.flatten(), tensor[None], tensor.reshape(-1, 1)))
    if kind == "shape" and shape:
        shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 3, 4, 9, 31, 64, 131))
        return torch.ones(shape, dtype=tensor.dtype)
    if kind == "empty" and shape:  # as large as can be said, and without an element
        shape[draw.randrange(len(shape))] = 0
        other = draw.randrange(len(shape))
        if shape[other]:
            shape[other] = draw.choice((2**20, 2**31, 2**40))
        return torch.empty(shape, dtype=tensor.dtype)
    if kind == "strides" and len(shape) > 1:
        return draw.choice(
            (tensor.mT, tensor[:, :1].expand(shape), tensor.repeat_interleave(2, -1)[..., ::2])
        )
    filled = tensor.clone()
    if filled.numel() and filled.dtype != torch.bool:
        at = draw.randrange(filled.numel())
        real = filled.is_floating_point()
        limits = None if real else torch.iinfo(filled.dtype)
        value = draw.choice(REALS if real else (-1, V, V - 1, limits.max, limits.min))
        wide = torch.tensor(value, dtype=torch.float64 if real else torch.int64)
        filled.view(-1)[at] = wide.to(filled.dtype)
    return filled


def arguments(op: str, draw: random.Random, wrong: int) -> dict[str, Any]:
    """By name; `wrong` of them are others than fit."""
    own = FITTING | OWN.get(op, {})
    schema = getattr(torch.ops.megarlx, op).default._schema
    found = {one.name: own[one.name]() for one in schema.arguments}
    if op == "sample_combine":
        shard = torch.ops.megarlx.sample_partials
        given = {n: FITTING[n]() for n in ("logits", "seed", "keys", "temperature")}
        found["partials"] = torch.stack([shard(**given, first_id=0, vocab_size=V)] * 2)
    for name in draw.sample(sorted(found), min(wrong, len(found))):
        found[name] = another(found[name], draw)
    return {
        name: guarded(value)
        if isinstance(value, Tensor) and value.is_contiguous()
        else [guarded(one) for one in value]
        if isinstance(value, list) and value and isinstance(value[0], Tensor)
        else value
        for name, value in found.items()
    }


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = "" if value.is_contiguous() else f" strides {value.stride()}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"
    return f"{value!r:.60}" if not isinstance(value, list) else str([shown(v) for v in value])


def main(seed: int, first: int, count: int) -> None:
    torch.set_num_threads(1)
    if "ASAN_OPTIONS" not in os.environ:  # a sanitizer's shadow of the memory is larger than it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, first + count):
        torch.manual_seed(hash((seed, number)))
        draw = random.Random(f"{seed} {number}")
        op = OPS[number % len(OPS)]
        given = arguments(op, draw, wrong=draw.choice((0, 1, 1, 1, 2, 3)))
        text = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
        print(f"call {number} {op}({text})", flush=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its default action ends the process
        try:
            getattr(torch.ops.megarlx, op)(**given)
            print("ok", flush=True)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
            print("refused", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
