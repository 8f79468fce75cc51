"""The base class of all sections of the schema, and value types that several of them use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Preprocessing = Literal["published", "fast", "whole"]  # see ``data/preprocessing.py``


def known_name(choices: Sequence[str]) -> AfterValidator:
    """A check that a value is one of ``choices``, such as the names of a registry."""

    def check(name: str) -> str:
        if name not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return name

    return AfterValidator(check)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable once validated."""

    # allow_inf_nan=False: YAML's .nan passes every range check below ("nan < 0" is false), so it
    # must be refused by type.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Keys of the first release; see ``digest_values``.
    first_keys: ClassVar[tuple[str, ...]] = ()

    def digest_values(self) -> dict[str, object]:
        """The values that a stored digest is computed from: ``first_keys``, and what was set.

        A key that a later release adds counts only if it differs from its default, so that it
        leaves the digests of all prepared datasets as they are.
        """
        values = self.model_dump(mode="json")
        changed = self.model_dump(mode="json", exclude_defaults=True)
        return {
            key: value for key, value in values.items() if key in self.first_keys or key in changed
        }
