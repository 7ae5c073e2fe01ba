"""Activation bytes kept for backward over the ideal: LoRA of rank 8 on MiniLM, batch 32 x 64.

The ideal is the sum of three parts, counted in bytes of distinct storages:
  what the frozen backbone itself keeps when gradients flow from the lowest adapted matrices on,
  each distinct input of an adapted matrix once, where the backbone does not keep it anyway,
  the rank-sized x A^T of each adapted matrix (in the backbone's type).
Counted are all tensors that autograd saves, without parameters, buffers and the batch. The model is
in train mode with its own dropout on; `dropout` is that of LoRA. With a bfloat16 backbone the
deltas of both libraries stay in float32.

A second table has LoRA and DoRA of rank 8 on all linear maps of a Llama shape (4 layers, width 256,
batch 8 x 64): the bytes of each form over those of plain LoRA of the same library, and those of
float32 deltas over those of bfloat16 ones on a bfloat16 backbone.

A third table has plain LoRA there with `deltune.lean` beside PEFT: all bytes that live after a
forward of a training step, whoever holds them, and the time of the step.

Run by hand: `python benchmarks/bench_memory.py`; `--only lean`.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from bench_step import CASES, floor
from models import batch, minilm, peft_lora
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deltune as dt

BOUND = 1.05
RANK = 8
LEAN, SPEED = 0.70, 1.03
WHERE = {"q, v": "attn.q, attn.v", "all linear": "attn, ffn"}


def saved(model: nn.Module, data: dict[str, Tensor], held: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage that autograd keeps; `held` keeps them alive while we count."""
    own = [*model.parameters(), *model.buffers(), *data.values()]
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(model(**data).loss)
    return kept


def ideal(dtype: torch.dtype, name: str, data: dict[str, Tensor]) -> int:
    """The bytes of the ideal."""
    spec, _, lowest = CASES[name]
    sites = [s.site.path for s in dt.plan(minilm(), spec, head=False).steps]
    model, held, inputs = floor(minilm(dtype), lowest).train(), [], []
    for path in sites:
        model.get_submodule(path).register_forward_pre_hook(_keeper(inputs))
    kept = saved(model, data, held)
    for x in inputs:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    thin = sum(x.shape[:-1].numel() * RANK * x.element_size() for x in inputs)
    return sum(kept.values()) + thin


def _keeper(inputs: list[Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])

    return keep


def total(model: Any, data: dict[str, Tensor]) -> int:
    return sum(saved(model.train(), data, []).values())


def llama(dtype: torch.dtype) -> Any:
    """A small Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def adapted(peer: bool, dtype: torch.dtype = torch.float32, **form: Any) -> Any:
    """The Llama with a form of LoRA on all linear maps, ours or PEFT's."""
    from peft import LoraConfig, get_peft_model

    model = llama(dtype)
    if peer:
        config = LoraConfig(
            r=RANK, target_modules="all-linear", task_type="CAUSAL_LM",
            lora_dropout=form.get("dropout", 0.0), use_dora="dora" in form,
        )  # fmt: skip
        return get_peft_model(model, config, autocast_adapter_dtype=not form.get("narrow"))
    kind = "dora" if "dora" in form else "lora"
    spec = f"{kind}(rank={RANK}, dropout={form.get('dropout', 0.0)}, where='attn, ffn')"
    for parameter in dt.attach(model, spec).parameters():
        parameter.data = parameter.data.to(dtype if form.get("narrow") else torch.float32)
    return model


def tokens() -> dict[str, Tensor]:
    """The batch of the second and third table."""
    ids = torch.randint(0, 2048, (8, 64), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def decoder(peer: bool, **form: Any) -> int:
    """Bytes kept for a form of LoRA; `narrow`: the deltas have the backbone's type."""
    return total(adapted(peer, **form), tokens())


def decoders() -> None:
    """The second table."""
    bf16, rows, bounds = torch.bfloat16, [], {}
    forms = {
        "dropout 0.05": ({"dropout": 0.05}, {}, 1.05),
        "DoRA": ({"dora": True}, {}, 1.3),
        "bfloat16 backbone, float32 deltas": (
            {"dtype": bf16},
            {"dtype": bf16, "narrow": True},
            1.02,
        ),
    }
    for name, (form, reference, bound) in forms.items():
        ratios = [decoder(peer, **form) / decoder(peer, **reference) for peer in (False, True)]
        rows.append([name, *(f"{ratio:.3f}" for ratio in ratios)])
        bounds[name] = ratios[0], bound
    table("Llama shape, all linear maps, over the plain form", ["", "deltune", "peft"], rows)
    for name, (ratio, bound) in bounds.items():
        verdict(name, ratio, bound)


def living(model: nn.Module, data: dict[str, Tensor]) -> int:
    """Bytes of all storages made in a forward that live behind it, with the loss alone held."""
    made: dict[int, Any] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> (
            Any
        ):  # fmt: skip
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    made[storage._cdata] = storage._weak_ref()
            return out

    with Watch():
        loss = model(**data).loss
    own = [*model.parameters(), *model.buffers(), *data.values()]
    known = {tensor.untyped_storage()._cdata for tensor in own}
    found = {key: torch.UntypedStorage._new_with_weak_ptr(weak) for key, weak in made.items()}
    del loss
    return sum(one.nbytes() for key, one in found.items() if one is not None and key not in known)


def lean(rounds: int) -> None:
    """The third table."""
    data = tokens()
    lines: list[list[str]] = []
    models: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = {
            "peft": None, "deltune": {"feed_forward": False, "norms": False, "head": False},
            "lean feed-forward": {"norms": False, "head": False}, "and head": {"norms": False},
            "lean": {},
        }  # fmt: skip
        sizes: dict[str, int] = {}
        for name, options in parts.items():
            model = adapted(options is None, dtype).train()
            with dt.lean(model, **options) if options is not None else nullcontext():
                living(model, data)
                sizes[name] = living(model, data)
            models.setdefault(name, (model, options))
        title = str(dtype).removeprefix("torch.")
        lines += [
            [f"{title}, {name}", f"{size / 2**20:.1f}", f"{size / sizes['peft']:.3f}"]
            for name, size in sizes.items()
        ]
        verdict(f"{title}: bytes of lean training over PEFT's", sizes["lean"] / sizes["peft"], LEAN)

    with ExitStack() as stack:
        for model, options in models.values():
            if options:
                stack.enter_context(dt.lean(model, **options))
        works = {
            name: lambda model=model: model(**data).loss.backward()
            for name, (model, _) in models.items()
        }
        times = interleave(works, rounds)
    for line, name in zip(lines, works, strict=False):
        line += [milliseconds(times[name]), str(Ratio.of(times, name, "peft"))]
    lines = [[*line, "", ""][:5] for line in lines]
    heads = ["", "MiB that live", "over PEFT", "step, ms", "over PEFT"]
    table("Llama shape, LoRA on all linear maps, without dropout", heads, lines)
    verdict("a lean step over PEFT's", Ratio.of(times, "lean", "peft").median, SPEED)
    verdict("a lean step over ours", Ratio.of(times, "lean", "deltune").median, SPEED)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", choices=["lean"])
    options.add_argument("--rounds", type=int, default=15)
    given = options.parse_args()
    if given.only:
        print(one_thread())
        lean(given.rounds)
        return
    machine, data, worst = one_thread(), batch(), 0.0
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, where in WHERE.items():
            least = ideal(dtype, name, data)
            for p in (0.0, 0.1):
                ours = minilm(dtype)
                dt.attach(ours, dt.LoRA(rank=RANK, dropout=p, where=where))
                mine = total(ours, data)
                options = {**CASES[name][1], "lora_dropout": p}
                theirs = total(peft_lora(minilm(dtype), **options), data)
                worst = max(worst, mine / least)
                title = f"{str(dtype).removeprefix('torch.')}, {name}, dropout {p}"
                row = [title, *(f"{n / 2**20:.1f}" for n in (least, mine, theirs))]
                rows.append([*row, f"{mine / least:.3f}", f"{theirs / least:.3f}"])
    heads = ["", "ideal MiB", "deltune MiB", "peft MiB", "deltune / ideal", "peft / ideal"]
    table(f"activation bytes kept for backward ({machine})", heads, rows)
    verdict("kept bytes over the ideal, the worst case", worst, BOUND)
    decoders()
    lean(given.rounds)


if __name__ == "__main__":
    main()
