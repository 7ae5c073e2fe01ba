"""The learned subspace. Oracles: the loss written out with autograd alone, the SVD bound, a planted
space, and the published sizes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deltune as dt
from deltune.errors import SubspaceError, TrainError
from deltune.planning import resolve
from deltune.sites.discover import discover
from deltune.subspace import learned
from deltune.subspace.learned import Losses, Maps, _shares, _step, fit
from deltune.subspace.linear import bound
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Subspace
from shapes import meta_model
from test_subspace_linear import TASKS, planted

FAST = FitSettings(dimension=3, steps=1500, learning_rate=3e-3, weight=1.0, std=0.1)


def small(noise: float = 0.0, tasks: int = 12) -> Solutions:
    """A planted space of three numbers, each solution of length about one."""
    solutions, _, _ = planted(3, noise)
    rows = {n: (r / r.norm(dim=1).mean()).float()[:tasks] for n, r in solutions.each()}
    starts = {n: s.float() for n, s in solutions.starts.items()}
    return Solutions.of(TASKS[:tasks], rows, starts)


@pytest.mark.parametrize(("tasks", "task"), [(12, 4), (1, 0)])
def test_a_step_has_the_gradients_of_the_whole_loss(tasks: int, task: int) -> None:
    """The parts are taken one method after the other; together they are one loss."""
    torch.manual_seed(0)
    solutions = small(tasks=tasks)
    settings = FitSettings(dimension=3, steps=1, std=0.3)
    targets = {n: torch.randn_like(s) for n, s in solutions.starts.items()}

    def task_loss(name: str, vector: torch.Tensor) -> torch.Tensor:
        return (vector - targets[name]).tanh().square().mean()

    found = []
    for whole in (False, True):
        draw = torch.Generator().manual_seed(1)
        maps = {n: Maps(len(s), settings, draw) for n, s in solutions.starts.items()}
        shares = _shares(3, torch.Generator().manual_seed(2), "released")
        rows = {n: read([task])[0] for n, read in solutions.read.items()}
        codes = {n: maps[n].down(rows[n]) for n in maps}
        rest = 10.0 * sum((maps[n].up(codes[n]) - rows[n]).norm() for n in maps)
        code = sum(share * codes[n] for share, n in zip(shares, maps, strict=True))
        assert isinstance(rest, torch.Tensor) and isinstance(code, torch.Tensor)
        if whole:
            loss = sum(task_loss(n, solutions.starts[n] + maps[n].up(code)) for n in maps)
            assert isinstance(loss, torch.Tensor)
            (loss + rest).backward()
            total = float(loss.detach())
        else:
            total = _step(solutions.starts, maps, code, rest, task_loss)
        found.append((total, [p.grad for one in maps.values() for p in one.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_shares_are_drawn_one_after_the_other() -> None:
    """Means 1/2, 1/4, 1/4 for three, not uniform on the simplex."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.tensor([_shares(3, draw, "released") for _ in range(20000)])
    assert (drawn >= 0).all() and torch.allclose(drawn.sum(dim=1), torch.ones(20000))
    assert drawn.mean(dim=0).tolist() == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert drawn[:, 0].var() == pytest.approx(1 / 12, abs=0.002)
    assert drawn[:, 1].square().mean() == pytest.approx(1 / 9, abs=0.003)  # E[(1-a)^2] E[u^2]


def test_uniform_shares_are_those_of_a_flat_dirichlet_distribution() -> None:
    """Means 1/T, variances (T - 1) / (T^2 (T + 1)), covariances -1 / (T^2 (T + 1)), and each one
    below x with probability 1 - (1 - x)^(T - 1)."""
    for count in (2, 3, 5):
        draw = torch.Generator().manual_seed(0)
        drawn = torch.tensor([_shares(count, draw, "uniform") for _ in range(20000)])
        assert (drawn >= 0).all() and torch.allclose(drawn.sum(dim=1), torch.ones(20000))
        wide = count**2 * (count + 1)
        expected = (count * torch.eye(count) - torch.ones(count, count)) / wide
        torch.testing.assert_close(drawn.T.cov(), expected, atol=0.003, rtol=0)
        assert drawn.mean(dim=0).tolist() == pytest.approx([1 / count] * count, abs=0.01)
        for x in (0.1, 0.3, 0.7):
            below = (drawn < x).double().mean(dim=0).tolist()
            assert below == pytest.approx([1 - (1 - x) ** (count - 1)] * count, abs=0.015)
    assert _shares(1, torch.Generator(), "uniform") == _shares(1, torch.Generator(), "released")


def test_the_draw_of_the_shares_decides_what_is_learned() -> None:
    """With a task's loss; and what was learned before there was a choice keeps its identity."""
    settings, solutions = dataclasses.replace(FAST, steps=5), small()

    def losses(task: int, step: int) -> Losses:
        return lambda name, vector: vector.square().mean()

    even = dataclasses.replace(settings, interpolation="uniform")
    one, two = (fit(solutions, each, losses) for each in (settings, even))
    code = torch.ones(3)
    assert not torch.equal(one.decode("lora", code), two.decode("lora", code))
    assert "interpolation" not in settings.to_json()
    assert even.to_json() == {**settings.to_json(), "interpolation": "uniform"}
    assert one.about["interpolation"] == "released" and two.about["interpolation"] == "uniform"


@pytest.mark.parametrize("activation", ["tanh", "none"])
def test_a_planted_space_is_learned(activation: str) -> None:
    solutions = small()
    settings = dataclasses.replace(FAST, activation=activation, distance="squared")
    space = fit(solutions, settings)
    for errors in space.reconstruction(solutions).values():
        assert errors.mean() < 0.1  # from 1: a constant rate stays so far from the end
    assert space.about["found"] == "learned" and space.about["activation"] == activation


def test_a_linear_encoder_comes_near_the_bound_and_nothing_below_it() -> None:
    solutions = small(noise=2.0)
    settings = dataclasses.replace(FAST, activation="none", distance="squared", steps=3000)
    space, least = fit(solutions, settings), bound(solutions, 3)
    for name, rows in solutions.each():
        again = space.decode(name, space.encode(name, rows)) - space.starts[name]
        error = float((rows - again).norm() / rows.norm())
        assert float(least[name]) * (1 - 1e-6) <= error <= 1.01 * float(least[name])


def test_the_task_s_loss_shapes_what_every_method_decodes() -> None:
    """The loss asks for a point off the solutions: with it interpolated codes decode nearer."""
    solutions = small()
    wanted = {n: torch.randn(len(s), generator=torch.Generator().manual_seed(3))
              for n, s in solutions.starts.items()}  # fmt: skip

    def losses(task: int, step: int):
        assert 0 <= task < 12 and step >= 0
        return lambda name, vector: (vector - wanted[name]).square().mean()

    heard: list[tuple[int, float, float]] = []
    settings = dataclasses.replace(FAST, steps=400, weight=0.01)
    told = fit(solutions, settings, losses, lambda *event: heard.append(event))
    alone = fit(solutions, settings)
    assert [step for step, *_ in heard] == list(range(1, 401))
    assert sum(total for _, total, _ in heard[-20:]) < 0.9 * sum(
        total for _, total, _ in heard[:20]
    )
    for name in solutions.methods:
        code = torch.stack([told.codes[n].mean(dim=0) for n in told.methods]).mean(dim=0)
        other = torch.stack([alone.codes[n].mean(dim=0) for n in alone.methods]).mean(dim=0)
        near = (told.decode(name, code) - wanted[name]).norm()
        assert near < (alone.decode(name, other) - wanted[name]).norm()


def test_one_task_makes_its_methods_decode_each_other() -> None:
    """As in the paper's first tables, four numbers and a weight of 0.1. The loss has its minimum at
    each method's own solution: so every mixture of codes must be decoded to it, and each method's
    code by all others. Reconstruction alone asks for a method's own code only."""
    solutions = small(tasks=1)
    rows = {name: read([0])[0] for name, read in solutions.read.items()}
    best = {name: solutions.starts[name] + row for name, row in rows.items()}
    settings = dataclasses.replace(FAST, dimension=4, weight=0.1, steps=2000)

    def losses(task: int, step: int) -> Losses:
        assert task == 0
        return lambda name, vector: (vector - best[name]).square().sum()

    told, alone = fit(solutions, settings, losses), fit(solutions, settings)
    assert told.tasks == TASKS[:1] and told.dimension == 4
    for decoder, row in rows.items():
        for source in rows:
            apart = [space.decode(decoder, space.codes[source][0]) - best[decoder]
                     for space in (told, alone)]  # fmt: skip
            one, other = (float(each.norm() / row.norm()) for each in apart)
            assert one < 0.1, (source, decoder)
            assert other < 0.1 if source == decoder else other > 0.3, (source, decoder)


def test_the_same_seed_is_the_same_space() -> None:
    solutions, settings = small(), dataclasses.replace(FAST, steps=5)
    one, two = fit(solutions, settings), fit(solutions, settings)
    other = fit(solutions, dataclasses.replace(settings, seed=1))
    code = torch.ones(3)
    assert torch.equal(one.decode("lora", code), two.decode("lora", code))
    assert not torch.equal(one.decode("lora", code), other.decode("lora", code))


class Killed(Exception):
    pass


def test_a_fit_that_was_killed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with losses that depend on the step and a method that only decodes."""
    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)
    solutions, settings = small(), dataclasses.replace(FAST, steps=40)
    start = torch.randn(19, generator=torch.Generator().manual_seed(3))

    def losses(task: int, step: int) -> Losses:
        return lambda name, vector: (vector - 0.1 * task).square().mean() * (1 + step % 3)

    def fitted(folder: Path | None, stop: int | None = None, steps: int = 40) -> Subspace:
        seen: list[int] = []

        def on_step(step: int, *_: float) -> None:
            seen.append(step)
            if step == stop:
                raise Killed

        try:
            chosen = dataclasses.replace(settings, steps=steps)
            return fit(solutions, chosen, losses, on_step, {"only": start}, folder)
        finally:
            steps_of.append(seen)

    steps_of: list[list[int]] = []
    whole, folder = fitted(None), tmp_path / "fit"
    for stop in (7, 29):  # in the first round of the twelve tasks, and in the third
        with pytest.raises(Killed):
            fitted(folder, stop)
    again = fitted(folder)
    assert steps_of[1:] == [list(range(1, 8)), list(range(8, 30)), list(range(30, 41))]
    code = torch.tensor([0.5, -1.0, 0.25])
    for name in whole.methods:
        assert torch.equal(again.decode(name, code), whole.decode(name, code)), name
    for name in solutions.methods:
        assert torch.equal(again.codes[name], whole.codes[name])
    with pytest.raises(TrainError, match="`steps`:\n    checkpoint: 40\n    this run:   41"):
        fitted(folder, steps=41)
    with pytest.raises(TrainError, match="solutions, `lora`"):
        fit(small(noise=0.1), settings, losses, None, {"only": start}, folder)


def test_the_published_sizes() -> None:
    """Down d n + d + d d + d and up n d, for n = 1,105,920 and d = 4 and 100: about 26.5 and 664
    million numbers for three methods in its figures, biases and second layers aside."""
    with torch.device("meta"):
        for d, published in ((4, 26.5e6), (100, 664e6)):
            maps = Maps(1_105_920, FitSettings(dimension=d), None)  # type: ignore[arg-type]
            count = sum(p.numel() for p in maps.parameters())
            assert count == 2 * d * 1_105_920 + d * d + 2 * d
            assert 3 * count == pytest.approx(published, rel=2e-3)


PARTS = {
    "encoder": ("layer.0.SelfAttention", "layer.1.DenseReluDense"),
    "decoder": (
        "layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense"
    ),
}  # fmt: skip
"""The sub-layers of a block of each stack of T5, in order."""


def adapter_order(stack: str, block: int) -> list[str]:
    return [f"{stack}.block.{block}.{part}.{own}" for part in PARTS[stack] for own in "DU"]


def lora_order(stack: str, block: int) -> list[str]:
    attentions = [part for part in PARTS[stack] if "Attention" in part]
    return [
        f"{stack}.block.{block}.{part}.{matrix}.{own}"
        for part in attentions for matrix in "qv" for own in "AB"
    ]  # fmt: skip


def prefix_order(stack: str, block: int) -> list[str]:
    first = [f"shared:{stack}.E", f"shared:{stack}.W1"] if block == 0 else []
    return [*first, f"{stack}.block.{block}.layer.0.SelfAttention.W2"]


@pytest.mark.parametrize(
    ("spec", "order", "tensors", "share"),
    [
        ("adapter(width=12, bias=False, activation='silu', init='bert')",
         adapter_order, 120, 2 / 5),
        ("lora(rank=10, alpha=16)", lora_order, 144, 1 / 3),
        ("prefix(tokens=120, mlp=24, bias=False, std=0.02, where='attn, !cross.attn')",
         prefix_order, 28, 1 / 2),
    ],
)  # fmt: skip
def test_the_published_methods_have_vectors_of_one_length_and_order(
    spec: str, order: Callable[[str, int], list[str]], tensors: int, share: float
) -> None:
    """All tensors of the encoder, then all of the decoder; per stack E, W1 and the rows of W2 of
    its twelve layers (one tensor in the released code), per layer self-attention, cross-attention
    and feed-forward part, q before v, and the matrix down (A, D) before the one up (B, U)."""
    layout = resolve(discover(meta_model("t5-base")), dt.parse(spec), False).layout
    kind = spec.partition("(")[0]
    stacks = {s: [f"{kind}.{n}" for block in range(12) for n in order(s, block)] for s in PARTS}
    assert [slot.name for slot in layout] == stacks["encoder"] + stacks["decoder"]
    assert layout.size == 1_105_920 and len(layout) == tensors
    first = sum(slot.size for slot in layout if slot.name in stacks["encoder"])
    assert first == share * layout.size


def test_what_cannot_be_learned_is_refused() -> None:
    for changes, words in (
        ({"dimension": 0}, "`dimension` is 0"),
        ({"steps": 0}, "`steps` is 0"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0"),
        ({"weight": -1.0}, "`weight` is -1"),
        ({"weight": math.nan}, "`weight` is nan"),
        ({"std": -0.02}, "`std` is -0.02; give a number from 0 on"),
        ({"interpolation": "even"}, "`interpolation` is `even`; choose one of released, uniform"),
    ):
        with pytest.raises(SubspaceError, match=words):
            FitSettings(**changes)
    solutions = small()

    def losses(task: int, step: int):
        return lambda name, vector: vector.sum() * torch.inf

    with pytest.raises(SubspaceError, match=r"step 1 has the losses .*; lower learning_rate"):
        fit(solutions, FAST, losses)
