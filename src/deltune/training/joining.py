"""Calls of one model by several runs, joined to one: rows under rows, padded to the longest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import TrainError
from deltune.mechanisms.lanes import remade

DECODER = "decoder_"
ROOM = 16  # lengths that are tried above the longest


class Asked(BaseException):
    """An objective has called the model with what there is no answer to yet."""

    def __init__(self, call: "Call") -> None:
        self.call = call


class Answering:
    """The model as an objective sees it whose forwards are shared with others.

    A call that was not answered before raises `Asked`; the objective is asked again when it is. All
    else is the model's own.

    Args:
        model: the model.
        answers: to the first calls.
        acting: tells how the run's delta acts, which has to stay as it is.
    """

    def __init__(
        self, model: nn.Module, answers: Sequence[Any], acting: Callable[[], object]
    ) -> None:
        self._model, self._answers, self._acting = model, iter(answers), acting
        self._before = acting()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._acting() != self._before:
            raise TrainError(
                "the objective calls the model with its delta disabled, scaled, routed or in fewer "
                "layers, and in a shared forward each delta acts as it did before; compute what "
                "the objective compares with beforehand, or train the deltas one by one"
            )
        for answer in self._answers:
            return answer
        raise Asked(Call(args, kwargs, torch.is_grad_enabled()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass(frozen=True)
class Call:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: bool = True
    """Whether gradients go through it."""
    given: dict[str | int, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", {**dict(enumerate(self.args)), **self.kwargs})

    @property
    def rows(self) -> int:
        """The rows of its batch; 0 where its tensors do not agree on that."""
        counts = {x.shape[0] if x.ndim else 0 for x in self.tensors.values()}
        return counts.pop() if len(counts) == 1 else 0

    @property
    def tensors(self) -> dict[str | int, Tensor]:
        """The tensors among what is given."""
        return {name: x for name, x in self.given.items() if isinstance(x, Tensor)}

    @property
    def lengths(self) -> dict[str | int, int]:
        """The tokens of a row in what can be padded on the right without a change of what the model
        makes of the rest: where a mask says what is padding, or nothing looks ahead."""
        mask = self.given.get("attention_mask")
        shape = mask.shape if isinstance(mask, Tensor) else None
        return {
            name: x.shape[1]
            for name, x in self.tensors.items()
            if x.ndim == 2 and _filler(name, 0) is not None
            and (x.shape == shape or str(name).startswith(DECODER))
        }  # fmt: skip

    @property
    def sizes(self) -> set[int]:
        """The sizes of all dimensions but the first."""
        return {n for x in self.tensors.values() for n in x.shape[1:]}

    def kind(self, exact: bool) -> tuple[Any, ...]:
        """Calls of one kind can be joined; `exact` ones only without padding."""
        padded = {} if exact else self.lengths
        inputs = (
            (name, x.dtype, x.shape[2 if name in padded else 1 :]) if isinstance(x, Tensor)
            else (name, repr(x))
            for name, x in self.given.items()
        )  # fmt: skip
        return self.grads, *inputs


def _filler(name: str | int, pad: int) -> int | None:
    plain = str(name).removeprefix(DECODER)
    fillers = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}
    return fillers.get(plain)


@dataclass(frozen=True)
class Joined:
    """Calls as one.

    Attributes:
        call: the joined one.
        rows: the number of rows of each call.
        sizes: for each call its own length by the joined one, where that is longer.
    """

    call: Call
    rows: list[int]
    sizes: list[dict[int, int]]

    def split(self, output: Any) -> list[Any]:
        """The output of each call: tensors and what holds them; what is of no row is left out."""
        if isinstance(output, Tensor):
            if output.ndim == 0 or output.shape[0] != sum(self.rows):
                return [None] * len(self.rows)
            # Backward through slices would make zeros of the whole for each; these may be written
            # to, unlike those of `split`.
            parts = torch.unsafe_split_with_sizes(output, self.rows)
            return [_own(part, sizes) for part, sizes in zip(parts, self.sizes, strict=True)]
        if not isinstance(output, dict | tuple | list):
            return [None] * len(self.rows)
        values = output.values() if isinstance(output, dict) else output
        parts = [self.split(value) for value in values]
        each = [[part[at] for part in parts] for at in range(len(self.rows))]
        if isinstance(output, dict):
            kind: Any = type(output)
            return [kind(**dict(zip(output, one, strict=True))) for one in each]
        return [remade(output, one) for one in each]


def _own(part: Tensor, sizes: dict[int, int]) -> Tensor:
    """Rows without what longer ones beside them add."""
    for dim in range(1, part.ndim):
        if (size := sizes.get(part.shape[dim])) is not None:
            part = part.narrow(dim, 0, size)
    return part


class Joiner:
    """Joins calls of one model."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        numbers = config.to_dict() if hasattr(config, "to_dict") else {}
        found = [n for n in numbers.values() if isinstance(n, int) and n > 1]
        self.pad = getattr(config, "pad_token_id", None) or 0
        self.most = getattr(config, "max_position_embeddings", None)
        # A padded length must be told from every other dimension of what the model computes.
        self.taken = {n for p in model.parameters() for n in p.shape} | set(found)
        self.taken |= {a // b for a in self.taken for b in found if b < 256 and a % b == 0}

    def groups(self, calls: Sequence[Call], exact: Sequence[Any]) -> list[list[int]]:
        """Which calls are joined, by their numbers.

        Args:
            calls: of the model.
            exact: None for a call that may be padded; others are joined with those of the same mark
                and the same lengths.
        """
        found: dict[Any, list[int]] = {}
        for number, (call, mark) in enumerate(zip(calls, exact, strict=True)):
            odd = number if call.rows == 0 else None
            found.setdefault((call.kind(mark is not None), mark, odd), []).append(number)
        whole = []
        for group in found.values():
            if self._padding([calls[at] for at in group]) is not None:
                whole.append(group)
                continue
            parts: dict[Any, list[int]] = {}
            for at in group:
                parts.setdefault(calls[at].kind(exact=True), []).append(at)
            whole += parts.values()
        return whole

    def join(self, calls: Sequence[Call]) -> Joined:
        """The calls of a group as one."""
        found = self._padding(calls)
        assert found is not None
        target, sizes = found
        made = dict(calls[0].given)
        for name in calls[0].tensors:
            parts = [self._padded(name, call.given[name], target.get(name)) for call in calls]
            made[name] = torch.cat(parts)
        args = tuple(made[at] for at in range(len(calls[0].args)))
        named = {name: value for name, value in made.items() if isinstance(name, str)}
        call = Call(args, named, calls[0].grads)
        return Joined(call, [call.rows for call in calls], sizes)

    def _padding(
        self, calls: Sequence[Call]
    ) -> tuple[dict[str | int, int], list[dict[int, int]]] | None:
        """The length of what is padded, and the sizes of each call; None where there is none."""
        lengths = [call.lengths for call in calls]
        sizes: list[dict[int, int]] = [{} for _ in calls]
        target: dict[str | int, int] = {}
        chosen: dict[tuple[int, ...], int] = {}
        for name in lengths[0]:
            own = tuple(one[name] for one in lengths)
            if len(set(own)) == 1:
                continue
            if own not in chosen:
                fixed = {n for call in calls for n in call.sizes} - set(own)
                length = self._length(max(own), {*chosen.values(), *fixed})
                if length is None:
                    return None
                chosen[own] = length
            target[name] = chosen[own]
            for mine, n in zip(sizes, own, strict=True):
                mine[chosen[own]] = n
        return target, sizes

    def _length(self, longest: int, besides: set[int]) -> int | None:
        for length in range(longest, longest + ROOM):
            if self.most is not None and length > self.most and length > longest:
                return None
            if length not in self.taken and length not in besides:
                return length
        return None

    def _padded(self, name: str | int, x: Tensor, length: int | None) -> Tensor:
        if length is None or x.shape[1] == length:
            return x
        return F.pad(x, (0, length - x.shape[1]), value=_filler(name, self.pad))
