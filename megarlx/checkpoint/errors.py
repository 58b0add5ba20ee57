"""What every refusal of this package is, and how all ranks come to raise the same one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megarlx.comm.collectives import gather_values
from megarlx.comm.groups import Group


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be saved or loaded: which file or tensor, what is there, what was
    expected."""


class Outcome:
    """Whether this rank's part of a common task went well; see `together`."""

    problem: str | None = None


@contextmanager
def together(world: Group, task: str) -> Iterator[Outcome]:
    """What one rank fails at, every rank raises: nobody is left waiting for the others.

    Only what storage and damaged files cause is caught. A mistake in the program is not, and ends
    its rank with its own traceback.
    """
    outcome = Outcome()
    try:
        yield outcome
    except (CheckpointError, OSError) as error:
        outcome.problem = str(error)
    raise_together(world, task, outcome.problem)


def raise_together(world: Group, task: str, problem: str | None) -> None:
    problems = gather_values(problem, world)
    # Many ranks tend to see the same damage; it is told once, by the first of them.
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(problems):
        if text is not None:
            ranks_of.setdefault(text, []).append(world.ranks[rank])
    if not ranks_of:
        return
    if world.size == 1:
        raise CheckpointError(f"{task}: {problem}")
    lines = [
        f"rank {ranks[0]}{f' and {len(ranks) - 1} more' if len(ranks) > 1 else ''}: {text}"
        for text, ranks in ranks_of.items()
    ]
    raise CheckpointError(f"{task}: " + "\n".join(lines[:8]))
