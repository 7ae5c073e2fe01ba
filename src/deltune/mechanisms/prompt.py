"""The prompt mechanism: learned embeddings joined to the embedded input.

Row by row the prompt stands directly before the first real token, behind any left padding, so a
padded batch equals its rows alone. Mask, positions and cache room grow with it, and the states of
the prompt are taken out again behind the last block: logits, labels, pooling and `generate` see
the length that they were given. An encoder's prompt stays, for the decoder to attend to.
"""

from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, WhereError
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

PROMPTS = "_deltune_prompts"


class PromptUnit(Unit):
    """Learned embeddings before the input of one stack."""

    spec: "Prompting"
    scalable: ClassVar[bool] = False

    def install(self, root: nn.Module) -> None:
        stack = root.get_submodule(self.site.path)
        self.names = tuple(signature(type(stack).forward).parameters)[1:]
        self.order: Tensor | None = None
        stack.__dict__[PROMPTS] = [*stack.__dict__.get(PROMPTS, []), self]
        self.before(stack, self.enter, kwargs=True)
        if self.site.anchor:
            self.before(root.get_submodule(self.site.anchor), self.widen, kwargs=True)
        else:
            # First of the hooks there: of several prompts the one joined last leaves first.
            trunk = root.get_submodule(self.site.exit)
            self.handles.append(trunk.register_forward_hook(self.strip, prepend=True))

    def remove(self, root: nn.Module) -> None:
        super().remove(root)
        stack = root.get_submodule(self.site.path)
        left = [unit for unit in stack.__dict__.pop(PROMPTS, []) if unit is not self]
        if left:
            stack.__dict__[PROMPTS] = left

    def enter(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Joins the prompt at the first call, and keeps room for it at cached ones."""
        given: dict[str, Any] = {**dict(zip(self.names, args, strict=False)), **kwargs}
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = embed(stack, given["input_ids"])
        batch, new = embeds.shape[:2]
        past, total = _past(given.get("past_key_values")), _total(stack)
        mask = _flat_mask(given.get("attention_mask"), past, new, total)
        cached = not isinstance(past, int) or past > 0
        seen = past + new - self.spec.length if cached else new
        mask = self._checked(mask, seen, cached)
        self._room(given.get("past_key_values"), past, new, total, stack)
        pads = _leading(mask, batch, embeds.device)
        if mask is not None:
            ones = mask.new_ones(batch, self.spec.length)
            given["attention_mask"] = _placed(mask, ones, pads)
        positions = self._positions(given, mask, pads, new, cached)
        if positions is not None:
            given["position_ids"] = positions
        if not cached:
            prompt = self.spec.embeddings(self).to(embeds.dtype).expand(batch, -1, -1)
            given["inputs_embeds"] = _placed(embeds, prompt, pads)
            given["input_ids"] = None
            if given.get("token_type_ids") is not None:
                types = given["token_type_ids"]
                given["token_type_ids"] = _placed(
                    types, types[:, :1].expand(batch, self.spec.length), pads
                )
            _fits(stack, given["inputs_embeds"].shape[1])
        self.order = None if cached else _kept(pads, new, self.spec.length)
        return (), given

    def strip(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Takes the prompt's states out of the stack's output."""
        if self.order is None:
            return output
        order, self.order = self.order, None
        long = order.shape[1] + self.spec.length
        return _map_states(output, lambda h: _rows(h, order) if h.shape[1] == long else h)

    def widen(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Lets the decoder attend to the prompt's states in the encoder's output."""
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None or mask is None or mask.ndim != 2 or mask.shape[1] == states.shape[1]:
            return None
        pads = _leading(mask, mask.shape[0], mask.device)
        ones = mask.new_ones(mask.shape[0], self.spec.length)
        return args, {**kwargs, "encoder_attention_mask": _placed(mask, ones, pads)}

    def _checked(self, mask: Tensor | None, seen: int | Tensor, cached: bool) -> Tensor | None:
        if mask is not None and not isinstance(seen, Tensor) and mask.shape[1] > seen:
            what = (
                "cache was filled without this prompt"
                if cached
                else "mask is longer than the input"
            )
            raise AttachError(
                f"the attention mask covers {mask.shape[1]} tokens where {seen} are expected: the "
                f"{what}; start generation anew after enabling, disabling or attaching a prompt"
            )
        return mask

    def _positions(
        self, given: dict[str, Any], mask: Tensor | None, pads: Tensor, new: int, cached: bool
    ) -> Tensor | None:
        """Positions of the new tokens: the given ones moved on, else counted from the mask."""
        length, positions = self.spec.length, given.get("position_ids")
        if "position_ids" not in self.names:
            return None
        if positions is not None:
            if cached:
                return positions + length
            batch = pads.shape[0]
            positions = positions.expand(batch, -1)
            first = positions.gather(1, pads[:, None])
            own = first + torch.arange(length, device=positions.device)
            moved = positions + length * (
                torch.arange(new, device=positions.device) >= pads[:, None]
            )
            return _placed(moved, own, pads)
        if mask is None:
            return None
        extended = given["attention_mask"]
        counted = (extended.long().cumsum(1) - 1).clamp(min=0) + self.site.width
        return counted[:, -new:] if cached else counted

    def _room(self, cache: Any, past: int | Tensor, new: int, total: int, stack: Any) -> None:
        """Gives a static cache, before it is filled, the room that the prompts take."""
        if isinstance(past, Tensor) or past or stack.__dict__[PROMPTS][0] is not self:
            return
        for layer in getattr(cache, "layers", ()):
            if not hasattr(layer, "max_cache_len") or getattr(layer, "is_sliding", False):
                continue
            if not layer.is_initialized:
                layer.max_cache_len += total
            elif layer.max_cache_len < new + total:
                raise AttachError(
                    f"the static cache holds {layer.max_cache_len} tokens; {new} tokens and "
                    f"{total} of prompts do not fit: make it larger"
                )


@dataclass(frozen=True)
class Prompting(Mechanism):
    """A method that owns input embeddings: define `tensors`, `length` and `embeddings`."""

    mechanism: ClassVar[str] = "prompt"
    unit: ClassVar[type[Unit]] = PromptUnit

    @property
    def length(self) -> int:
        """Number of prompt tokens."""
        raise NotImplementedError

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
        return [_stack_site(atlas, block, stacks, self.kind)]


def _stack_site(atlas: Atlas, block: Site, stacks: dict[str, Site], kind: str) -> Site:
    trunk = _trunk(block.path)
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
    tables = [
        m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in n
    ]
    first = tables[0].padding_idx + 1 if tables and tables[0].padding_idx is not None else 0
    return replace(
        block, path=path, role="", layer=None, kind="module", exit=trunk, width=first,
        anchor=_trunk(decoder) if decoder else "", shape=(table.embedding_dim,),
        entry=next(p for p, m in atlas.modules.items() if m is table),
    )  # fmt: skip


def _embeds(module: nn.Module) -> bool:
    """Whether a module embeds tokens, and takes them embedded too."""
    takes = "inputs_embeds" in signature(type(module).forward).parameters
    return takes and hasattr(module, "get_input_embeddings")


def _trunk(block: str) -> str:
    """The module around the outermost list of blocks."""
    parts = block.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) - 1])


def embed(stack: Any, ids: Tensor) -> Tensor:
    """The embeddings of tokens as the stack itself makes them, scaled where it scales them."""
    table = stack.get_input_embeddings()
    scale = getattr(stack, "embed_scale", 1.0) if not hasattr(table, "embed_scale") else 1.0
    return table(ids) * scale if scale != 1.0 else table(ids)


def _past(cache: Any) -> int | Tensor:
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return length if isinstance(length, int) else int(length)


def _total(stack: nn.Module) -> int:
    return sum(unit.spec.length for unit in stack.__dict__[PROMPTS])


def _flat_mask(mask: Any, past: int | Tensor, new: int, total: int) -> Tensor | None:
    """The (batch, tokens) mask, also from the 4-D one that `generate` makes for static caches."""
    if isinstance(mask, dict):
        if mask.get("full_attention") is None and any(m is not None for m in mask.values()):
            raise AttachError(
                "a static cache with sliding-window attention only hides the padding from the "
                "prompt; generate with a dynamic cache"
            )
        mask = mask.get("full_attention")
    if mask is None or mask.ndim == 2:
        return mask
    row = mask[:, 0, -1, : past + new - total if past else new]
    return (row if row.dtype == torch.bool else row == 0).long()


def _leading(mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The number of padding tokens before the first real one, for each row."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return (mask.long().cumsum(1) == 0).sum(1).clamp(max=mask.shape[1] - 1)


def _placed(x: Tensor, block: Tensor, at: Tensor) -> Tensor:
    """`x` (batch, n, ...) with `block` (batch, l, ...) put in before column `at` of each row."""
    n, length = x.shape[1], block.shape[1]
    column = torch.arange(n + length, device=x.device)[None]
    at = at[:, None]
    source = torch.where(column < at, column + length, column - at)
    source = torch.where(column >= at + length, column, source)
    return _rows(torch.cat([block.to(x.dtype), x], 1), source)


def _kept(at: Tensor, n: int, length: int) -> Tensor:
    """The columns of the original tokens, for each row."""
    column = torch.arange(n, device=at.device)[None]
    return torch.where(column < at[:, None], column, column + length)


def _rows(x: Tensor, columns: Tensor) -> Tensor:
    """x[b, columns[b, j]] for every row."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], columns.expand(x.shape[0], -1)]


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


def _fits(stack: Any, length: int) -> None:
    """Learned positions end somewhere: better said than an index error."""
    tables = [
        m for n, m in stack.named_modules() if isinstance(m, nn.Embedding) and "position" in n
    ]
    most = getattr(getattr(stack, "config", None), "max_position_embeddings", None)
    if tables and most is not None and length > most:
        raise AttachError(
            f"prompt and input are {length} tokens, the model has {most} positions; "
            "shorten the input or the prompt"
        )
