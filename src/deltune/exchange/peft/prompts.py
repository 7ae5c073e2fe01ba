"""Prompts and prefixes in PEFT's format: one tensor, `prompt_embeddings`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deltune.delta import Delta
from deltune.errors import ExchangeError
from deltune.exchange.foreign import Held, Told
from deltune.exchange.peft.face import Face
from deltune.families.addition.prefix import Prefix
from deltune.families.addition.prompt import Prompt
from deltune.mechanisms.unit import Unit
from deltune.planning import Plan
from deltune.sites.discover import Atlas, discover
from deltune.spec import Spec

NAME = "prompt_embeddings"
SIZES = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
"""Fields that the tensor says, too."""
STARTS = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
          "tokenizer_kwargs", "encoder_reparameterization_type", "encoder_hidden_size",
          "encoder_num_layers", "encoder_dropout", "prefix_projection", "init_weights")  # fmt: skip
"""How training began, and networks that are folded away in the file."""


def stacks(atlas: Atlas) -> set[str]:
    """Of encoder and decoder, those that the model has."""
    return {site.stack for site in atlas.sites} & {"encoder", "decoder"}


def _table(told: Told, held: Held) -> tuple[int, Tensor]:
    tokens = told.take("num_virtual_tokens", int, 0)
    table = held.take(NAME)
    if tokens < 1 or table.ndim != 2 or len(table) % tokens:
        raise ExchangeError(
            f"{told.where} has num_virtual_tokens = {tokens} and `{NAME}` the shape "
            f"{tuple(table.shape)}; expected a row for each token"
        )
    return tokens, table.float()


def read_prompt(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Tensor]:
    """A prompt. Of the rows that PEFT keeps for two stacks the encoder's act.

    Raises:
        ExchangeError: of an encoder with a head: there PEFT's pooler reads the prompt's first state
            in place of [CLS], ours still [CLS].
    """
    tokens, table = _table(told, held)
    if stacks(atlas) == {"encoder"} and atlas.heads:
        raise ExchangeError(
            f"{told.where}: in an encoder with a head PEFT's pooler reads the prompt's first "
            "state, here it reads that of [CLS]: its outputs cannot be had; train it again"
        )
    return [Prompt(tokens=tokens)], table[:tokens]


def fill_prompt(made: Plan, table: Tensor) -> dict[str, Tensor]:
    """The tensors of a plan."""
    return {f"{s.key}.P": table for s in made.steps if isinstance(s.spec, Prompt)}


def write_prompt(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prompt; of two stacks with the rows that PEFT wants and does not use."""
    (unit, *more) = units
    if more:
        raise ExchangeError(f"`{delta.name}` has {1 + len(more)} prompts; PEFT knows one at a time")
    if unit.site.stack == "encoder" and delta.tree.with_head:
        raise ExchangeError(
            "in an encoder with a head PEFT's pooler reads the state of the prompt's first token, "
            "deltune's [CLS]: PEFT would give other outputs; keep it in deltune's format"
        )
    double = getattr(getattr(delta.model, "config", None), "is_encoder_decoder", False)
    table = torch.cat([unit.P, unit.P]) if double else unit.P
    config = {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(unit.P),
        "token_dim": unit.P.shape[1], "num_transformer_submodules": 1 + double,
    }  # fmt: skip
    return config, {NAME: table}


def read_prefix(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Tensor]:
    """A prefix; of two stacks the decoder's self-attention alone has it."""
    tokens, table = _table(told, held)
    where = "decoder.attn" if stacks(atlas) == {"encoder", "decoder"} else "attn"
    return [Prefix(tokens=tokens, positions="shift", where=where)], table


def fill_prefix(made: Plan, table: Tensor) -> dict[str, Tensor]:
    """The tensors of a plan. The columns are keys and values, layer by layer; of two stacks PEFT
    doubles these tables, deals them out four to a layer and uses the first two."""
    steps = [step for step in made.steps if isinstance(step.spec, Prefix)]
    double = stacks(made.atlas) == {"encoder", "decoder"}
    widths = [param.shape[1] for step in steps for param in step.tensors.values()]
    if table.shape[1] != sum(widths):
        raise ExchangeError(
            f"`{NAME}` has {table.shape[1]} columns and {len(steps)} layers of this model want "
            f"{sum(widths)}; load the model that it belongs to"
        )
    parts = table.split(widths, dim=1)
    found = {}
    for at, step in enumerate(steps):
        first = (4 * at if double else 2 * at) % len(parts)
        found |= {f"{step.key}.{own}": parts[first + n].contiguous() for n, own in enumerate("KV")}
    return found


def write_prefix(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prefix of a model of one stack.

    Raises:
        ExchangeError: positions that stay, a gate, networks that are not folded, two stacks: PEFT
            would give other outputs.
    """
    every = list(units)
    spec = every[0].spec
    odd = (
        ("keeps the tokens' positions", spec.positions != "shift"),
        ("has a gate", bool(spec.gate)),
        ("is made by a network; fold it first: `delta.fold()`", spec.mlp is not None),
        ("is in a model of two stacks, where PEFT mixes up the layers",
         stacks(discover(delta.model)) == {"encoder", "decoder"}),
    )  # fmt: skip
    for what, wrong in odd:
        if wrong:
            raise ExchangeError(f"the prefix of `{delta.name}` {what}; PEFT would act otherwise")
    config = {
        "peft_type": "PREFIX_TUNING", "num_virtual_tokens": spec.tokens,
        "num_layers": len(every), "token_dim": every[0].K.shape[1],
        "num_transformer_submodules": 1,
    }  # fmt: skip
    return config, {NAME: torch.cat([t for unit in every for t in (unit.K, unit.V)], dim=1)}


SILENT = (*SIZES, *STARTS)
BARE: Any = {"prefix": "base_model.", "bare": (NAME,), "modules": False}
PROMPT = Face(Prompt, read_prompt, fill_prompt, write_prompt, SILENT, **BARE)
PREFIX = Face(Prefix, read_prefix, fill_prefix, write_prefix, SILENT, **BARE)
