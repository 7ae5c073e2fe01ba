"""On a GPU: the same numbers as on the CPU, which is the oracle. Skipped where there is none."""

import copy
from pathlib import Path

import pytest
import torch

import deltune as dt
from zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SPECS = [
    "lora(rank=2)", "lora(rank=2, where='attn, ffn')", "adapter(width=3)",
    "adapter(width=3, placement='pfeiffer', where='ffn')", "prefix(tokens=3)",
    "prefix(tokens=3, mlp=4)", "prompt(tokens=3)", "bitfit", "full",
    "lora(rank=2) + prefix(tokens=2) + prompt(tokens=2)",
]  # fmt: skip
MODELS = ["bert", "gpt2", "gpt-neox", "llama", "gemma3", "mixtral", "t5", "bart", "whisper", "vit"]


def _on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_the_cpus(name: str, spec: str, tmp_path: Path) -> None:
    case = ZOO[name]
    model = case.build(0)
    try:
        delta = dt.attach(model, spec, seed=0)
    except dt.DeltuneError as error:
        pytest.skip(f"refused on any device: {str(error)[:80]}")
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
    delta.load_vector(delta.vector() + 0.1 * noise)
    moved = copy.deepcopy(model).cuda()
    theirs = dt.deltas(moved)["delta"]
    out, there = case.run(model), case.output(moved(**_on("cuda", case.batch(0))))
    scale = float(out.detach().abs().max())
    assert float((there.detach().cpu() - out.detach()).abs().max()) < 2e-4 * scale
    out.square().mean().backward()
    there.square().mean().backward()
    for mine, other in zip(delta.parameters(), theirs.parameters(), strict=True):
        assert other.device.type == "cuda" and other.grad is not None and mine.grad is not None
        bound = 2e-3 * max(float(mine.grad.abs().max()), 1e-3)
        assert float((other.grad.cpu() - mine.grad).abs().max()) < bound
    theirs.save(tmp_path / "d")
    again = dt.load(tmp_path / "d", case.build(0).cuda())
    assert torch.equal(again.vector(), theirs.vector())


def test_merging_and_dropout_on_the_device() -> None:
    model = ZOO["gpt2"].build(0).cuda()
    delta = dt.attach(model, "lora(rank=2, dropout=0.5, where='attn, ffn')", seed=0)
    delta.load_vector(torch.randn(delta.layout.size).cuda())
    batch = _on("cuda", ZOO["gpt2"].batch(0))
    with torch.no_grad():
        plain = model(**batch).logits
        delta.merge()
        assert torch.allclose(model(**batch).logits, plain, atol=1e-4)
        delta.unmerge()
        model.train()
        torch.manual_seed(3)
        first = model(**batch).logits
        torch.manual_seed(3)
        assert torch.equal(model(**batch).logits, first)
        assert not torch.allclose(first, plain, atol=1e-3)


@pytest.mark.parametrize("spec", ["lora(rank=2)", "prefix(tokens=3)", "prompt(tokens=3)"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_the_cpus(spec: str, cache: str) -> None:
    model = ZOO["llama"].build(0)
    delta = dt.attach(model, spec, seed=0)
    delta.load_vector(delta.vector() + 0.1 * torch.ones(delta.layout.size))
    prompt = ZOO["llama"].prompt(0)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(**prompt, **options)
    moved = copy.deepcopy(model).cuda()
    found = moved.generate(**_on("cuda", prompt), disable_compile=True, **options)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("spec", ["lora(rank=2)", "adapter(width=3)", "prefix(tokens=3)", "bitfit"])
def test_training_in_bfloat16_autocast(spec: str) -> None:
    model = ZOO["bert"].build(0).cuda().train()
    delta = dt.attach(model, spec, seed=0)
    batch = _on("cuda", ZOO["bert"].batch(0))
    labels = torch.tensor([0, 1, 2], device="cuda")
    optimiser = torch.optim.AdamW(delta.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
