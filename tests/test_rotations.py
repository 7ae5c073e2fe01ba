"""Rotations, reflections and shared shards.

Oracles: the formulas written out with whole matrices (reflections and permutations made entry by
entry, `torch.block_diag`, `torch.linalg.inv`, `torch.linalg.matrix_power`, loops over shards).
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.errors import SpecError
from deltune.mechanisms.rotation import cayley, neumann, skew
from zoo import ZOO


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


def rotation(A: Tensor, size: int, terms: int | None) -> Tensor:
    """OFT's block-diagonal R."""
    blocks = []
    for values in A:
        Q, entries = torch.zeros(size, size, dtype=A.dtype), iter(values)
        for i in range(size):
            for j in range(i + 1, size):
                Q[i, j] = next(entries)
                Q[j, i] = -Q[i, j]
        eye = torch.eye(size, dtype=A.dtype)
        if terms is None:
            blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
            continue
        powers = [torch.linalg.matrix_power(Q, k) for k in range(terms)]
        blocks.append(eye + 2 * sum(powers[1:-1]) + powers[-1])
    return torch.block_diag(*blocks)


def butterfly(K: Tensor) -> Tensor:
    """BOFT's R = B_m ... B_1, its permutations as matrices."""
    _, n, b, _ = K.shape
    whole, eye = torch.eye(n * b, dtype=K.dtype), torch.eye(b, dtype=K.dtype)
    for i, factor in enumerate(K):
        Q = (factor - factor.mT) / 2
        D = torch.block_diag(*[(eye - one) @ torch.linalg.inv(eye + one) for one in Q])
        P = torch.zeros(n * b, n * b, dtype=K.dtype)
        taken: list[int] = []  # features as the blocks have them, one after the other
        if i == 0:
            taken += range(n * b)
        for first in range(0, n * b if i else 0, b * 2**i):
            for start in range(first, first + b * 2**i // 2, b // 2):
                for part in (start, start + b * 2**i // 2):
                    taken += range(part, part + b // 2)
        for place, feature in enumerate(taken):
            P[feature, place] = 1
        whole = P @ D @ P.mT @ whole
    return whole


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


@pytest.mark.parametrize("terms", [4, 5, 8, None])
@pytest.mark.parametrize("share", [False, True])
def test_oft_rotates_inputs_block_by_block(terms: int | None, share: bool) -> None:
    x = normal(5, 8)
    delta = moved(linear(), f"oft(block=4, terms={terms}, share={share}, where='0')")
    A, layer = delta.tensors()["oft.0.A"], linear()[0]
    assert A.shape == (1 if share else 2, 6)
    R = rotation(A.expand(2, -1), 4, terms)
    assert torch.allclose(delta.model(x), F.linear(x @ R, layer.weight, layer.bias))


def test_oft_and_hra_turn_the_vectors_of_an_embedding() -> None:
    ids = torch.tensor([0, 3, 3, 9])
    rows = embedding()(ids)
    delta = moved(embedding(), "oft(block=4, where='0')")
    R = rotation(delta.tensors()["oft.0.A"], 4, 5)
    assert torch.allclose(delta.model(ids), rows @ R)
    delta = moved(embedding(), "hra(rank=3, where='0')")
    assert torch.allclose(delta.model(ids), rows @ chain(delta.tensors()["hra.0.U"]))


def test_a_limit_shortens_each_block_to_its_share() -> None:
    delta = moved(linear(), "oft(block=4, limit=0.5, terms=None, where='0')")
    W, A = delta.model[0].weight.detach().clone(), delta.tensors()["oft.0.A"].clone()
    A[1] *= 0.01
    delta.load_vector(A.flatten())
    most = 0.5 / 2**0.5
    norms = [float(skew(values, 4).norm()) for values in A]
    assert norms[0] > most > norms[1]
    A[0] *= most / norms[0]
    assert torch.allclose(W + change(delta), W @ rotation(A, 4, None).mT)


def test_the_series_comes_near_to_the_inverse_of_the_other_sign() -> None:
    Q = skew(0.02 * normal(3, 6), 4)
    eye = torch.eye(4, dtype=Q.dtype)
    R = eye + cayley(Q)
    assert torch.allclose(R @ R.mT, eye.expand_as(R))
    assert torch.allclose(neumann(-Q, 12) + eye, R, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "block", "factors"), [(8, 4, 1), (8, 4, 2), (16, 2, 4), (24, 4, 2), (9, 3, 1)]
)
def test_boft_is_a_product_of_permuted_blocks_and_gains(
    features: int, block: int, factors: int
) -> None:
    delta = moved(linear(features), f"boft(block={block}, factors={factors}, where='0')")
    K, g = (delta.tensors()[f"boft.0.{name}"] for name in "Kg")
    R, W = butterfly(K), delta.model[0].weight.detach().clone()
    assert torch.allclose(R @ R.mT, torch.eye(features, dtype=R.dtype))
    assert torch.allclose(W + change(delta), g * (W @ R.mT))


def test_a_butterfly_of_all_factors_mixes_all_features() -> None:
    delta = moved(linear(16), "boft(block=2, factors=4, where='0')")
    assert bool((butterfly(delta.tensors()["boft.0.K"]).abs() > 1e-9).all())


def test_boft_scales_the_features_of_an_embedding() -> None:
    ids = torch.tensor([0, 3, 3, 9])
    delta = moved(embedding(), "boft(block=2, factors=2, where='0')")
    K, g = (delta.tensors()[f"boft.0.{name}"] for name in "Kg")
    assert torch.allclose(delta.model(ids), embedding()(ids) @ butterfly(K).mT * g.flatten())


def test_a_scale_is_one_on_the_change() -> None:
    for text in ("hra(rank=3, where='0')", "oft(block=4, where='0')", "boft(where='0')"):
        delta = moved(linear(), text)
        whole = change(delta)
        delta.unmerge().scale = 0.3
        assert torch.allclose(change(delta), 0.3 * whole)


def test_only_the_roles_that_are_meant_turn() -> None:
    """The q and v thirds of GPT-2's `c_attn`; each has a rotation of its own."""
    delta = moved(ZOO["gpt2"].build(0), "oft(block=4, terms=None)")
    path = "transformer.h.0.attn.c_attn"
    q, _, v = delta.model.get_submodule(path).weight.detach().clone().mT.chunk(3)
    found = change(delta, path).mT.chunk(3)
    for role, weight, there in (("q", q, found[0]), ("v", v, found[2])):
        R = rotation(delta.tensors()[f"oft.{path}.{role}.A"], 4, None)
        assert torch.allclose(weight + there, weight @ R.mT, atol=1e-6)
    assert not found[1].any()


# --- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "mini"), [(4, None), (3, None), (8, None), (3, 4), (1, 1)])
def test_miss_adds_one_shard_to_all_groups_of_inputs(rank: int, mini: int | None) -> None:
    x = normal(5, 8)
    delta = moved(linear(), f"miss(rank={rank}, mini={mini}, where='0')")
    D, layer = delta.tensors()["miss.0.D"], linear()[0]
    expected = torch.empty(12, 8, dtype=D.dtype)
    for o in range(12):
        for i in range(8):
            expected[o, i] = D[i % rank, o % D.shape[1]]
    assert torch.allclose(delta.model(x), F.linear(x, layer.weight + expected, layer.bias))
    assert torch.allclose(change(delta), expected)


def test_bat_is_affine_in_the_blocks_of_the_weight() -> None:
    delta = moved(linear(), "miss(rank=4, bat=True, where='0')")
    D, W = delta.tensors()["miss.0.D"], delta.model[0].weight.detach().clone()
    assert D.shape == (3, 4, 4)
    there = change(delta)
    for i in range(3):
        for j in range(2):
            block = (slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4))
            assert torch.allclose(there[block], W[block] @ D[i] + D[i])


def test_shards_of_an_embedding_are_shared_by_tokens() -> None:
    ids = torch.tensor([0, 3, 3, 9])
    delta = moved(embedding(), "miss(rank=4, where='0')")
    D = delta.tensors()["miss.0.D"]
    assert torch.allclose(delta.model(ids), embedding()(ids) + D[ids % 4])


def test_dropout_of_shards_is_one_of_inputs_in_training_only() -> None:
    delta = moved(linear(), "miss(rank=4, dropout=0.5, where='0')")
    x, D = torch.ones(4000, 8, dtype=torch.float64), delta.tensors()["miss.0.D"]
    plain = linear()(x)
    torch.manual_seed(0)
    there = (delta.model.train()(x) - plain).detach()
    assert torch.allclose(there.mean(0), 2 * D.sum(0), atol=0.15)
    assert float(there.std(0).min()) > 0.1
    assert torch.allclose(delta.model.eval()(x) - plain, (2 * D.sum(0)).expand_as(plain))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("hra(rank=0)", "`rank` must be 1 or more"),
        ("hra(rank=9, orthogonal=True, where='0')", r"`0` has 8 features .* at most 8"),
        ("oft(block=3, where='0')", r"`oft\(block=3\)`: 3 does not divide the 8 features at `0`"),
        ("oft(block=None, blocks=3, where='0')", "3 does not divide the 8 features at `0`"),
        ("oft(block=None, blocks=8, where='0')", "leaves blocks of one of the 8 features at `0`"),
        ("oft(block=4, blocks=2)", "`blocks` must be given instead of `block`"),
        ("oft(block=None)", "`blocks` must be given instead of `block`"),
        ("oft(block=1)", "`block` must be 2 or more"),
        ("oft(block=None, blocks=0)", "`blocks` must be 1 or more"),
        ("oft(terms=3)", "`terms` must be 4 or more and at most 1000, or None"),
        ("oft(terms=2147483648)", "terms=2147483648.* 4 or more and at most 1000, or None"),
        ("oft(limit=0.0)", "`limit` must be above 0, or None"),
        ("boft(factors=0)", "`factors` must be 1 or more"),
        ("boft(block=4, factors=3, where='0')", "has 2 blocks of 4 features.* at most 2"),
        ("boft(block=2, factors=1000000000000, where='0')", "factors=1000000000000.* at most 3"),
        ("boft(block=None, blocks=1, factors=2, where='0')", "has 1 blocks .* at most 1"),
        ("miss(rank=0)", "`rank` must be 1 or more"),
        ("miss(mini=0)", "`mini` must be 1 or more, or None"),
        ("miss(mini=2, bat=True)", "`mini` must be None with `bat`"),
        ("miss(dropout=1.0)", r"`dropout` must be in \[0, 1\)"),
        ("miss(dropout=0.1, bat=True)", "`dropout` must be 0 with `bat`"),
        ("miss(rank=9, where='0')", r"`0` \(12 x 8\) has 8 inputs, .* at most 8"),
        ("miss(rank=4, mini=5, where='0')", "5 columns do not divide the 12 outputs"),
        ("miss(rank=8, bat=True, where='0')", "does not divide into blocks of 8 x 8"),
    ],
)
def test_bad_specs_say_what_to_do(text: str, what: str) -> None:
    model = linear()
    with pytest.raises(SpecError, match=what):
        dt.attach(model, text)
    assert not dt.deltas(model)
