"""What every section of the configuration has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, field_validator, model_validator
from pydantic_core import PydanticCustomError, core_schema

from megarlx import plug

LARGEST = 2**63 - 1  # of all integers: what 64 bits hold


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


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


class Section(BaseModel):
    """A frozen table of the configuration: every key is known, typed and described."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*")
    @classmethod
    def _within_limits(cls, value: Any) -> Any:
        if any(isinstance(one, int) and abs(one) > LARGEST for one in _each(value)):
            raise ValueError(f"integers are at most {LARGEST}")
        return value

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
