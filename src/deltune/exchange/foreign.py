"""Files of other libraries: read without pickle, and nothing in them is passed over in silence."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltune.errors import ExchangeError, listing

MOST_JSON = 16 * 2**20
MOST_NUMBER = 2**63
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
"""What a field holds that asks for nothing."""


class Told:
    """The fields of a configuration. Each is taken, or known to say nothing about a delta, or
    empty; any other one asks for what is not done here, and is refused by name.

    Args:
        values: field -> value.
        where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where
        self.left = set(values)

    def take(
        self, name: str, kind: type | tuple[type, ...], default: Any, least: int | None = None
    ) -> Any:
        """The value of a field, of this kind and not below the least; the default where it is
        missing or null. Numbers are finite and have 64 bits at most."""
        self.left.discard(name)
        value = self.values.get(name)
        if value is None:
            return default
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        number = isinstance(value, int | float)
        if not good or (number and not abs(value) < MOST_NUMBER):
            names = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
            raise ExchangeError(
                f"{self.where}: `{name}` is {_cut(value)}; expected {' or '.join(names)}"
            )
        if least is not None and value < least:
            raise ExchangeError(f"{self.where}: `{name}` is {value!r}; expected {least} or more")
        return value

    def close(self, silent: Iterable[str], defaults: Mapping[str, Any]) -> None:
        """Refuses what was not taken and asks for something.

        Args:
            silent: fields that say nothing about what a trained delta does.
            defaults: values of fields, beside empty ones, that ask for nothing.
        """
        asked = [
            name
            for name in sorted(self.left - set(silent))
            if not any(self.values[name] is one or self.values[name] == one for one in EMPTY)
            and not (name in defaults and self.values[name] == defaults[name])
        ]
        if asked:
            said = [f"{name} = {self.values[name]!r}" for name in asked]
            raise ExchangeError(
                f"{self.where} asks for what cannot be honoured: {listing(said)}; load it with the "
                "library that wrote it and merge it, or train without"
            )


def _cut(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) < 99 else f"{text[:96]}..."


class Form(NamedTuple):
    """A tensor of a place, as we name it, and its sides, such as `m d`: a letter is the same number
    for all tensors of a place, 1 or more, and a number is itself."""

    ours: str
    sides: str


class Held:
    """The tensors of a file, each to be taken once.

    Args:
        tensors: by name.
        where: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.left, self.where = dict(tensors), where

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor of a name, which has this shape if one is given."""
        if name not in self.left:
            raise ExchangeError(f"{self.where} lacks `{name}`; it is incomplete: save it again")
        found = self.left.pop(name)
        if shape is not None and tuple(found.shape) != shape:
            raise ExchangeError(
                f"{self.where}: `{name}` has the shape {tuple(found.shape)} and this model wants "
                f"{shape}; load the model that it was trained on"
            )
        return found

    def places(self, mark: str, forms: Mapping[str, Form]) -> dict[str, dict[str, Tensor]]:
        """The tensors behind a mark in their names: what stands before it -> our name -> tensor.

        Args:
            mark: such as `.adapters.a.`; it may begin a name without its dot.
            forms: what follows the mark -> our name and the form. A place has all or none.

        Raises:
            ExchangeError: a place lacks one, or has one of another form.
        """
        found = dict.fromkeys(
            before
            for before, inside, own in (f".{full}".partition(mark) for full in self.left)
            if inside and own in forms
        )
        return {before[1:]: self._place(f"{before}{mark}"[1:], forms) for before in found}

    def _place(self, start: str, forms: Mapping[str, Form]) -> dict[str, Tensor]:
        sides: dict[str, int] = {}
        taken = {}
        for own, (ours, form) in forms.items():
            tensor = taken[ours] = self.take(start + own)
            shape, words = tuple(tensor.shape), form.split()
            pairs = [
                (int(word) if word.isdecimal() else sides.setdefault(word, max(1, side)), side)
                for word, side in zip(words, shape, strict=False)
            ]
            if len(words) != len(shape) or any(wanted != side for wanted, side in pairs):
                known = ", ".join(f"{word} = {side}" for word, side in sides.items())
                raise ExchangeError(
                    f"{self.where}: `{start}{own}` has the shape {shape}; expected ({form})"
                    f"{known and ' with '}{known}; it is damaged: save it again"
                )
        return taken

    def close(self) -> None:
        """Refuses tensors that nothing has taken."""
        if self.left:
            raise ExchangeError(
                f"{self.where} holds tensors that are not understood: {listing(self.left, 6)}; "
                "nothing was attached"
            )


def read_json(file: Path) -> Told:
    """The object in a JSON file.

    Raises:
        ExchangeError: no such file, one that is too large, or no JSON object.
    """
    try:
        if file.stat().st_size > MOST_JSON:
            raise ExchangeError(f"`{file}` is larger than any configuration; not read")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExchangeError(f"`{file}` cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"`{file}` is no readable JSON ({error}); save it again") from None
    if not isinstance(values, dict):
        raise ExchangeError(f"`{file}` holds {type(values).__name__}; expected a JSON object")
    return Told(values, f"`{file}`")


def read_safetensors(file: Path, whole_numbers: tuple[str, ...] = ()) -> Held:
    """All tensors of a file, finite and in float32 or what they are.

    Args:
        file: the file.
        whole_numbers: ends of the names of tensors that may hold these.

    Raises:
        ExchangeError: a truncated or damaged file, values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise ExchangeError(f"`{file}` is damaged or no safetensors file ({error})") from None
    return _checked(tensors, file, whole_numbers)


def read_pickled(file: Path, whole_numbers: tuple[str, ...] = ()) -> Held:
    """All tensors of a file that torch has pickled, by torch's reader of nothing but tensors.

    It makes no object of another kind and calls nothing that a file names, and what is no mapping
    of names to tensors is refused.

    Args:
        file: the file.
        whole_numbers: as for `read_safetensors`.

    Raises:
        ExchangeError: as `read_safetensors`; anything else than tensors in the file.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise ExchangeError(
            f"`{file}` is damaged, or holds more than tensors ({type(error).__name__}); "
            "save it as safetensors with the library that wrote it"
        ) from None
    plain = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )
    if not plain:
        raise ExchangeError(f"`{file}` holds {type(tensors).__name__}; expected tensors by name")
    return _checked(tensors, file, whole_numbers)


def _checked(tensors: dict[str, Tensor], file: Path, whole_numbers: tuple[str, ...]) -> Held:
    for name, tensor in tensors.items():
        whole = name.endswith(whole_numbers) and tensor.dtype in WHOLE
        if not tensor.is_floating_point() and not whole:
            raise ExchangeError(f"`{file}`: `{name}` is {tensor.dtype}; expected floating point")
        if not tensor.isfinite().all():
            raise ExchangeError(f"`{file}`: `{name}` holds values that are not finite")
    return Held(tensors, f"`{file}`")
