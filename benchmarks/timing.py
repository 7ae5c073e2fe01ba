"""Fair timing on a busy machine, and the tables that the benchmarks print.

Everything runs on one thread and is timed by the processor time of this process, so that what else
the machine does counts little. The candidates run one after the other in every round, in an order
that turns from round to round, and each is compared with the reference of the same round.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]
Times = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio over rounds: its median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, times: Times, name: str, reference: str) -> "Ratio":
        """Candidate over reference, round by round."""
        pairs = zip(times[name], times[reference], strict=True)
        low, median, high = statistics.quantiles([mine / theirs for mine, theirs in pairs], n=4)
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}..{self.high:.3f}]"


def interleave(candidates: Mapping[str, Work], rounds: int, warmup: int = 3) -> Times:
    """Processor seconds of every candidate in every round, garbage collection kept out."""
    gc.freeze()  # collecting is quick when what exists already is left out
    names = list(candidates)
    times: Times = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            gc.disable()
            start = time.process_time()
            candidates[name]()
            seconds = time.process_time() - start
            gc.enable()
            if turn >= 0:
                times[name].append(seconds)
    return times


def one_thread() -> str:
    """Sets one thread; says so."""
    torch.set_num_threads(1)
    return f"torch {torch.__version__}, 1 thread"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    print(title, lines[0], "-" * len(lines[0]), *lines[1:], "", sep="\n", flush=True)


def verdict(claim: str, value: float, bound: float, most: bool = True) -> None:
    """Prints whether a claim holds: at most the bound, or at least it."""
    holds = value <= bound if most else value >= bound
    sign = "<=" if most else ">="
    print(f"{'holds' if holds else 'FAILS'}: {claim}: {value:.4g} {sign} {bound}", flush=True)


def milliseconds(seconds: Sequence[float]) -> str:
    """The median."""
    return f"{1e3 * statistics.median(seconds):.2f}"
