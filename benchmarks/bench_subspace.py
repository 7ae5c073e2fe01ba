"""Time and memory of learning a subspace of 60 tasks and three methods, against n and d.

The solutions are drawn: 60 x 3 vectors of n numbers. A step is what `subspace.learned.fit` does
without the losses of the tasks, which are forward passes of the model and do not depend on d: the
codes of one task, the reconstruction of three methods, gradients of all maps, one update of
Adafactor. Its time should grow as n d and no faster; memory is the peak of the process over what it
held before. The space in closed form (`principal`) is beside it.

Run by hand: `python benchmarks/bench_subspace.py`.
"""

import gc
import time
from itertools import pairwise

import torch
from timing import one_thread, table, verdict

from deltune.study.machine import resident_bytes
from deltune.subspace.learned import fit
from deltune.subspace.linear import principal
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.training.memory import PeakMemory

WHOLE = 1_105_920
"""n of the published methods on T5-base."""
TASKS, METHODS = 60, ("adapter", "lora", "prefix")
CASES = ((WHOLE // 4, 100), (WHOLE // 2, 100), (WHOLE, 25), (WHOLE, 50), (WHOLE, 100))
BYTES, SLOPE = 8 * 2**30, 1.25
CPU = torch.device("cpu")


def solutions(size: int) -> Solutions:
    """Drawn ones."""
    rows = {name: torch.randn(TASKS, size) * 0.02 for name in METHODS}
    return Solutions.of([f"task {i}" for i in range(TASKS)], rows)


def measured(size: int, dimension: int, steps: int = 8) -> tuple[float, int, float]:
    """Processor seconds of a step, peak bytes of learning, processor seconds of the closed form."""
    given = solutions(size)
    gc.collect()
    peak = PeakMemory(CPU)
    before, times = resident_bytes(cuda=False) or 0, [time.process_time()]
    settings = FitSettings(dimension=dimension, steps=steps)
    fit(given, settings, on_step=lambda *_: times.append(time.process_time()))
    spent = sorted(later - earlier for earlier, later in pairwise(times[1:]))
    used = (peak.read() or 0) - before
    start = time.process_time()
    principal(given, min(dimension, TASKS))
    return spent[len(spent) // 2], used, time.process_time() - start


def main() -> None:
    print(one_thread())
    found = {case: measured(*case) for case in CASES}
    unit = found[WHOLE, 100][0] / (WHOLE * 100)
    rows = [
        [f"{n:,}", d, f"{step:.2f} s", f"{step / (n * d) / unit:.2f}", f"{used / 2**30:.2f} GiB",
         f"{closed:.1f} s"]
        for (n, d), (step, used, closed) in found.items()
    ]  # fmt: skip
    table(
        f"{TASKS} tasks x {len(METHODS)} methods",
        ["n", "d", "step", "per n d", "memory", "closed form"], rows,
    )  # fmt: skip
    step, used, _ = found[WHOLE, 100]
    verdict("bytes to learn n = 1.1 million, d = 100", used, BYTES)
    for case in ((WHOLE // 2, 100), (WHOLE, 50)):
        growth = step / found[case][0] / 2
        verdict(f"growth from n, d = {case} to twice that, over 2", growth, SLOPE)


if __name__ == "__main__":
    main()
