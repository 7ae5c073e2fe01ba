"""Specs: what a delta is, as frozen data with one strict codec (JSON and text).

The text form is a Python-like expression: `lora(rank=8) + bitfit`, `prefix(tokens=20)[encoder]`.
It is read through Python's own parser and nothing in it is ever executed.
"""

import ast
import dataclasses
import hashlib
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from deltune.errors import SpecError, closest, listing

Family = Literal["addition", "specification", "reparameterization", "baseline", "composite"]


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        return f"{self.authors} {self.year}" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


@dataclass(frozen=True)
class Spec:
    """A delta as data: a method, its options and where it goes.

    `a + b` composes two specs into one delta that holds both.
    """

    kind: ClassVar[str] = ""
    family: ClassVar[Family] = "composite"
    mechanism: ClassVar[str] = ""
    paper: ClassVar[Paper | None] = None
    merges: ClassVar[bool] = False
    checked: ClassVar[str] = "its formula, written out in the tests"
    """The independent oracle of the method's tests."""
    example: ClassVar[str] = ""
    """Its text in the catalogue, where the kind alone is not the typical use."""
    later: ClassVar[tuple[str, ...]] = ()
    """Options that were added later: not in the JSON at their defaults, so that the specs of saved
    deltas and finished studies are still the same."""

    within: str = field(default="", kw_only=True)
    """Narrows `where`: a stack and/or a layer range, e.g. `encoder`, `4:8`, `decoder, -2:`."""

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Holds values given in Python to the types of the fields, as those in text are."""
        order = [f.name for f in dataclasses.fields(cls) if not f.kw_only]
        for name, value in [*zip(order, given, strict=False), *named.items()]:
            if name in (hints := _hints(cls)):
                checked_value(f"{cls.kind}.{name}", value, hints[name])
        return super().__new__(cls)

    def __add__(self, other: "Spec") -> "Sum":
        return Sum((*parts(self), *parts(other)))

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in _changed(self).items())
        return (
            self.kind
            + (f"({given})" if given else "")
            + (f"[{self.within}]" if self.within else "")
        )

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON data; `from_json` gives it back."""
        left = set(self.later) - set(_changed(self))
        said = {n: _plain(self.kind, n, value) for n, value in _fields(self) if n not in left}
        return {"kind": self.kind, **said}

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, the spec's identity."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Sum(Spec):
    """Several specs that act at once, as one delta: `lora(rank=8) + bitfit`."""

    kind: ClassVar[str] = "sum"

    parts: tuple[Spec, ...] = ()

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "sum", "parts": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Composite(Spec):
    """A method that is a combination of others, under a name of its own: define `expand`."""

    def expand(self) -> Spec:
        """The methods that it stands for."""
        raise NotImplementedError


METHODS: dict[str, type[Spec]] = {}


S = TypeVar("S", bound=Spec)


def register(cls: type[S]) -> type[S]:
    """Class decorator: makes a method known by its `kind`."""
    if METHODS.setdefault(cls.kind, cls) is not cls:
        raise SpecError(f"two methods call themselves `{cls.kind}`; give the second another `kind`")
    return cls


def methods() -> dict[str, type[Spec]]:
    """Every method by its kind; family, mechanism, paper and merging are class attributes.

    Example:
        >>> import deltune as dt
        >>> dt.methods()["lora"].family
        'reparameterization'
    """
    import deltune.families  # noqa: F401  (registers them)

    return dict(METHODS)


def parts(spec: Spec) -> tuple[Spec, ...]:
    """The specs that a spec is made of: those of a sum, else itself."""
    return spec.parts if isinstance(spec, Sum) else (spec,)


def primitives(spec: Spec) -> tuple[Spec, ...]:
    """The specs that act: the parts of a spec, composites replaced by what they stand for."""
    return tuple(
        one
        for part in parts(spec)
        for one in (primitives(part.expand()) if isinstance(part, Composite) else (part,))
    )


def parse(text: str) -> Spec:
    """Reads a spec from text; `str(spec)` writes it.

    Args:
        text: such as `lora(rank=8) + bitfit` or `prefix(tokens=20)[encoder]`.

    Raises:
        SpecError: unknown method or field (with the close match), or not an expression.

    Example:
        >>> import deltune as dt
        >>> str(dt.parse("lora(rank=4)+bitfit"))
        'lora(rank=4) + bitfit'
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise SpecError(
            f"`{text}` is not a spec ({error.msg}); write e.g. `lora(rank=8) + bitfit`"
        ) from None
    return _read(tree, text)


def from_json(data: object) -> Spec:
    """Reads a spec from the data of `Spec.to_json`.

    Raises:
        SpecError: unknown kind or field, wrong type, value out of range.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise SpecError(f"a spec is an object with a `kind`, got {data!r}")
    values = dict(data)
    kind = values.pop("kind")
    if kind == "sum":
        items = values.pop("parts", None)
        if values or not isinstance(items, list) or len(items) < 2:
            raise SpecError("a `sum` has `parts`, a list of two or more specs, and nothing else")
        return Sum(tuple(from_json(item) for item in items))
    return build(kind, values)


def build(kind: str, values: Mapping[str, Any]) -> Spec:
    """The spec of a kind with these field values, each checked against its type."""
    known = methods()
    if kind not in known:
        raise SpecError(f"unknown method `{kind}`{closest(kind, known)}; methods: {listing(known)}")
    hints = _hints(known[kind])
    names = [f.name for f in dataclasses.fields(known[kind])]
    checked = {}
    for name, value in values.items():
        if name not in names:
            raise SpecError(
                f"`{kind}` has no field `{name}`{closest(name, names)}; fields: {listing(names)}"
            )
        checked[name] = checked_value(f"{kind}.{name}", value, hints[name])
    return known[kind](**checked)


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


@cache
def _hints(cls: type[Spec]) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(node: ast.expr, text: str) -> Spec:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _read(left, text) + _read(right, text)
        case ast.Subscript(value, inside):
            spec = _read(value, text)
            if isinstance(spec, Sum) or spec.within:
                raise SpecError(f"in `{text}`: put the brackets behind each method, once")
            return dataclasses.replace(spec, within=ast.unparse(inside).strip("()"))
        case ast.Name(kind):
            return build(kind, {})
        case ast.Call(ast.Name(kind), [], keywords):
            return build(kind, dict(_keyword(keyword, text) for keyword in keywords))
    raise SpecError(
        f"`{ast.unparse(node)}` in `{text}` is not a spec; write `method(field=value, ...)`, "
        "joined with `+`"
    )


def _keyword(keyword: ast.keyword, text: str) -> tuple[str, Any]:
    try:
        return str(keyword.arg), ast.literal_eval(keyword.value)
    except ValueError:
        raise SpecError(
            f"`{keyword.arg}={ast.unparse(keyword.value)}` in `{text}` is not a plain value; "
            "use numbers, quoted strings, True/False/None or {...}"
        ) from None


def _fields(spec: Spec) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(spec):
        yield f.name, getattr(spec, f.name)


def _changed(spec: Spec) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    return {n: v for n, v in _fields(spec) if n != "within" and v != defaults[n]}


def _plain(kind: str, name: str, value: Any) -> Any:
    if callable(value):
        raise SpecError(
            f"`{kind}.{name}` is a Python function, which cannot be written down; "
            "use roles, names or globs where the spec must be saved"
        )
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


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
    return names.get(hint, "None" if hint is type(None) else str(hint))


def require(condition: bool, spec: Spec, name: str, expected: str) -> None:
    """Checks a field in `__post_init__`: raises a SpecError that names field and value."""
    if not condition:
        raise SpecError(
            f"`{spec.kind}({name}={getattr(spec, name)!r})`: `{name}` must be {expected}"
        )
