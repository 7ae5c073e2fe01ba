"""Batches taken apart, padded on the other side, and decoded one forward at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from zoo import Batch

STEPS = 4


def rows(batch: Batch) -> Iterator[Batch]:
    """Each row of a padded batch alone, without its padding."""
    for i in range(len(next(iter(batch.values())))):
        row = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        for mask in [name for name in row if name.endswith("mask")]:
            real = row[mask][0].bool()
            for name, tensor in row.items():
                if name.startswith("decoder_") == mask.startswith("decoder_"):
                    row[name] = tensor[:, real]
        yield row


def leftward(batch: Batch, positions: bool = True) -> Batch:
    """The same rows, padded on the left, with their positions."""
    lengths = batch["attention_mask"].sum(1)
    ids = torch.stack(
        [row.roll(int(len(row) - n)) for row, n in zip(batch["input_ids"], lengths, strict=True)]
    )
    mask = batch["attention_mask"].flip(1)
    counted = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    return {"input_ids": ids, "attention_mask": mask, **counted}


def log_probabilities(model: nn.Module, row: Batch, made: Tensor) -> Tensor:
    """Of the next token of one row: a whole forward without a cache; no end of sequence."""
    if model.config.is_encoder_decoder:
        given = {name: tensor for name, tensor in row.items() if not name.startswith("decoder_")}
        given["decoder_input_ids"] = made
    else:
        ids = torch.cat([row["input_ids"], made], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        scores = model(**given, use_cache=False).logits[0, -1].log_softmax(-1)
    scores[model.generation_config.eos_token_id] = -torch.inf
    return scores


def step_by_step(model: nn.Module, batch: Batch, beams: int = 1) -> Tensor:
    """The new tokens of each row by beam search (greedy, with one beam), row by row."""
    start = getattr(model.config, "decoder_start_token_id", None)
    found = []
    for row in rows(batch):
        first = [[start]] if model.config.is_encoder_decoder else [[]]
        live = [(0.0, torch.tensor(first, dtype=torch.long))]
        for _ in range(STEPS):
            grown = []
            for score, made in live:
                for token, value in enumerate(log_probabilities(model, row, made).tolist()):
                    grown.append((score + value, torch.cat([made, torch.tensor([[token]])], 1)))
            live = sorted(grown, key=lambda beam: -beam[0])[:beams]
        found.append(live[0][1][0, -STEPS:])
    return torch.stack(found)


def generated(model: nn.Module, batch: Batch, **options: object) -> Tensor:
    """The new tokens that `generate` makes of a batch."""
    given = {name: tensor for name, tensor in batch.items() if not name.startswith("decoder_")}
    # Forced and forbidden tokens of some configurations are no matter here.
    model.generation_config.forced_eos_token_id = None
    model.generation_config.bad_words_ids = None
    made = model.generate(
        **given, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, **options
    )
    return made[:, -STEPS:]


def embedded(model: nn.Module, batch: Batch) -> Batch:
    """A batch with embeddings in place of token ids."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
