"""Says in words what a field takes: the one source for error messages and for --help-config."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from megarlx import plug
from megarlx.config.section import Named, Section

WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Any: "anything",
}


def without_none(annotation: Any) -> Any:
    """The type without `| None`, which in TOML is said by leaving the key out."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (a for a in get_args(annotation) if a is not type(None))
    return annotation


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    annotation = without_none(annotation)
    is_section = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation if is_section else None


def element_section(annotation: Any) -> type[Section] | None:
    """The section that each entry of a list of tables, or of a table of names, holds."""
    annotation = without_none(annotation)
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is tuple:
        return section_of(get_args(annotation)[0])
    return section_of(get_args(annotation)[1]) if is_table_of_names(annotation) else None


def is_table_of_names(annotation: Any) -> bool:
    return get_origin(without_none(annotation)) is dict


def allowed(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """For example `an integer of at least 1`, `one of "pre", "post"`, `a list of 2 numbers`."""
    annotation = without_none(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], [*arguments[1:], *metadata])
    for named in metadata:
        if isinstance(named, Named):
            return plug.allowed(named.kind)
    if origin is Literal:
        return "one of " + ", ".join(f'"{a}"' for a in arguments)
    if origin is tuple:
        number = "values" if arguments[-1] is Ellipsis else f"{len(arguments)} values"
        return f"a list of {number}, each {allowed(arguments[0])}"
    if origin is list:
        return "a list"
    if origin is dict:
        return f"a table of names, each with {allowed(arguments[1])}"
    if section := section_of(annotation):
        return "a table with the keys " + ", ".join(section.model_fields)
    return " ".join(filter(None, [WORDS[annotation], ", ".join(_limits(metadata))]))


def _limits(metadata: Iterable[Any]) -> list[str]:
    said: list[str] = []
    for limit in metadata:
        match limit:
            case FieldInfo():
                said += _limits(limit.metadata)
            case annotated_types.Ge(ge):
                said.append(f"of at least {ge}")
            case annotated_types.Gt(gt):
                said.append(f"above {gt}")
            case annotated_types.Le(le):
                said.append(f"up to {le}")
            case annotated_types.Lt(lt):
                said.append(f"below {lt}")
            case annotated_types.MultipleOf(step):
                said.append(f"a multiple of {step}")
    return said
