"""The rules of a key, written beside the key itself.

    log_every_steps: Annotated[PositiveInt, Rules(may_change_on_resume=True, rehearse=fixed(1))]

Other modules read the rules and keep no list of keys of their own: ``resume_diff`` (may a resumed
run change it?), the trainer (is it a hyperparameter in TensorBoard?), ``smoke_test`` (how does
``--rehearse`` shrink it?). Pydantic ignores the metadata, so it never appears in the JSON Schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config.schema.section import Section
from pipeline.config.schema.shrink import Shrink


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may happen to a key's value apart from the user setting it.

    Attributes:
        may_change_on_resume: an interrupted stage resumes with a new value, because the value
            decides how the stage runs or what it reports, but not what it computes. On a section:
            holds for all keys below it.
        fixed_in: stages that must not resume with a new value even so.
        hparam: column of the key in TensorBoard's table of hyperparameters, from 1; 0: not shown.
        rehearse: makes the value of a rehearsal from the job's own.
        rehearse_input: the same, for keys that describe input files (images, weights). A rehearsal
            has no such files, so these keys are replaced before the job is checked; the others
            are replaced after it, so that the check still sees the real sizes.
    """

    may_change_on_resume: bool = False
    fixed_in: tuple[str, ...] = ()
    hparam: int = 0
    rehearse: Shrink | None = None
    rehearse_input: Shrink | None = None


_NO_RULES = Rules()  # most keys: a resumed run must not change them, a rehearsal keeps them


def _rules_of(info: FieldInfo) -> Rules:
    return next((entry for entry in info.metadata if isinstance(entry, Rules)), _NO_RULES)


def key_of(name: str, info: FieldInfo) -> str:
    """The key as the job file spells it: ``from`` for the field ``initial``."""
    return info.alias or name


def may_change_on_resume(root: type[Section], path: Sequence[str], stage: str) -> bool:
    """True if ``stage`` may resume although the key at ``path`` has a new value.

    A key that the schema does not have (of an older release) must not change, unless it lies
    below a section that may.
    """
    # Any rule on the way suffices: Job.cluster permits everything below it at once.
    return any(
        rules.may_change_on_resume and stage not in rules.fixed_in
        for rules in _rules_along(root, path)
    )


def hparam_keys(section: type[Section]) -> list[str]:
    """The hyperparameters of a section that TensorBoard shows, in the order of its columns."""
    # Sorted by column and not by position in the class: TensorBoard's table puts the values first
    # that people compare most.
    columns = {name: _rules_of(info).hparam for name, info in section.model_fields.items()}
    shown = [name for name, column in columns.items() if column]
    return sorted(shown, key=lambda name: columns[name])


def keys_with_rules(section: Section, above: str = "") -> Iterator[tuple[str, Rules]]:
    """Every key that a checked section has, in dotted form, with its rules; outer keys first."""
    for name, info in type(section).model_fields.items():
        key = f"{above}{key_of(name, info)}"
        yield key, _rules_of(info)
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from keys_with_rules(value, f"{key}.")
        elif isinstance(value, dict):  # datasets by name
            for entry, below in value.items():
                yield from keys_with_rules(below, f"{key}.{entry}.")


def _rules_along(root: type[Section], path: Sequence[str]) -> Iterator[Rules]:
    """Rules of the keys on the way to ``path``, outermost first.

    Example: ("data", "toy", "root") -> rules of Job.data, then of DatasetConfig.root; "toy" is a
    name that the user chose and has no rules.
    """
    section: type[Section] | None = root
    parts = iter(path)
    for part in parts:
        fields = section.model_fields if section is not None else {}
        info = next((info for name, info in fields.items() if key_of(name, info) == part), None)
        if info is None:
            return
        yield _rules_of(info)
        # A mapping by name: the next part of the path is a name and not a key of the schema.
        if get_origin(info.annotation) is dict:
            next(parts, None)
        section = _section_within(info.annotation)


def _section_within(annotation: object) -> type[Section] | None:
    """The section class inside a type: DatasetConfig of dict[str, DatasetConfig]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section_within(argument) for argument in get_args(annotation))
    return next((section for section in inner if section is not None), None)
