"""The environments that come with megarlx: every task can be solved, none is solved by chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megarlx.config.environment import EnvironmentConfig
from megarlx.data.conversations import read_conversations
from megarlx.data.draw import Draw
from megarlx.data.prompts import read_prompts
from megarlx.data.tokenizer import WordTokenizer, load_tokenizer
from megarlx.rollouts.environments import BuiltIn
from megarlx.rollouts.environments.gymnasium import TextGym
from megarlx.rollouts.environments.interface import built_in, success_rate
from megarlx.rollouts.environments.worker import EnvironmentServer
from megarlx.study.environments import demonstrations
from megarlx.study.environments.calculator import Calculator
from megarlx.study.environments.demonstrations import Sizes, demonstration
from megarlx.study.environments.shop import Shop
from megarlx.study.environments.sokoban import MOVES, Board, Sokoban

# (options, most turns the solver takes, most that a random policy solves in as many turns)
CASES: dict[str, tuple[Any, int, float]] = {
    "calculator": (Calculator(), 4, 0.2),
    "calculator-long": (Calculator({"steps": [0, 0, 0, 1], "quantities": 2}), 5, 0.05),
    "sokoban-easy": (Sokoban("easy"), 6, 0.35),
    "sokoban-medium": (Sokoban("medium"), 12, 0.1),
    "sokoban-three-moves": (Sokoban("medium", moves_per_turn=3), 4, 0.1),
    "shop": (Shop(), 30, 0.1),
}
CASE = pytest.mark.parametrize("name", CASES)


@CASE
def test_the_solver_solves_every_task_in_as_many_turns(name: str) -> None:
    environment, turns, _ = CASES[name]
    for split in ("train", "validation", "test"):
        tasks = [environment.task(split, i) for i in range(25)]
        assert success_rate(environment, tasks, max_turns=turns) == 1.0


@CASE
def test_a_random_policy_solves_few_tasks(name: str) -> None:
    environment, turns, floor = CASES[name]
    tasks = 4 * [environment.task("test", i) for i in range(40)]
    rate = success_rate(environment, tasks, max_turns=min(turns, 8), draw=Draw(3, "random"))
    assert rate <= floor


@CASE
def test_tasks_are_functions_of_split_and_number_and_no_split_shares_one(name: str) -> None:
    environment = CASES[name][0]
    shown: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        tasks = [environment.task(split, i) for i in range(25)]
        assert tasks == [environment.task(split, i) for i in range(25)]
        assert tasks == json.loads(json.dumps(tasks))
        shown[split] = {environment.reset(task, 0) for task in tasks}
        assert len(shown[split]) > 10
    assert not shown["train"] & shown["test"]
    assert not shown["train"] & shown["validation"]
    assert not shown["validation"] & shown["test"]


@CASE
def test_every_word_is_listed_and_the_same_actions_show_the_same(name: str) -> None:
    environment: BuiltIn = CASES[name][0]
    tokenizer = WordTokenizer(environment.words)
    for index in range(30):
        task, seen = environment.task("train", index), []
        for _ in range(2):
            draw = Draw(index, "actions")
            said = [environment.reset(task, 5)]
            for _ in range(12):
                action = environment.random_action(draw)
                observation, reward, done, info = environment.step(action)
                said += [action, observation, str(reward), str(info)]
                tokenizer.encode(f"{action} {observation}")
                if done:
                    break
            seen.append(said)
        assert seen[0] == seen[1]


@CASE
@pytest.mark.parametrize("action", ["", "calc 3 +", "answer pears", "open 0", "north", "buy buy"])
def test_what_is_no_action_is_marked_and_changes_nothing(name: str, action: str) -> None:
    environment = CASES[name][0]
    environment.reset(environment.task("train", 0), 0)
    before = environment.solution()
    _, reward, done, info = environment.step(action)
    assert (reward, done, info["valid"]) == (0.0, False, False)
    assert environment.solution() == before


def test_the_calculator_answers_calls_and_knows_the_answer() -> None:
    environment = Calculator()
    question = environment.reset(environment.task("train", 0), 0)
    assert question.endswith("how many ?")
    assert environment.step("calc 7 + 5") == ("12", 0.0, False, {"valid": True})
    for call in ("calc 50 * 50", "calc 3 / 2", "calc 3 / 0", "calc 2 - 9"):
        assert environment.step(call)[0] == "error"
    assert environment.step("calc 12 / 4")[0] == "3"
    right = environment.problem.answer[0]
    assert environment.step(f"answer {right + 1}")[1:3] == (0.0, True)
    environment.reset(environment.task("train", 0), 0)
    assert environment.step(f"answer {right}") == (
        "right",
        1.0,
        True,
        {"success": True, "valid": True},
    )


def test_sokoban_moves_pushes_and_ends_as_the_rules_say() -> None:
    rows = ["P o x _", "_ # _ _", "_ _ _ _"]
    board = Board.read(rows)
    assert board.rows() == rows
    assert board.moved("up") is None
    assert board.moved("down").rows() == ["_ o x _", "P # _ _", "_ _ _ _"]  # type: ignore[union-attr]
    pushed = board.moved("right")
    assert pushed is not None
    assert pushed.rows() == ["_ P * _", "_ # _ _", "_ _ _ _"]
    assert pushed.solved
    assert board.shortest() == ["right"]
    past = pushed.moved("right")
    assert past is not None
    assert past.rows() == ["_ _ + o", "_ # _ _", "_ _ _ _"]
    assert past.stuck
    assert past.shortest() is None
    assert past.moved("right") is None, "two things cannot be pushed through a wall"
    environment = Sokoban(moves_per_turn=2, move_cost=0.1, box_reward=0.25)
    environment.reset({"rows": rows}, 0)
    observation, reward, done, info = environment.step("right")
    assert reward == pytest.approx(1 + 0.25 - 0.1)
    assert (done, info["success"]) == (True, True)
    assert observation == "_ P * _ / _ # _ _ / _ _ _ _"


def test_pulling_is_pushing_backwards() -> None:
    draw, seen = Draw(1, "boards"), 0
    board = Board.read(["_ o _ _ _", "_ P # _ x", "_ _ o _ _", "x _ _ _ _"])
    state = (board.player, board.boxes)
    for _ in range(300):
        move = draw.one(list(MOVES))
        before = board.before(state, move)
        if before is not None:
            assert board.after(before, move) == state
            seen += before[1] != state[1]
            state = before
    assert seen > 8


@pytest.mark.parametrize("level", ["easy", "medium", "hard"])
def test_levels_take_as_many_moves_as_they_promise(level: str) -> None:
    environment = Sokoban(level)
    wanted, taken = environment.level, []
    for index in range(5 if level == "hard" else 30):
        board = Board.read(environment.task("test", index)["rows"])
        way = board.shortest()
        assert way is not None
        assert (len(board.boxes), len(board.walls)) == (wanted.boxes, wanted.walls)
        taken.append(len(way))
        for move in way:
            board = board.moved(move) or board
        assert board.solved
    assert wanted.fewest_moves <= min(taken) <= max(taken) <= wanted.most_moves


def test_the_shop_shows_sizes_only_of_what_is_open_and_pays_for_the_wish_alone() -> None:
    environment = Shop(partial=0.4)
    task = environment.task("train", 3)
    environment.reset(task, 0)
    page = environment.step(f"search {task['colour']} {task['kind']}")[0]
    assert task["size"] not in page
    assert environment.step("buy")[3] == {"valid": False}
    opened = environment.step("open 1")[0]
    assert "size" in opened
    product = environment.open
    assert product is not None
    met = (product.size == task["size"]) + (product.price < task["below"]) + 2
    assert environment.step("buy")[1] == (1.0 if met == 4 else pytest.approx(0.4 * met / 4))


def test_wrong_options_are_explained() -> None:
    with pytest.raises(ValueError, match="level is 'huge' with no changes; allowed are easy, medi"):
        Sokoban("huge")
    with pytest.raises(ValueError, match=r"with depth; allowed are .* boxes, fewest_moves"):
        Sokoban("easy", depth=3)
    with pytest.raises(ValueError, match="products is 0, page 3; allowed"):
        Shop(products=0)
    with pytest.raises(ValueError, match="digits is true"):
        Calculator({"digits": True})


def test_wrong_settings_of_an_environment_are_refused() -> None:
    with pytest.raises(ValidationError, match='allowed are "calculator", "sokoban", '):
        EnvironmentConfig(function="chess")
    with pytest.raises(ValidationError, match="must be below max_episode_tokens = 20"):
        EnvironmentConfig(function="shop", max_turn_tokens=20, max_episode_tokens=20)


@pytest.mark.parametrize("function", ["calculator", "sokoban", "shop"])
def test_written_files_are_read_by_the_loaders_of_the_trainer(
    function: str, tmp_path: Path
) -> None:
    config = EnvironmentConfig(function=function, max_turns=10)
    sizes = Sizes(train_tasks=20, validation_tasks=4, test_tasks=40, demonstrations=25)
    rates = demonstrations.write_environment(config, tmp_path, sizes, mistakes=0.2)
    assert rates["solver"] > 0.9 > 0.5 > rates["random"]
    tokenizer = load_tokenizer(tmp_path / "environment.words")
    conversations = list(read_conversations(tmp_path / "demonstrations.jsonl"))
    assert len(conversations) == 25
    for conversation in conversations:
        ids, learned = demonstrations.TEMPLATE.encode(conversation, tokenizer)
        said = [t for t, of_policy in zip(ids, learned, strict=True) if of_policy]
        actions = " ".join(
            t.content + " <eos>" for t in conversation.turns if t.role == "assistant"
        )
        assert tokenizer.decode(said) == actions
    for split, count in (("train", 20), ("validation", 4), ("test", 40)):
        prompts = read_prompts(tmp_path / f"tasks_{split}.jsonl")
        assert len(prompts) == count
        environment = built_in(config)
        for prompt in prompts:
            assert environment.reset(prompt.metadata["task"], 0) == prompt.question
            tokenizer.encode(prompt.question)
    again = tmp_path / "again"
    demonstrations.write_environment(config, again, sizes, mistakes=0.2)
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


@pytest.mark.parametrize("function", ["calculator", "sokoban", "shop"])
def test_unsolved_demonstrations_are_kept_where_wanted(function: str, tmp_path: Path) -> None:
    """Then each task in its turn has one, whichever way it ended."""
    config = EnvironmentConfig(function=function, max_turns=8)
    sizes = Sizes(train_tasks=1, validation_tasks=1, test_tasks=1, demonstrations=60)
    for solved_only in (True, False):
        own = tmp_path / str(solved_only)
        demonstrations.write_environment(config, own, sizes, mistakes=0.4, solved_only=solved_only)
        environment = built_in(config)
        firsts, solved = [], 0
        for conversation in read_conversations(own / "demonstrations.jsonl"):
            turns = conversation.turns
            assert 2 <= len(turns) <= 16
            firsts.append(turns[0].content)
            task = next(
                task
                for task in (environment.task("train", i) for i in range(1000))
                if environment.reset(task, 0) == firsts[-1]
            )
            environment.reset(task, 0)
            info = [environment.step(t.content)[3] for t in turns if t.role == "assistant"][-1]
            solved += info.get("success", False)
        assert len(firsts) == 60
        in_turn = [environment.reset(environment.task("train", i), 0) for i in range(60)]
        assert (firsts == in_turn) == (not solved_only)
        assert solved == 60 if solved_only else 5 < solved < 57


def test_mistakes_are_in_demonstrations_and_are_made_up_for() -> None:
    environment = Sokoban("medium")
    perfect, clumsy = (
        [
            demonstration(
                environment,
                environment.task("train", i),
                max_turns=20,
                draw=Draw(0, i),
                mistakes=mistakes,
            )
            for i in range(60)
        ]
        for mistakes in (0.0, 0.3)
    )
    assert all(perfect)
    lengths = [
        sum(len(d.turns) for d in found if d is not None) / sum(d is not None for d in found)
        for found in (perfect, clumsy)
    ]
    assert lengths[1] > lengths[0]
    assert sum(d is not None for d in clumsy) > 20


class Lamp:
    """As Gymnasium has them: the light goes on with the second "on"."""

    def __init__(self, old: bool = False, numbers: bool = False) -> None:
        self.old, self.numbers = old, numbers

    def reset(self, *, seed: int, options: dict[str, Any]) -> Any:
        self.count, self.label = 0, options["label"]
        return self._seen() if self.old else (self._seen(), {})

    def _seen(self) -> Any:
        text = f"{self.label} {self.count}"
        return {"text": text, "image": object()} if self.numbers else text

    def step(self, action: Any) -> Any:
        self.count += action == (1 if self.numbers else "on")
        on = self.count == 2
        info = {"won": on, "valid": True, "image": object()}
        if self.old:
            return self._seen(), float(on), on, info
        return self._seen(), float(on), on, False, info


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_gymnasium_environments_of_either_age_are_taken(old: bool, numbers: bool) -> None:
    options = {
        "make": f"{__name__}:Lamp",
        "arguments": {"old": old, "numbers": numbers},
        "success_key": "won",
        **({"observation_key": "text", "action_ids": ["off", "on"]} if numbers else {}),
    }
    server = EnvironmentServer("gymnasium", options, 100)
    begin = {"episode": 1, "task": {"label": "lamp"}, "seed": 0, "replay": []}
    assert server([begin]) == {"answers": [{"observation": "lamp 0"}]}

    def stepped(action: str) -> Any:
        return server([{"episode": 1, "action": action}])["answers"][0]

    first = stepped(" on" if numbers else "on")
    assert (first["observation"], first["done"]) == ("lamp 1", False)
    if numbers:
        assert stepped("dance")["info"] == {"valid": False}
    last = stepped("on")
    assert (last["reward"], last["done"], last["info"]["success"]) == (1.0, True, True)


def test_a_gymnasium_observation_that_is_no_text_is_refused_by_type() -> None:
    options = {"make": f"{__name__}:Lamp", "arguments": {"numbers": True}}
    server = EnvironmentServer("gymnasium", options, 100)
    begin = {"episode": 1, "task": {"label": "lamp"}, "seed": 0, "replay": []}
    (answer,) = server([begin])["answers"]
    assert answer["failed"] == "wrong_shape"
    assert answer["detail"].startswith("reset's observation is a dict")
    assert isinstance(TextGym(**options), TextGym)


def test_what_has_no_reset_and_step_is_never_made(tmp_path: Path) -> None:
    mark = tmp_path / "made"
    options = {"args": f"touch {mark}", "shell": True}
    with pytest.raises(TypeError, match="subprocess:Popen is no environment: it has no reset and"):
        EnvironmentServer("subprocess:Popen", options, 100)
    assert not mark.exists()
