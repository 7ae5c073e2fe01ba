"""The prompt mechanism: learned embeddings joined to the embedded input.

Row by row the prompt stands directly before the first real token, behind any left padding, or in
slots beside other real tokens, so a padded batch equals its rows alone. Mask, positions and cache
room grow with it, and the states of the prompt are taken out again behind the last block: logits,
labels, pooling and `generate` see the length that they were given. In a causal model the state of
a token before a slot is that of the slot's end, which predicts the next token. An encoder's prompt
stays, for the decoder to attend to.

A key/value cache is marked with the prompts that stand in it, so that one filled before a prompt
was attached, enabled, disabled or detached is refused as long as a prompt acts. Once none acts,
nothing is hooked on the model, and a cache that holds a prompt goes unnoticed: empty it yourself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError, WhereError
from deltune.mechanisms.caches import (
    PROMPTS,
    Held,
    cache_in,
    caches,
    check_continues,
    flat_mask,
    held_by,
    make_room,
    mark_on,
    told,
)  # fmt: skip
from deltune.mechanisms.lanes import Lane, drawing, put
from deltune.mechanisms.slots import Joint, Slot, beside, columns, widened
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites import quirks
from deltune.sites.discover import Atlas
from deltune.sites.site import Site, trunk_of


class PromptUnit(Unit):
    """Learned embeddings in the input of one stack; the first unit acts for all on the stack."""

    spec: "Prompting"
    scalable: ClassVar[bool] = False

    def __init__(self, spec: "Prompting", site: Site, shared: nn.Module | None) -> None:
        super().__init__(spec, site, shared)
        self.identity = uuid4().hex  # the same when disabled and enabled again, and in copies

    def renew(self, identity: str) -> None:
        self.identity = identity  # a cache that holds another one's prompt is refused

    def install(self, root: nn.Module) -> None:
        stack = root.get_submodule(self.site.path)
        self.__dict__["stack"] = stack  # known, not owned: no submodule
        self.names = tuple(signature(type(stack).forward).parameters)[1:]
        self.order: Tensor | None = None
        self.first = 0
        stack.__dict__[PROMPTS] = [*stack.__dict__.get(PROMPTS, []), self]
        self.before(stack, self.enter, kwargs=True)
        bearer = root.get_submodule(self.site.anchor or self.site.path)
        self.handles.append(bearer.register_forward_hook(self.mark, with_kwargs=True))
        if self.site.anchor:
            self.before(bearer, self.widen, kwargs=True)
        else:
            # First of the hooks there, so that the others see the tokens only.
            trunk = root.get_submodule(self.site.exit)
            self.handles.append(trunk.register_forward_hook(self.strip, prepend=True))

    def remove(self, root: nn.Module) -> None:
        super().remove(root)
        stack = root.get_submodule(self.site.path)
        left = [unit for unit in stack.__dict__.pop(PROMPTS, []) if unit is not self]
        if left:
            stack.__dict__[PROMPTS] = left

    @property
    def leads(self) -> bool:
        """Whether this is the first of the units on the stack."""
        return self.stack.__dict__[PROMPTS][0] is self

    def enter(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Joins the prompts at the first call, and keeps room for them at cached ones."""
        if not self.leads:
            return None
        given: dict[str, Any] = {**dict(zip(self.names, args, strict=False)), **kwargs}
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = embed(stack, given["input_ids"])
        new = embeds.shape[1]
        cache, total = cache_in(given), _total(stack)
        past = held_by(cache)
        mask = flat_mask(given.get("attention_mask"), past, new, total)
        if past:
            self._recognise(cache)
        check_continues(mask, given.get("position_ids"), past - total if past else 0, new)
        if past:
            self.first, self.order = mark_on(cache, self.site)[0], None
            self._go_on(given, mask, new, total)
        else:
            make_room(cache, new, total)
            self.first = new
            self._join(given, mask, embeds, total)
            _fits(stack, new + total, self.site.width)
        return (), given

    def _go_on(self, given: dict[str, Any], mask: Tensor | None, new: int, total: int) -> None:
        """Keeps room for the prompts, which are in the cache with the first tokens."""
        present = self._present(mask)
        if mask is not None:
            mask = given["attention_mask"] = widened(mask, present, self.first)
        if "position_ids" in self.names:
            if given.get("position_ids") is not None:
                given["position_ids"] = given["position_ids"] + present.sum(1, keepdim=True)
            elif mask is not None:
                given["position_ids"] = _counted(mask, self.site.width)[:, -new:]

    def _join(self, given: dict[str, Any], mask: Tensor | None, embeds: Tensor, total: int) -> None:
        """Joins the prompts of all units to what the stack was given."""
        batch, new = embeds.shape[:2]
        slots, prompt, present = self._prompts(batch)
        if self.lane is not None and not present.all():
            ours = torch.ones(batch, new, dtype=torch.long, device=embeds.device)
            mask = ours if mask is None else mask
            _uncounted(self.stack, self.names, slots)
        joint = Joint(
            slots, beside(slots, batch, new, embeds.device, mask, given.get("input_ids")), new
        )
        if mask is not None:
            given["attention_mask"] = joint.joined(present.expand(batch, -1).to(mask.dtype), mask)
        if "position_ids" in self.names:
            if given.get("position_ids") is not None:
                counted = joint.counted(given["position_ids"].expand(batch, -1))
                missing = (~present).long().expand(batch, -1)
                gone = joint.joined(missing, missing.new_zeros(batch, new)).cumsum(1)
                given["position_ids"] = (counted - gone).clamp(min=self.site.width)
            elif mask is not None:
                given["position_ids"] = _counted(given["attention_mask"], self.site.width)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = joint.alike(given["token_type_ids"])
        given["inputs_embeds"] = joint.joined(prompt.expand(batch, -1, -1), embeds)
        given["input_ids"] = None
        self.order = joint.tokens
        if self.site.stack == "decoder":
            closing = joint.closing()
            absent = None if self.lane is None else ~present.any(1, keepdim=True)
            self.order = closing if absent is None else torch.where(absent, joint.tokens, closing)

    def strip(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Takes the prompts' states out of the stack's output."""
        if not self.leads or self.order is None:
            return output
        order, self.order = self.order, None
        long = order.shape[1] + _total(self.stack)
        return _map_states(output, lambda h: columns(h, order) if h.shape[1] == long else h)

    def mark(
        self, bearer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Notes on the cache, given or made in this call, which prompts stand in it."""
        if not self.leads:
            return
        for cache in caches(kwargs, output):
            marks = getattr(cache, PROMPTS, {})
            setattr(cache, PROMPTS, {**marks, self.site.path: (self.first, self._joined())})

    def widen(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lets the decoder attend to the prompts' states in the encoder's output."""
        if not self.leads:
            return None
        cache = cache_in(kwargs)
        if held_by(cache) > 0 or any(getattr(cache, "is_updated", {}).values()):
            self._recognise(cache)
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None or mask is None or mask.ndim != 2 or mask.shape[1] == states.shape[1]:
            return None
        mask = widened(mask, self._present(mask), mask.shape[1])
        return args, {**kwargs, "encoder_attention_mask": mask}

    def _prompts(self, batch: int) -> tuple[Sequence[Slot], Tensor, Tensor]:
        """Slots, the prompt (batch or 1, length, width), and which of it is there (batch or 1,
        length): of a row with a shorter prompt the slot's end."""
        made = {}
        for lane, units in _by_lane(self.stack).items():
            with drawing(lane):
                made[lane] = torch.cat([unit.spec.embeddings(unit) for unit in units])
        present = self._present(next(iter(made.values())), batch)
        if self.lane is None:
            return self._slots()[0], made[None][None], present
        slots, width = self._slots(), _total(self.stack)
        same = all(one == slots[0] for one in slots)
        if not same and not all(slot.leads for one in slots for slot in one):
            raise AttachError(
                "the rows of one batch have prompts at other places; route them in batches of "
                "their own"
            )
        first = next(iter(made.values()))
        parts = {
            lane: F.pad(prompt, (0, 0, width - len(prompt), 0)).expand(
                len(lane.rows) * lane.router.times(batch), -1, -1
            )
            for lane, prompt in made.items()
            if lane is not None
        }
        prompt = put(first.new_zeros(batch, width, first.shape[1]), parts)
        return slots[0] if same else [Slot(width)], prompt, present

    def _slots(self) -> list[list[Slot]]:
        """The slots of each lane."""
        lanes = _by_lane(self.stack).values()
        return [[slot for unit in units for slot in unit.spec.slotted] for units in lanes]

    def _present(self, like: Tensor | None, batch: int | None = None) -> Tensor:
        """Which prompt tokens a row has, (batch or 1, most tokens)."""
        total = _total(self.stack)
        device = like.device if like is not None else None
        column = torch.arange(total, device=device)
        if self.lane is None:
            return column[None] >= 0
        n = batch or (self.lane.router.batch if like is None else like.shape[0])
        parts = {
            lane: (column >= total - sum(unit.spec.length for unit in units)).expand(
                len(lane.rows) * lane.router.times(n), -1
            )
            for lane, units in _by_lane(self.stack).items()
            if lane is not None
        }
        return put(torch.zeros(n, total, dtype=torch.bool, device=device), parts)

    def _joined(self) -> Held:
        """Identity and length of the prompts that act on the stack, in their order."""
        return tuple(
            (f"{unit.identity} {'' if unit.lane is None else unit.lane.rows}", unit.spec.length)
            for unit in self.stack.__dict__[PROMPTS]
        )

    def _recognise(self, cache: Any) -> None:
        """Refuses a filled cache that holds other prompts than those that act."""
        held, acting = mark_on(cache, self.site)[1], self._joined()
        if held != acting:
            raise AttachError(
                f"the prompts in the key/value cache ({told(held)}) are not those that act now "
                f"({told(acting)}); begin with an empty cache after attaching, enabling, "
                "disabling or detaching a prompt"
            )


@dataclass(frozen=True)
class Prompting(Mechanism):
    """A method that owns input embeddings: define `tensors`, `length` and `embeddings`, and
    `slotted` if they do not stand together before the first token."""

    mechanism: ClassVar[str] = "prompt"
    unit: ClassVar[type[Unit]] = PromptUnit

    @property
    def length(self) -> int:
        """Number of prompt tokens."""
        raise NotImplementedError

    @property
    def slotted(self) -> tuple[Slot, ...]:
        """Where the prompt tokens stand, in their order."""
        return (Slot(self.length),)

    def embeddings(self, t: Unit) -> Tensor:
        """The prompt, (length, width of the embedding)."""
        raise NotImplementedError

    def sites(self, atlas: Atlas) -> list[Site]:
        wanted = self.within or "encoder"
        stacks = {s.stack: s for s in atlas.sites if s.role == "block" and s.layer == 0}
        block = stacks.get(wanted) or (
            next(iter(stacks.values()), None) if not self.within else None
        )
        if block is None:
            raise WhereError(
                f"`{self.kind}` needs a stack of blocks{f' `{wanted}`' if self.within else ''}; "
                f"{type(atlas.model).__name__} has {', '.join(stacks) or 'none'}"
            )
        moving = next((slot for slot in self.slotted if slot.number < 0), None)
        if block.stack == "decoder" and moving is not None:
            raise AttachError(
                f"`{self.kind}`: a prompt {moving.place} cannot stand in the causal model "
                f"{type(atlas.model).__name__}: no token of the text sees what is behind it, and "
                "the end moves with every generated token; count from the front (`0`, `1`), or "
                "stand beside a token (`before 103`, `after 103`)"
            )
        return [_stack_site(atlas, block, stacks, self.kind)]


def _stack_site(atlas: Atlas, block: Site, stacks: dict[str, Site], kind: str) -> Site:
    trunk = trunk_of(block.path)
    path = trunk
    while path and not _embeds(atlas.modules[path]):
        path = path.rpartition(".")[0]
    model: Any = atlas.modules[path]
    if not _embeds(model):
        raise AttachError(
            f"`{kind}` joins embeddings to embedded tokens, and no part of "
            f"{type(atlas.model).__name__} around `{trunk}` takes `inputs_embeds`; "
            "use a prefix, adapter or LoRA on this model"
        )
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise AttachError(f"`{kind}`: `{path}` does not embed tokens but {type(table).__name__}")
    decoder = stacks["decoder"].path if block.stack == "encoder" and "decoder" in stacks else ""
    tables = _positions(model)
    first = tables[0].padding_idx + 1 if tables and tables[0].padding_idx is not None else 0
    return block._replace(
        path=path, role="", layer=None, kind="module", exit=trunk, width=first,
        anchor=trunk_of(decoder) if decoder else "", shape=(table.embedding_dim,),
        entry=next(p for p, m in atlas.modules.items() if m is table),
    )  # fmt: skip


def _embeds(module: nn.Module) -> bool:
    """Whether a module embeds tokens, and takes them embedded too."""
    takes = "inputs_embeds" in signature(type(module).forward).parameters
    return takes and hasattr(module, "get_input_embeddings")


def embed(stack: Any, ids: Tensor) -> Tensor:
    """The embeddings of tokens as the stack itself makes them, scaled where it scales them."""
    table = stack.get_input_embeddings()
    scale = getattr(stack, "embed_scale", 1.0) if not hasattr(table, "embed_scale") else 1.0
    return table(ids) * scale if scale != 1.0 else table(ids)


def _total(stack: nn.Module) -> int:
    """The prompt tokens in a row, at most."""
    return max(sum(unit.spec.length for unit in units) for units in _by_lane(stack).values())


def _by_lane(stack: nn.Module) -> dict[Lane | None, list[PromptUnit]]:
    """The units on a stack by the rows that they act on, the one attached last first."""
    found: dict[Lane | None, list[PromptUnit]] = {}
    for unit in reversed(stack.__dict__[PROMPTS]):
        found.setdefault(unit.lane, []).append(unit)
    return found


def _uncounted(stack: nn.Module, names: tuple[str, ...], slots: Sequence[Slot]) -> None:
    """Refuses prompts of several lengths where positions cannot be given."""
    kinds = [type(module).__name__ for module in stack.modules()]
    absolute = _positions(stack) or any(quirks.SINUSOIDAL in kind for kind in kinds)
    told = "position_ids" in names
    if all(slot.leads for slot in slots):
        good = told or not absolute
    else:  # what stands before a slot keeps its distance to what stands behind
        config = getattr(stack, "config", None)
        local = any(getattr(config, name, None) for name in quirks.WINDOWS)
        good = told and not local and (absolute or any("Rotary" in kind for kind in kinds))
    if not good:
        raise AttachError(
            f"{type(stack).__name__} counts positions by itself, and rows with prompts of other "
            "lengths would have other positions than alone; route rows with prompts of one length"
        )


def _map_states(output: Any, change: Any) -> Any:
    """Applies `change` to the hidden states in a block stack's output."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, dict):
        for name in ("last_hidden_state", "hidden_states"):
            if output.get(name) is not None:
                output[name] = _map_states(output[name], change)
        return output
    return tuple(change(x) if isinstance(x, Tensor) and x.ndim == 3 else x for x in output)


def _positions(model: nn.Module) -> list[nn.Embedding]:
    """The tables of learned absolute positions."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]


def _counted(mask: Tensor, first: int) -> Tensor:
    """The positions of real tokens, from `first` on."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) + first


def _fits(stack: Any, length: int, first: int) -> None:
    """Learned positions end somewhere: better said than an index error."""
    most = getattr(getattr(stack, "config", None), "max_position_embeddings", None)
    if most is not None and length > most - first and _positions(stack):
        raise AttachError(
            f"prompt and input are {length} tokens, the model has {most - first} positions; "
            "shorten the input or the prompt"
        )
