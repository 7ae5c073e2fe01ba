"""A bank of a thousand LoRAs beside a Llama shape: what a member costs, and what a batch pays.

LoRA of rank 8 on all linear maps (4 layers, width 512), members in folders, one thread:

    loading     adding and reading the n-th member from its folder into memory; PEFT reads 64 by
                `load_adapter`, all of which are attached
    memory      what the process holds over the tensors' bytes, with the last of them read
    a batch     32 rows, each its own member, 16 tokens: the time of entering a `route` block and
                running it, over that with the same deltas attached: all on the device already; all
                copied there from memory; all read from folders

Run by hand: `python benchmarks/bench_bank.py`; `--members 200`, `--rounds 5`.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from bench_routing import RANK, ROWS, held, llama
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict

import deltune as dt

SPEC = f"lora(rank={RANK}, where='attn, ffn')"
PEERS, SHOWN = 64, (2, 8, 64)
FLAT, MEMORY, RESIDENT = 1.3, 1.1, 1.1


def copies(folder: Path, count: int, first: Path) -> list[Path]:
    """Folders with the files of one, each its own file."""
    found = []
    for k in range(count):
        (folder / f"m{k}").mkdir()
        for file in first.iterdir():
            if file.is_file():
                os.link(file, folder / f"m{k}" / file.name)
        found.append(folder / f"m{k}")
    return found


def seconds(load: Callable[[int], object], count: int) -> list[float]:
    """Processor seconds of each load."""
    found = []
    for k in range(count):
        started = time.process_time()
        load(k)
        found.append(time.process_time() - started)
    return found


def peft_curve(folder: Path) -> list[float]:
    """Seconds of each load in PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(folder / "peft")  # type: ignore[arg-type]
    model = PeftModel.from_pretrained(llama(), folder / "peft", adapter_name="first")
    return seconds(lambda k: model.load_adapter(folder / "peft", f"a{k}"), PEERS)


def loading(place: Path, count: int) -> None:
    """The first table, and memory."""
    delta = dt.attach(llama(), SPEC)
    delta.load_vector(0.01 * torch.randn(delta.layout.size))
    first = delta.save(place / "first")
    size = delta.layout.size * 4
    (place / "members").mkdir()
    folders = copies(place / "members", count, first)
    bank: Any = dt.Bank(llama(), SPEC, capacity=ROWS)

    def load(k: int) -> None:
        bank.add(f"m{k}", folders[k])
        bank.fetch(f"m{k}")

    gc.collect()
    before = held()
    ours = seconds(load, count)
    gc.collect()
    ratio = (held() - before) / (count * size)
    theirs = peft_curve(place)
    rows = [
        [name, *(f"{1e3 * statistics.median(s[n - 2 : n]):.2f}" for n in SHOWN),
         f"{1e3 * statistics.median(s[-5:]):.2f}", f"{statistics.median(s[-5:]) / s[1]:.2f}"]
        for name, s in (("deltune", ours), ("peft", theirs))
    ]  # fmt: skip
    heads = ["", *(f"n = {n}" for n in SHOWN), "the last", "last / 2nd"]
    table(f"reading the n-th of {count} members, of {PEERS} in PEFT, ms", heads, rows)
    last, early = statistics.median(ours[-50:]), statistics.median(ours[1:51])
    verdict(f"one of the last 50 of {count} over one of the first 50", last / early, FLAT)
    verdict("memory over the tensors", ratio, MEMORY)


def batches(place: Path, rounds: int) -> None:
    """The second table."""
    ids = torch.randint(0, 2048, (ROWS, 16), generator=torch.Generator().manual_seed(0))
    attached: Any = llama()
    for k in range(ROWS):
        dt.load(place / "members" / f"m{k}", attached, name=f"m{k}").disable()
    pools = [[f"m{k}" for k in range(i * ROWS, (i + 1) * ROWS)] for i in range(3)]
    banks = {
        "resident": dt.Bank(llama(), SPEC, capacity=ROWS, folder=place / "members"),
        "memory": dt.Bank(llama(), SPEC, capacity=ROWS, folder=place / "members"),
        "folders": dt.Bank(llama(), SPEC, capacity=ROWS, folder=place / "members", memory=0),
    }

    def run(model: Any, pools: Iterator[list[str]]) -> None:
        with dt.route(model, next(pools)), torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def enter(model: Any, rows: list[str]) -> None:
        with dt.route(model, rows):
            pass

    works: dict[str, Callable[[], object]] = {}
    turns = {name: cycle(pools[:1] if name == "resident" else pools) for name in banks}
    same, one = cycle(pools[:1]), cycle([["m0"] * ROWS])
    works["attached"] = lambda: run(attached, same)
    for name, bank in banks.items():
        works[name] = lambda m=bank.model, turn=turns[name]: run(m, turn)
    works["entering, attached"] = lambda: enter(attached, pools[0])
    works["entering, resident"] = lambda: enter(banks["resident"].model, pools[0])
    works["one for all"] = lambda: run(attached, one)
    times = interleave(works, rounds)
    rows = [
        [name, milliseconds(times[name]), str(Ratio.of(times, name, "attached"))]
        for name in works
    ]  # fmt: skip
    table(f"{ROWS} rows, each its own member, 16 tokens", ["", "ms", "over attached"], rows)
    resident = Ratio.of(times, "resident", "attached").median
    verdict("a batch of members on the device over attached deltas", resident, RESIDENT)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--members", type=int, default=1000)
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    print(one_thread())
    with tempfile.TemporaryDirectory() as place:
        loading(Path(place), max(given.members, 3 * ROWS))
        batches(Path(place), given.rounds)


if __name__ == "__main__":
    main()
