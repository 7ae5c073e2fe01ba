"""Attach against bare registration, and against PEFT: LoRA of rank 8 on query and value of MiniLM.

Bare registration is the least that any library has to do, by hand: the same A and B with the same
initialisation for the same 12 modules and a copy of the head, as registered parameters; a hook on
each module; the backbone frozen. Every attachment is on a fresh copy of the model, so nothing can
be remembered of it; `again` is the second delta on the same copy.

Run by hand: `python benchmarks/bench_attach.py`.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from models import minilm, peft_lora
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt

BOUND = 2.0


class Pair(nn.Module):
    """A and B of one matrix."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(args[0], self.A), self.B) * 2.0


def register(model: Any) -> nn.Module:
    """The same delta by hand."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pairs = nn.ModuleList()
    for layer in model.bert.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.value):
            pair = Pair(linear, 8)
            linear.register_forward_hook(pair.hook)
            pairs.append(pair)
    model.pairs = pairs
    model.head_copy = deepcopy(model.classifier).requires_grad_(True)
    return model


def _twin(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor.detach()) if isinstance(tensor, nn.Parameter) else tensor


def main(rounds: int = 60) -> None:
    machine = one_thread()
    model = minilm()
    whole = [*model.parameters(), *model.buffers()]

    def copy() -> Any:
        # New modules and parameters on the same storage: nothing is known of them, and it is cheap.
        return deepcopy(model, {id(p): _twin(p) for p in whole})

    copies: dict[str, Any] = {}
    work = {
        "bare": lambda: register(copies["bare"]),
        "deltune": lambda: dt.attach(copies["deltune"], dt.LoRA(rank=8)),
        "deltune again": lambda: dt.attach(copies["deltune again"], dt.LoRA(rank=8), "second"),
        "peft": lambda: peft_lora(copies["peft"]),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 3):
        for name in work:
            copies[name] = copy()
        dt.attach(copies["deltune again"], dt.LoRA(rank=8))
        for name, seconds in interleave(work, 1, warmup=0).items():
            times[name] += seconds if turn >= 3 else []
    table(
        f"attach lora(rank=8) to MiniLM ({machine}, {rounds} rounds)",
        ["", "ms", "over bare [quartiles]"],
        [[name, milliseconds(times[name]), Ratio.of(times, name, "bare")] for name in work],
    )
    verdict("attach over bare", Ratio.of(times, "deltune", "bare").median, BOUND)


if __name__ == "__main__":
    main()
