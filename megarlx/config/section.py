"""What every section of the configuration has in common."""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from megarlx import plug

# Names of code that may be imported to check a configuration, beside ours; None: all. It is a set
# where another run's configuration is read, before trust.py has had its say.
TRUSTED: ContextVar[Collection[str] | None] = ContextVar("TRUSTED", default=None)


def may_import(kind: str, name: str) -> bool:
    trusted = TRUSTED.get()
    return trusted is None or name in plug.ours(kind) or name in trusted


@dataclass(frozen=True)
class Named:
    """Marks a string field as a name of something that may be a user's: see plug.py."""

    kind: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, name: str) -> str:
        if wrong := plug.problem(self.kind, name):
            raise ValueError(wrong)
        return name


@dataclass(frozen=True)
class OptionsOf:
    """Marks a table as the options of what another field of the section names.

    That is a class with `Options`, a Section: the table is checked by it, and holds its defaults.
    The name stands before the options, and the options have validate_default.
    """

    kind: str
    name: str  # the other field

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_after_validator_function(self._checked, handler(source))

    def section(self, named: str) -> type[Section]:
        found = getattr(plug.resolve(self.kind, named), "Options", None)
        if not (isinstance(found, type) and issubclass(found, Section)):
            raise plug.PlugError(f"{self.kind} {named!r} has no Options that is a Section")
        return found

    def _checked(self, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        named = info.data.get(self.name)
        if named is None or not may_import(self.kind, named):
            return given
        try:
            section = self.section(named)
        except plug.PlugError as error:
            raise PydanticCustomError("plug", "{text}", {"text": str(error)}) from None
        try:
            return section.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            # load.py tells each of these in the words of the section.
            context = {"text": str(error), "section": section}
            context["errors"] = error.errors(include_url=False)
            raise PydanticCustomError("options", "{text}", context) from None


class Section(BaseModel):
    """A frozen table of the configuration: every key is known, typed and described."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def problems(self) -> list[tuple[str, str]]:
        """(field, what is wrong) where fields that are each valid do not go together."""
        return []

    @model_validator(mode="after")
    def _raise_problems(self) -> Self:
        if problems := self.problems():
            text = "; ".join(f"{field}: {wrong}" for field, wrong in problems)
            # load.py takes the list out of the context, so that each problem gets its own line.
            raise PydanticCustomError(
                "problems", "{text}", {"text": text, "problems": list(problems)}
            )
        return self

    def to_json(self) -> str:
        """Every field, defaults included, always in the same order."""
        return self.model_dump_json(indent=2) + "\n"
