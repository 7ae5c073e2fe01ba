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

Run by hand: `python benchmarks/bench_memory.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from bench_step import CASES, floor
from models import batch, minilm, peft_lora
from timing import one_thread, table, verdict
from torch import Tensor, nn

import deltune as dt

BOUND = 1.05
RANK = 8
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


def decoder(peer: bool, dtype: torch.dtype = torch.float32, narrow: bool = False, **form: Any) -> (
    int
):  # fmt: skip
    """Bytes kept for a form of LoRA on all linear maps of the Llama; `narrow`: the deltas have the
    backbone's type."""
    from peft import LoraConfig, get_peft_model

    model = llama(dtype)
    if peer:
        config = LoraConfig(
            r=RANK, target_modules="all-linear", task_type="CAUSAL_LM",
            lora_dropout=form.get("dropout", 0.0), use_dora="dora" in form,
        )  # fmt: skip
        model = get_peft_model(model, config, autocast_adapter_dtype=not narrow)
    else:
        kind = "dora" if "dora" in form else "lora"
        dropout = form.get("dropout", 0.0)
        spec = f"{kind}(rank={RANK}, dropout={dropout}, where='attn, ffn')"
        for parameter in dt.attach(model, spec).parameters():
            parameter.data = parameter.data.to(dtype if narrow else torch.float32)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2048, (8, 64), generator=draw)
    return total(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


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


def main() -> None:
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


if __name__ == "__main__":
    main()
