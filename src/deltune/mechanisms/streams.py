"""Streams: random numbers of its own for the rows of each lane.

While rows are routed, what is dropped in the rows of one delta can be made what would be dropped if
they were a batch of their own: each lane has a stream of random numbers, and a tensor of the shape
that those rows would have alone. Functions that draw are met on their way into torch and run for
the rows of each lane in turn, cut to that shape.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

ROWWISE: set[Any] = {F.dropout, F.scaled_dot_product_attention}
"""Functions that draw, of tensors whose first dimension is rows. The output has the dimensions of
the first of them, but for its last."""


def rowwise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a function of a tensor that draws known to streams."""

    def call(x: Tensor, *args: Any) -> Tensor:
        if has_torch_function_unary(x):
            return handle_torch_function(call, (x,), x, *args)
        return function(x, *args)

    ROWWISE.add(call)
    return call


class Stream:
    """The random numbers of one lane.

    Used as a context, in which torch's global generators are at the state of the stream.

    Args:
        device: of the model; its generator belongs to the stream beside that of the CPU.

    Attributes:
        index: where the lane's rows are in a tensor of n rows.
        sizes: of dimensions that the rows share with longer ones: their own size by the shared one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = [torch.Generator(), *([] if _here(device) else [torch.Generator(device)])]
        self.state = generators(device)
        self.index: Callable[[int, torch.device], Any] = _whole
        self.sizes: dict[int, int] = {}
        self._outer: State | None = None

    def __enter__(self) -> None:
        assert self._outer is None, "a stream within itself"
        self._outer = generators(self.device)
        set_generators(self.device, self.state)

    def __exit__(self, *failure: object) -> None:
        assert self._outer is not None
        self.state = generators(self.device)
        set_generators(self.device, self._outer)
        self._outer = None

    @property
    def state(self) -> "State":
        """Of its generators."""
        return tuple(generator.get_state() for generator in self._own)

    @state.setter
    def state(self, state: "State") -> None:
        for generator, one in zip(self._own, state, strict=True):
            generator.set_state(one)

    def seed(self) -> int:
        """A number that `new_seed` would draw in its context."""
        return new_seed() if self.open else new_seed(self._own[0])

    @property
    def open(self) -> bool:
        """Whether the global generators are those of the stream."""
        return self._outer is not None

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of a tensor of the rows without longer ones beside them."""
        return (shape[0], *(self.sizes.get(n, n) for n in shape[1:]))

    def own(self, x: Any) -> Any:
        """A tensor of the rows in the shape that it would have without longer ones beside them."""
        if not self.sizes or not isinstance(x, Tensor) or not x.ndim:
            return x
        for dim, size in enumerate(self.shape(x.shape)):
            x = x.narrow(dim, 0, size)
        return x

    def longer(self, made: Tensor, like: Tensor) -> Tensor:
        """What was made of `own(like)`, with zeros up to the size of `like`."""
        gaps = [
            full - made.shape[dim] if full in self.sizes and made.shape[dim] < full else 0
            for dim, full in enumerate(like.shape)
        ]
        return F.pad(made, [n for gap in gaps[::-1] for n in (0, gap)]) if any(gaps) else made


class Streams(TorchFunctionMode):
    """While it is open, what draws for rows draws from the stream of each lane."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        super().__init__()
        self.streams = streams

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in ROWWISE or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        inside = next((stream for stream in self.streams if stream.open), None)
        if inside is not None:
            return _at_own_size(inside, func, args, kwargs)
        x = args[0] if args else kwargs["input"]
        n, parts = x.shape[0], []

        def rows(value: Any, stream: Stream) -> Any:
            mine = isinstance(value, Tensor) and value.ndim and value.shape[0] == n
            return value[stream.index(n, x.device)] if mine else value

        for stream in self.streams:
            mine = [rows(value, stream) for value in args]
            named = {name: rows(value, stream) for name, value in kwargs.items()}
            with stream:
                parts.append(_at_own_size(stream, func, mine, named))
        return torch.cat(parts)


def _at_own_size(stream: Stream, func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> Any:
    args = list(args)
    first = args[0] if args else kwargs["input"]
    cut = {name: stream.own(value) for name, value in kwargs.items()}
    return stream.longer(func(*map(stream.own, args), **cut), first)


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if func is F.dropout:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
        return bool(given.get("training", True)) and given.get("p", 0.5) > 0
    if func is F.scaled_dot_product_attention:
        return (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
    return True


def new_seed(generator: torch.Generator | None = None) -> int:
    """A number to seed a generator with, of a generator or of torch's global one."""
    return int(torch.randint(2**62, (), dtype=torch.int64, generator=generator))


def _whole(n: int, device: torch.device) -> slice:
    return slice(0, n)


State = tuple[Tensor, ...]


def generators(device: torch.device) -> State:
    """The states of torch's generators, of the CPU and of the device."""
    here = torch.default_generator.get_state()
    if _here(device):
        return (here,)
    return here, torch.get_device_module(device).get_rng_state(device)


def set_generators(device: torch.device, state: State) -> None:
    """Sets them."""
    torch.default_generator.set_state(state[0])
    if len(state) > 1:
        torch.get_device_module(device).set_rng_state(state[1], device)


def _here(device: torch.device) -> bool:
    """Whether the device has no generator beside that of the CPU."""
    return device.type in ("cpu", "meta")
