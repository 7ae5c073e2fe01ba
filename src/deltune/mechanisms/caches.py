"""Key/value caches that prompts stand in, and the calls that continue them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltune.errors import AttachError
from deltune.sites.site import Site

PROMPTS = "_deltune_prompts"
NAMES = ("cache", "past_key_values")
"""What models call a cache: the second until transformers 5.23, and whoever still says so."""
Held = tuple[tuple[str, int], ...]
"""Identity and length of prompts."""


def held_by(cache: Any) -> int:
    """How many tokens a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call or the fields of an output; None without one."""
    return next((named[name] for name in NAMES if named.get(name) is not None), None)


def caches(kwargs: dict[str, Any], output: Any) -> list[Any]:
    """The key/value caches that a call was given or made."""
    found = [cache_in(kwargs)]
    if isinstance(output, dict):
        found.append(cache_in(output))
    elif isinstance(output, tuple):
        found.extend(output)
    return [cache for cache in found if hasattr(cache, "get_seq_length")]


def mark_on(cache: Any, site: Site) -> tuple[int, Held]:
    """Of the call that began a cache: its number of tokens, and the prompts that joined."""
    return getattr(cache, PROMPTS, {}).get(site.path, (0, ()))


def told(prompts: Held) -> str:
    """The lengths of prompts, as people say them."""
    return f"{' + '.join(str(n) for _, n in prompts)} tokens" if prompts else "none"


def check_continues(mask: Tensor | None, positions: Tensor | None, held: int, new: int) -> None:
    """Refuses new tokens that do not follow the `held` ones of the cache."""
    advice = (
        "; `generate` counts the prompt among the tokens of a cache: give it only the tokens "
        "that the cache lacks, with a mask over all"
    )
    if mask is not None:
        if mask.shape[1] != held + new:
            raise AttachError(
                f"the attention mask covers {mask.shape[1]} tokens where {held + new} are "
                f"expected, {held} in the cache and {new} new ones{advice if held else ''}"
            )
        return
    if not held or new == 1 or positions is None or torch.compiler.is_compiling():
        return  # reading a position waits for the device: not at every step of a decoder
    if positions.ndim == 2 and (start := int(positions[0, 0])) != held:
        raise AttachError(
            f"the new tokens begin at position {start} where {held} is expected, behind the "
            f"tokens in the cache{advice}"
        )


def make_room(cache: Any, new: int, total: int) -> None:
    """Gives a static cache, before it is filled, the room that the prompts take."""
    for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", ()):
        if not hasattr(layer, "max_cache_len") or getattr(layer, "is_sliding", False):
            continue
        if not layer.is_initialized:
            layer.max_cache_len += total
        elif layer.max_cache_len < new + total:
            raise AttachError(
                f"the static cache holds {layer.max_cache_len} tokens; {new} tokens and "
                f"{total} of prompts do not fit: make it larger"
            )


def flat_mask(mask: Any, past: int, new: int, total: int) -> Tensor | None:
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
