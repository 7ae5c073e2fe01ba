"""Checkpoints for vLLM. Oracle: PEFT on what was written, and the rules by which vLLM reads it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltune as dt
from deltune.errors import ExchangeError
from deltune.exchange.vllm import save_vllm
from zoo import ZOO

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    ("llama", "lora(rank=3, alpha=7, where='attn, ffn')"),
    ("llama", "lora(rank=2, where='attn.q') + lora(rank=5, scaling='root', where='attn, head')"),
    ("qwen3", "vera(rank=4)"),
    ("gpt2", "lora(rank=2, where='attn.q, attn.v') + lora(rank=1, where='ffn')"),
    ("phi3", "lora(rank={'attn': 2, 'ffn': 3}) + lora(rank=2, where='embed')"),
]


def read_as_vllm(folder: Path, linear: set[str]) -> tuple[int, float]:
    """The rank and the factor of a checkpoint, as vLLM finds them; fails where it would refuse."""
    told = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= told.keys()
    assert told["bias"] == "none" and not told["modules_to_save"] and not told["use_dora"]
    assert isinstance(told["r"], int) and isinstance(told["lora_alpha"], int)
    factor = told["lora_alpha"] / (math.sqrt(told["r"]) if told["use_rslora"] else told["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        parts = name.removeprefix("base_model.model.").split(".")
        end = 1 if parts[-1].startswith("lora_embedding_") else 2
        assert parts[-end] in {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
        assert parts[-end - 1] in linear and (end == 1 or parts[-1] == "weight")
        assert told["r"] == tensor.shape[0 if "_A" in parts[-end] else 1]
        assert tensor.dtype == torch.float32
    return told["r"], factor


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_what_vllm_reads_does_what_the_delta_does(name: str, spec: str, tmp_path: Path) -> None:
    case = ZOO[name]
    model: Any = case.build(0)
    linear = {path.rpartition(".")[2] for path, module in model.named_modules()
              if type(module).__name__ in ("Linear", "Conv1D", "Embedding")}  # fmt: skip
    base = case.run(model)
    delta = dt.attach(model, spec, seed=0)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
    delta.load_vector(delta.vector() + 0.2 * noise)
    delta.scale = 0.7
    out = case.run(model)
    folder = save_vllm(delta, tmp_path / "served")
    rank, factor = read_as_vllm(folder, linear)
    assert factor == 1.0 and rank <= 8
    fresh = case.build(0)
    theirs = peft.PeftModel.from_pretrained(fresh, folder).eval()
    torch.testing.assert_close(case.run(theirs), out, rtol=0, atol=2e-5 * float(out.abs().max()))
    assert float((out - base).abs().max()) > 1e-2


def test_what_vllm_has_no_words_for_is_refused(tmp_path: Path) -> None:
    for name, spec, words in (
        ("llama", "dora(rank=2)", "holds `dora` at .*deltune convert"),
        ("llama", "adapter(width=2)", "holds `adapter` at .*merge it and serve"),
        ("llama", "lora(rank=2) + norms", "holds `norms` at"),
        ("llama", "lora(rank=2, gate='token')", "holds `lora` at"),
        ("llama", "loha(rank=2)", "holds `loha` at"),
        ("mixtral", "lora(rank=2, where='ffn')", r"holds `lora` at `model.layers.0.mlp.experts`"),
        ("bert", "lora(rank=2)", "holds a trained task head.*head=False"),
    ):
        delta = dt.attach(ZOO[name].build(0), spec)
        with pytest.raises(ExchangeError, match=words):
            save_vllm(delta, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
