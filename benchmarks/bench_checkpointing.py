"""Deltas in the upper quarter of the layers under gradient checkpointing: deltune against
transformers with PEFT.

LoRA of rank 8 on query and value of the last 3 of 12 layers (a random BERT of MiniLM's width, batch
16 x 64, train mode). transformers makes the embeddings require gradients when checkpointing is
switched on, so all 12 layers are computed again and back-propagated; only 3 need to be. The
gradients of the deltas are compared for equal tensors and equal random states: with ours where all
12 layers are computed again, they must be the same bit for bit; with PEFT's, which multiplies by
the scale elsewhere, up to rounding.

Run by hand: `python benchmarks/bench_checkpointing.py`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from models import batch, peft_lora
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict
from torch import Tensor

import deltune as dt
from deltune.container import container

FASTER, SAME = 1.6, 1e-5
LAYERS, LOWEST = 12, 9


def build() -> Any:
    """A BERT of MiniLM's width with 12 random layers."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=LAYERS,
            num_attention_heads=12,
        )
    )  # fmt: skip


def pair() -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
    """Our model, PEFT's model, and the parameters of both that correspond, with equal values."""
    ours, theirs = build(), build()
    delta = dt.attach(ours, f"lora(rank=8)[{LOWEST}:]")
    theirs = peft_lora(theirs, layers_to_transform=list(range(LOWEST, LAYERS)))
    same: list[tuple[Tensor, Tensor]] = []
    for name, parameter in delta.tree.named().items():
        kind, _, rest = name.partition(".")
        path, _, own = rest.rpartition(".")
        module = theirs.base_model.model.get_submodule(path)
        if kind == "head":
            same.append((parameter, getattr(module.modules_to_save["default"], own)))
        else:
            same.append((parameter, getattr(module, f"lora_{own}")["default"].weight))
    with torch.no_grad():
        for mine, peft in same:
            mine.copy_(torch.randn_like(mine) * 0.05)
            peft.copy_(mine)
    for model in (ours, theirs):
        model.gradient_checkpointing_enable()
        model.train()
    return ours, theirs, same


def step(model: Any, data: dict[str, Tensor]) -> Callable[[], None]:
    """Forward and backward from the same random state, old gradients dropped."""

    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(1)
        model(**data).loss.backward()

    return run


def needless(model: Any) -> Any:
    """The model as transformers would train it, with all layers computed again."""
    held = container(model)
    assert held is not None
    held.hook.remove()  # what switches the needless gradients off before each forward
    model.enable_input_require_grads()
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=12)
    rounds, machine = options.parse_args().rounds, one_thread()
    ours, theirs, same = pair()
    data = batch(rows=16)
    times = interleave({"deltune": step(ours, data), "peft": step(theirs, data)}, rounds)
    gaps = []
    for mine, peft in same:  # equal up to the order of sums
        assert mine.grad is not None and peft.grad is not None
        gaps.append(float((mine.grad - peft.grad).abs().max() / peft.grad.abs().max()))
    ratio = Ratio.of(times, "peft", "deltune")
    kept = [mine.grad.clone() for mine, _ in same if mine.grad is not None]
    step(needless(ours), data)()
    changed = sum(
        not torch.equal(was, mine.grad) for was, (mine, _) in zip(kept, same, strict=True)
    )
    table(
        f"checkpointed step, LoRA in the top {LAYERS - LOWEST} layers ({machine}, {rounds} rounds)",
        ["", "ms", "peft / deltune [quartiles]"],
        [["deltune", milliseconds(times["deltune"]), ratio],
         ["peft", milliseconds(times["peft"]), ""]],
    )  # fmt: skip
    verdict("peft's step over ours", ratio.median, FASTER, most=False)
    verdict("gradients changed in any bit by leaving out the needless work", changed, 0)
    verdict("largest difference of gradients over the largest gradient", max(gaps), SAME)


if __name__ == "__main__":
    main()
