"""Rotations and reflections.

Oracles: the formulas written out with whole matrices (reflections and permutations made entry by
entry, `torch.block_diag`, `torch.linalg.inv`, `torch.linalg.matrix_power`).
"""

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import SpecError


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(model: nn.Module, text: str) -> dt.Delta:
    """A delta away from its start."""
    delta = dt.attach(model, text, seed=0, head=False)
    return delta.load_vector(delta.vector() + 0.3 * normal(delta.layout.size).to(delta.vector()))


def change(delta: dt.Delta, path: str = "0") -> Tensor:
    """What merging adds to a weight, as the module stores it."""
    before = delta.model.get_submodule(path).weight.detach().clone()
    delta.merge()
    return delta.model.get_submodule(path).weight.detach() - before


def linear(into: int = 8, out: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, out)).double()


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8, padding_idx=0)).double()


def chain(U: Tensor) -> Tensor:
    """H_1 H_2 ... H_r."""
    product = torch.eye(len(U), dtype=U.dtype)
    for u in U.mT:
        product = product @ (torch.eye(len(U), dtype=U.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return product


# --- reflections --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 11])
def test_hra_is_the_product_of_its_reflections(rank: int) -> None:
    delta = moved(linear(), f"hra(rank={rank}, where='0')")
    W, U = delta.model[0].weight.detach().clone(), delta.tensors()["hra.0.U"]
    assert torch.allclose(W + change(delta), W @ chain(U))


def test_orthogonal_reflections_are_those_of_the_vectors_after_gram_and_schmidt() -> None:
    delta = moved(linear(), "hra(rank=3, orthogonal=True, where='0')")
    W, U = delta.model[0].weight.detach().clone(), delta.tensors()["hra.0.U"]
    vectors: list[Tensor] = []
    for u in U.mT:
        for v in vectors:
            u = u - (u @ v) * v
        vectors.append(u / u.norm())
    assert torch.allclose(W + change(delta), W @ chain(torch.stack(vectors, 1)))
    vector = delta.unmerge().vector()
    assert torch.autograd.gradcheck(
        lambda v: delta.call(v, input=normal(2, 8)), vector.requires_grad_()
    )


def test_reflections_start_as_none_where_they_come_in_pairs() -> None:
    x = normal(5, 8)
    for text, same in (("hra(rank=4, where='0')", True), ("hra(rank=3, where='0')", False)):
        model = linear()
        plain = model(x)
        U = dt.attach(model, text, seed=0).tensors()["hra.0.U"]
        assert torch.equal(U[:, 0], U[:, 1]) and not torch.equal(U[:, 1], U[:, 2])
        assert torch.allclose(model(x), plain) == same
    with torch.autocast("cpu", torch.bfloat16):
        model = linear().float()
        delta = dt.attach(model, "hra(rank=8, where='0')", seed=0)
        there = next(iter(delta.tree.units)).change(model[0].weight).detach()
    assert float(there.abs().max()) < 1e-5


# --- rotations ----------------------------------------------------------------------------------


def test_hra_turns_the_vectors_of_an_embedding() -> None:
    ids = torch.tensor([0, 3, 3, 9])
    rows = embedding()(ids)
    delta = moved(embedding(), "hra(rank=3, where='0')")
    assert torch.allclose(delta.model(ids), rows @ chain(delta.tensors()["hra.0.U"]))


def test_a_scale_is_one_on_the_change() -> None:
    for text in ("hra(rank=3, where='0')",):
        delta = moved(linear(), text)
        whole = change(delta)
        delta.unmerge().scale = 0.3
        assert torch.allclose(change(delta), 0.3 * whole)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hra(rank=0)", "`rank` must be 1 or more"),
        ("hra(rank=9, orthogonal=True, where='0')", r"`0` has 8 features .* at most 8"),
    ],
)
def test_bad_specs_say_what_to_do(text: str, what: str) -> None:
    model = linear()
    with pytest.raises(SpecError, match=what):
        dt.attach(model, text)
    assert not dt.deltas(model)
