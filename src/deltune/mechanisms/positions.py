"""Positions of tokens behind a prefix.

A prefix that was trained through a key-value cache counts as the first tokens: everything after
it is `length` positions further on. Rotary and learned absolute positions are shifted where they
are computed; T5's relative bias gets the columns of tokens 0 .. length-1.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.mechanisms.lanes import Lane
from deltune.sites.site import Site

Hook = Callable[..., Any]
CACHE_LENGTH = ("cache_length", "past_key_values_length")  # since transformers 5.24, and before


def shift_positions(
    root: nn.Module, site: Site, length: int
) -> tuple[nn.Module | None, list[tuple[nn.Module, Hook]]]:
    """What shifts the positions of a stack: its relative-bias module, or hooks (layer 0 only).

    Raises:
        AttachError: the stack's positions are computed in a way that is not known here.
    """
    if site.stack == "cross":
        return None, []
    stack = _stack(root, site)
    biased = [m for m in stack.modules() if hasattr(m, "relative_attention_bias")]
    if biased:
        return next((m for m in biased if m.has_relative_attention_bias), None), []
    if site.layer != 0:
        return None, []
    found: list[tuple[nn.Module, Hook]] = [
        (m, partial(_shift, length)) for m in _position_modules(stack)
    ]
    if not found:
        raise AttachError(
            f"no position module was found around `{site.path}`: "
            "`positions='shift'` cannot be served on this model; use `positions='keep'`"
        )
    if getattr(stack, "main_input_name", "input_ids") != "input_ids":
        raise AttachError(
            f"the input of `{site.path}` has a fixed length (it is no text) that fills all "
            "positions: `positions='shift'` cannot be served there; use `positions='keep'`"
        )
    return None, found


def relative_bias(attention: Any, queries: int, past: int | Tensor, length: int) -> Tensor:
    """T5's bias (1, heads, queries, length) of keys at 0 .. length-1 for queries behind them."""
    weight = attention.relative_attention_bias.weight
    at = torch.arange(queries, device=weight.device)[:, None] + past + length
    bucket = attention._relative_position_bucket(
        torch.arange(length, device=weight.device)[None] - at,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(bucket).permute(2, 0, 1)[None]


def _further(positions: Any, length: int, lane: Lane | None) -> Any:
    """What is added to the positions: `length`, or that in the rows of a lane."""
    if lane is None or lane.router.alone is not None:
        return length
    if not isinstance(positions, Tensor) or positions.ndim < 2:
        raise AttachError(
            "the positions of this model are one number for all rows, and prefixes with "
            "`positions='shift'` would move each row by its own; use `positions='keep'`, or rows "
            "with prefixes of one length"
        )
    n = max(positions.shape[0], lane.router.batch)
    return lane.column(length, n, positions.device)


def _stack(root: nn.Module, site: Site) -> nn.Module:
    """The model around the first module list on a path that also holds its positions."""
    parts = site.path.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    for depth in range(first - 1, -1, -1):
        stack = root.get_submodule(".".join(parts[:depth]))
        if _position_modules(stack) or any(
            hasattr(m, "relative_attention_bias") for m in stack.modules()
        ):
            return stack
    return root


def _position_modules(stack: nn.Module) -> list[nn.Module]:
    found = []
    for name, module in stack.named_modules():
        last = name.rpartition(".")[2]
        rotary = type(module).__name__.endswith("RotaryEmbedding")
        learned = isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe")
        if (rotary or learned) and "rel" not in last:
            found.append(module)
    return found


def _shift(
    length: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
    lane: Lane | None = None,
) -> Any:  # fmt: skip
    names = list(signature(type(module).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    target = "position_ids" if "position_ids" in names else names[0]
    if given.get(target) is None:  # then counted on from the length of the cache
        target = next(name for name in CACHE_LENGTH if name in names)
        given.setdefault(target, 0)
    given[target] = given[target] + _further(given[target], length, lane)
    table = getattr(module, "num_embeddings", None)
    if table is not None and isinstance(given[target], Tensor) and given[target].max() >= table:
        raise AttachError(
            f"the input is too long for a prefix of {length} with shifted positions: the model has "
            f"{table} positions; shorten the input or use `positions='keep'`"
        )
    return (), given
