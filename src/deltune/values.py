"""Values of fields, held to the type hints of the fields."""

import math
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

from deltune.errors import SpecError, listing


def checked_value(field_name: str, value: Any, hint: Any) -> Any:
    """`value` as a type hint wants it: lists become tuples, whole numbers floats.

    Args:
        field_name: names the value in messages, e.g. `lora.rank`.
        value: plain data, as JSON, TOML or a Python literal gives it.
        hint: a plain type, `Literal`, union, `tuple[X, ...]` or mapping.

    Raises:
        SpecError: the value is of another type, or not one of the choices.

    Example:
        >>> checked_value("study.seeds", [0, 1], tuple[int, ...])
        (0, 1)
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise SpecError(f"`{field_name}` is a number of {value.bit_length()} bits; the most is 63")
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return checked_value(field_name, value, option)
            except SpecError:
                continue
    elif origin is Literal and value in arguments:
        return value
    elif (
        origin is tuple
        and isinstance(value, list | tuple)
        and (arguments[-1] is ... or len(value) == len(arguments))
    ):
        return tuple(checked_value(field_name, item, arguments[0]) for item in value)
    elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            of = partial(checked_value, field_name)
            return {of(k, arguments[0]): of(v, arguments[1]) for k, v in value.items()}
    elif origin is Callable and callable(value):
        return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif hint is type(None) and value is None:
        return None
    elif (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool) == isinstance(value, bool)
    ):
        return value
    raise SpecError(f"`{field_name}={value!r}` is not {_describe(hint)}")


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + listing(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(
            _describe(option) for option in get_args(hint) if "Callable" not in str(option)
        )
    names = {
        int: "a whole number",
        float: "a finite number",
        str: "a string",
        bool: "True or False",
    }
    if hint is type(None):
        return "None"
    return names.get(hint, f"a {hint.__name__}" if isinstance(hint, type) else str(hint))
