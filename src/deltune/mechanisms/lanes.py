"""Lanes: which rows of a batch a delta acts on, while each row has deltas of its own.

A unit with a lane registers its hooks through it. What several lanes do at one place becomes one
hook, in which each sees its own rows and the results are put together once. A module whose
parameters lanes change runs again for the rows of each, since a module has one set of them.

Row i of a batch of B is rows i n / B ... of a tensor of n: beams of a row, and tokens of a row laid
end to end, stand together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltune.errors import AttachError
from deltune.mechanisms.piles import Piles
from deltune.mechanisms.streams import Stream

Hook = Callable[..., Any]
_SHARED = nullcontext()
Index = slice | Tensor


class Router:
    """The rows of the batches of one call or more, and what acts on them.

    Args:
        batch: rows of a batch as the user counts them.
        rowless: modules that are given what belongs to no row, with their paths.
    """

    def __init__(self, batch: int, rowless: dict[int, str]) -> None:
        self.batch, self.rowless = batch, rowless
        self.alone: Lane | None = None  # the one whose rows a module runs again with
        self.joints: dict[tuple[int, str, int], Joint] = {}
        self.reruns: dict[int, Rerun] = {}
        self.kept: dict[Any, Any] = {}
        """What units keep from one call to the next, as long as the same rows come."""
        self.piles: Piles | None = None
        """Where deltas that are trained at once hold what stands at the same place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Router":
        raise AttachError("a model is copied while its rows are routed; copy it before or after")

    def reset(self, rowless: dict[int, str]) -> None:
        """Forgets what acted, to route such rows again; to a compiler its hooks are the same."""
        self.rowless, self.alone = rowless, None
        for joint in self.joints.values():
            joint.handle = None
            joint.hooks.clear()
        for rerun in self.reruns.values():
            rerun.handles = []
            rerun.entries.clear()
        self.kept.clear()

    def times(self, n: int, place: str = "") -> int:
        """How many rows of a tensor of `n` belong to one of the batch."""
        if n % self.batch:
            raise AttachError(
                f"{self.batch} rows were named and {n} come in{place}; name a delta, or None, for "
                "each row of the batch"
            )
        return n // self.batch

    def check(self, module: nn.Module) -> None:
        """Refuses a module that nothing can be changed at row by row."""
        if id(module) in self.rowless:
            raise AttachError(
                f"`{self.rowless[id(module)]}` is also given what belongs to no row of a batch, "
                "where a change is one for all rows; leave it out of `where`, or run the rows of "
                "each delta as a batch of their own"
            )

    def spread(self, x: Tensor, place: str = "") -> Tensor:
        """`x` with a row for each of the batch, also where one row stands for all."""
        if x.shape[0] == 1 and self.batch > 1:
            return x.expand(self.batch, *x.shape[1:])
        self.times(x.shape[0], place)
        return x


class Lane:
    """The rows of one delta.

    Args:
        router: of all rows.
        rows: rising numbers of rows.

    Attributes:
        stream: random numbers that are the rows' own; None where all draw from one generator.
    """

    def __init__(self, router: Router, rows: Sequence[int]) -> None:
        self.router, self.rows = router, tuple(rows)
        self.stream: Stream | None = None
        self._indices: dict[tuple[int, torch.device], Index] = {}

    def index(self, n: int, device: torch.device) -> Index:
        """Where the rows are in a tensor of `n`."""
        key = (n, device)
        if key not in self._indices:
            times = self.router.times(n)
            found = [row * times + k for row in self.rows for k in range(times)]
            whole = found == list(range(found[0], found[0] + len(found)))
            # Kept for calls in any mode, and autograd takes no tensor that inference mode has made.
            with _SHARED if torch.compiler.is_compiling() else torch.inference_mode(False):
                self._indices[key] = (
                    slice(found[0], found[-1] + 1) if whole else torch.tensor(found, device=device)
                )
        return self._indices[key]

    def take(self, x: Tensor) -> Tensor:
        """The rows of `x`; of one row that stands for all, that row."""
        if self.router.alone is not None or (x.shape[0] == 1 and self.router.batch > 1):
            return x
        return x[self.index(x.shape[0], x.device)]

    def column(self, value: int, n: int, device: torch.device) -> Tensor:
        """(n, 1): a number in the rows of the lane, 0 in others."""
        found = torch.zeros(n, 1, dtype=torch.long, device=device)
        found[self.index(n, device)] = value
        return found

    def whole(self, part: Tensor, n: int) -> Tensor:
        """The rows `part` among `n`, 0 in others."""
        if self.router.alone is not None:
            return part
        whole = part.new_zeros(n, *part.shape[1:])
        index = self.index(n, part.device)
        return torch.index_put(whole, (_numbers(index, n, part.device),), part)

    def change_output(self, module: nn.Module, hook: Hook) -> list[RemovableHandle]:
        """Lets `hook(module, args, output)` change the output's rows."""
        return self._join(module, "output", hook)

    def change_input(self, module: nn.Module, hook: Hook) -> list[RemovableHandle]:
        """Lets `hook(module, args)` change the input's rows."""
        return self._join(module, "input", hook)

    def bracket(self, module: nn.Module, enter: Hook, leave: Hook) -> list[RemovableHandle]:
        """Runs the module again for these rows, between `enter` and `leave`."""
        self.router.check(module)
        known = self.router.reruns.get(id(module))
        if known is None:
            known = self.router.reruns[id(module)] = Rerun(self.router, module)
        known.entries.setdefault(self, []).append((enter, leave))
        return known.hooked(module)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the module, with what these rows have in the place of its parameters, makes of x."""
        known = self.router.reruns.get(id(module))
        if known is None or self not in known.entries or self.router.alone is not None:
            return module.forward(x)
        return known.with_(self, module, (x,), {})

    def _join(self, module: nn.Module, side: str, hook: Any) -> list[RemovableHandle]:
        self.router.check(module)
        nth = 0
        while True:
            key = (id(module), f"{side} {hook.__name__}", nth)
            known = self.router.joints.get(key)
            if known is None:
                known = self.router.joints[key] = Joint(self.router, side)
            if self not in known.hooks:
                known.hooks[self] = hook
                return [known.hooked(module)]
            nth += 1


def drawing(lane: Lane | None) -> AbstractContextManager[None]:
    """While it is open, random numbers are drawn for the rows of a lane."""
    own = None if lane is None else lane.stream
    return _SHARED if own is None or own.open else own


class Joint:
    """The hooks of several lanes at one place, as one."""

    def __init__(self, router: Router, side: str) -> None:
        self.router, self.side = router, side
        self.hooks: dict[Lane, Hook] = {}
        self.handle: RemovableHandle | None = None

    def hooked(self, module: nn.Module) -> RemovableHandle:
        """The handle of the one hook, registered if it is not yet."""
        if self.handle is None:
            if self.side == "output":
                self.handle = module.register_forward_hook(self.output)
            else:
                self.handle = module.register_forward_pre_hook(self.input)
        return self.handle

    def output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output with each lane's rows changed by its hook."""
        main = output if isinstance(output, Tensor) else output[0]
        alone = self.router.alone
        if alone is not None:
            hook = self.hooks.get(alone)
            return output if hook is None else hook(module, args, output)
        main = self.router.spread(main, f" at {type(module).__name__}")
        made = self._together(module, args, main)
        if made is None:
            parts = {}
            for lane, hook in self.hooks.items():
                mine = tuple(_rows(lane, x, main) for x in args)
                with drawing(lane):
                    parts[lane] = hook(module, mine, lane.take(main))
            made = put(main, parts)
        return made if isinstance(output, Tensor) else (made, *output[1:])

    def input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The input with each lane's rows changed by its hook."""
        alone = self.router.alone
        if alone is not None:
            hook = self.hooks.get(alone)
            return args if hook is None else hook(module, args)
        main = self.router.spread(args[0], f" at {type(module).__name__}")
        parts = {}
        for lane, hook in self.hooks.items():
            with drawing(lane):
                parts[lane] = hook(module, (lane.take(main),))[0]
        return (put(main, parts), *args[1:])

    def _together(self, module: nn.Module, args: tuple[Any, ...], main: Tensor) -> Tensor | None:
        """The output, if the units can act on all rows at once."""
        first: Any = next(iter(self.hooks.values()))
        act = getattr(first.__self__, f"{first.__name__}_together", None)
        if act is None:
            return None
        units = {lane: hook.__self__ for lane, hook in self.hooks.items()}  # type: ignore
        return act(module, args, main, units)


class Rerun:
    """A module that runs again for the rows of each lane, with that lane's parameters."""

    def __init__(self, router: Router, module: nn.Module) -> None:
        self.router, self.name = router, type(module).__name__
        self.entries: dict[Lane, list[tuple[Hook, Hook]]] = {}
        self.handles: list[RemovableHandle] = []
        self.states: dict[Lane, Any] = {}

    def hooked(self, module: nn.Module) -> list[RemovableHandle]:
        """The handles of its hooks, registered if they are not yet."""
        if not self.handles:
            options = {"with_kwargs": True, "prepend": True}
            after = module.register_forward_hook(self.run, **options)
            self.handles = [module.register_forward_pre_hook(self.begin), after]
        return self.handles

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Notes the streams of the lanes, which draw again in their own runs."""
        self.states = {lane: lane.stream.state for lane in self.entries if lane.stream is not None}

    def run(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The output, with the rows of each lane from its own run."""
        alone = self.router.alone
        if alone is not None:
            if alone not in self.entries:
                return output
            return self.with_(alone, module, args, kwargs)
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        assert given is not None
        first = output if isinstance(output, Tensor) else next(_tensors(output))
        n = self.router.spread(first, f" at {type(module).__name__}").shape[0]
        made = {}
        for lane in self.entries:
            mine = tuple(_taken(lane, x, given) for x in args)
            named = {name: _taken(lane, x, given) for name, x in kwargs.items()}
            self.router.alone = lane
            if lane.stream is not None:
                lane.stream.state = self.states[lane]
            try:
                with drawing(lane):
                    made[lane] = self.with_(lane, module, mine, named)
            finally:
                self.router.alone = None
        if isinstance(output, Tensor):
            return self._whole(output, made, n)
        keys: Any = list(output) if isinstance(output, dict) else range(len(output))
        whole = {
            key: self._whole(output[key], {lane: out[key] for lane, out in made.items()}, n)
            for key in keys
        }
        kind: Any = type(output)
        return kind(**whole) if isinstance(output, dict) else remade(output, whole.values())

    def _whole(self, x: Any, parts: dict[Lane, Any], n: int) -> Any:
        """One of the outputs with the rows of the lanes in it; what has no rows is the module's."""
        if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] not in (1, n):
            return x
        times = self.router.times(n)
        if any(part.shape[1:] != x.shape[1:] for part in parts.values()):
            raise AttachError(
                f"{self.name} puts out what depends on all rows of its batch, and would run again "
                "for the rows of each delta; leave its parameters out of `where`, or run the rows "
                "of each delta as a batch of their own"
            )
        rows = {
            lane: part.expand(len(lane.rows) * times, *part.shape[1:])
            for lane, part in parts.items()
        }
        return put(x.expand(n, *x.shape[1:]), rows)

    def with_(
        self, lane: Lane, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of the module alone with the parameters of a lane."""
        entered = []
        try:
            for enter, leave in self.entries[lane]:
                entered.append(leave)
                enter(module, args)
            return module.forward(*args, **kwargs)
        finally:
            for leave in entered:
                leave(module, args, None)


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, dict) else output
    yield from (value for value in values if isinstance(value, Tensor) and value.ndim > 0)


def remade(like: Any, values: Iterable[Any]) -> Any:
    """A tuple, one with names too, or a list of these values, of the class of another."""
    kind: Any = type(like)
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def put(main: Tensor, parts: dict[Lane, Tensor]) -> Tensor:
    """`main` with the rows of each lane replaced."""
    n, device = main.shape[0], main.device
    taken = [lane.index(n, device) for lane in parts]
    rows = torch.cat([part.to(main.dtype) for part in parts.values()])
    if in_order(taken, n):
        return rows
    numbers = torch.cat([_numbers(index, n, device) for index in taken])
    return main.index_copy(0, numbers, rows)


def in_order(taken: Sequence[Index], n: int) -> bool:
    """Whether these rows follow each other from the first to the last of `n`."""
    at = 0
    for index in taken:
        if not isinstance(index, slice) or index.start != at:
            return False
        at = index.stop
    return at == n


def _numbers(index: Index, n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device)[index] if isinstance(index, slice) else index


def _taken(lane: Lane, x: Any, like: Tensor) -> Any:
    """The rows of what has as many as `like`, for a module that runs again."""
    if hasattr(x, "get_seq_length"):
        raise AttachError(
            "a module that holds a key/value cache would run again for the rows of each delta; "
            "route rows to methods that change no parameter there"
        )
    return _rows(lane, x, like)


def _rows(lane: Lane, x: Any, like: Tensor) -> Any:
    """The rows of what has as many as `like`."""
    batched = isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == like.shape[0]
    return lane.take(x) if batched else x
