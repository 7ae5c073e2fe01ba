"""Specs: what a delta is, as frozen data with one strict codec (JSON and text).

The text form is a Python-like expression: `lora(rank=8) + bitfit`, `prefix(tokens=20)[encoder]`,
`average(lora, adapter >> ia3)`.
It is read through Python's own parser and nothing in it is ever executed.
"""

import ast
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, Self, TypeVar, get_type_hints

from deltune.errors import SpecError, closest, listing
from deltune.values import checked_value

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

    `a + b` composes two specs into one delta that holds both, `a >> b` into one in which b acts
    on what a has made of the model.
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
        return Sum((self, other))

    def __rshift__(self, other: "Spec") -> "Stack":
        return Stack((self, other))

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
class Operator(Spec):
    """Specs made one: a delta that arranges how its parts act.

    In text an operator has its parts first: `average(lora, adapter, weights=(0.3, 0.7))`. The
    planning gives it the units that are to be made of its parts, and it gives them back as it
    arranges them; so no verb knows of operators.
    """

    least: ClassVar[int] = 1
    """Of how many parts it is, at least."""
    sign: ClassVar[str] = ""
    """What stands between the parts in text, instead of a name before them."""

    parts: tuple[Spec, ...] = ()
    """The specs that it is of."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        require(len(self.parts) >= self.least, self, "parts", f"{self.least} specs or more")
        require(not self.within, self, "within", "left out: put the brackets behind its parts")

    def arranged(
        self, below: list[list[Any]], name: str, atlas: Any, shared: dict[str, Any]
    ) -> list[Any]:
        """The units to be made, as this operator arranges them.

        Args:
            below: for each part the units that are to be made of it (`mechanisms.step.Step`).
            name: of the operator among the parts of the delta, if it has units of its own.
            atlas: the model's places.
            shared: the tensors that sites share, by their group; may be changed.
        """
        return [step for steps in below for step in steps]

    def __str__(self) -> str:
        if self.sign:
            one = (f"({part})" if getattr(part, "sign", "") else f"{part}" for part in self.parts)
            return self.sign.join(one)
        given = [f"{name}={value!r}" for name, value in _changed(self).items()]
        return f"{self.kind}({', '.join([*map(str, self.parts), *given])})"

    def to_json(self) -> dict[str, Any]:
        said = {n: _plain(self.kind, n, v) for n, v in _changed(self).items()}
        return {"kind": self.kind, "parts": [part.to_json() for part in self.parts], **said}


@dataclass(frozen=True)
class Series(Operator):
    """An operator between its parts, for which brackets make no difference."""

    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        same = (part.parts if type(part) is type(self) else (part,) for part in self.parts)
        object.__setattr__(self, "parts", tuple(one for found in same for one in found))
        super().__post_init__()


@dataclass(frozen=True)
class Sum(Series):
    """Several specs that act at once, as one delta: `lora(rank=8) + bitfit`.

    At one output of a module changes of weights come first, then functions that read elsewhere,
    then those that read this output, in the order in which they are written.
    """

    kind: ClassVar[str] = "sum"
    sign: ClassVar[str] = " + "


@dataclass(frozen=True)
class Stack(Series):
    """Several specs of which each acts on what those before it have made of the model:
    `adapter(width=8) >> adapter(width=4)`.

        h <- h + f_a(h),  then  h <- h + f_b(h)

    for functions at one output of a module, in the order in which they are written. Changes of
    weights are differences to the pre-trained ones, which add up in any order; the rows of a later
    prompt stand before those of an earlier one; the keys of prefixes have no order. So a stack of
    these equals their sum, as does one of deltas at different places, which follow each other as
    the model computes them.
    """

    kind: ClassVar[str] = "stack"
    sign: ClassVar[str] = " >> "

    def arranged(
        self, below: list[list[Any]], name: str, atlas: Any, shared: dict[str, Any]
    ) -> list[Any]:
        return [step.behind(self, n) for n, steps in enumerate(below) for step in steps]


@dataclass(frozen=True)
class Composite(Spec):
    """A method that is a combination of others, under a name of its own: define `expand`."""

    def expand(self) -> Spec:
        """The methods that it stands for."""
        raise NotImplementedError


METHODS: dict[str, type[Spec]] = {}
DEEPEST = 32
OPERATORS: dict[str, type[Operator]] = {"sum": Sum, "stack": Stack}


S = TypeVar("S", bound=Spec)


def register(cls: type[S]) -> type[S]:
    """Class decorator: makes a method or an operator known by its `kind`."""
    kinds: dict[str, Any] = OPERATORS if issubclass(cls, Operator) else METHODS
    if kinds.setdefault(cls.kind, cls) is not cls:
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
    """The methods that act: those below all operators, composites replaced by what they stand
    for."""
    if isinstance(spec, Composite):
        return primitives(spec.expand())
    if isinstance(spec, Operator):
        return tuple(one for part in spec.parts for one in primitives(part))
    return (spec,)


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


def from_json(data: object, depth: int = 0) -> Spec:
    """Reads a spec from the data of `Spec.to_json`.

    Args:
        data: plain JSON data.
        depth: of the operators around it; there may be `DEEPEST`.

    Raises:
        SpecError: unknown kind or field, wrong type, value out of range.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise SpecError(f"a spec is an object with a `kind`, got {data!r}")
    values = dict(data)
    kind = values.pop("kind")
    if kind in _known() and kind not in METHODS:
        items = values.get("parts")
        if not isinstance(items, list):
            raise SpecError(f"a `{kind}` has `parts`, a list of specs, got {items!r}")
        if depth == DEEPEST:
            raise SpecError(f"a spec has at most {DEEPEST} operators inside each other")
        values["parts"] = tuple(from_json(item, depth + 1) for item in items)
    return build(kind, values)


def _known() -> dict[str, type[Spec]]:
    return methods() | OPERATORS


def build(kind: str, values: Mapping[str, Any]) -> Spec:
    """The spec of a kind with these field values, each checked against its type."""
    known = _known()
    if kind not in known:
        raise SpecError(
            f"unknown method `{kind}`{closest(kind, known)}; methods: {listing(METHODS)}; "
            f"operators: `+`, `>>`, {listing([n for n, op in OPERATORS.items() if not op.sign])}"
        )
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


@cache
def _hints(cls: type[Spec]) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(node: ast.expr, text: str) -> Spec:
    match node:
        case ast.BinOp(left, ast.Add(), right):
            return _read(left, text) + _read(right, text)
        case ast.BinOp(left, ast.RShift(), right):
            return _read(left, text) >> _read(right, text)
        case ast.Subscript(value, inside):
            spec = _read(value, text)
            if isinstance(spec, Operator) or spec.within:
                raise SpecError(f"in `{text}`: put the brackets behind each method, once")
            return dataclasses.replace(spec, within=ast.unparse(inside).strip("()"))
        case ast.Name(kind):
            return build(kind, {})
        case ast.Call(ast.Name(kind), [], keywords):
            return build(kind, dict(_keyword(keyword, text) for keyword in keywords))
        case ast.Call(ast.Name(kind), below, keywords) if kind in _known() and kind not in METHODS:
            given = dict(_keyword(keyword, text) for keyword in keywords)
            return build(kind, {"parts": tuple(_read(one, text) for one in below), **given})
    raise SpecError(
        f"`{ast.unparse(node)}` in `{text}` is not a spec; write `method(field=value, ...)`, "
        "joined with `+` or `>>`"
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
    return {n: v for n, v in _fields(spec) if n not in ("within", "parts") and v != defaults[n]}


def _plain(kind: str, name: str, value: Any) -> Any:
    if callable(value):
        raise SpecError(
            f"`{kind}.{name}` is a Python function, which cannot be written down; "
            "use roles, names or globs where the spec must be saved"
        )
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def require(condition: bool, spec: Spec, name: str, expected: str) -> None:
    """Checks a field in `__post_init__`: raises a SpecError that names field and value."""
    if not condition:
        raise SpecError(
            f"`{spec.kind}({name}={getattr(spec, name)!r})`: `{name}` must be {expected}"
        )
