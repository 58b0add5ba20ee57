"""Different numbers of elements between every two ranks of a group, in one operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megarlx.comm.collectives import named, through_host
from megarlx.comm.groups import Group


def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int], group: Group) -> list[Tensor]:
    """`parts` [k_i], one for each rank in group order → as many from each: [sizes_i].

    Bytes are counted as sent where they go to another rank.
    """
    if len(parts) != group.size or len(sizes) != group.size:
        raise ValueError(
            f"all_to_all: {len(parts)} parts and {len(sizes)} sizes; {group.axis} has "
            f"{group.size} ranks, and each needs one"
        )
    if group.size == 1:
        return list(parts)
    given = [part.numel() for part in parts]
    source = torch.cat(list(parts))
    others = source.numel() - given[group.rank]
    group.traffic.add(group.axis, "all_to_all", others * source.element_size())
    place = torch.device("cpu") if through_host(source.device, group) else source.device
    received = source.new_empty(sum(sizes), device=place)
    with named(group, "all_to_all"):
        dist.all_to_all_single(
            received, source.to(place), list(sizes), given, group=group.process_group
        )
    return list(received.to(source.device).split(list(sizes)))
