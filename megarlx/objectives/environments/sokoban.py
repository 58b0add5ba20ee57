"""Sokoban in words: push every box onto a target. The edge of the board is a wall.

    _ _ o x        the player P, a box o, a target x, a free cell _, a wall #
    P _ _ _        * is a box on a target, + the player on one

A board is made by playing backwards: boxes start on the targets and are pulled away. How many moves
it takes at least is known by search, so every task can be solved and is as long as asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields, replace
from typing import Any

from megarlx.data.synthetic.draw import Draw
from megarlx.data.synthetic.problems import Split
from megarlx.objectives.environments import interface

Cell = tuple[int, int]
MOVES: dict[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
CELLS = ("_", "#", "o", "x", "*", "P", "+")


@dataclass(frozen=True)
class Level:
    width: int
    height: int
    boxes: int = 1
    walls: int = 0
    fewest_moves: int = 1
    most_moves: int = 30


LEVELS = {
    "easy": Level(4, 3, fewest_moves=2, most_moves=6),
    "medium": Level(5, 5, walls=3, fewest_moves=4, most_moves=12),
    "hard": Level(6, 6, boxes=2, walls=4, fewest_moves=8, most_moves=30),
}


@dataclass(frozen=True)
class Board:
    width: int
    height: int
    walls: frozenset[Cell]
    targets: frozenset[Cell]
    player: Cell
    boxes: frozenset[Cell]

    @staticmethod
    def read(rows: list[str]) -> Board:
        cells = [row.split() for row in rows]
        at = {(r, c): word for r, row in enumerate(cells) for c, word in enumerate(row)}

        def of(kinds: str) -> frozenset[Cell]:
            return frozenset(cell for cell, word in at.items() if word in kinds)

        (player,) = of("P+")
        return Board(len(cells[0]), len(cells), of("#"), of("x*+"), player, of("o*"))

    def rows(self) -> list[str]:
        def word(cell: Cell) -> str:
            if cell == self.player:
                return "+" if cell in self.targets else "P"
            if cell in self.boxes:
                return "*" if cell in self.targets else "o"
            return "#" if cell in self.walls else "x" if cell in self.targets else "_"

        lines = range(self.height)
        return [" ".join(word((r, c)) for c in range(self.width)) for r in lines]

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    def free(self, cell: Cell) -> bool:
        inside = 0 <= cell[0] < self.height and 0 <= cell[1] < self.width
        return inside and cell not in self.walls

    def moved(self, move: str) -> Board | None:
        """None where a wall or a box that cannot be pushed is in the way."""
        ahead, behind = _step(self.player, move), _step(_step(self.player, move), move)
        if not self.free(ahead):
            return None
        if ahead not in self.boxes:
            return replace(self, player=ahead)
        if not self.free(behind) or behind in self.boxes:
            return None
        return replace(self, player=ahead, boxes=self.boxes - {ahead} | {behind})

    def pulled(self, move: str) -> Board | None:
        """One move backwards, with the box in front of the player if there is one."""
        ahead, behind = _step(self.player, move), _step(self.player, move, -1)
        if not self.free(behind) or behind in self.boxes:
            return None
        if ahead not in self.boxes:
            return replace(self, player=behind)
        return replace(self, player=behind, boxes=self.boxes - {ahead} | {self.player})

    @property
    def stuck(self) -> bool:
        """A box in a corner, and not on a target, stays there."""
        return any(
            (self._wall(box, "up") or self._wall(box, "down"))
            and (self._wall(box, "left") or self._wall(box, "right"))
            for box in self.boxes - self.targets
        )

    def _wall(self, cell: Cell, move: str) -> bool:
        return not self.free(_step(cell, move))

    def shortest(self, most_moves: int | None = None) -> list[str] | None:
        """Of the fewest moves; None if there is no way (of at most so many)."""
        came: dict[tuple[Cell, frozenset[Cell]], tuple[Board, str] | None]
        came, ahead = {(self.player, self.boxes): None}, deque([(self, 0)])
        while ahead:
            board, depth = ahead.popleft()
            if board.solved:
                return board._way(came)
            if depth == most_moves or board.stuck:
                continue
            for move in MOVES:
                after = board.moved(move)
                if after is not None and (after.player, after.boxes) not in came:
                    came[after.player, after.boxes] = board, move
                    ahead.append((after, depth + 1))
        return None

    def _way(self, came: dict[Any, tuple[Board, str] | None]) -> list[str]:
        moves, board = [], self
        while (before := came[board.player, board.boxes]) is not None:
            board, move = before
            moves.append(move)
        return moves[::-1]


def _step(cell: Cell, move: str, count: int = 1) -> Cell:
    return cell[0] + count * MOVES[move][0], cell[1] + count * MOVES[move][1]


class Sokoban:
    """`level` is one of easy, medium, hard; other arguments change what it is made of."""

    def __init__(
        self,
        level: str = "easy",
        seed: int = 0,
        moves_per_turn: int = 1,
        move_cost: float = 0.0,
        box_reward: float = 0.0,
        **changes: int,
    ) -> None:
        """moves_per_turn  most moves of one action
        move_cost       taken off for each move
        box_reward      for each box on a target, taken off again when it leaves
        """
        allowed = {f.name for f in fields(Level)}
        if level not in LEVELS or not changes.keys() <= allowed:
            raise ValueError(
                f"sokoban: level is '{level}' with {', '.join(changes) or 'no changes'}; allowed "
                f"are {', '.join(LEVELS)} with {', '.join(sorted(allowed))}"
            )
        self.level, self.seed = replace(LEVELS[level], **changes), seed
        self.moves_per_turn, self.move_cost, self.box_reward = moves_per_turn, move_cost, box_reward

    @property
    def words(self) -> list[str]:
        return [*CELLS, "/", *MOVES, "error"]

    def task(self, split: Split, index: int) -> interface.Task:
        draw = Draw(self.seed, "sokoban", split, index)
        rows = interface.drawn_of_split(draw, split, self._drawn, " / ".join)
        return {"rows": rows}

    def reset(self, task: interface.Task, seed: int) -> str:
        self.board = Board.read(task["rows"])
        return self._text()

    def step(self, action: str) -> interface.Step:
        moves = action.split()
        if not 1 <= len(moves) <= self.moves_per_turn or not set(moves) <= MOVES.keys():
            return f"error / {self._text()}", 0.0, False, {"valid": False}
        reward = 0.0
        for move in moves:
            reward -= self.move_cost
            before = len(self.board.boxes & self.board.targets)
            self.board = self.board.moved(move) or self.board
            after = len(self.board.boxes & self.board.targets)
            reward += self.box_reward * (after - before)
            if self.board.solved or self.board.stuck:
                break
        reward += float(self.board.solved)
        done = self.board.solved or self.board.stuck
        return self._text(), reward, done, {"success": self.board.solved, "valid": True}

    def solution(self) -> str | None:
        way = self.board.shortest()
        return None if way is None else " ".join(way[: self.moves_per_turn])

    def random_action(self, draw: Draw) -> str:
        return draw.one(list(MOVES))

    def _text(self) -> str:
        return " / ".join(self.board.rows())

    def _drawn(self, draw: Draw) -> list[str] | None:
        """A board, unless it takes too few or too many moves."""
        level = self.level
        places = [(r, c) for r in range(level.height) for c in range(level.width)]
        cells = draw.some(places, level.walls + level.boxes + 1)
        walls, boxes = cells[: level.walls], frozenset(cells[level.walls : -1])
        board = Board(
            level.width, level.height, frozenset(walls), boxes, player=cells[-1], boxes=boxes
        )
        for _ in range(draw.between(2, 3 * level.most_moves)):
            board = board.pulled(draw.one(list(MOVES))) or board
        if board.boxes & board.targets:
            return None
        way = board.shortest(level.most_moves)
        return board.rows() if way is not None and len(way) >= level.fewest_moves else None
