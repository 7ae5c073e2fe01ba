"""Gates, masks and pruning of the backbone's own weights.

Oracles: the formulas of the papers on a twin of the model whose weights are written by hand; the
bit order of numpy; stable sorting; counts of BERT-base; the uninterrupted run.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import deltune as dt
from deltune.errors import AttachError, DeltuneError, SpecError, TrainError, WhereError
from deltune.families.specification.movement import Movement
from deltune.mechanisms import concrete
from deltune.mechanisms.binary import cubic, pack, straight, top, unpack
from deltune.training import optim
from deltune.training.callback import DeltaCallback
from deltune.training.course import Course
from deltune.training.events import Event, Step
from deltune.training.loop import TrainResult, train
from shapes import meta_model
from snapshots import distance
from test_train_delta import Digits
from test_train_trainer import rows
from train_toy import settings, toy_task
from zoo import ZOO

BERT = ZOO["bert"]
TASK = toy_task(24, 10)
RUNS = {
    "diff": "diff(density=0.1, rate=5.0)",
    "masking": "masking(skip=0)",
    "bernoulli": "masking(mode='bernoulli', sparsity=0.4, skip=0)",
    "movement": "movement(rate=3.0)",
    "soft": "movement(mode='soft', rate=3.0, l1=5.0, threshold=0.45)",
}
every_run = pytest.mark.parametrize("text", RUNS.values(), ids=list(RUNS))
demanding = pytest.mark.parametrize(
    "text", [text for name, text in RUNS.items() if name != "masking"]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attached(text: str, noise: float = 0.1, seed: int = 0) -> dt.Delta:
    """A delta on a tiny BERT in eval mode, away from its start."""
    delta = dt.attach(BERT.build(0), text, seed=seed)
    return delta.load_vector(
        delta.vector() + noise * torch.randn(delta.layout.size, generator=seeded(seed))
    )


def calm(model: nn.Module) -> nn.Module:
    """In train mode, without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def places(delta: dt.Delta) -> Iterator[tuple[str, str, Any]]:
    """(path, parameter name, unit) of every parameter of the backbone that a method changes."""
    for unit in delta.tree.units:
        if unit.spec.kind != "head":
            for name in dict.fromkeys(place[0] for place in unit.site.places):
                yield unit.site.path, name, unit


def by_hand(delta: dt.Delta, change: Callable[[Tensor, str, Any], Tensor]) -> dict[Any, Tensor]:
    """dL/dW' of every changed parameter, on a twin whose weights are `change` of the old ones."""
    twin = calm(BERT.build(0))
    head = {n.removeprefix("head."): t for n, t in delta.tensors().items() if n.startswith("head.")}
    twin.load_state_dict(head, strict=False)
    weights = {}
    for path, name, unit in places(delta):
        owner = twin.get_submodule(path)
        value = nn.Parameter(change(owner._parameters[name].detach(), name, unit).detach())
        owner._parameters[name] = weights[unit, name] = value
    BERT.run(twin).square().mean().backward()
    return {
        place: torch.zeros_like(w) if w.grad is None else w.grad for place, w in weights.items()
    }


def backward(delta: dt.Delta) -> None:
    for parameter in delta.parameters():
        parameter.grad = None
    BERT.run(delta.model).square().mean().backward()


def gradient(delta: dt.Delta) -> Tensor:
    """The gradient as a vector, zero where there is none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in delta.parameters()]
    return torch.cat([g.reshape(-1) for g in found])


def grad(unit: Any, name: str) -> Tensor:
    found = unit.own(name).grad
    assert found is not None
    return found


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().abs().max()) <= 1e-5 * float(b.detach().abs().max()) + 1e-7


# --- bits, the largest, the straight-through gradient ---------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 24), (2, 3, 7), (0,)])
def test_packed_bits_come_back_and_are_as_numpy_packs_them(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=seeded()) < 0.4
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == math.ceil(mask.numel() / 8)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    assert torch.equal(unpack(bits, shape), mask)


@pytest.mark.parametrize("kinds", [2, 5, 10**6])
def test_the_largest_are_those_of_a_stable_sort(kinds: int) -> None:
    scores = torch.randint(kinds, (7, 9), generator=seeded(kinds)).float()
    order = scores.reshape(-1).sort(descending=True, stable=True).indices
    for k in (0, 1, 17, 62, 63):
        expected = torch.zeros(63, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(top(scores, k), expected.view(7, 9))
    assert torch.equal(top(torch.zeros(2, 3), 2), torch.tensor([[True, True, False], [False] * 3]))


@pytest.mark.parametrize("changed", [True, False])
def test_the_straight_through_gradient_is_that_of_the_mask_as_numbers(changed: bool) -> None:
    value, d, g = torch.randn(3, 4, 5, generator=seeded(), dtype=torch.float64)
    mask = torch.rand(4, 5, generator=seeded(1)) < 0.5
    numbers = mask.double().requires_grad_()
    oracle = d.clone().requires_grad_()
    expected = (value + oracle if changed else value) * numbers - value
    expected.backward(g)
    scores, change = torch.zeros(4, 5).double().requires_grad_(), d.clone().requires_grad_()
    found = straight(scores, mask, value, change if changed else None)
    found.backward(g)
    assert torch.equal(value + found, (value + d if changed else value) * mask)
    assert near(scores.grad, numbers.grad) and numbers.grad[~mask].abs().min() > 0
    assert near(change.grad, oracle.grad) if changed else change.grad is None


# --- diff pruning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (-0.1, 1.1), (-0.5, 2.0)])
def test_gates_are_open_as_often_as_their_chance_says(low: float, high: float) -> None:
    draws = 200_000
    for alpha in (-2.0, 0.0, 1.0, 3.0):
        u = torch.rand(draws, generator=seeded())
        expected = 1 / (1 + math.exp(-(alpha - math.log(-low / high))))
        open_ = (concrete.opened(torch.full((draws,), alpha), u, low, high) > 0).double().mean()
        assert abs(float(open_) - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)
        assert float(concrete.chance(torch.tensor(alpha), low, high)) == pytest.approx(expected)


@pytest.mark.parametrize("structured", [True, False])
def test_gradients_of_gates_are_those_written_out_in_the_paper(structured: bool) -> None:
    delta = attached(f"diff(structured={structured}, start=0.3)", noise=0.5)
    calm(delta.model)
    made: dict[Any, tuple[Tensor, ...]] = {}

    def gate(alpha: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.clamp(1e-4, 1 - 1e-4)
        s = torch.sigmoid(u.log() - (1 - u).log() + alpha)
        wide = s * 3.0 - 1.5
        return wide.clamp(0, 1), ((wide > 0) & (wide < 1)) * 3.0 * s * (1 - s)

    def change(value: Tensor, name: str, unit: Any) -> Tensor:
        z, dz = gate(unit.own(f"{name}:alpha").detach(), unit.draws[f"{name}:alpha"])
        z_g, dz_g = torch.tensor(1.0), torch.tensor(0.0)
        if structured:
            z_g, dz_g = gate(unit.own(f"{name}:group").detach(), unit.draws[f"{name}:group"])
        made[unit, name] = z, dz, z_g, dz_g
        return value + z_g * z * unit.own(name).detach()

    with Course(delta.model, seed=3) as course:
        course.before_step(0, 4)
        backward(delta)
        shares = []
        for (unit, name), g in by_hand(delta, change).items():
            z, dz, z_g, dz_g = made[unit, name]
            w = unit.own(name).detach()
            assert near(grad(unit, name), g * z * z_g)
            assert near(grad(unit, f"{name}:alpha"), g * w * z_g * dz)
            if structured:
                assert near(grad(unit, f"{name}:group"), (g * w * z).sum() * dz_g)
            shares += [float(((z > 0) & (z < 1)).float().mean())]
        course.after_step()
    assert 0.1 < np.mean(shares) < 0.9


def test_the_penalty_is_the_expected_number_of_open_gates() -> None:
    delta = attached("diff(l0=0.01, start=0.0)", noise=1.0)
    alphas = [t for n, t in delta.tree.named().items() if n.endswith((":alpha", ":group"))]
    flat = torch.cat([a.detach().reshape(-1) for a in alphas])
    expected = torch.sigmoid(flat)
    with Course(delta.model) as course:
        calm(delta.model)
        course.before_step(0, 4)
        course.after_backward()
        found = torch.cat([a.grad.reshape(-1) for a in alphas])
        assert near(found, 0.01 * expected * (1 - expected))
        drawn = [unit.draws for unit in delta.tree.units if unit.spec.kind == "diff"]
        u = torch.cat([draws[n].reshape(-1) for draws in drawn for n in draws])
        assert len(u) == len(flat)
        shuffled = torch.cat(
            [unit.own(n).detach().reshape(-1) for unit in delta.tree.units
             if unit.spec.kind == "diff" for n in unit.draws]
        )  # fmt: skip
        opened = int((concrete.opened(shuffled, u, -1.5, 1.5) > 0).sum())
        spread = math.sqrt(float((expected * (1 - expected)).sum()))
        assert abs(opened - float(expected.sum())) < 4 * spread


def test_no_difference_is_no_change_whatever_the_gates() -> None:
    delta = dt.attach(BERT.build(0), "diff(start=0.0)")
    for name, tensor in delta.tree.named().items():
        if name.endswith(":alpha"):
            tensor.data.normal_(generator=seeded())
    plain = BERT.run(calm(BERT.build(0)))
    with Course(delta.model) as course, torch.no_grad():
        calm(delta.model)
        for step in range(2):
            course.before_step(step, 10)
            assert distance(BERT.run(delta.model), plain) <= 1e-6


@pytest.mark.parametrize(
    "text", ["diff(start=0.0)", "masking(mode='bernoulli', sparsity=0.4, skip=0)"]
)
def test_gates_are_drawn_once_for_a_step_and_replayed_in_checkpointing(text: str) -> None:
    delta = attached(text)
    model: Any = calm(delta.model)

    def seen(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        with Course(model, seed) as course:
            course.before_step(step, 10)
            first, second = BERT.run(model), BERT.run(model)
            assert torch.equal(first, second)
            backward(delta)
            course.after_step()
            return first.detach(), torch.cat([p.grad.reshape(-1) for p in delta.parameters()])

    plain = seen(0)
    assert torch.equal(seen(0)[0], plain[0])
    assert not torch.equal(seen(1)[0], plain[0]) and not torch.equal(seen(0, 1)[0], plain[0])
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = seen(0)
        assert torch.equal(again[0], plain[0]) and distance(again[1], plain[1]) <= 1e-5
    model.gradient_checkpointing_disable()
    with torch.no_grad():
        assert torch.equal(BERT.run(model), BERT.run(model.eval()))


def drive(delta: dt.Delta, steps: int, until: int | None = None, start: int = 0) -> None:
    """Trains on mean squares of outputs, step by step."""
    model = delta.model.train()
    with Course(model, seed=1) as course:
        optimiser = torch.optim.AdamW(
            optim.groups(delta.parameters(), course, 0.01, 0.1), betas=(0.9, 0.95)
        )
        for step in range(start, until or steps):
            course.before_step(step, steps)
            BERT.run(model, step % 3).square().mean().backward()
            course.after_backward()
            optimiser.step()
            optimiser.zero_grad()
            course.after_step()
    model.eval()


def changes(delta: dt.Delta) -> Tensor:
    """What merging adds to every changed parameter, end to end."""
    return torch.cat(
        [
            change.detach().reshape(-1)
            for unit in delta.tree.units
            if unit.spec.kind != "head"
            for *_, change in unit.weights(delta.model)
        ]
    )


def test_pruning_keeps_the_largest_exactly_and_nothing_else_moves_afterwards() -> None:
    delta = dt.attach(BERT.build(0), "diff(density=0.05, start=0.5, rate=5.0, l0=1e-4)", seed=0)
    drive(delta, 12, until=6)
    before = changes(delta)
    k = int(0.05 * before.numel())
    assert k < int((before != 0).sum())
    kept = torch.zeros_like(before, dtype=torch.bool)
    kept[before.abs().sort(descending=True, stable=True).indices[:k]] = True
    with Course(delta.model, seed=1) as course:
        course.before_step(6, 12)
    assert torch.equal(changes(delta), torch.where(kept, before, 0.0))
    drive(delta, 12, start=6)
    after = changes(delta)
    assert torch.equal(after[~kept], torch.zeros(int((~kept).sum())))
    assert int((after != 0).sum()) == k and not torch.equal(after[kept], before[kept])
    assert f"{k:,} entries left" in repr(delta)
    alphas = [p for n, p in delta.tree.named().items() if ":alpha" in n]
    assert all(p.grad is None for p in alphas)


def test_any_vector_keeps_within_the_budget_once_pruned() -> None:
    delta = attached("diff(density=0.05)")
    assert "not pruned yet" in repr(delta)
    with pytest.raises(AttachError, match="cannot fold before it is pruned; train it to the end"):
        delta.fold()
    drive(delta, 4)
    delta.load_vector(torch.ones(delta.layout.size))
    found = changes(delta)
    assert int((found != 0).sum()) == int(0.05 * found.numel())
    assert torch.equal(found[found != 0], torch.ones(int(0.05 * found.numel())))


def test_folded_differences_are_sparse_values_at_rising_positions() -> None:
    delta = attached("diff(density=0.05, where='attn, ffn')[1:]")
    drive(delta, 6)
    found, acting = changes(delta), BERT.run(delta.model)
    delta.fold()
    k = int(0.05 * found.numel())
    assert str(delta.spec) == f"sparse(count={k}, where='attn, ffn')[1:]"
    tensors = delta.tensors()
    index = tensors["sparse.shared:all.index"].long()
    assert torch.equal(index, (found != 0).nonzero().flatten())
    assert torch.equal(tensors["sparse.shared:all.values"], found[index])
    assert delta.count(head=False) == k
    assert torch.equal(BERT.run(delta.model), acting)
    drive(delta, 2)


def test_a_pruned_delta_trains_on_with_its_mask() -> None:
    delta = attached("diff(density=0.05)")
    drive(delta, 4)
    kept = changes(delta) != 0
    drive(delta, 8)
    assert torch.equal(changes(delta) != 0, kept)


# --- masking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["masking", "masking(mode='sign')", "masking(sparsity=0.3)"])
def test_the_initial_sparsity_is_what_was_asked_for(text: str) -> None:
    share = 0.3 if "0.3" in text else 0.05
    model = nn.Sequential(nn.Linear(200, 300, bias=False))
    text = text.rstrip(")") + (", " if "(" in text else "(") + "where='0')"
    delta = dt.attach(model, text, seed=0)
    with torch.no_grad():
        seen = model(torch.eye(200)).T
    off = (seen == 0).double().mean()
    assert abs(float(off) - share) < 4 * math.sqrt(share * (1 - share) / seen.numel())
    assert torch.equal(seen[seen != 0], model[0].weight[seen != 0])
    scores = delta.vector()
    assert float(scores.min()) >= -0.02 and float(scores.max()) <= (0.02 + 0.01) / share - 0.02


@pytest.mark.parametrize("mode", ["threshold", "sign", "bernoulli"])
def test_every_score_gets_the_gradient_of_its_weight(mode: str) -> None:
    delta = attached(f"masking(mode='{mode}', sparsity=0.4, where='attn, ffn')", noise=0.7)
    calm(delta.model)
    masks: dict[Any, Tensor] = {}

    def change(value: Tensor, name: str, unit: Any) -> Tensor:
        m = unit.own(f"{name}:scores").detach()
        mask = m > (0.01 if mode == "threshold" else 0.0)
        if mode == "bernoulli":
            mask = unit.draws[f"{name}:scores"] < torch.sigmoid(m)
        masks[unit, name] = mask
        return value * mask

    with Course(delta.model) as course:
        course.before_step(0, 2)
        backward(delta)
        for (unit, name), g in by_hand(delta, change).items():
            value = delta.model.get_submodule(unit.site.path)._parameters[name]
            expected = g * value
            if mode == "sign":
                expected = expected * (unit.own(f"{name}:scores").abs() < 1)
            assert near(grad(unit, f"{name}:scores"), expected)
        course.after_step()
    off = torch.cat([~mask.reshape(-1) for mask in masks.values()]).float().mean()
    assert 0.2 < float(off) < 0.8


def test_bernoulli_masks_are_drawn_with_the_sigmoid_of_their_scores() -> None:
    model = nn.Sequential(nn.Linear(400, 500, bias=False))
    delta = dt.attach(model, "masking(mode='bernoulli', sparsity=0.2, where='0')")
    assert torch.allclose(torch.sigmoid(delta.vector()), torch.tensor(0.8))
    x = torch.eye(400)
    with Course(model) as course, torch.no_grad():
        course.before_step(0, 5)
        off = float((model.train()(x) == 0).double().mean())
        course.after_step()
        assert abs(off - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 200_000)
        assert torch.equal(model(x), model.eval()(x))
        assert torch.equal(model(x), x @ model[0].weight.T)


def test_counts_are_those_of_the_paper_on_bert_base() -> None:
    plan = dt.plan(meta_model("bert-base"), "masking")
    assert plan.count() == 71_368_704 == 10 * (4 * 768**2 + 2 * 768 * 3072) + 768**2
    assert len(plan.steps) == 61 and plan.steps[-1].site.path == "pooler.dense"
    bits = dt.plan(meta_model("bert-base"), "mask")
    assert bits.count() == 0
    assert sum(param.shape[0] for _, param in bits.params()) == 8_921_088
    assert {param.dtype for _, param in bits.params()} == {torch.uint8}
    assert dt.plan(meta_model("bert-base"), "movement").count() == 2 * 84_934_656
    whole = sum(p.numel() for p in meta_model("bert-base").parameters())
    tensors = sum(1 for _ in meta_model("bert-base").parameters())
    assert dt.plan(meta_model("bert-base"), "diff").count() == 2 * whole + tensors
    assert dt.plan(meta_model("bert-base"), "diff(structured=False)").count() == 2 * whole


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "t5", "torch-encoder"])
@pytest.mark.parametrize("text", ["masking(skip=0)", "masking(mode='bernoulli', skip=0)"])
def test_folded_masks_are_bits_and_act_the_same(name: str, text: str, tmp_path: Path) -> None:
    case = ZOO[name]
    delta = dt.attach(case.build(0), text, seed=0)
    size = delta.count(head=False)
    delta.load_vector(torch.randn(delta.layout.size, generator=seeded()))
    note = repr(delta).rpartition("on, ")[2]
    with torch.no_grad():
        acting = case.run(delta.model)
        delta.fold()
        assert delta.spec == dt.parse("mask(skip=0)") and delta.count(head=False) == 0
        assert distance(case.run(delta.model), acting) <= 1e-6
        assert repr(delta).rpartition("on, ")[2] == note and f"of {size:,} weights kept" in note
        bits = {n: t for n, t in delta.tensors().items() if n.endswith(":bits")}
        assert size / 8 <= sum(t.numel() for t in bits.values()) < size / 8 + len(bits)
        acting = case.run(delta.model)
        loaded = dt.load(delta.save(tmp_path / "mask"), case.build(0))
        assert loaded.layout == delta.layout
        assert torch.equal(case.run(loaded.model), acting)
        assert distance(case.run(delta.merge().model), acting) <= 1e-6
        for path, own, _ in places(delta):
            merged = delta.model.get_submodule(path)._parameters[own]
            value = case.build(0).get_submodule(path)._parameters[own]
            assert torch.equal(merged[merged != 0], value[merged != 0])


def test_a_delta_without_trained_tensors_is_a_vector_of_length_0() -> None:
    case = ZOO["gpt2"]
    delta = dt.attach(case.build(0), "mask(where='attn, ffn')")
    assert delta.vector().shape == (0,) and len(delta.layout) == 0 and delta.count() == 0
    assert delta.load_vector(delta.vector()) is delta and delta.parameters() == []
    with torch.no_grad():
        plain = case.run(case.build(0))
        assert torch.equal(case.run(delta.model), plain)  # attached afresh it masks nothing
        assert torch.equal(case.output(delta.call(delta.vector(), **case.batch(0))), plain)
        case.run(delta.model.train())
    assert "0 trainable" in repr(delta) and "mask" in delta._repr_html_()
    with pytest.raises(TrainError, match=r"`mask\(where=.*has no trained tensors"):
        train(delta.model, None, TASK, delta, settings(), objective=Digits())


def test_the_head_can_be_masked_instead_of_trained() -> None:
    delta = dt.attach(BERT.build(0), "masking(where='attn[1:], head')", head=False, seed=0)
    kinds = {unit.site.path for unit in delta.tree.units}
    assert "classifier" in kinds and not any("layer.0." in path for path in kinds)
    assert all(name.endswith(":scores") for name in delta.tree.named())


# --- movement pruning -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.15, 0.03, 0.5, 1.0])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0.1, 0.2), (0.0, 0.0), (0.35, 0.5)])
def test_the_schedule_is_the_cubic_of_the_paper(
    keep: float, warmup: float, cooldown: float
) -> None:
    steps, size = 40, 1000
    spec = Movement(keep=keep, warmup=warmup, cooldown=cooldown)
    soft = Movement(mode="soft", threshold=0.1, warmup=warmup, cooldown=cooldown)
    begin, end = warmup * steps, steps - cooldown * steps
    counts = [spec.level(step, steps, size) for step in range(steps + 1)]
    taus = [soft.level(step, steps, size) for step in range(steps + 1)]
    for step, (count, tau) in enumerate(zip(counts, taus, strict=True)):
        part = (1 - (step - begin) / (end - begin)) ** 3
        v = 1.0 if step <= begin else keep if step > end else keep + (1 - keep) * part
        assert count in (int(v * size), int(v * size + 1e-9), int(v * size - 1e-9))
        goal = 0.0 if step <= begin else 0.1 if step > end else 0.1 - 0.1 * part
        assert tau == pytest.approx(goal, abs=1e-12)
        assert v < 1.0 or count == size
        assert v > keep or count == int(keep * size)
    assert counts[0] == size and counts[-1] == int(keep * size) and taus[0] == 0.0
    assert counts == sorted(counts, reverse=True) and taus == sorted(taus)
    assert cubic(5, 5, 9) == 1.0 and cubic(9, 5, 9) == cubic(99, 5, 9) == 0.0


def test_exactly_so_many_weights_of_each_matrix_are_left_in_every_step() -> None:
    delta = attached("movement(keep=0.15, warmup=0.2, cooldown=0.2)")
    plain = {(path, name): BERT.build(0).get_submodule(path)._parameters[name].detach()
             for path, name, _ in places(delta)}  # fmt: skip
    spec: Any = delta.spec
    for step in range(10):
        drive(delta, 10, until=step + 1, start=step)
        for path, name, unit in places(delta):
            value = plain[path, name]
            (change,) = [c for *_, own, c in unit.weights(delta.model) if own == name]
            weight, scores = value + change.detach(), unit.own(f"{name}:scores").detach()
            count = spec.level(step + 1, 10, value.numel())
            expected = top(scores, count)
            assert int(expected.sum()) == count == int((weight != 0).sum())
            assert torch.equal(weight != 0, expected)
            # where nothing is pruned the model is dense
            assert step + 1 > 2 or count == value.numel()
    assert delta.count(head=False) == 2 * 3584
    assert f"{sum(int(0.15 * v.numel()) for v in plain.values()):,} of 3,584" in repr(delta)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_scores_and_weights_get_the_gradients_of_the_paper(mode: str) -> None:
    delta = attached(f"movement(mode='{mode}', threshold=0.5, warmup=0.0, cooldown=0.5)", noise=0.5)
    masks: dict[Any, Tensor] = {}

    def change(value: Tensor, name: str, unit: Any) -> Tensor:
        s = unit.own(f"{name}:scores").detach()
        order = s.reshape(-1).argsort(descending=True, stable=True)
        mask = torch.zeros(s.numel(), dtype=torch.bool)
        mask[order[: int(0.15 * s.numel())]] = True
        masks[unit, name] = mask.view(s.shape) if mode == "hard" else torch.sigmoid(s) > 0.5
        return (value + unit.own(name).detach()) * masks[unit, name]

    with Course(delta.model) as course:
        calm(delta.model)
        course.before_step(8, 10)
        backward(delta)
        for (unit, name), g in by_hand(delta, change).items():
            value = delta.model.get_submodule(unit.site.path)._parameters[name]
            mask = masks[unit, name]
            d_scores = grad(unit, f"{name}:scores")
            assert near(d_scores, g * (value + unit.own(name)))
            assert near(grad(unit, name), g * mask)
            assert float(d_scores[~mask].abs().max()) > 0
            assert 0.1 < float(mask.float().mean()) < 0.9


def test_equal_scores_keep_the_first_of_a_matrix_and_never_none() -> None:
    for text, share in (("movement(keep=0.25)", 0.25), ("movement(mode='soft')", 0.005)):
        delta = dt.attach(BERT.build(0), text)
        if "soft" in text:
            for name, tensor in delta.tree.named().items():
                if name.endswith(":scores"):
                    tensor.data.fill_(-9.0)
        with Course(delta.model) as course:
            course.before_step(99, 100)
        for _, name, unit in places(delta):
            found = delta.spec.mask(unit, name, ()).reshape(-1)  # type: ignore[attr-defined]
            kept = int(share * found.numel()) + ("soft" in text)
            assert torch.equal(found, torch.arange(found.numel()) < kept)


def test_the_soft_penalty_follows_the_threshold() -> None:
    delta = attached("movement(mode='soft', l1=3.0, threshold=0.2, warmup=0.0, cooldown=0.25)")
    with Course(delta.model) as course:
        for step in (0, 2, 7):
            for parameter in delta.parameters():
                parameter.grad = None
            course.before_step(step, 8)
            course.after_backward()
            scores = [
                unit.own(f"{name}:scores").detach().requires_grad_()
                for _, name, unit in places(delta)
            ]
            weight = 3.0 * {0: 0.0, 2: 1 - (1 - 2 / 6) ** 3, 7: 1.0}[step]
            loss = weight * sum(torch.sigmoid(s).sum() / s.numel() for s in scores) / len(scores)
            loss.backward()
            for (_, name, unit), s in zip(places(delta), scores, strict=True):
                assert near(grad(unit, f"{name}:scores"), s.grad)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "t5", "torch-encoder"])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_what_is_left_folds_into_bits_and_values(name: str, mode: str, tmp_path: Path) -> None:
    case = ZOO[name]
    delta = dt.attach(case.build(0), f"movement(mode='{mode}', threshold=0.5)", seed=0)
    delta.load_vector(torch.randn(delta.layout.size, generator=seeded()))
    with Course(delta.model) as course:
        course.before_step(9, 10)
    note = repr(delta).rpartition("on, ")[2]
    with torch.no_grad():
        acting = case.run(delta.model)
        delta.fold()
        count = delta.count(head=False)
        assert delta.spec == dt.parse(f"pruned(count={count})")
        assert repr(delta).rpartition("on, ")[2] == note and note.startswith(f"{count:,} of ")
        assert distance(case.run(delta.model), acting) <= 1e-6
        acting = case.run(delta.model)
        loaded = dt.load(delta.save(tmp_path / "pruned"), case.build(0))
        assert torch.equal(case.run(loaded.model), acting)
        assert distance(case.run(delta.merge().model), acting) <= 1e-6
        merged = [
            delta.model.get_submodule(path)._parameters[own] for path, own, _ in places(delta)
        ]
        assert sum(int((weight != 0).sum()) for weight in merged) == count
    delta.unmerge()
    with pytest.raises(AttachError, match="already in its plain form"):
        delta.fold()


def test_what_is_left_can_be_tuned_on() -> None:
    delta = attached("movement")
    drive(delta, 5)
    delta.fold()
    left = changes(delta)
    drive(delta, 2)
    pruned = torch.cat([
        ~delta.tree.units[0].spec.mask(unit, name, unit.site.shape).reshape(-1)  # type: ignore
        for _, name, unit in places(delta)
    ])  # fmt: skip
    assert torch.equal(changes(delta)[pruned], left[pruned])
    assert float((changes(delta)[~pruned] != left[~pruned]).float().mean()) > 0.9


# --- training -------------------------------------------------------------------------------------


def run(text: str, **extra: Any) -> tuple[dt.Delta, TrainResult]:
    model = BERT.build(0)
    delta = dt.attach(model, text, seed=0)
    chosen = settings(learning_rate=0.02, num_train_epochs=3, eval_steps=2, max_grad_norm=0)
    return delta, train(model, None, TASK, delta, chosen, objective=Digits(), **extra)


@every_run
def test_trains_to_the_end_of_its_stages_and_folds(text: str) -> None:
    seen: list[bool] = []

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            seen.append(all(part.settled(units) for part, units in delta.tree.members()))

    model = BERT.build(0)
    delta = dt.attach(model, text, seed=0)
    start = delta.vector()
    chosen = settings(learning_rate=0.02, num_train_epochs=3, eval_steps=2, max_grad_norm=0)
    result = train(model, None, TASK, delta, chosen, objective=Digits(), on_event=watch)
    assert not torch.equal(delta.vector(), start)
    assert seen == sorted(seen) and seen[-1] and seen[0] == ("masking" in text)
    assert result.best_step is not None and seen[result.best_step - 1]
    assert all(part.settled(units) for part, units in delta.tree.members())
    assert not any("draws" in unit.__dict__ for unit in delta.tree.units)
    with torch.no_grad():
        acting = BERT.run(model)
        delta.fold()
        assert distance(BERT.run(model), acting) <= 1e-6
    if text.startswith("diff"):
        assert delta.count(head=False) == int(0.1 * sum(p.numel() for p in own(BERT.build(0))))
    if "movement(rate" in text:
        sizes = [p.numel() for n, p in BERT.build(0).named_parameters()
                 if ".layer." in n and p.ndim == 2]  # fmt: skip
        assert delta.count(head=False) == sum(int(0.15 * size) for size in sizes)


def own(model: nn.Module) -> list[Tensor]:
    return [p for n, p in model.named_parameters() if not n.startswith("classifier")]


@every_run
@pytest.mark.parametrize("killed", [10, 11])
def test_resumes_bit_for_bit_in_every_stage(text: str, killed: int, tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step == killed:
            raise KeyboardInterrupt

    straight_on, whole = run(text)
    with pytest.raises(KeyboardInterrupt):
        run(text, folder=tmp_path, on_event=kill)
    resumed, parts = run(text, folder=tmp_path)
    assert parts.losses == whole.losses and parts.best_step == whole.best_step
    for name, tensor in straight_on.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor), name


@demanding
def test_a_plain_loop_is_refused(text: str) -> None:
    delta = attached(text)
    with pytest.raises(TrainError, match=f"{delta.spec.kind}.* asks for more"):
        BERT.run(delta.model.train())
    with torch.no_grad():
        BERT.run(delta.model)
    BERT.run(delta.model.eval())
    if text.startswith("masking"):
        plain = attached("masking(skip=0)")
        BERT.run(plain.model.train())


def test_scores_and_gates_have_learning_rates_of_their_own() -> None:
    for text, ending, factor in (
        ("diff", (":alpha", ":group"), 2000.0), ("movement", (":scores",), 1e-2 / 3e-5),
    ):  # fmt: skip
        delta = attached(text)
        with Course(delta.model) as course:
            groups = optim.groups(delta.parameters(), course, 5e-5, 0.1)
        names = {id(p): name for name, p in delta.tree.named().items()}
        for group in groups:
            for parameter in group["params"]:
                mine = names[id(parameter)].endswith(ending)
                assert group["lr"] == pytest.approx(5e-5 * (factor if mine else 1.0))
                assert group["weight_decay"] == (0.1 if not mine and parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("name", ["diff", "movement"])
def test_trains_under_the_hugging_face_trainer_and_resumes(name: str, tmp_path: Path) -> None:
    def trained(folder: str, resume: str | None = None) -> dt.Delta:
        delta = dt.attach(BERT.build(0), RUNS[name], seed=0)
        with Course(delta.model) as course:
            groups = optim.groups(delta.parameters(), course, 1e-2, 0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=8, save_steps=3, learning_rate=1e-2,
            per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            delta.model, arguments, train_dataset=rows(), callbacks=[DeltaCallback(delta)],
            optimizers=(torch.optim.AdamW(groups), None),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return delta

    one = trained("one")
    two = trained("two", str(tmp_path / "one" / "checkpoint-3"))
    for key, tensor in one.tensors().items():
        assert torch.equal(two.tensors()[key], tensor), key
    assert all(part.settled(units) for part, units in one.tree.members())
    one.model.eval()
    acting = BERT.run(one.model)
    assert distance(BERT.run(one.fold().model), acting) <= 1e-6


@every_run
def test_compiled_steps_are_the_eager_ones_in_one_graph(text: str) -> None:
    delta = attached(text if "skip" in text else text.replace(")", ", where='attn.q')"), noise=0.3)
    model = calm(delta.model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with Course(model) as course:
        for step in (0, 2, 8):
            course.before_step(step, 10)
            backward(delta)
            expected = gradient(delta)
            for parameter in delta.parameters():
                parameter.grad = None
            compiled(**BERT.batch(0)).logits.square().mean().backward()
            assert distance(gradient(delta), expected) <= 1e-5
            course.after_step()


def test_a_copy_reads_its_own_state() -> None:
    delta = attached("movement(warmup=0.0)", noise=0.5)
    level = next(n for n in delta.tensors() if n.endswith(":level"))
    with Course(delta.model) as course:
        for step in range(5):
            course.before_step(step, 10)
    BERT.run(delta.model)
    for writes in range(12):
        twin = dt.deltas(copy.deepcopy(delta.model))["delta"]
        before = twin.tree.stored()[level].item()
        for value in range(writes):
            twin.tree.stored()[level].fill_(100 + value)
        unit = next(u for u in twin.tree.units if "weight:level" in u._buffers)
        assert unit.state("weight:level") == (99 + writes if writes else before)
    with torch.inference_mode():
        other = dt.attach(BERT.build(0), "movement")
        other.tree.stored()[level].fill_(7)
        assert next(iter(other.tree.units)).state("weight:level") == 7


@pytest.mark.parametrize(
    "spelled",
    [
        "diff(density=0.005, learn=0.5, l0=1.25e-7, structured=True, rate=2000.0, start=5.0)",
        "masking(mode='threshold', sparsity=0.05, threshold=0.01, spread=0.02, skip=2)",
        "fish(examples=1024)",
        "child(mode='F', share=0.3, clip=1.0)",
        "movement(mode='hard', keep=0.15, threshold=0.1, l1=400.0, warmup=0.1, cooldown=0.2)",
        "lora(rank=8, alpha=16.0, dropout=0.0, scaling='linear', where='attn.q, attn.v')",
        "intrinsic(dimension=20000, variant='said', projection='fastfood', gradient='exact')",
        "mpo(cores=5, where='attn, ffn')",
    ],
)
def test_defaults_are_those_of_the_released_code(spelled: str) -> None:
    """Spelled out, none of them is written down: `str` leaves out what is the default."""
    assert str(dt.parse(spelled)) == spelled.partition("(")[0]


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("diff(density=0.0)", r"density=0.0.*\(0, 1\)"),
        ("diff(density=1.0)", r"density=1.0.*\(0, 1\)"),
        ("diff(learn=0.0)", r"learn=0.0.*\(0, 1\)"),
        ("diff(learn=1.5)", r"learn=1.5.*\(0, 1\)"),
        ("diff(l0=-1.0)", "`l0` must be 0 or more"),
        ("diff(rate=0.0)", "`rate` must be above 0"),
        ("diff(density=1e-5)", r"leaves none of the 5,\d+ entries .*use a `density` of 0.0001"),
        ("masking(sparsity=0.0)", r"sparsity=0.0.*\(0, 1\)"),
        ("masking(sparsity=1.0)", r"sparsity=1.0.*\(0, 1\)"),
        ("masking(spread=0.0)", "`spread` must be above 0"),
        ("masking(threshold=-0.1)", "`threshold` must be above -`spread`"),
        ("masking(mode='soft')", "not one of `threshold`, `sign`, `bernoulli`"),
        ("mask(skip=-1)", "`skip` must be 0 or more"),
        ("movement(keep=0.0)", r"keep=0.0.*\(0, 1\]"),
        ("movement(keep=1.2)", r"keep=1.2.*\(0, 1\]"),
        ("movement(keep=0.001)", "leaves none of the 256 entries of `bert.*query.weight`"),
        ("movement(threshold=1.0)", r"threshold=1.0.*\(0, 1\)"),
        ("movement(warmup=1.0)", r"warmup=1.0.*\[0, 1\)"),
        ("movement(warmup=0.5, cooldown=0.5)", r"cooldown=0.5.*\[0, 1 - `warmup`\)"),
        ("movement(l1=-1.0)", "`l1` must be 0 or more"),
        ("pruned(count=0)", "`count` must be 1 or more"),
        ("pruned(count=4000)", "selects 4,000 of the 3,584 entries .*choose 1 to 3,584"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        dt.attach(BERT.build(0), text)


def test_too_few_blocks_are_told() -> None:
    with pytest.raises(WhereError, match=r"lowest 2 blocks .*has 2 in `encoder`; use a smaller"):
        dt.attach(BERT.build(0), "masking")
    with pytest.raises(WhereError, match=r"has no blocks.*name the matrices in `where`"):
        dt.attach(ZOO["torch-mlp"].build(0), "masking")
    paths = {step.site.path for step in dt.plan(BERT.build(0), "masking(skip=1)", head=False).steps}
    assert "bert.pooler.dense" in paths and len(paths) == 7
    assert not any(".layer.0." in path for path in paths)
    narrow = dt.plan(BERT.build(0), "masking(skip=0)[1:]", head=False)
    assert {step.site.layer for step in narrow.steps} == {1}


def test_training_too_short_to_learn_gates_is_refused() -> None:
    delta = attached("diff")
    with (
        Course(delta.model) as course,
        pytest.raises(TrainError, match="no step to learn in, of 1"),
    ):
        course.before_step(0, 1)
    assert issubclass(TrainError, DeltuneError)
