"""The kv-prefix mechanism: learned keys and values joined to those inside attention.

K' = [P_k; K], V' = [P_v; V], through the attention interface of transformers: the model's own
attention function is called with longer keys and values and a mask that shows the prefix to every
query. The cache never holds the prefix, so `generate`, padding and checkpointing need no care.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import unwrap
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError, WhereError
from deltune.mechanisms.caches import cache_in
from deltune.mechanisms.gate import GatedUnit
from deltune.mechanisms.lanes import Lane, drawing, put
from deltune.mechanisms.modules import first_input
from deltune.mechanisms.positions import relative_bias, shift_positions
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select

PREFIXES = "_deltune_prefixes"
MARK = "deltune_"
SERVED = ("eager", "sdpa")


class PrefixUnit(GatedUnit):
    """Learned keys and values of one attention."""

    spec: "KeyValue"
    scalable: ClassVar[bool] = False

    def install(self, root: nn.Module) -> None:
        attention = root.get_submodule(self.site.path)
        for config in _configs(root, self.site.path):
            _use(config)
        attention.__dict__[PREFIXES] = [*attention.__dict__.get(PREFIXES, []), self]
        self.applied, self.past = False, 0
        self.__dict__["bias_from"] = None
        self.x: Tensor | None = None
        self.watch(root)
        if self.spec.watches:
            self.before(attention, self.read, kwargs=True)
        if self.spec.shifts:
            first, hooks = shift_positions(root, self.site, self.spec.length)
            self.__dict__["bias_from"] = first
            for module, hook in hooks:
                self.before(module, partial(hook, lane=self.lane), kwargs=True)
            if first is not None:
                self.before(attention, self.count, kwargs=True)
        self.after(attention, self.verify)

    def remove(self, root: nn.Module) -> None:
        super().remove(root)
        attention = root.get_submodule(self.site.path)
        left = [unit for unit in attention.__dict__.pop(PREFIXES, []) if unit is not self]
        if left:
            attention.__dict__[PREFIXES] = left
        _release(root)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in SERVED:
            _register(name)

    def read(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes what the attention reads, for prefixes that depend on it."""
        self.x = self.mine(first_input(args, kwargs))

    def count(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes how many tokens the cache holds (a static one is longer than that)."""
        cache = cache_in(kwargs)
        past = 0 if cache is None else cache.get_seq_length(attention.layer_idx)
        self.past = past.clone() if isinstance(past, Tensor) else past

    def verify(self, attention: Any, args: tuple[Any, ...], output: Any) -> None:
        if not self.applied:
            raise AttachError(
                f"the prefix of `{self.site.path}` was not applied: "
                f"{type(attention).__name__} did not call the attention function "
                f"`{attention.config._attn_implementation}`; was the attention implementation "
                "changed after attaching? Disable and enable the delta to set it again"
            )
        self.applied = False

    def joined(
        self, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, queries: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values, mask and position bias with the prefix before them."""
        batch, heads, length = key.shape[0], key.shape[1], self.spec.length
        own_key, own_value = (
            t.unflatten(-1, (heads, -1)).transpose(-3, -2).to(key.dtype).expand(batch, -1, -1, -1)
            for t in self.tables()
        )
        if bias is not None:
            bias = torch.cat([self.bias(bias, queries), bias], -1)
        key, value = torch.cat([own_key, key], 2), torch.cat([own_value, value], 2)
        if mask is not None:
            mask = F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
        self.applied = True
        return key, value, mask, bias

    def tables(self) -> Iterator[Tensor]:
        """Keys and values, ([batch,] length, heads * head width)."""
        tables = self.spec.keys_values(self)
        if self.spec.gated:
            assert self.x is not None
            gate = self.gate(self.x)
            tables = tuple(gate * table for table in tables)
        self.x = None
        yield from tables

    def bias(self, bias: Tensor, queries: int) -> Tensor:
        """Position bias of the prefix slots: none, or as if they were the first tokens."""
        if self.bias_from is None:
            return bias.new_zeros(()).expand(*bias.shape[:-1], self.spec.length)
        return relative_bias(self.bias_from, queries, self.past, self.spec.length).to(bias.dtype)


@dataclass(frozen=True)
class KeyValue(Mechanism):
    """A method that owns keys and values: define `where`, `tensors`, `length`, `keys_values`."""

    mechanism: ClassVar[str] = "kv"
    unit: ClassVar[type[Unit]] = PrefixUnit

    where: Where = "attn"

    @property
    def length(self) -> int:
        """Number of prefix slots."""
        raise NotImplementedError

    @property
    def shifts(self) -> bool:
        """Whether the tokens' positions start behind the prefix."""
        return False

    def keys_values(self, t: Unit) -> tuple[Tensor, Tensor]:
        """Keys and values, ([batch,] length, heads * head width); a method that watches masks may
        use the input `t.x` of the attention."""
        raise NotImplementedError

    def sites(self, atlas: Atlas) -> list[Site]:
        attentions = [s for s in atlas.sites if s.role == "attn" and s.kind == "sublayer"]
        if not attentions:
            raise WhereError(
                f"`{self.kind}` needs attention layers, and none were found in "
                f"{type(atlas.model).__name__}"
            )
        chosen = select(atlas, self.where, attentions, self.within)
        for site in chosen:
            _check(site, atlas)
            if self.shifts:
                shift_positions(atlas.model, site, self.length)
        return chosen


def _check(site: Site, atlas: Atlas) -> None:
    attention: Any = atlas.modules[site.path]
    forward = unwrap(type(attention).forward)
    routed = "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", forward).co_names
    if not routed or not hasattr(attention, "config"):
        raise AttachError(
            f"a prefix cannot be joined in `{site.path}`: {type(attention).__name__} computes "
            "attention itself instead of through the attention interface of transformers; "
            "use a prompt, adapter or LoRA on this model"
        )
    used = attention.config._attn_implementation.removeprefix(MARK)
    if used not in SERVED:
        raise AttachError(
            f"the attention implementation of `{site.path}` is `{used}`; prefixes are served with "
            "`eager` and `sdpa`: load the model with `attn_implementation='sdpa'`"
        )
    if not all(site.kv):
        raise AttachError(
            f"the keys and values of `{site.path}` have no known width (fused projections of an "
            "unknown layout); a prefix cannot be sized"
        )


def _configs(root: nn.Module, path: str) -> Iterator[Any]:
    """The configurations that decide the attention function used at a path, innermost first."""
    seen = set()
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        config = getattr(root.get_submodule(".".join(parts[:depth])), "config", None)
        if hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            yield config


def _use(config: Any) -> None:
    name = config._attn_implementation
    if name in SERVED:
        _register(name)
        config._attn_implementation = MARK + name
        if config._attn_implementation != MARK + name:
            raise AttachError(
                f"{type(config).__name__} kept the attention implementation "
                f"`{config._attn_implementation}` when `{MARK + name}` was set"
            )


def _release(root: nn.Module) -> None:
    """Restores every configuration, those on other paths too, once no prefix is left."""
    modules = list(root.modules())
    if any(PREFIXES in module.__dict__ for module in modules):
        return
    for module in modules:
        config: Any = module.__dict__.get("config")
        used = getattr(config, "_attn_implementation", None)
        if used is not None and used.startswith(MARK):
            config._attn_implementation = used.removeprefix(MARK)


def _register(name: str) -> None:
    """Makes the prefix-joining form of an attention function known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    if MARK + name not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(MARK + name, FUNCTIONS[name])
        AttentionMaskInterface.register(MARK + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


def _attention(
    original: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    units = module.__dict__.get(PREFIXES, [])
    queries, bias = query.shape[2], kwargs.get("position_bias")
    if units and attention_mask is None and queries > 1:
        attention_mask = _causal(module, kwargs.get("is_causal"), query, key)
    lane = units[0].lane if units else None
    if lane is not None and lane.router.alone is None:
        key, value, attention_mask, bias = _routed(
            units[::-1], key, value, attention_mask, bias, queries
        )
        units = []
    for unit in reversed(units):
        if lane is None or unit.lane is lane.router.alone:
            key, value, attention_mask, bias = unit.joined(
                key, value, attention_mask, bias, queries
            )
    if bias is not None:
        kwargs["position_bias"] = bias
    return original(module, query, key, value, attention_mask, **kwargs)


def _routed(
    units: list[PrefixUnit], key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    queries: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Keys, values, mask and position bias with each row's own prefixes before them: a shorter one
    stands right, and what is left of it is masked."""
    n, heads = key.shape[:2]
    lanes: dict[Lane, list[PrefixUnit]] = {}
    for unit in units:
        assert unit.lane is not None
        lanes.setdefault(unit.lane, []).append(unit)
        unit.applied = True
    sizes = {lane: sum(unit.spec.length for unit in mine) for lane, mine in lanes.items()}
    most = max(sizes.values())
    tables: list[dict[Lane, Tensor]] = [{}, {}]
    visible, biases = {}, {}
    for lane, mine in lanes.items():
        count, gap = len(lane.rows) * lane.router.times(n), most - sizes[lane]
        with drawing(lane):
            tables_ = [list(unit.tables()) for unit in mine]
        made = [
            [t.unflatten(-1, (heads, -1)).transpose(-3, -2).to(key.dtype) for t in own]
            for own in tables_
        ]
        for side, parts in enumerate(zip(*made, strict=True)):
            whole = torch.cat([part.expand(count, -1, -1, -1) for part in parts], 2)
            tables[side][lane] = F.pad(whole, (0, 0, gap, 0))
        shown = torch.arange(most, device=key.device) >= gap
        visible[lane] = shown.expand(count, -1)
        if bias is not None:
            row = torch.cat([unit.bias(bias, queries) for unit in mine], -1)
            biases[lane] = F.pad(row, (gap, 0)).expand(count, -1, -1, -1)
    empty = key.new_zeros(n, heads, most, key.shape[-1])
    seen = put(torch.zeros(n, most, dtype=torch.bool, device=key.device), visible)[:, None, None]
    if mask is None:
        mask = torch.ones(n, 1, queries, key.shape[2], dtype=torch.bool, device=key.device)
    mask = mask.expand(n, -1, -1, -1)
    seen = seen.expand(-1, *mask.shape[1:3], -1)
    if mask.dtype != torch.bool:
        seen = torch.where(seen, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    if bias is not None:
        blank = bias.new_zeros(n, *bias.shape[1:3], most)
        bias = torch.cat([put(blank, biases), bias.expand(n, -1, -1, -1)], -1)
    key, value = (
        torch.cat([put(empty, own), x], 2) for own, x in zip(tables, (key, value), strict=True)
    )
    return key, value, torch.cat([seen, mask], -1), bias


def _causal(module: nn.Module, is_causal: bool | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask that scaled-dot-product attention would have implied."""
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        return None
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    return mask.tril(keys - queries)[None, None]


def _sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
          attention_mask: Tensor | None, **kwargs: Any) -> Any:  # fmt: skip
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _attention(sdpa_attention_forward, module, query, key, value, attention_mask, kwargs)


def _eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
           attention_mask: Tensor | None, **kwargs: Any) -> Any:  # fmt: skip
    original = sys.modules[type(module).__module__].eager_attention_forward
    return _attention(original, module, query, key, value, attention_mask, kwargs)


FUNCTIONS = {"eager": _eager, "sdpa": _sdpa}
