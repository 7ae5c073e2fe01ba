"""On a GPU: the same numbers as on the CPU, which is the oracle. Skipped where there is none."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune as dt
from deltune.conversion.convert import convert
from deltune.subspace.learned import Losses, fit
from deltune.training.many import Job, train_many
from many_toys import Numbers, number_task
from methods import METHODS
from snapshots import distance
from test_bank import MECHANISMS, alone, routed, saved
from test_routing import ROWS, eight, large, outputs
from test_subspace_learned import FAST, small
from zoo import ZOO

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SPECS = [
    "lora(rank=2)", "lora(rank=2, where='attn, ffn')", "adapter(width=3)",
    "adapter(width=3, placement='pfeiffer', where='ffn')", "prefix(tokens=3)",
    "prefix(tokens=3, mlp=4)", "prompt(tokens=3)", "bitfit", "full",
    "lora(rank=2) + prefix(tokens=2) + prompt(tokens=2)",
]  # fmt: skip
MODELS = ["bert", "gpt2", "gpt-neox", "llama", "gemma3", "mixtral", "t5", "bart", "whisper", "vit"]


def _on(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


@pytest.mark.parametrize("name", METHODS)
def test_rows_with_deltas_of_their_own_and_their_gradients(name: str) -> None:
    """Of every method, over eight deltas; the same model on the CPU is the oracle."""
    case, model = eight(METHODS[name])
    moved = copy.deepcopy(model).cuda()
    draw = torch.Generator().manual_seed(9)
    rows = [str(int(k)) for k in torch.randint(8, (ROWS,), generator=draw)]
    batch, found = large(case), []
    for one, inputs in ((model, batch), (moved, _on("cuda", batch))):
        with dt.route(one, rows):
            out = outputs(case, one, inputs)
        mask = batch["attention_mask"].to(out)[..., None] if out.ndim == 3 else 1.0
        (out * mask).square().mean().backward()
        grads = [p.grad for d in dt.deltas(one).values() for p in d.parameters()]
        whole = torch.cat([g.flatten() for g in grads if g is not None])
        found.append(((out * mask).detach().cpu(), whole.cpu()))
    assert distance(found[1][0], found[0][0]) < 2e-4
    assert distance(found[1][1], found[0][1]) < 2e-3 and float(found[0][1].norm()) > 0


@pytest.mark.parametrize(("name", "text"), MECHANISMS)
def test_a_bank_pages_its_members_to_the_device(name: str, text: str, tmp_path: Path) -> None:
    """In less room than there are members, which lie in memory and in folders."""
    case = ZOO[name]
    paths = saved(case, text, tmp_path, 5)
    model = case.build(0)
    oracle = {None: alone(case, model, None)} | {n: alone(case, model, p) for n, p in paths.items()}
    batch = case.batch(0)
    moved = replace(case, batch=lambda seed: _on("cuda", batch))
    bank = dt.Bank(model.cuda(), text, capacity=3, folder=tmp_path)
    for rows in (["m0", "m2", None], ["m4", "m1", "m0"], ["m3", "m3", None], ["m0", "m4", "m2"]):
        expected = torch.stack([oracle[name][i] for i, name in enumerate(rows)])
        assert distance(routed(moved, model, rows).cpu(), expected) < 2e-4
        assert {p.device.type for p in model.parameters()} == {"cuda"} and len(bank.resident) <= 3


@pytest.mark.parametrize("specs", [
    ["lora(rank=2)", "lora(rank=4)", "adapter(width=4)", "prefix(tokens=3)", "bitfit"],
    ["lora(rank=2, dropout=0.2)", "lora(rank=2, dropout=0.2)", "lora(rank=2, dropout=0.2)"],
], ids=["methods", "dropout"])  # fmt: skip
def test_many_at_once_equal_one_after_the_other(specs: list[str]) -> None:
    model = ZOO["bert"].build(0).cuda()
    jobs, starts = [], []
    for k, spec in enumerate(specs):
        settings = dt.TrainSettings(
            3e-3 * (1 + k), max_steps=12, per_device_train_batch_size=3, eps=1e-4, eval_steps=5,
            seed=k, precision="fp32",
        )  # fmt: skip
        delta = dt.attach(model, spec, name=str(k), seed=k)
        task = number_task(k, longest=8 + 4 * (k % 3))
        jobs.append(Job(task, delta, settings, Numbers(3)))
        starts.append(delta.vector().clone())
    found: Any = train_many(model, None, jobs)
    for job, start, result in zip(jobs, starts, found, strict=True):
        job.delta.load_vector(start)
        for other in dt.deltas(model).values():
            other.enable() if other.name == job.delta.name else other.disable()
        oracle = dt.train(model, None, job.task, job.delta, job.settings, objective=Numbers(3))
        assert result.losses == pytest.approx(oracle.losses, abs=1e-3)


def test_a_space_learned_on_the_device_is_that_of_the_cpu() -> None:
    """With the loss of a task beside it, which is asked for vectors on the device."""
    solutions = small()
    targets = {name: 0.1 * torch.randn_like(start) for name, start in solutions.starts.items()}
    asked, found = set(), []

    def losses(task: int, step: int) -> Losses:
        def loss(method: str, vector: Tensor) -> Tensor:
            asked.add(vector.device.type)
            return (vector - targets[method].to(vector)).square().mean()

        return loss

    settings = replace(FAST, steps=40)
    for device in ("cpu", "cuda"):
        found.append(fit(solutions, settings, losses, device=torch.device(device)))
    assert asked == {"cpu", "cuda"}
    for name in solutions.methods:
        one, other = (space.ups[name].weight for space in found)
        assert other.device.type == "cpu"
        assert distance(other, one) < 1e-3
        assert distance(found[1].codes[name], found[0].codes[name]) < 1e-3


def test_a_conversion_on_the_device_is_that_of_the_cpu() -> None:
    model = ZOO["gpt2"].build(0)
    source = dt.attach(model, "lora(rank=4, where='attn, ffn')", seed=0)
    source.load_vector(torch.randn(source.layout.size, generator=torch.Generator().manual_seed(1)))
    moved = copy.deepcopy(model).cuda()
    to = "lora(rank=2, where='attn, ffn')"
    mine = convert(source, to, how="weights")
    theirs = convert(dt.deltas(moved)["delta"], to, how="weights")
    assert mine.error is not None and 0 < mine.error < 1
    assert theirs.error == pytest.approx(mine.error, rel=1e-4)
    there = ZOO["gpt2"].output(moved(**_on("cuda", ZOO["gpt2"].batch(0))))
    assert distance(there.detach().cpu(), ZOO["gpt2"].run(model)) < 1e-3


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
