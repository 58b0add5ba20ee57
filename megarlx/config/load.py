"""Reads a configuration file and its overrides; says everything that is wrong with them at once."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, overload

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megarlx.config.allowed import allowed, section_of, without_none
from megarlx.config.lines import Path as KeyPath
from megarlx.config.lines import line_numbers
from megarlx.config.section import LARGEST, TRUSTED, Section
from megarlx.config.sections import Config

S = TypeVar("S", bound=Section)
Prepare = Callable[[dict[str, Any]], dict[str, Any]]
# In resolved.json: what `auto` became on the machine, by dotted key, and why.
CHOSEN = "chosen"
KEPT = "training.precision"  # it changes the numbers of a run
OF_A_PARENT = ("model", "training")  # that a recipe leaves to the run it starts from
KEY = re.compile(r"""\s*"[^"]*"\s*|\s*'[^']*'\s*|[^."'=]+""")  # quoted, with dots in it
DOTTED = re.compile(rf"((?:{KEY.pattern})(?:\.(?:{KEY.pattern}))*)=(.*)", re.DOTALL)
BARE_WORD = re.compile(r"[^\s\"'\[\]{}#=,]+")


class ConfigError(Exception):
    """All that is wrong with a configuration, one line each, as the user is to read it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@overload
def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    prepare: Prepare | None = None,
    trusted: Collection[str] | None = None,
) -> Config: ...


@overload
def load_config(
    path: str | Path,
    overrides: Sequence[str],
    kind: type[S],
    *,
    prepare: Prepare | None = None,
) -> S: ...


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: Any = Config,
    *,
    prepare: Prepare | None = None,
    trusted: Collection[str] | None = None,
) -> Any:
    """The configuration in a sparse TOML file or a resolved JSON file, overridden by `a.b=c`s.

    `prepare` may add to what was read before it is checked. With `trusted` the file is another
    run's: of a user's code, no more than these names is imported to check it.
    """
    path = Path(path)
    values, lines = _read(path)
    places: dict[KeyPath, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    problems = [p for override in overrides if (p := _override(values, places, override))]
    if prepare is not None:
        values = prepare(values)
    reading = TRUSTED.set(trusted)
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        if kind is Config and "model" not in values and {"trunk", "excursions"} & values.keys():
            raise ConfigError([f"{path} is a sweep: megarlx sweep {path}"]) from None
        recipe = kind is Config and "model" not in values and "stages" in values
        if recipe:
            problems.append(
                f"{path} has no [model]: it is a recipe, whose model is that of the run it starts "
                f"from: megarlx branch RUN {path} --out RUN2, or megarlx plan {path} --trunk RUN "
                "--gpus N"
            )
        problems += _explain(error, kind, places, str(path), OF_A_PARENT if recipe else ())
        raise ConfigError(problems) from None
    finally:
        TRUSTED.reset(reading)
    problems += [p for override in overrides if (p := _unread(values, override))]
    if problems:
        raise ConfigError(problems)
    return config


def checked(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """A table that a program gives, refused in the words of a file's."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, {}, where)) from None


def over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and what they leave out; tables are put together, anything else is replaced. So is
    what a table with a preset of its own would leave out: the preset says it."""
    merged = dict(base)
    for key, value in values.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and "preset" not in value:
            value = over(below, value)
        merged[key] = value
    return merged


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start})"]) from None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ConfigError([f"{path}: holds no object but {_shown(values)}"])
            return as_asked(values), {}
        values = tomllib.loads(text)
    except ValueError as error:  # also what int() says about a number of 5,000 digits
        language = "JSON" if path.suffix == ".json" else "TOML"
        at_end = text.count("\n") + 1 if "end of document" in str(error) else ""
        line = m.group(1) if (m := re.search(r"line (\d+)", str(error))) else at_end
        where = f"{path}:{line}" if line else str(path)
        raise ConfigError([f"{where}: is not valid {language}: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: brackets are nested too deeply to be read"]) from None
    return values, line_numbers(text)


def as_asked(resolved: dict[str, Any]) -> dict[str, Any]:
    """Without what was chosen for the machine that wrote it: another one chooses for itself."""
    chosen = resolved.pop(CHOSEN, None)
    for key in chosen if isinstance(chosen, dict) else ():
        *inside, last = key.split(".")
        here: Any = resolved
        for step in inside:
            here = here.get(step) if isinstance(here, dict) else None
        if isinstance(here, dict) and key != KEPT:
            here.pop(last, None)
    return resolved


def _override(values: dict[str, Any], places: dict[KeyPath, str], override: str) -> str | None:
    """Puts `a.b=c` into values, or returns what is wrong with it."""
    source = f"--set {override if len(override) <= 200 else override[:200] + '…'}"
    found = DOTTED.fullmatch(override)
    dotted, text = found.groups() if found else ("", "")
    keys = [key.strip().strip("\"'") for key in KEY.findall(dotted)]
    if not all(keys) or not keys:
        return f"{source}: expected key=value, for example --set training.steps=100"
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {"value": text.strip()} if BARE_WORD.fullmatch(text.strip()) else {}
    if list(parsed) != ["value"]:
        return f"{source}: {text[:80]!r} is neither a TOML value nor a bare word"
    here: Any = values
    path: KeyPath = ()
    for i, key in enumerate(keys):
        step: str | int = key
        last = i == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                return f"{source}: {_dotted(path)} is a list of {len(here)}, counted from 0"
            step = int(key)
        elif not isinstance(here, dict):
            return f"{source}: {_dotted(path)} is {_shown(here)}, which has no keys"
        path = (*path, step)
        if last:
            here[step] = parsed["value"]
            for below in [p for p in places if p[: len(path)] == path]:
                del places[below]
        elif isinstance(here, dict):
            if here.get(step) is None:  # in a resolved file, a table that was not given is null
                here[step] = {}
            here = here[step]
        else:
            here = here[step]
        places.setdefault(path, source)
    return None


def _unread(values: Mapping[str, Any], override: str) -> str | None:
    """What is wrong with a setting of [optimizer] that every objective of the stages replaces."""
    section, _, key = override.partition("=")[0].replace(" ", "").partition(".")
    key = key.partition(".")[0]
    stages = values.get("stages")
    if section != "optimizer" or not isinstance(stages, list):
        return None
    places = {
        f"stages.{number}.objectives.{name}.{key}": key in own
        for number, stage in enumerate(stages)
        for name, own in stage["objectives"].items()
    }
    if not places or not all(places.values()):
        return None
    named = ", ".join(places)
    return f"--set {override}: optimizer.{key} is read by nothing here: set {named}"


def _explain(
    error: ValidationError,
    kind: type[Section],
    places: dict[KeyPath, str],
    file: str,
    optional: Collection[str] = (),
) -> list[str]:
    """pydantic's findings in the user's words, in the order of the file; sections that may be
    `optional` here are not told as missing."""
    found: dict[tuple[int, str], None] = {}
    order = {key: i for i, key in enumerate(places)}
    for detail in error.errors(include_url=False):
        if detail["type"] == "missing" and detail["loc"] in {(name,) for name in optional}:
            continue
        for path, text in _texts(detail, kind, ()):
            known = path
            while known and known not in places:
                known = known[:-1]
            found[order.get(known, len(order)), f"{places.get(known, file)}: {text}"] = None
    return [line for _, line in sorted(found, key=lambda entry: entry[0])]


def _texts(detail: Any, kind: type[Section], before: KeyPath) -> list[tuple[KeyPath, str]]:
    """(where, what) of a finding in a section that stands at `before`."""
    location: KeyPath = (*before, *detail["loc"])
    match detail["type"]:
        case "problems":
            fields = [
                (*location, *(int(key) if key.isdecimal() else key for key in field.split(".")))
                for field, _ in detail["ctx"]["problems"]
            ]
            whats = [what for _, what in detail["ctx"]["problems"]]
            return [(f, f"{_dotted(f)} {what}") for f, what in zip(fields, whats, strict=True)]
        case "options":
            inner, section = detail["ctx"]["errors"], detail["ctx"]["section"]
            return [found for one in inner for found in _texts(one, section, location)]
        case "plug":
            return [(location, f"{_dotted(location)}: {detail['ctx']['text']}")]
    return [(location, _message(detail, kind, before))]


def _message(detail: Any, kind: type[Section], before: KeyPath) -> str:
    location: KeyPath = detail["loc"]
    name = _dotted((*before, *location))
    if detail["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_nearest(location, kind, before)}"
    annotation, metadata, field = _declared(kind, location)
    expected = allowed(annotation, metadata)
    if detail["type"] == "value_error" and isinstance(detail["input"], int):
        return f"{name} is {_shown(detail['input'])}; integers are at most {LARGEST}"
    if detail["type"] != "missing":
        return f"{name or 'the file'} is {_shown(detail['input'])}; expected {expected}"
    if field is None:
        return f"{name} is missing; expected {expected}"
    noted = field.json_schema_extra
    if isinstance(noted, dict):
        return f"{name} is missing, and its default, {noted['default']}, is not {expected}"
    return f"{name} is missing: {field.description} ({expected})"


def _declared(
    kind: type[Section], location: KeyPath
) -> tuple[Any, Sequence[Any], FieldInfo | None]:
    """The declared type of what a location names, its limits, and the field where it is one."""
    annotation: Any = kind
    metadata: Sequence[Any] = ()
    field = None
    for step in location:
        if section := section_of(annotation):
            field = section.model_fields[str(step)]
            annotation, metadata = field.annotation, field.metadata
            continue
        field = None
        if get_origin(annotation := without_none(annotation)) is Annotated:
            annotation = get_args(annotation)[0]
        elements = get_args(annotation)
        if get_origin(annotation) is dict:
            annotation, metadata = elements[1], ()
        elif get_origin(annotation) is tuple and isinstance(step, int):
            annotation = elements[0] if elements[-1] is Ellipsis else elements[step]
            metadata = ()
    return annotation, metadata, field


# What other trainers call a key, and what it is called here.
CALLED_ELSEWHERE = {
    "num_generations": "samples_per_prompt",
    "max_completion_length": "max_completion_tokens",
    "learning_rate": "lr",
    "gradient_checkpointing": "recompute",
    "recompute_granularity": "recompute",
    "micro_batch_size": "sequences_per_microbatch",
    "per_device_train_batch_size": "sequences_per_microbatch",
    "global_batch_size": "sequences_per_step",
    "max_steps": "steps",
    "train_iters": "steps",
    "max_grad_norm": "clip_norm",
    "clip_grad": "clip_norm",
    "grad_clip": "clip_norm",
    "lr_scheduler_type": "schedule",
}


def _nearest(location: KeyPath, kind: type[Section], before: KeyPath) -> str:
    """`did you mean …`: a key of the same table, or else the same key of another one."""
    *inside, last = location
    section = section_of(_declared(kind, tuple(inside))[0]) or kind
    beside = difflib.get_close_matches(str(last), section.model_fields, n=1, cutoff=0.6)
    everywhere = {path.rsplit(".", 1)[-1]: path for path in reversed(list(_all_keys(kind)))}
    if last == "lr" and inside[:1] in (["sft"], ["rl"]):
        return f"did you mean 'stages[0].objectives.{inside[0]}.lr'?"
    last = CALLED_ELSEWHERE.get(str(last), last)
    if str(last) in section.model_fields:
        return f"did you mean '{_dotted((*before, *inside, last))}'?"
    elsewhere = difflib.get_close_matches(str(last), everywhere, n=1, cutoff=0.8)
    start = f"{_dotted(before)}." if before else ""
    if str(last) in everywhere:
        return f"did you mean '{start}{everywhere[str(last)]}'?"
    if beside:
        return f"did you mean '{_dotted((*before, *inside, beside[0]))}'?"
    if elsewhere:
        return f"did you mean '{start}{everywhere[elsewhere[0]]}'?"
    return "allowed are " + ", ".join(section.model_fields)


def _all_keys(kind: type[Section], before: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        keys.append(before + name)
        if section := section_of(field.annotation):
            keys += _all_keys(section, f"{before}{name}.")
    return keys


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _shown(value: Any) -> str:
    """A value as it would be written, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a date, or an integer of thousands of digits in a list
        text = f"{value}" if not isinstance(value, (list, dict)) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
