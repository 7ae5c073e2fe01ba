"""A training step over its floor, for deltune and PEFT: LoRA of rank 8 on MiniLM, batch 32 x 64.

The floor is what no delta on these sites can go below: the frozen forward, and the backward from
the loss to the outputs of the lowest adapted matrices and no further. It is measured on the same
model with every parameter of the backbone frozen and a gradient asked for at those outputs only,
with the same head in training. A step is forward, loss, backward, AdamW and zeroing, in train mode
(the model's own dropout on); the three run the same batch, one after the other in each round.

Run by hand: `python benchmarks/bench_step.py`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from models import batch, minilm, peft_lora
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict
from torch import Tensor, nn

import deltune as dt

BOUND = 1.05
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "q, v": ("lora(rank=8)", {}, ("query", "value")),
    "q, v, dropout 0.1": ("lora(rank=8, dropout=0.1)", {"lora_dropout": 0.1}, ("query", "value")),
    "all linear": (
        "lora(rank=8, where='attn, ffn')",
        {"target_modules": ["query", "key", "value", "attention.output.dense",
                            "intermediate.dense", "output.dense"]},
        ("query", "key", "value"),
    ),
}  # fmt: skip


def floor(model: Any, lowest: tuple[str, ...]) -> Any:
    """The frozen model whose backward ends at the outputs of the lowest adapted matrices."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    for name in lowest:
        module = model.bert.encoder.layer[0].attention.self.get_submodule(name)
        module.register_forward_hook(_ask)
    return model


def _ask(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.requires_grad_()


def step(model: nn.Module, data: dict[str, Tensor]) -> Callable[[], None]:
    """One training step of everything that is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> None:
        model(**data).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def compare(name: str, rounds: int, machine: str) -> float:
    """Prints the table of one case; ours over the floor."""
    spec, options, lowest = CASES[name]
    data, ours = batch(), minilm()
    dt.attach(ours, spec)
    models = {
        "floor": floor(minilm(), lowest),
        "deltune": ours,
        "peft": peft_lora(minilm(), **options),
    }
    work = {name: step(model.train(), data) for name, model in models.items()}
    times = interleave(work, rounds)
    table(
        f"LoRA r=8 on {name}: a step of 32 x 64 ({machine}, {rounds} rounds)",
        ["", "ms", "over the floor [quartiles]"],
        [[k, milliseconds(times[k]), Ratio.of(times, k, "floor")] for k in work],
    )
    return Ratio.of(times, "deltune", "floor").median


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    rounds, machine = options.parse_args().rounds, one_thread()
    ratios = {name: compare(name, rounds, machine) for name in CASES}
    verdict("step over the floor, LoRA q, v", ratios["q, v"], BOUND)


if __name__ == "__main__":
    main()
