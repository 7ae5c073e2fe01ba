"""The time of switching which of many attached LoRAs acts, beside PEFT's `set_adapter`.

LoRA of rank 8 on query, key, value and output of a Llama shape (8 layers, width 128), K of them, of
which one acts; each switch goes on to the next. `stays` has another delta attached first that acts
all the time. A switch costs what the two deltas that change cost, so its time should not grow with
K.

Run by hand: `python benchmarks/bench_activate.py`; `--rounds 5`, `--many 4 64`.
"""

import argparse
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict

import deltune as dt

SWITCHES, GROWTH = 20, 1.5


def llama() -> Any:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ours(count: int, stays: bool) -> Callable[[], None]:
    """Switches of our deltas `0` ... ."""
    model = llama()
    if stays:
        dt.attach(model, "lora(rank=8, where='attn')", name="stays")
    for k in range(count):
        dt.attach(model, "lora(rank=8, where='attn')", name=str(k)).disable()
    names = cycle(str(k) for k in range(count))
    kept = ["stays"] if stays else []

    def switch() -> None:
        for _ in range(SWITCHES):
            dt.activate(model, [*kept, next(names)])

    return switch


def theirs(count: int) -> Callable[[], None]:
    """Switches of PEFT's adapters."""
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, target_modules=modules, task_type="CAUSAL_LM")
    model: Any = get_peft_model(llama(), config, adapter_name="0")  # type: ignore[arg-type]
    for k in range(1, count):
        model.add_adapter(str(k), config)
    names = cycle(str(k) for k in range(count))

    def switch() -> None:
        for _ in range(SWITCHES):
            model.set_adapter(next(names))

    return switch


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--many", type=int, nargs="+", default=[4, 32, 128])
    given = options.parse_args()
    machine, runs = one_thread(), {}
    for k in given.many:
        runs[f"ours {k}"] = ours(k, False)
        runs[f"stays {k}"] = ours(k, True)
        runs[f"peft {k}"] = theirs(k)
    times = interleave(runs, given.rounds)
    lines = []
    for k in given.many:
        each = [[t / SWITCHES for t in times[f"{name} {k}"]] for name in ("ours", "stays", "peft")]
        ratio = Ratio.of(times, f"peft {k}", f"ours {k}")
        lines.append([str(k), *map(milliseconds, each), str(ratio)])
    table(f"A switch, {machine}", ["K", "ms", "ms, stays", "ms, PEFT", "PEFT / ours"], lines)
    first, last = min(given.many), max(given.many)
    growth = Ratio.of(times, f"ours {last}", f"ours {first}").median
    verdict(f"{last} attached over {first}, at most", growth, GROWTH)


if __name__ == "__main__":
    main()
