"""Everything that is sent between processes goes through here.

Each function takes a `Group`, returns its input when the group has one member, counts its bytes in
the group's `Traffic`, and turns a dead or stuck peer into a `CollectiveError` within the group's
time limit. Under NCCL the host does not wait for the device, so there a stuck peer ends the
process through torch's watchdog after the same limit, with the axis in its message.

First the plain operations, then host-side values. differentiable.py has those that autograd sees
through. n is the size of the group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarlx.comm.groups import CollectiveError, Group, bytes_sent

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}

# torch 2.13 renamed both and warns of the older names.
_all_gather_single: Callable = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single: Callable = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)


@contextmanager
def named(group: Group, operation: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # every c10d error is one
        raise CollectiveError(group, operation, error) from error


class Pending:
    """An operation under way: its tensors must be neither read nor written until `wait` returns."""

    def __init__(self, group: Group, operation: str, work: dist.Work | None, *kept: Tensor) -> None:
        self._group = group
        self._operation = operation
        self._work = work
        self._kept = kept  # alive until the backend is done with them

    def wait(self) -> None:
        if self._work is not None:
            with named(self._group, self._operation):
                self._work.wait()
        self._work = None
        self._kept = ()


def _count(group: Group, operation: str, whole: Tensor) -> None:
    sent = bytes_sent(operation, group.size, whole.numel() * whole.element_size())
    group.traffic.add(group.axis, operation, sent)


def through_host(device: torch.device, group: Group) -> bool:
    """gloo lacks several operations on CUDA tensors; such a tensor travels through a host copy."""
    return device.type == "cuda" and dist.get_backend(group.process_group) == "gloo"


def _as_contiguous(tensor: Tensor, group: Group) -> Tensor:
    """What the backend can work on in place; the tensor itself wherever that is possible."""
    return tensor.cpu().contiguous() if through_host(tensor.device, group) else tensor.contiguous()


def all_reduce_(tensor: Tensor, group: Group, op: str = "sum") -> Tensor:
    """In place; every rank gets the same bits."""
    if op not in _REDUCTIONS:
        raise ValueError(f"all_reduce_: op is '{op}'; allowed are {', '.join(_REDUCTIONS)}")
    if group.size == 1:
        return tensor
    _count(group, "all_reduce", tensor)
    buffer = _as_contiguous(tensor.detach(), group)
    with named(group, "all_reduce"):
        dist.all_reduce(buffer, _REDUCTIONS[op], group=group.process_group)
    return _write_back(tensor, buffer)


def _write_back(tensor: Tensor, buffer: Tensor) -> Tensor:
    if buffer.data_ptr() != tensor.data_ptr() or buffer.device != tensor.device:
        with torch.no_grad():
            tensor.copy_(buffer)
    return tensor


def all_gather(tensor: Tensor, group: Group, dim: int = 0) -> Tensor:
    """[…, d, …] on every rank → […, n·d, …], in group order. Shapes must agree."""
    if group.size == 1:
        return tensor
    dim = dimension_of("all_gather", tensor, dim)
    source = tensor.detach().contiguous()
    gathered = source.new_empty(group.size, *source.shape)
    all_gather_flat_(gathered.view(-1), source.view(-1), group).wait()
    return gathered.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Sums […, n·d, …] over the ranks and returns this rank's […, d, …]."""
    if group.size == 1:
        return tensor
    dim = dimension_of("reduce_scatter", tensor, dim)
    check_divisible("reduce_scatter", tensor, group, dim)
    parts = tensor.detach().unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    own = parts.new_empty(parts.shape[1:])
    reduce_scatter_flat_(own.view(-1), parts.view(-1), group).wait()
    return own


def all_gather_flat_(
    output: Tensor, shard: Tensor, group: Group, async_op: bool = False
) -> Pending:
    """output [n·s] ← every rank's shard [s]. The shard may be its own place in the output."""
    _check_flat("all_gather_flat_", output, shard, "output", "shard", group)
    if group.size == 1:
        _write_back(output, shard)
        return Pending(group, "all_gather", None)
    _count(group, "all_gather", output)
    if through_host(output.device, group):
        host = output.cpu()
        with named(group, "all_gather"):
            _all_gather_single(host, shard.cpu(), group=group.process_group)
        output.copy_(host)
        return Pending(group, "all_gather", None)
    with named(group, "all_gather"):
        work = _all_gather_single(output, shard, group=group.process_group, async_op=async_op)
    return Pending(group, "all_gather", work, output, shard)


def reduce_scatter_flat_(
    shard: Tensor, input: Tensor, group: Group, async_op: bool = False
) -> Pending:
    """shard [s] ← this rank's part of the sum of every rank's input [n·s].

    The shard may be its own place in the input; the rest of the input is not changed.
    """
    _check_flat("reduce_scatter_flat_", input, shard, "input", "shard", group)
    if group.size == 1:
        _write_back(shard, input)
        return Pending(group, "reduce_scatter", None)
    _count(group, "reduce_scatter", input)
    if through_host(input.device, group):
        host = shard.cpu()
        with named(group, "reduce_scatter"):
            _reduce_scatter_single(host, input.cpu(), group=group.process_group)
        shard.copy_(host)
        return Pending(group, "reduce_scatter", None)
    with named(group, "reduce_scatter"):
        work = _reduce_scatter_single(shard, input, group=group.process_group, async_op=async_op)
    return Pending(group, "reduce_scatter", work, shard, input)


def broadcast_(tensor: Tensor, group: Group, source: int = 0) -> Tensor:
    """In place, from the rank at position `source` of the group."""
    _check_position("broadcast_", "source", source, group)
    if group.size == 1:
        return tensor
    _count(group, "broadcast", tensor)
    buffer = _as_contiguous(tensor.detach(), group)
    with named(group, "broadcast"):
        dist.broadcast(buffer, group=group.process_group, group_src=source)
    return _write_back(tensor, buffer)


def send(tensor: Tensor, group: Group, to: int) -> None:
    """To the rank at position `to` of the group."""
    _check_position("send", "to", to, group, other=True)
    _count(group, "send", tensor)
    buffer = _as_contiguous(tensor.detach(), group)
    with named(group, "send"):
        dist.send(buffer, group=group.process_group, group_dst=to)


def receive_(tensor: Tensor, group: Group, source: int) -> Tensor:
    """Fills `tensor` with what the rank at position `source` of the group sends."""
    _check_position("receive_", "source", source, group, other=True)
    _count(group, "receive", tensor)
    buffer = _as_contiguous(tensor.detach(), group)
    with named(group, "receive"):
        dist.recv(buffer, group=group.process_group, group_src=source)
    return _write_back(tensor, buffer)


def start_send(tensor: Tensor, group: Group, to: int, operation: str, where: str) -> Pending:
    """`send` that does not wait: its bytes are counted as `operation`, its errors say `where`."""
    _check_position("start_send", "to", to, group, other=True)
    group.traffic.add(group.axis, operation, tensor.nbytes)
    buffer = _as_contiguous(tensor.detach(), group)
    with named(group, where):
        work = dist.isend(buffer, group=group.process_group, group_dst=to)
    return Pending(group, where, work, buffer)


def start_receive(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    source: int,
    where: str,
) -> tuple[Tensor, Pending]:
    """A buffer that is filled when `Pending.wait` returns; on the host where gloo needs that."""
    _check_position("start_receive", "source", source, group, other=True)
    place = "cpu" if through_host(device, group) else device
    buffer = torch.empty(shape, dtype=dtype, device=place)
    with named(group, where):
        work = dist.irecv(buffer, group=group.process_group, group_src=source)
    return buffer, Pending(group, where, work)


# Values of the host.


def barrier(group: Group) -> None:
    """Returns once every rank of the group is here."""
    all_reduce_(torch.zeros(1, dtype=torch.int64), group)


def gather_values(value: Any, group: Group) -> list[Any]:
    """A JSON value of every rank, in group order: digests, counts, texts. Not for hot loops."""
    if group.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = all_gather(torch.tensor([text.numel()]), group).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: text.numel()] = text
    rows = all_gather(padded[None], group)
    return [
        json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)
    ]


# Checks.


def dimension_of(operation: str, tensor: Tensor, dim: int) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"{operation}: dim is {dim}; a tensor of shape {list(tensor.shape)} has the "
            f"dimensions {-tensor.dim()} to {tensor.dim() - 1}"
        )
    return dim % tensor.dim()


def check_divisible(operation: str, tensor: Tensor, group: Group, dim: int) -> None:
    if tensor.dim() == 0 or tensor.shape[dim] % group.size:
        raise ValueError(
            f"{operation}: dimension {dim} of shape {list(tensor.shape)} must be a multiple of "
            f"the {group.size} ranks of {group.axis}"
        )


def _check_position(
    operation: str, argument: str, position: int, group: Group, other: bool = False
) -> None:
    if not 0 <= position < group.size or (other and position == group.rank):
        raise ValueError(
            f"{operation}: {argument} is {position}; allowed are positions 0 to {group.size - 1} "
            f"of the {group.axis} group" + (f" other than its own, {group.rank}" if other else "")
        )


def _check_flat(
    operation: str, whole: Tensor, shard: Tensor, whole_name: str, shard_name: str, group: Group
) -> None:
    for name, tensor in ((whole_name, whole), (shard_name, shard)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{operation}: {name} (shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}) must be contiguous"
            )
    if whole.numel() != group.size * shard.numel() or whole.dtype != shard.dtype:
        raise ValueError(
            f"{operation}: {whole_name} has {whole.numel()} numbers of {whole.dtype} and "
            f"{shard_name} {shard.numel()} of {shard.dtype}; {whole_name} must hold exactly "
            f"{group.size} times as many of the same dtype ({group.size} ranks of {group.axis})"
        )
