"""torch's PipelineStage with static shapes, where what is sent is counted and nothing is kept.

torch makes receive buffers for all micro-batches at once and keeps them as long as the schedule,
and keeps what it sent until the step is over. Here a buffer is made when it is asked for and
dropped when it has been used, so memory follows the micro-batches in flight, not their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megarlx.comm.groups import Group
from megarlx.parallel.pipeline_plan import PipelinePlan


class SendsUnderWay:
    """The sends of a rank that may not have arrived: at most `limit`, then the oldest is awaited.

    That cannot hang: the schedules' order of sends and receives holds even if each waits for its
    other half before the next begins.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.works: deque[dist.Work] = deque()

    def start(self, op: dist.P2POp) -> None:
        work = dist.isend(op.tensor, group=op.group, group_dst=op.group_peer)
        assert work is not None  # both ranks are in the group
        self.works.append(work)
        while len(self.works) > self.limit:
            self.works.popleft().wait()

    def wait(self) -> None:
        while self.works:
            self.works.popleft().wait()


class ExchangedStage(PipelineStage):
    def __init__(
        self,
        module: nn.Module,
        index: int,
        plan: PipelinePlan,
        group: Group,
        sends: SendsUnderWay | None,  # None: torch sends by itself
        *,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        training: bool,
    ) -> None:
        # Given shapes keep torch from finding them out by running every stage once more, on
        # uninitialised memory. The last stage's output is not sent: its shape does not matter.
        hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=training)
        # gloo cannot send CUDA tensors: they travel through host memory, as in comm/collectives.py.
        through_host = device.type == "cuda" and dist.get_backend(group.process_group) == "gloo"
        super().__init__(
            module,
            index,
            plan.stages,
            torch.device("cpu") if through_host else device,
            input_args=() if index == 0 else hidden,
            output_args=hidden,
            group=group.process_group,
        )
        self.compute_device = device
        self.sends = sends
        self.traffic = group.traffic
        self.axis = group.axis
        self.last_exchange = f"stage {index}: nothing exchanged yet"
        # Before its first step a schedule agrees with its neighbours on how shapes are known: one
        # int32 to the next stage and one back.
        for lower in (index, index - 1):
            if lower >= 0 and plan.crosses_ranks(lower):
                self.traffic.add(self.axis, "send_agreement", torch.int32.itemsize)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        # torch asks every stage whether it was given its shapes. In a rehearsal with torch's fake
        # process group nobody answers; all stages are made here, and all are given them.
        if "fake" in dist.get_backend_config(self.group):
            return torch.ones(1, dtype=torch.int32)
        return super()._warmup_backward_result(received_result)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        _drop_buffers(info for infos in self.args_recv_info.values() for info in infos)
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        _drop_buffers(info for infos in self.grad_recv_info.values() for info in infos)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return self._received(super().get_fwd_recv_ops(fwd_chunk_id), "hidden", fwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        infos = self.args_recv_info[fwd_chunk_id]
        self._move_to_compute_device(infos)
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _drop_buffers(infos)
        if not self.has_backward:
            self.fwd_cache[fwd_chunk_id] = (self.fwd_cache[fwd_chunk_id][0], [])
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        ops = super().get_fwd_send_ops(fwd_chunk_id)
        if not self.has_backward:
            del self.fwd_cache[fwd_chunk_id]
        return self._sent(ops, "hidden", fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return self._received(super().get_bwd_recv_ops(bwd_chunk_id), "gradient", bwd_chunk_id)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        infos = self.grad_recv_info.get(bwd_chunk_id, ())
        self._move_to_compute_device(infos)
        super().backward_one_chunk(bwd_chunk_id, loss, *args, **kwargs)
        _drop_buffers(infos)
        if loss is not None:
            # The schedule keeps the losses; their graphs would keep the hidden states received.
            loss.detach_()

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._sent(super().get_bwd_send_ops(bwd_chunk_id), "gradient", bwd_chunk_id)

    def _make_buffers(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if info.buffer is None and not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    def _move_to_compute_device(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if info.buffer is not None:
                info.buffer = info.buffer.to(self.compute_device)

    def _received(self, ops: list[dist.P2POp], what: str, chunk: int) -> list[dist.P2POp]:
        for op in ops:
            self._note(f"receive the {what} of micro-batch {chunk} from", op.peer)
        return ops

    def _sent(self, ops: list[dist.P2POp], what: str, chunk: int) -> list[dist.P2POp]:
        for op in ops:
            # A gradient can come out of backward with any strides; the wire has but one order.
            op.tensor = op.tensor.to(self.device).contiguous()
            self.traffic.add(self.axis, f"send_{what}", op.tensor.nbytes)
            self._note(f"send the {what} of micro-batch {chunk} to", op.peer)
        if self.sends is None:
            return ops
        for op in ops:
            self.sends.start(op)
        return []

    def _note(self, exchange: str, global_rank: int) -> None:
        self.last_exchange = (
            f"stage {self.stage_index} last began to {exchange} global rank {global_rank}"
        )


def _drop_buffers(infos: Iterable[Any]) -> None:
    for info in infos:
        info.buffer = None
