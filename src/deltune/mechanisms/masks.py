"""What a unit may know of the batch: which tokens are real, and which may look at which.

Both are read from the call of the self-attention in the unit's own block. That mask is final:
joined prompts have widened it, and gradient checkpointing, which runs the inside of a block again,
calls the attention again too.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError
from deltune.mechanisms.modules import at
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites import quirks
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

HIDDEN = -1e4  # an additive mask hides what has this much added, or less


class MaskedUnit(Unit):
    """A unit that may look at the masks of its block, if its method watches them."""

    def watch(self, root: nn.Module) -> None:
        """Notes the masks of each call of the self-attention, where the method asks for it."""
        if self.spec.watches:
            attention = at(root, self.site.attention)
            self.noted: list[Tensor | None] = []
            self.names = tuple(signature(type(attention).forward).parameters)[1:]
            self.before(attention, self.note_mask, kwargs=True)

    def note_mask(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = given[self.names[0]].shape[1]
        _refuse_past(self.spec.kind, attention, given)
        allowed = allowed_pairs(attention, given, tokens)
        self.noted[:] = [None if allowed is None else self.mine(allowed)]

    def allowed(self) -> Tensor | None:
        """True where a token may look at another, (batch, heads, tokens, tokens), each of the
        first three possibly 1; None if all may. To be asked once for each call."""
        if not self.noted:
            raise AttachError(
                f"`{self.spec.kind}` at `{self.site.path}` needs the mask that `"
                f"{self.site.attention}` is called with, and it was not called before in this "
                f"block, or `{self.site.path}` was called twice; choose other places"
            )
        return self.noted.pop()

    def visible(self) -> Tensor | None:
        """True where a token is no padding, (batch or 1, tokens); None if all are real. To be
        asked, instead of `allowed`, once for each call."""
        allowed = self.allowed()
        return None if allowed is None else allowed.any(-2).any(1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None) -> Tensor:
    """Softmax attention with several heads, each scaled by the root of its width."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2)


def watched(spec: Mechanism, sites: Sequence[Site], atlas: Atlas) -> Sequence[Site]:
    """The sites with the self-attention of their block, where the method watches masks.

    Raises:
        AttachError: a site is in no block, or its attention takes the batch second.
    """
    if not spec.watches:
        return sites
    blocks = {site.path for site in atlas.sites if site.role == "block"}
    attentions: dict[str, str] = {}
    for site in atlas.sites:
        if site.role == "attn" and site.kind == "sublayer" and site.stack != "cross":
            attentions.setdefault(_block(site.path, blocks), site.path)
    found = []
    for site in sites:
        attention = attentions.get(_block(site.path, blocks), "")
        if not attention:
            raise AttachError(
                f"`{spec}` looks at the attention mask, and `{site.path}` is in no block with a "
                "self-attention; choose places inside the blocks"
            )
        if getattr(atlas.modules[attention], "batch_first", True) is False:
            raise AttachError(
                f"`{spec}` looks along the tokens of each row, and `{attention}` takes the tokens "
                "first and the batch second; build it with `batch_first=True`"
            )
        found.append(site._replace(attention=attention))
    return found


def causal(site: Site, atlas: Atlas) -> bool:
    """Whether the tokens at a site, noted with its attention, only look back."""
    attention: Any = atlas.modules[site.attention]
    kind = getattr(getattr(attention, "config", None), "model_type", "")
    return (
        site.stack in ("decoder", "cross")
        or bool(getattr(attention, "is_causal", False))
        or kind in quirks.CAUSAL_TOWERS
    )


def counted(attention: Any, given: dict[str, Any], tokens: int) -> Tensor:
    """The number of each token among the real ones of its row, from 0 on, (batch or 1, tokens),
    from the arguments of a self-attention, also where the first tokens are in its cache.

    Raises:
        AttachError: the cache holds tokens that the mask does not tell of.
    """
    past = cached(attention, given)
    if past and any(getattr(attention.config, name, None) for name in quirks.WINDOWS):
        raise AttachError(
            "tokens are counted by the attention mask, and behind a key/value cache this model's "
            "shows the last ones only (a sliding window); pass `use_cache=False`"
        )
    allowed = allowed_pairs(attention, given, tokens, past)
    if allowed is None:
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        return torch.arange(past, past + tokens, device=device)[None]
    return (allowed.any(-2).any(1).cumsum(1) - 1)[:, past:]


def allowed_pairs(
    attention: Any, given: dict[str, Any], tokens: int, past: int = 0
) -> Tensor | None:
    """Which of `tokens` tokens may look at which, and at the `past` ones before them, from the
    arguments of a self-attention: True there, (batch, heads, tokens, past + tokens), each of the
    first three possibly 1; None if all may."""
    found: Tensor | None = None
    told = given.get("is_causal")
    looks_back = tokens > 1 and (getattr(attention, "is_causal", False) if told is None else told)
    for name, mask in given.items():
        if mask is None or "mask" not in name or name.startswith("encoder_"):
            continue
        truth = _true(attention, name, mask)
        if truth.ndim == 2 and name == "attn_mask":
            truth = truth[None, None]
        elif truth.ndim == 2:
            truth = truth[:, None, None]
        elif truth.ndim == 3:
            heads = attention.num_heads if isinstance(attention, nn.MultiheadAttention) else 1
            truth = truth.unflatten(0, (-1, heads))
        looks_back = looks_back and truth.shape[-2] == 1
        truth = truth[..., : past + tokens]  # the room that a static cache has for later ones
        found = truth if found is None else found & truth
    if looks_back:
        device = next(x.device for x in given.values() if isinstance(x, Tensor))
        size = past + tokens if found is None else found.shape[-1]
        back = torch.ones(tokens, size, dtype=torch.bool, device=device).tril(size - tokens)
        found = back[None, None] if found is None else found & back
    return found


def numbered(attention: Any, given: dict[str, Any], tokens: int) -> Tensor:
    """The number of each of `tokens` tokens among the real ones of its row, -1 for padding,
    (batch or 1, tokens). Those in a key/value cache count; of a sliding window those in it."""
    held, device = 0, next(x.device for x in given.values() if isinstance(x, Tensor))
    layers = (part.__dict__.get("layer_idx") for part in attention.modules())
    layer = next((one for one in layers if one is not None), 0)
    for cache in given.values():
        if hasattr(cache, "get_seq_length"):
            held = int(cache.get_seq_length(layer))
    allowed = allowed_pairs(attention, given, tokens, held)
    if allowed is None or allowed.shape[-1] < tokens:
        return torch.arange(held, held + tokens, device=device)[None]
    real = allowed.any(-2).any(1)
    return torch.where(real, real.long().cumsum(-1) - 1, -1)[:, -tokens:]


def _block(path: str, blocks: set[str]) -> str:
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path


def _refuse_past(kind: str, attention: Any, given: dict[str, Any]) -> None:
    if cached(attention, given):
        raise AttachError(
            f"`{kind}` reads the whole sequence, and this call has only its last tokens: the "
            "others are in the key/value cache; pass `use_cache=False` (also to `generate`)"
        )


def cached(attention: Any, given: dict[str, Any]) -> int:
    """The number of tokens in the key/value cache that a self-attention is called with."""
    for cache in given.values():
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length(getattr(attention, "layer_idx", 0)))
    return 0


def _true(attention: nn.Module, name: str, mask: Any) -> Tensor:
    """A mask as True where a token may be looked at."""
    multihead = isinstance(attention, nn.MultiheadAttention)
    theirs = not multihead and name in ("attention_mask", "mask")
    if isinstance(mask, Tensor):
        if mask.is_floating_point() and not (theirs and mask.ndim == 2):
            return mask > HIDDEN
        if theirs:
            return mask != 0
        if multihead:
            return mask == 0
    raise AttachError(
        f"it is not known what `{name}` ({type(mask).__name__}) of {type(attention).__name__} "
        "means; masks are read as `attention_mask` of transformers with the attention "
        "implementations `sdpa` and `eager`, as those of `nn.MultiheadAttention`, or additive"
    )
