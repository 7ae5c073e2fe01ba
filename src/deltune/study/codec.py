"""Strict reading of tables (TOML, JSON) into frozen dataclasses: nothing unknown is let through."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from deltune.errors import SpecError, StudyError, closest, listing
from deltune.values import checked_value

T = TypeVar("T")


def decode(cls: type[T], table: object, place: str) -> T:
    """`table` as an instance of the dataclass `cls`, nested dataclasses included.

    Args:
        cls: a dataclass.
        table: what a TOML or JSON reader gave.
        place: where the table stands, for messages, e.g. `study.toml: [budget]`.

    Raises:
        StudyError: an unknown or missing field, or a value of another type.
    """
    if not isinstance(table, Mapping):
        raise StudyError(f"{place} is {table!r}; expected a table of {listing(_names(cls))}")
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise StudyError(
                f"{place} has no field `{key}`{closest(key, hints)}; fields: {listing(_names(cls))}"
            )
    missing = [name for name in _required(cls) if name not in table]
    if missing:
        raise StudyError(f"{place} lacks {listing(missing)}; add it")
    values = {key: _value(hints[key], value, f"{place} {key}") for key, value in table.items()}
    return cls(**values)


def _value(hint: Any, value: object, place: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return decode(hint, value, place)
    inner = get_args(hint)
    whole = next((part for part in inner if dataclasses.is_dataclass(part)), None)
    if type(None) in inner and isinstance(whole, type):
        return None if value is None else decode(whole, value, place)
    if get_origin(hint) is tuple and inner and dataclasses.is_dataclass(inner[0]):
        if not isinstance(value, list):
            raise StudyError(f"{place} is {value!r}; expected a list of tables")
        return tuple(decode(inner[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    plain = [get_origin(part) or part for part in (hint, *(inner if type(None) in inner else ()))]
    if hint is Any or dict in plain or list in plain:
        return value
    try:
        return checked_value(place, value, hint)
    except SpecError as error:
        raise StudyError(str(error)) from None


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _required(cls: type[Any]) -> list[str]:
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is missing and field.default_factory is missing
    ]
