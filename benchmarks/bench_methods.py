"""A training step of every method over its floor, on MiniLM, batch 16 x 48.

The floor is the frozen forward and the backward from the loss to the outputs of the lowest
attention matrices, with the same head in training (as in `bench_step.py`). A method that stops
higher, such as one of the upper layers alone, can be below 1. Each method runs at its defaults; its
own demands (schedules, penalties, gates) are part of the step.

Run by hand: `python benchmarks/bench_methods.py`, or with some kinds: `... lora prefix`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_step import floor, step
from models import batch, minilm
from timing import Ratio, interleave, milliseconds, one_thread, table
from torch import Tensor, nn

import deltune as dt
from deltune import catalogue
from deltune.training.course import Course

ROWS, TOKENS, ROUNDS = 16, 48, 7


def driven(model: nn.Module, data: dict[str, Tensor]) -> Callable[[], None]:
    """One training step with everything that the method asks for."""
    course = Course(model).__enter__()
    course.prepare(lambda most, size=None, training=True: (model(**data).loss for _ in range(1)))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    steps = iter(range(10**6))

    def run() -> None:
        course.before_step(next(steps), 10**6)
        model(**data).loss.backward()
        course.after_backward()
        optimiser.step()
        course.after_step()
        optimiser.zero_grad()

    return run


def main(kinds: list[str]) -> None:
    machine, data = one_thread(), batch(ROWS, TOKENS)
    rows: list[list[object]] = []
    for one in catalogue.entries():
        if kinds and one.kind not in kinds:
            continue
        model: Any = minilm()
        try:
            delta = dt.attach(model, one.example, seed=0)
        except dt.DeltuneError as error:
            rows.append([one.kind, "", str(error).split(";")[0][:60], ""])
            continue
        lowest = ("query", "key", "value")
        work = {
            "floor": step(floor(minilm(), lowest).train(), data),
            one.kind: driven(model.train(), data),
        }
        times = interleave(work, ROUNDS, warmup=2)
        ratio = Ratio.of(times, one.kind, "floor")
        rows.append(
            [one.kind, f"{delta.count(head=False):,}", milliseconds(times[one.kind]), ratio]
        )
        print(*rows[-1], sep="  ", flush=True)
    table(
        f"a step of {ROWS} x {TOKENS} ({machine}, {ROUNDS} rounds)",
        ["method", "trained", "ms", "over the floor [quartiles]"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
