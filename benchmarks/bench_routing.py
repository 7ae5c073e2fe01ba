"""The time of a batch whose rows have several LoRAs, over that of one LoRA for all rows.

32 rows, LoRA of rank 8 on a Llama shape (4 layers, width 512, 8 heads, feed-forward 1376), without
gradients, on one thread; with `--device cuda` on a GPU, where a larger `--width`, `--layers` and
`--dtype bfloat16` make more than launches of it. The rows of each delta stand together, as a server
sorts them, or are in random order. PEFT takes the same rows by `adapter_names`. `1 token` is a step
of decoding with a cache of 16 tokens.

    K deltas    ours / ours with one delta for all, PEFT's / PEFT's with one for all
    loaded      attaching one more when so many are there, and bytes held over those of the tensors
                (width 1024)

Run by hand: `python benchmarks/bench_routing.py`; `--tokens 16`, `--rounds 5`, `--loaded 1000`.
"""

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import one_thread, table, verdict

import deltune as dt

ROWS, RANK, MOST, DECODING = 32, 8, 1.10, 1.25
WHERE = {
    "attention": ("attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "all linear": ("attn, ffn", "all-linear"),
}


def llama(width: int = 512, layers: int = 4) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(8, width // 128)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=width * 43 // 16,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Shape:
    """The backbone, and where it is."""

    device: str = "cpu"
    width: int = 512
    layers: int = 4
    dtype: str = "float32"

    def build(self) -> Any:
        """The model."""
        return llama(self.width, self.layers).to(self.device, getattr(torch, self.dtype))

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def ours(shape: Shape, where: str, most: int) -> Any:
    """Our model with deltas `0` ... , none of which acts."""
    model = shape.build()
    for k in range(most):
        delta = dt.attach(model, f"lora(rank={RANK}, where='{where}')", name=str(k), seed=k)
        delta.load_vector(0.01 * torch.randn(delta.layout.size))
        delta.disable()
    return model


def theirs(shape: Shape, modules: Any, most: int) -> Any:
    """PEFT's model with adapters `0` ... ."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=modules, task_type="CAUSAL_LM")
    model: Any = get_peft_model(shape.build(), config, adapter_name="a0")  # type: ignore[arg-type]
    for k in range(1, most):
        model.add_adapter(f"a{k}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    return model.eval()


def call(model: Any, tokens: int, options: dict[str, Any]) -> Callable[[], Any]:
    """A forward over the rows; for one token, behind 16 in a cache that is not kept."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2048, (ROWS, tokens), generator=draw).to(model.device)
    if tokens > 1:
        return lambda: model(input_ids=ids, use_cache=False, **options)
    first = torch.randint(0, 2048, (ROWS, 16), generator=draw).to(model.device)
    cache = model(input_ids=first, use_cache=True, **options).past_key_values

    def step() -> None:
        model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        cache.crop(-1)

    return step


def rounds(
    shape: Shape, runs: dict[str, tuple[Any, Callable[[], Any]]], count: int
) -> dict[str, list[float]]:
    """Seconds of each call in each round, interleaved; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(count + 1):
        for name, (around, run) in runs.items():
            with around():
                run()
                shape.wait()
                started = time.perf_counter()
                run()
                shape.wait()
                seconds = time.perf_counter() - started
            if turn:
                found[name].append(seconds)
    return found


def compare(
    shape: Shape, tokens: int, name: str, many: tuple[int, ...], count: int
) -> list[list[str]]:
    """A line for each number of deltas."""
    where, modules = WHERE[name]
    mine, peer = ours(shape, where, max(many)), theirs(shape, modules, max(many))
    draw = torch.Generator().manual_seed(1)
    order = torch.randperm(ROWS, generator=draw).tolist()
    lines = []
    for k in many:
        rows = [str(i * k // ROWS) for i in range(ROWS)]
        mixed = [rows[i] for i in order]
        named = [f"a{row}" for row in rows]
        runs: dict[str, tuple[Any, Callable[[], Any]]] = {}
        for title, asked in (("one", ["0"] * ROWS), ("ours", rows), ("mixed", mixed)):
            with dt.route(mine, asked):
                runs[title] = (lambda a=asked: dt.route(mine, a), call(mine, tokens, {}))
        peer.set_adapter("a0")
        runs["peft one"] = (nullcontext, call(peer, tokens, {}))
        runs["peft"] = (nullcontext, call(peer, tokens, {"adapter_names": named}))
        seconds = rounds(shape, runs, count)

        def ratio(a: str, b: str, seconds: dict[str, list[float]] = seconds) -> float:
            pairs = zip(seconds[a], seconds[b], strict=True)
            return statistics.median(x / y for x, y in pairs)

        milli = 1e3 * statistics.median(seconds["one"])
        numbers = [ratio("ours", "one"), ratio("mixed", "one"), ratio("peft", "peft one")]
        lines.append(
            [name, str(tokens), str(k), f"{milli:.1f}", *(f"{one:.2f}" for one in numbers),
             f"{ratio('peft', 'ours'):.2f}"]
        )  # fmt: skip
    return lines


def held() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def loaded(most: int) -> None:
    """Time of attaching the last of many deltas over that of the first ones, and their memory."""
    model, seconds = llama(1024), []
    dt.attach(model, f"lora(rank={RANK})", name="first").disable()
    gc.collect()
    before = held()
    for k in range(most):
        started = time.process_time()
        delta = dt.attach(model, f"lora(rank={RANK}, where='attn, ffn')", name=str(k))
        seconds.append(time.process_time() - started)
        delta.disable()
    gc.collect()
    size = most * delta.layout.size * 4
    last, early = statistics.median(seconds[-50:]), statistics.median(seconds[1:51])
    print(f"{most} deltas: one of the last 50 takes {last / early:.2f} times one of the first 50; "
          f"memory {(held() - before) / size:.3f} times their tensors")  # fmt: skip


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--many", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--loaded", type=int, default=1000)
    options.add_argument("--device", default="cpu")
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--dtype", default="float32")
    given = options.parse_args()
    shape = Shape(given.device, given.width, given.layers, given.dtype)
    machine, lines = one_thread(), []
    if shape.device == "cuda":
        machine = f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {shape.dtype}"
    machine += f", {shape.layers} layers of width {shape.width}"
    if given.loaded:
        loaded(given.loaded)
    for tokens in given.tokens:
        for name in WHERE:
            lines += compare(shape, tokens, name, tuple(given.many), given.rounds)
    table(
        f"{ROWS} rows, {machine}",
        ["LoRA on", "tokens", "K", "ms, one", "K / one", "random order / one", "PEFT K / one",
         "PEFT / ours"],
        lines,
    )  # fmt: skip
    for tokens in given.tokens:
        bound = DECODING if tokens == 1 else MOST
        for column, order in ((4, "sorted"), (5, "in random order")):
            worst = max(float(line[column]) for line in lines if line[1] == str(tokens))
            verdict(f"{tokens} tokens, rows {order}, K deltas over one, at most", worst, bound)


if __name__ == "__main__":
    main()
