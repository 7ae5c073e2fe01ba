"""Decoders and encoders. Oracles: explicit matrices, the formulas, autograd through them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from deltune.errors import SubspaceError
from deltune.mechanisms.projections import Fastfood, hadamard, sylvester
from deltune.subspace.learned import Maps, fit
from deltune.subspace.maps import Curved, Diagonal, Encoder, put_together, taken_apart
from deltune.subspace.settings import FitSettings
from deltune.subspace.store import load, save
from deltune.vector import Layout
from test_subspace_learned import FAST, small


def test_a_diagonal_begins_as_fastfood_and_is_its_matrices() -> None:
    """P = H G Pi H B / sqrt(D m), written out as matrices; gradients by autograd through them."""
    size, d, m = 50, 12, 64
    made = Diagonal.begin(size, d, seed=3)
    torch.testing.assert_close(
        made.project(torch.eye(d)), Fastfood(size, d, seed=3).project(torch.eye(d))
    )
    assert float(made.gauss.square().mean()) == pytest.approx(1.0)
    signs, places, _, _ = made.inner[0].drawn(torch.device("cpu"))
    h, short = sylvester(m).double(), sylvester(16).double()
    first = short[places.long()][:, :d] * signs.double()
    gauss = torch.randn(m, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, d, dtype=torch.float64, requires_grad=True)
    other = dataclasses.replace(made, gauss=gauss)
    expected = (v @ first.T * gauss) @ h[:size].T / (size * m) ** 0.5
    torch.testing.assert_close(other.project(v), expected)
    weight = torch.randn(5, size, dtype=torch.float64)
    ours = torch.autograd.grad((other.project(v) * weight).sum(), (v, gauss))
    theirs = torch.autograd.grad((expected * weight).sum(), (v, gauss))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.autograd.gradcheck(
        lambda v, g: dataclasses.replace(made, gauss=g).project(v), (v, gauss)
    )
    assert torch.equal(hadamard(torch.eye(4), sylvester(2)), sylvester(4))


def explicit(size: int, d: int, seed: int, gauss: torch.Tensor) -> torch.Tensor:
    """H G Pi H B / sqrt(D m) as a matrix (size, d)."""
    drawn = Fastfood(size, d, seed)
    signs, places, _, _ = drawn.drawn(torch.device("cpu"))
    m = drawn.padded
    short = sylvester(1 << (d - 1).bit_length()).double()[places.long()][:, :d] * signs.double()
    return sylvester(m).double()[:size] @ (gauss[:, None] * short) / (size * m) ** 0.5


def test_a_diagonal_of_each_tensor_is_their_matrices_one_below_the_other() -> None:
    """Of tensors of 12, 50 and 3 numbers m is 16, 64 and 8, which holds d; none has another's
    draw."""
    sizes, d = (12, 50, 3), 7
    made = Diagonal.begin(65, d, 3, sizes)
    assert made.gauss.numel() == 16 + 64 + 8 and len({one.seed for one in made.inner}) == 3
    alone = [one.project(torch.eye(d)) for one in made.inner]
    torch.testing.assert_close(made.project(torch.eye(d)), torch.cat(alone, dim=1))
    for piece, one in zip(made.gauss.split([16, 64, 8]), made.inner, strict=True):
        assert float(piece.square().mean()) == pytest.approx(1.0, rel=1e-5)
        assert one.size in sizes
    gauss = torch.randn(88, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, d, dtype=torch.float64, requires_grad=True)
    other = dataclasses.replace(made, gauss=gauss)
    pieces = zip(sizes, made.inner, gauss.split([16, 64, 8]), strict=True)
    whole = torch.cat([explicit(n, d, one.seed, own) for n, one, own in pieces])
    torch.testing.assert_close(other.project(v), v @ whole.T)
    weight = torch.randn(5, 65, dtype=torch.float64)
    ours = torch.autograd.grad((other.project(v) * weight).sum(), (v, gauss))
    theirs = torch.autograd.grad((v @ whole.T * weight).sum(), (v, gauss))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_a_method_without_solutions_may_have_a_map_for_each_tensor(tmp_path: Path) -> None:
    solutions, start = small(), torch.ones(40)
    layout = Layout.of({"a": (5, 6), "b": (10,)})

    def losses(task: int, step: int) -> Any:
        return lambda _, vector: vector.square().sum()

    settings = dataclasses.replace(FAST, steps=2, scope="tensor")
    space = fit(solutions, settings, losses, None, {"full": start}, None, {"full": layout})
    up = space.ups["full"]
    assert isinstance(up, Diagonal) and tuple(up.sizes) == (30, 10)
    assert up.gauss.numel() == 32 + 16 and (up.size, up.dimension) == (40, 3)
    code, again = torch.randn(3), load(save(space, tmp_path / "space"))
    assert torch.equal(again.decode("full", code), space.decode("full", code))
    assert settings.to_json()["scope"] == "tensor" and "scope" not in FAST.to_json()
    for given, words in (({}, "is not given"), ({"full": Layout.of({"a": (5,)})}, "has 5 numbers")):
        with pytest.raises(SubspaceError, match=f"`full`, whose vector has 40 numbers, {words}"):
            fit(solutions, settings, losses, None, {"full": start}, None, given)


def test_a_curved_decoder_and_a_linear_encoder_are_their_formulas() -> None:
    draw = torch.Generator().manual_seed(0)
    settings = FitSettings(
        dimension=3, hidden=5, decoder="curved", activation="none", distance="mean", std=0.5
    )
    maps = Maps(20, settings, draw)
    made, down = maps.decoder(), maps.encoder()
    assert isinstance(made, Curved) and (made.size, made.dimension, made.linear) == (20, 3, False)
    v, rows = torch.randn(2, 3), torch.randn(2, 20)
    hidden = (v @ made.w2.T + made.b2).tanh()
    torch.testing.assert_close(made.project(v), hidden @ made.w3.T + made.b3)
    assert down.w2 is None
    torch.testing.assert_close(down(rows), rows @ down.w1.T + down.b1)
    assert sum(p.numel() for p in maps.parameters()) == 3 * 20 + 3 + 5 * 3 + 5 + 20 * 5 + 20


def test_intrinsic_prompt_tuning_is_a_space_of_one_method() -> None:
    """One step of it has the loss and the gradients of L_PT + 200 MSE."""
    whole = small()
    name = "lora"
    solutions = type(whole).of(
        whole.tasks, {name: whole.read[name](range(12))}, {name: whole.starts[name]}
    )
    settings = FitSettings(
        dimension=3, steps=1, learning_rate=1e-3, weight=200.0, activation="none",
        distance="mean", decoder="curved", hidden=7, std=0.1,
    )  # fmt: skip
    heard: list[tuple[float, float]] = []
    asked: list[int] = []

    def losses(task: int, step: int) -> Any:
        asked.append(task)
        return lambda _, vector: (vector - 1).square().sum()

    space = fit(solutions, settings, losses, lambda _, *two: heard.append(two))
    maps = Maps(130, settings, torch.Generator().manual_seed(0))
    row = solutions.read[name](asked)[0]
    again = maps.requires_grad_(False).up(maps.down(row))
    assert heard[0][1] == pytest.approx(float((again - row).square().mean()), rel=1e-5)
    expected = float((solutions.starts[name] + again - 1).square().sum())
    assert heard[0][0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SubspaceError, match=r"decoder of `lora` is not linear and .* no encoder"):
        dataclasses.replace(space, downs={}).encode(name, row)


def test_a_method_without_solutions_learns_to_decode_the_codes_of_others() -> None:
    """What it should be is linear in the code of each task; a Fastfood map as it is drawn is far
    from it, and learned from the loss alone it comes near."""
    solutions = small()
    tasks = len(solutions.tasks)
    draw = torch.Generator().manual_seed(4)
    whole = torch.randn(3, 40, generator=draw)
    start = torch.randn(40, generator=draw)
    rows = solutions.read["lora"](range(tasks))
    wanted = torch.linalg.svd(rows)[0][:, :3] @ whole

    def losses(task: int, step: int) -> Any:
        def loss(method: str, vector: torch.Tensor) -> torch.Tensor:
            if method != "full":
                return 0.0 * vector.sum()
            return (vector - start - wanted[task]).square().sum()

        return loss

    settings = dataclasses.replace(FAST, steps=1500, learning_rate=1e-2)
    heard: list[float] = []
    space = fit(
        solutions, settings, losses, lambda _, loss, __: heard.append(loss), {"full": start}
    )
    assert space.methods == ("adapter", "lora", "prefix", "full") and "full" not in space.codes
    assert isinstance(space.ups["full"], Diagonal)
    assert not torch.equal(space.ups["full"].gauss, Diagonal.begin(40, 3, 0).gauss)
    assert sum(heard[-100:]) < 0.5 * sum(heard[:100])
    assert not any(t.requires_grad for t in taken_apart(space.ups["full"])[0].values())


def test_every_kind_of_map_comes_back_from_a_folder(tmp_path: Path) -> None:
    solutions = small()

    def losses(task: int, step: int) -> Any:
        return lambda _, vector: vector.square().sum()

    for place, decoder in enumerate(("linear", "curved")):
        settings = dataclasses.replace(FAST, steps=2, decoder=decoder, hidden=4, activation="none")
        space = fit(solutions, settings, losses, decoded={"full": torch.ones(40)})
        again = load(save(space, tmp_path / str(place)))
        code = torch.randn(3)
        assert again.methods == space.methods and set(again.codes) == set(solutions.methods)
        for name in space.methods:
            assert torch.equal(again.decode(name, code), space.decode(name, code))
        for name, rows in solutions.each():
            assert torch.equal(again.encode(name, rows), space.encode(name, rows))
    encoder = Encoder(torch.ones(2, 3), torch.zeros(2))
    assert put_together(*taken_apart(encoder)).w2 is None


def test_what_cannot_decode_is_refused() -> None:
    solutions = small()
    with pytest.raises(SubspaceError, match="`lora` has solutions in the space"):
        fit(solutions, FAST, lambda *_: lambda *_: torch.ones(()), None, {"lora": torch.ones(3)})
    with pytest.raises(SubspaceError, match="`full` has no solutions and there are no losses"):
        fit(solutions, FAST, decoded={"full": torch.ones(3)})
    with pytest.raises(SubspaceError, match="`hidden` is 0"):
        FitSettings(hidden=0)
