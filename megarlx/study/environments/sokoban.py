"""Sokoban in words: push every box onto a target. The edge of the board is a wall.

    _ _ o x        the player P, a box o, a target x, a free cell _, a wall #
    P _ _ _        * is a box on a target, + the player on one

A board is made by playing backwards: boxes start on the targets and are pulled away. How many moves
it takes at least is known by search, so every task can be solved and is as long as asked for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields, replace
from functools import cached_property

from megarlx.data.draw import Draw, Split
from megarlx.rollouts.environments import interface
from megarlx.study.environments.splits import drawn_of_split

Cell = tuple[int, int]
State = tuple[Cell, frozenset[Cell]]  # the player, the boxes
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

    @cached_property
    def inside(self) -> frozenset[Cell]:
        cells = ((r, c) for r in range(self.height) for c in range(self.width))
        return frozenset(cells) - self.walls

    @cached_property
    def dead(self) -> frozenset[Cell]:
        """Corners: a box there, and not on a target, stays for ever."""

        def wall(cell: Cell, *moves: str) -> bool:
            return any(_step(cell, move) not in self.inside for move in moves)

        corners = (c for c in self.inside if wall(c, "up", "down") and wall(c, "left", "right"))
        return frozenset(corners) - self.targets

    @property
    def stuck(self) -> bool:
        return not self.dead.isdisjoint(self.boxes)

    def moved(self, move: str) -> Board | None:
        """None where a wall or a box that cannot be pushed is in the way."""
        after = self.after((self.player, self.boxes), move)
        return None if after is None else replace(self, player=after[0], boxes=after[1])

    def after(self, state: State, move: str) -> State | None:
        player, boxes = state
        ahead = _step(player, move)
        if ahead not in self.inside:
            return None
        if ahead not in boxes:
            return ahead, boxes
        behind = _step(ahead, move)
        if behind not in self.inside or behind in boxes:
            return None
        return ahead, boxes - {ahead} | {behind}

    def before(self, state: State, move: str) -> State | None:
        """One move backwards, with the box in front of the player if there is one."""
        player, boxes = state
        ahead, behind = _step(player, move), _step(player, move, -1)
        if behind not in self.inside or behind in boxes:
            return None
        return behind, boxes - {ahead} | {player} if ahead in boxes else boxes

    def shortest(self, most_moves: int | None = None) -> list[str] | None:
        """Of the fewest moves; None if there is no way (of at most so many)."""
        start: State = (self.player, self.boxes)
        came: dict[State, tuple[State, str] | None] = {start: None}
        ahead = deque([(start, 0)])
        while ahead:
            state, depth = ahead.popleft()
            if state[1] == self.targets:
                return _way(came, state)
            if depth == most_moves or not self.dead.isdisjoint(state[1]):
                continue
            for move in MOVES:
                after = self.after(state, move)
                if after is not None and after not in came:
                    came[after] = state, move
                    ahead.append((after, depth + 1))
        return None


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    moves = []
    while (before := came[state]) is not None:
        state, move = before
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
        rows = drawn_of_split(draw, split, self._drawn, " / ".join)
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
        state: State = (board.player, boxes)
        for _ in range(draw.between(2, 3 * level.most_moves)):
            state = board.before(state, draw.one(list(MOVES))) or state
        if state[1] & boxes:
            return None
        board = replace(board, player=state[0], boxes=state[1])
        way = board.shortest(level.most_moves)
        return board.rows() if way is not None and len(way) >= level.fewest_moves else None
