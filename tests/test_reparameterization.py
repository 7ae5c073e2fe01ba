"""LoRA, random bases, intrinsic dimension, matrix product operators, PHM and Kronecker sums.

Oracles: the matrices of the formulas written out (H, B, Pi, G; sums of `torch.kron`; the Hamilton
product of two quaternions), `torch.linalg.svd`, `torch.autograd`, and counts from the papers.
"""

import copy
import math
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.errors import AttachError, SpecError, WhereError
from deltune.families.reparameterization.phm import hamilton
from deltune.mechanisms import tensor_train
from deltune.mechanisms.kronecker import KroneckerSum, near_root
from deltune.mechanisms.projections import PROJECTIONS, Fastfood, Projection, hadamard, sylvester
from deltune.training.course import Course
from deltune.training.optim import groups
from shapes import meta_model
from snapshots import distance
from zoo import ZOO

SPECS = [
    "intrinsic(dimension=100)",
    "intrinsic(dimension=8, variant='did', projection='sparse')",
    "intrinsic(dimension=8, variant='did', projection='dense')",
    "intrinsic(dimension=100, scope='global')",
    "mpo(cores=3, where='*')",
    "phm(n=2, where='*')",
    "phm(algebra='quaternion', where='*')",
    "kronecker(rank=2, where='*')",
    "loha(rank=2, where='*')",
    "lokr(rank=1, where='*')",
    "vera(rank=3, where='*')",
    "randlora(rank=3, alpha=3.0, where='*')",
    "fourierft(frequencies=9, alpha=4.0, init='zero', where='*')",
    "c3a(block=4, init='zero', where='*')",
    "shira(rank=2, where='*')",
    "vblora(rank=2, vectors=5, length=4, where='*')",
    "hra(rank=4, where='*')",
    "oft(block=4, where='*')",
    "oft(block=None, blocks=4, terms=None, limit=0.5, where='*')",
    "boft(block=2, factors=2, where='*')",
    "miss(rank=5, where='*')",
    "miss(rank=4, bat=True, where='*')",
]
SIZES = [(100, 10), (64, 64), (37, 5), (7, 30), (1, 3)]
every_spec = pytest.mark.parametrize("text", SPECS)
every_map = pytest.mark.parametrize("kind", PROJECTIONS.values(), ids=list(PROJECTIONS))
every_size = pytest.mark.parametrize(("size", "dimension"), SIZES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    """Two linear layers whose sides divide by four, in double precision."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 16)).double()


def moved(model: nn.Module, text: str, seed: int = 0) -> dt.Delta:
    """A delta away from its start."""
    delta = dt.attach(model, text, f"{text} {seed}", seed=seed, head=False)
    return delta.load_vector(delta.vector() + 0.3 * normal(delta.layout.size, seed=seed))


def changes(delta: dt.Delta) -> dict[str, Tensor]:
    """What merging adds to each parameter."""
    model = delta.model
    before = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("deltas.")}
    delta.merge()
    after = dict(model.named_parameters())
    found = {name: after[name].detach() - value for name, value in before.items()}
    delta.unmerge()
    return found


# --- all four -----------------------------------------------------------------------------------


@every_spec
def test_the_delta_is_a_function_of_its_vector(text: str) -> None:
    """Oracle of the transforms of `torch.func`: one vector at a time, gradients of plain calls."""
    delta = moved(network(), text)
    x, vector, way = normal(5, 8), delta.vector(), normal(delta.layout.size, seed=3)

    def f(v: Tensor) -> Tensor:
        return delta.call(v, input=x).square().sum()

    leaf = vector.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    assert torch.allclose(torch.func.grad(f)(vector), expected)
    _, slope = torch.func.jvp(f, (vector,), (way,))
    assert torch.allclose(slope, expected @ way)
    (curved,) = torch.autograd.grad(expected @ way, leaf)
    step = 1e-5 * way
    sides = [torch.func.grad(f)(vector + sign * step) for sign in (1, -1)]
    assert torch.allclose(curved, (sides[0] - sides[1]) / 2e-5, rtol=1e-4, atol=1e-4)
    several = torch.stack([vector, 2 * vector, vector - way])
    each = torch.stack([torch.func.grad(f)(v) for v in several])
    assert torch.allclose(torch.vmap(torch.func.grad(f))(several), each)


@every_spec
def test_deltas_add_up_whether_merged_or_not(text: str) -> None:
    """Oracle: the network itself with the sum of both changes in its weights."""
    model, x = network(), normal(5, 8)
    deltas = [moved(model, text, 1), moved(model, "lora(rank=2, where='*')", 2)]
    alone = [changes(delta) for delta in deltas]
    weights = {n: p + alone[0][n] + alone[1][n] for n, p in network().named_parameters()}
    expected = torch.func.functional_call(network(), weights, (x,))
    for merged in ((), (0,), (1,), (0, 1), (1, 0)):
        for i in merged:
            deltas[i].merge()
        assert torch.allclose(model(x), expected), merged
        for i in merged:
            deltas[i].unmerge()


@every_spec
def test_a_low_precision_backbone_keeps_float32_tensors(text: str) -> None:
    model = network().to(torch.bfloat16)
    x = normal(5, 8).to(torch.bfloat16)
    plain = model(x)
    delta = dt.attach(model, text, seed=0)
    assert all(p.dtype == torch.float32 for p in delta.parameters())
    assert distance(model(x).float(), plain.float()) < 0.02
    delta.load_vector(delta.vector() + 0.2 * normal(delta.layout.size).float())
    acting = model(x)
    acting.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters())
    assert distance(acting.float(), plain.float()) > 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().square().mean().backward()
    assert distance(delta.merge().model(x).float(), acting.float()) < 0.05


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("intrinsic(dimension=0)", "`dimension` must be 1 or more"),
        ("intrinsic(projection='dense', gradient='released')", "`gradient` must be `exact` unless"),
        ("intrinsic(scope='global', gradient='released')", "`exact` unless .*`scope` is `tensor`"),
        ("intrinsic(dimension=4)", "one scale for each of 4 parameters and has 0 scalars left"),
        ("mpo(cores=4)", "`cores` must be odd"),
        ("mpo(cores=1)", "`cores` must be odd"),
        ("mpo(bonds=0)", "`bonds` must be 1 or more, one number or 4"),
        ("mpo(bonds=(2, 2))", "`bonds` must be 1 or more, one number or 4"),
        ("mpo(rate=0.0)", "`rate` must be above 0"),
        ("mpo(out_factors=(2, 2))", "`out_factors` must be 5 numbers of 1 or more"),
        (
            "mpo(where='0')",
            r"`0` \(12 x 8\) has a side of 12, a product of 3 primes, too few for 5",
        ),
        ("mpo(cores=3, where='0', in_factors=(2, 2, 3))", "product is 12, and .* has 8"),
        ("phm(n=0)", "`n` must be 1 or more"),
        ("phm(n=2, algebra='quaternion')", "`n` must be 4 for quaternions"),
        ("phm(n=3, where='0')", "3 does not divide the 12 x 8 matrix at `0`"),
        ("kronecker(rank=0)", "`rank` must be 1 or more"),
        ("vera(rank=0)", "`rank` must be 1 or more"),
        ("randlora(rank=0)", "`rank` must be 1 or more"),
        ("randlora(dropout=-0.1)", r"`dropout` must be in \[0, 1\)"),
        ("vera(dropout=1.0)", r"`dropout` must be in \[0, 1\)"),
        (
            "kronecker(rank=9, where='0')",
            r"a sum of 8 products 3 x 4 \(x\) 4 x 2; use a rank of at",
        ),
    ],
)
def test_bad_specs_say_what_to_do(text: str, what: str) -> None:
    model = network()
    with pytest.raises(SpecError, match=what):
        dt.attach(model, text)
    assert not dt.deltas(model)


EMPTY = (
    "lora(rank=1) phm(n=1) kronecker(rank=1) mpo(cores=3) masking movement pruned mask "
    "sparse(count=1) fish(count=1) diff(density=0.5) intrinsic(dimension=9)"
)


@pytest.mark.parametrize("text", EMPTY.split())
def test_a_matrix_without_entries_is_no_place(text: str) -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.empty(4, 0))
    within = text.rstrip(")") + (", " if "(" in text else "(")
    with pytest.raises(WhereError, match=r"`0` .*matches no module"):
        dt.attach(model, f"{within}where='0')")
    paths = {step.site.path for step in dt.plan(model, f"{within}where='1')").steps}
    assert paths == {"1"}
    with pytest.raises(WhereError, match=r"no module|no parameter|nothing|no blocks"):
        dt.plan(model[:1], f"{within}where='*')")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_matrix_with_values_that_are_not_finite_is_not_decomposed(value: float) -> None:
    model = network()
    model[0].weight.data[0, 0] = value
    with pytest.raises(AttachError, match=r"matrix at `0`.*not finite; repair the model, or leave"):
        dt.attach(model, "mpo(cores=3, where='0')")
    assert not dt.deltas(model)


# --- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "power"), [("linear", 1.0), ("root", 0.5)])
def test_a_lora_change_is_the_scaled_product_of_its_rank(scaling: str, power: float) -> None:
    found = []
    for alpha in (6.0, 12.0):
        delta = moved(network(), f"lora(rank=3, alpha={alpha}, scaling='{scaling}', where='0')")
        tensors = delta.tensors()
        A, B = tensors["lora.0.A"], tensors["lora.0.B"]
        assert A.shape == (3, 8) and B.shape == (12, 3)
        found.append(changes(delta)["0.weight"])
        assert torch.allclose(found[-1], alpha / 3**power * B @ A)
        assert int(torch.linalg.matrix_rank(found[-1])) == 3
    assert torch.allclose(2 * found[0], found[1])  # the same tensors: twice alpha, twice the change


def test_lora_starts_from_uniform_a_and_zero_b_and_the_other_way_on_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(3000, 40), nn.Linear(40, 90))
    tensors = dt.attach(model, "lora(rank=30, where='*')", seed=0).tensors()
    A, B = tensors["lora.1.A"], tensors["lora.1.B"]
    assert not B.any() and float(A.abs().max()) <= 1 / math.sqrt(40)
    assert float(A.var()) == pytest.approx(1 / (3 * 40), rel=0.1)  # of U(-a, a): a^2 / 3
    A, B = tensors["lora.0.A"], tensors["lora.0.B"]
    assert A.shape == (30, 3000) and not A.any()
    assert float(B.std()) == pytest.approx(1.0, rel=0.1) and abs(float(B.mean())) < 0.15


def test_what_is_not_adapted_of_a_fused_matrix_stays_exactly() -> None:
    """The q and v thirds of GPT-2's `c_attn` change, each by rank r; the k third does not."""
    delta = moved(ZOO["gpt2"].build(0), "lora(rank=2)")
    fused = {n: c.mT for n, c in changes(delta).items() if n.endswith("c_attn.weight")}
    assert len(fused) == 2
    for change in fused.values():
        q, k, v = change.chunk(3)
        assert not k.any()
        assert [int(torch.linalg.matrix_rank(part, rtol=1e-5)) for part in (q, v)] == [2, 2]


def test_lora_on_a_convolution_adds_the_reshaped_product() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    x, weight = normal(2, 4, 5, 5), model[0].weight.detach().clone()
    delta = moved(model, "lora(rank=2, alpha=6.0, where='0')")
    A, B = (delta.tensors()[f"lora.0.{name}"] for name in "AB")
    expected = F.conv2d(x, weight + 3.0 * (B @ A).reshape(weight.shape), model[0].bias)
    assert torch.allclose(model(x), expected)


def gpt2_medium() -> Any:
    import transformers as hf

    return hf.GPT2Model(hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def test_lora_counts_are_those_of_the_paper() -> None:
    """RoBERTa-base and -large (of BERT-large's sides) with r = 8, GPT-2 medium with r = 4."""
    with torch.device("meta"):
        gpt2 = gpt2_medium()
    counts = [(meta_model("roberta-base"), 8, 294_912), (meta_model("bert-large"), 8, 786_432),
              (gpt2, 4, 393_216)]  # fmt: skip
    for model, rank, count in counts:
        assert dt.plan(model, f"lora(rank={rank})", head=False).count() == count


def test_a_saved_lora_holds_its_two_tensors_for_each_matrix_and_nothing_else(
    tmp_path: Path,
) -> None:
    delta = moved(network(), "lora(rank=2, where='*')")
    stored = load_file(delta.save(tmp_path / "lora") / "delta.safetensors")
    assert set(stored) == {f"lora.{place}.{name}" for place in (0, 2) for name in "AB"}


# --- random bases -------------------------------------------------------------------------------


def test_a_vera_change_is_the_product_of_slices_of_one_pair_between_two_diagonals() -> None:
    delta = moved(network(), "vera(rank=20, start=0.3, where='*')")
    tensors = delta.tensors()
    A, B = (tensors[f"vera.shared:all.{name}"] for name in "AB")
    assert A.shape == (20, 12) and B.shape == (16, 20) and delta.count() == 20 + 12 + 20 + 16
    for path, out, into in (("0", 12, 8), ("2", 16, 12)):
        d, b = (torch.diag(tensors[f"vera.{path}.{name}"]) for name in "db")
        expected = b @ B[:out] @ d @ A[:, :into]
        assert torch.allclose(changes(delta)[f"{path}.weight"], expected)
    fresh = dt.attach(network(), "vera(rank=20, start=0.3, where='*')").tensors()
    assert (fresh["vera.0.d"] == 0.3).all() and not fresh["vera.0.b"].any()
    other = dt.attach(network(), "vera(rank=20, seed=1, where='*')").tensors()
    assert torch.equal(fresh["vera.shared:all.A"], A)
    assert not torch.equal(other["vera.shared:all.A"], A)


@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize("bases", ["dense", "sparse", "very_sparse"])
def test_a_randlora_change_is_the_sum_over_columns_of_b_and_rows_of_a(
    bases: str, rank: int
) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 10)).double()
    delta = moved(model, f"randlora(rank={rank}, alpha=6.0, bases={bases!r}, seed=3, where='*')")
    tensors = delta.tensors()
    A, B = (tensors[f"randlora.shared:all.{name}"] for name in "AB")
    assert A.shape == (rank, 1, 12) and B.shape == (12, math.ceil(12 / rank), rank)
    assert [float(part.std()) for part in (A, B)] == pytest.approx([1.0, 1.0], rel=0.01)
    assert bases == "dense" or (A.unique().numel() <= 3 and (A == 0).any())
    for path, out, into in (("0", 12, 8), ("1", 10, 12)):
        m, M = min(out, into), max(out, into)
        n = math.ceil(m / rank)
        L, G = (tensors[f"randlora.{path}.{name}"] for name in ("Lambda", "Gamma"))
        assert L.shape == (rank, n) and G.shape == (n, m)
        columns = [B[:M, j, k] for j in range(n) for k in range(rank)]
        rows = [L[k, j] * A[k, 0, :m] * G[j] for k in range(rank) for j in range(n)]
        D = 6.0 / rank * sum(torch.outer(*pair) for pair in zip(columns, rows, strict=True))
        change = changes(delta)[f"{path}.weight"]
        assert torch.allclose(change, D if into <= out else D.mT)
        assert bases != "dense" or int(torch.linalg.matrix_rank(change)) == m  # full
    fresh = dt.attach(network(), f"randlora(rank={rank}, where='0')").tensors()
    assert (fresh["randlora.0.Gamma"] == 1 / 8).all() and not fresh["randlora.0.Lambda"].any()


def test_sparse_bases_without_spread_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SpecError, match=r"bases for 2 x 2 have no spread; use `bases='dense'`"):
        for seed in range(20):
            dt.attach(model, f"randlora(rank=1, bases='sparse', seed={seed}, where='0')").detach()
    assert not dt.deltas(model)


# --- projections --------------------------------------------------------------------------------


def parity(order: int) -> Tensor:
    """H[i, j] = (-1)^(number of ones that i and j share in binary)."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("power", range(12))
def test_the_hadamard_transform_multiplies_by_its_matrix(power: int) -> None:
    x = normal(3, 2**power)
    for radix in (2, 8, 32):
        expected = x @ parity(2**power)
        assert torch.allclose(hadamard(x, sylvester(radix)), expected, atol=1e-9)


@every_size
def test_fastfood_is_the_product_of_its_factors(size: int, dimension: int) -> None:
    fastfood = Fastfood(size, dimension, seed=3)
    signs, places, gauss, _ = fastfood.drawn(torch.device("cpu"))
    m = fastfood.padded
    assert m & (m - 1) == 0 and max(size, dimension) <= m < 2 * max(size, dimension)
    short = m // int(places.unique(return_counts=True)[1][0])
    order, used = [], dict.fromkeys(range(short), 0)
    for place in places.tolist():  # any permutation with these places modulo `short`
        order.append(place + short * used[place])
        used[place] += 1
    assert sorted(order) == list(range(m))
    H, G = parity(m), torch.diag(gauss.double())
    Pi, B = torch.eye(m, dtype=torch.float64)[order], torch.eye(m, dtype=torch.float64)
    B[range(dimension), range(dimension)] = signs.double()
    norm = math.sqrt(m * float(gauss.double().square().sum())) * math.sqrt(size / m)
    matrix = (H @ G @ Pi @ H @ B / norm)[:size, :dimension]
    made = fastfood.project(torch.eye(dimension, dtype=torch.float64)).mT
    assert torch.allclose(made, matrix, rtol=1e-6, atol=1e-6)
    if size == m:
        assert torch.allclose(made.norm(dim=0), torch.ones(dimension, dtype=torch.float64))


@every_map
@every_size
def test_the_adjoint_is_the_transpose(
    kind: Callable[..., Projection], size: int, dimension: int
) -> None:
    """<P v, y> = <v, P^T y>, and the derivatives of both by finite differences."""
    P, v, y = kind(size, dimension, seed=1), normal(dimension), normal(size, seed=1)
    assert float(P.project(v) @ y) == pytest.approx(float(v @ P.adjoint(y)), abs=1e-12)
    matrix = P.project(torch.eye(dimension, dtype=torch.float64)).mT
    assert torch.allclose(P.adjoint(y), matrix.mT @ y)
    for there, x in ((P.project, v), (P.adjoint, y)):
        assert torch.autograd.gradcheck(there, (x.requires_grad_(),))
        assert torch.autograd.gradgradcheck(lambda x, there=there: there(x) ** 2, (x,))


@every_map
@every_size
def test_projections_are_linear_and_known_by_their_seed(
    kind: Callable[..., Projection], size: int, dimension: int
) -> None:
    P, v, w = kind(size, dimension, seed=1), normal(dimension), normal(dimension, seed=1)
    both = 2 * P.project(v) - 3 * P.project(w)
    assert torch.allclose(P.project(2 * v - 3 * w), both)
    assert torch.equal(kind(size, dimension, seed=1).project(v), P.project(v))
    copied = pickle.dumps(P)
    assert len(copied) < 500
    assert torch.equal(pickle.loads(copied).project(v), P.project(v))
    assert torch.allclose(P.project(v.float()).double(), P.project(v), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(P.project(v), kind(size, dimension, seed=1).project(v))
    if size > 2:
        assert not torch.allclose(kind(size, dimension, seed=2).project(v), P.project(v))


@pytest.mark.parametrize("kind", ["fastfood", "sparse"])
@pytest.mark.parametrize(("size", "dimension"), [(700, 40), (40, 300), (512, 512)])
def test_projections_keep_norms_on_average(kind: str, size: int, dimension: int) -> None:
    """E |P v|^2 = |v|^2 over draws; the mean of 400 is within four standard errors of it."""
    v = normal(dimension)
    maps = [PROJECTIONS[kind](size, dimension, seed) for seed in range(400)]
    ratios = torch.stack([(P.project(v).norm() / v.norm()) ** 2 for P in maps])
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 20


def test_dense_entries_have_the_deviation_of_the_released_code() -> None:
    matrix = PROJECTIONS["dense"](2000, 50, 0).project(torch.eye(50)).mT
    assert float(matrix.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(matrix.mean())) < 1e-4


# --- intrinsic dimension ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(PROJECTIONS))
def test_parameters_move_by_their_scaled_projections(kind: str) -> None:
    """Closed form: merged change of p_i = lambda_i P_i v, P_i read off column by column."""
    model = network()
    delta = moved(model, f"intrinsic(dimension=9, projection='{kind}')")
    tensors = {name: tensor.clone() for name, tensor in delta.tensors().items()}
    v = tensors.pop("intrinsic.shared:all.v")
    assert len(v) == 5 and len(tensors) == 4 and all(t.shape == () for t in tensors.values())
    found = changes(delta)
    columns: dict[str, list[Tensor]] = {name: [] for name in found}
    ones = {name: torch.ones_like(scale) for name, scale in tensors.items()}
    for one in torch.eye(5, dtype=torch.float64):
        delta.load_tensors({"intrinsic.shared:all.v": one, **ones})
        for name, column in changes(delta).items():
            columns[name].append(column.flatten())
    made = {name: torch.stack(column, 1) for name, column in columns.items()}
    for name, change in found.items():
        path, _, own = name.rpartition(".")
        scale = tensors[f"intrinsic.{path}.lambda_{own}"]
        assert torch.allclose(change.flatten(), scale * (made[name] @ v))


def _whole(delta: dt.Delta) -> tuple[Any, list[str]]:
    """The one map of all parameters, and their names in its order."""
    units = delta.tree.units
    parts = {f"{u.site.path}.{n}": part for u in units for n, part in u.maps.items()}
    (whole,) = {id(part.whole): part.whole for part in parts.values()}.values()
    return whole, sorted(parts, key=lambda name: parts[name].rows.start)


def test_the_parts_of_a_global_map_are_one_fastfood_over_all_parameters() -> None:
    """The matrix H G Pi H B / sqrt(D |G|^2) written out for the D numbers of the parameters in the
    order of the model; changes by it, and the gradient of v by autograd through it."""
    model, x = network(), normal(5, 8)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    size, m = sum(sizes.values()), 1 << (sum(sizes.values()) - 1).bit_length()
    delta = moved(model, "intrinsic(dimension=9, variant='did', scope='global')")
    whole, order = _whole(delta)
    assert order == list(sizes) and whole.map.size == size
    signs, places, gauss, _ = whole.map.drawn(torch.device("cpu"))
    first = sylvester(16).double()[places.long()][:, :9] * signs.double()
    matrix = sylvester(m).double()[:size] @ (gauss.double()[:, None] * first)
    assert matrix.square().sum() == pytest.approx(9, rel=0.2)
    (v,) = delta.parameters()
    expected = dict(zip(sizes, (matrix @ v).split(list(sizes.values())), strict=True))
    for name, change in changes(delta).items():
        torch.testing.assert_close(change.flatten(), expected[name].detach())
    model(x).square().sum().backward()
    grad, v.grad = v.grad, None
    moving = {n: p.detach() + expected[n].view(p.shape) for n, p in model.named_parameters()
              if n in sizes}  # fmt: skip
    delta.disable()
    torch.func.functional_call(model, moving, x).square().sum().backward()
    torch.testing.assert_close(grad, v.grad)


def test_a_global_map_is_multiplied_once_for_a_v_and_anew_for_another() -> None:
    """However v came to be another, and gradients add up over several passes."""
    model, x = network(), normal(5, 8)
    delta = moved(model, "intrinsic(dimension=9, scope='global')")
    whole, _ = _whole(delta)
    plain, made = whole.map._project, []
    whole.map._project = lambda v: made.append(1) or plain(v)
    model(x).square().sum().backward()
    first = [p.grad.clone() for p in delta.parameters()]
    model(x).square().sum().backward()
    for grad, parameter in zip(first, delta.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)
    assert len(made) == 1
    v = delta.tree.named()["intrinsic.shared:all.v"]
    before = model(x)
    for change in ("data", "step", "vector"):
        if change == "data":
            v.data[0] += 1.0  # which counts as no version of it
        elif change == "step":
            torch.optim.SGD([v], lr=0.5).step()
        else:
            delta.load_vector(delta.vector() + 1.0)
        after, count = model(x), len(made)
        assert not torch.allclose(after, before)
        fresh = dt.attach(network(), delta.spec, seed=0).load_vector(delta.vector())
        torch.testing.assert_close(after, fresh.model(x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), after)
        before = after
        assert len(made) == count + 1  # without gradients it is another product
        model(x)
    slopes = torch.func.jacrev(lambda u: delta.call(u, input=x).sum())(delta.vector())
    other = torch.autograd.functional.jacobian(
        lambda u: delta.call(u, input=x).sum(), delta.vector()
    )
    torch.testing.assert_close(slopes, other)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), model(x))


def test_parameters_of_one_shape_move_along_directions_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double()
    found = changes(moved(model, "intrinsic(dimension=40, variant='did')"))
    for name in ("weight", "bias"):
        pair = [found[f"{path}.{name}"].flatten() for path in (0, 1)]
        assert abs(float(F.cosine_similarity(*pair, 0))) < 0.5


def test_the_start_is_the_backbone_bit_for_bit() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    plain = case.run(model)
    delta = dt.attach(model, "intrinsic(dimension=60)", head=False)
    assert not delta.tensors()["intrinsic.shared:all.v"].any()
    assert torch.equal(case.run(model), plain)


@pytest.mark.parametrize("dimension", [100, 20_000])
def test_said_trains_exactly_the_dimension_asked_for(dimension: int) -> None:
    case = ZOO["bert"]
    own = [n for n, _ in case.build(0).named_parameters() if not n.startswith("classifier")]
    for variant, coordinates in (("said", dimension - len(own)), ("did", dimension)):
        text = f"intrinsic(dimension={dimension}, variant='{variant}')"
        made = dt.plan(case.build(0), text, head=False)
        assert made.count() == dimension
        assert {s.name: s.size for s in made.layout}["intrinsic.shared:all.v"] == coordinates


def test_where_and_within_narrow_what_moves() -> None:
    delta = moved(ZOO["bert"].build(0), "intrinsic(dimension=9, where='attn.q')[1:]")
    named = {name for name, change in changes(delta).items() if change.any()}
    path = "bert.encoder.layer.1.attention.self.query"
    assert named == {f"{path}.weight", f"{path}.bias"}


def test_the_seed_is_all_there_is_of_a_projection(tmp_path: object) -> None:
    delta = moved(network(), "intrinsic(dimension=9, seed=4)")
    expected, x = changes(delta), normal(5, 8)
    acting = delta.model(x)
    folder = delta.save(f"{tmp_path}/saved")
    stored = sum(tensor.numel() for tensor in delta.tensors().values())
    assert stored == 9
    loaded = dt.load(folder, network())
    assert torch.equal(loaded.model(x), acting)
    for seed, same in ((4, True), (5, False)):
        other = dt.attach(network(), f"intrinsic(dimension=9, seed={seed})", seed=7)
        again = changes(other.load_vector(delta.vector()))
        assert all(torch.equal(again[name], expected[name]) for name in again) is same


def test_the_released_gradient_is_the_true_one_over_the_padded_size() -> None:
    """Written out for one parameter of 96 entries and one of 12: m = 128 and 16."""
    x, grads = normal(5, 8), {}
    for gradient in ("exact", "released"):
        for where in ("weight", "bias"):
            model = nn.Sequential(nn.Linear(8, 12)).double()
            model[0].load_state_dict({"weight": normal(12, 8), "bias": normal(12)})
            text = f"intrinsic(dimension=6, variant='did', gradient='{gradient}', where='0')"
            delta = dt.attach(model, text)
            delta.load_vector(normal(6))
            seen = _seen(delta, where)
            out = F.linear(x, seen) if where == "weight" else seen
            out.square().sum().backward()
            grads[gradient, where] = delta.parameters()[0].grad
    for where, m in (("weight", 128), ("bias", 16)):
        assert torch.allclose(grads["released", where], grads["exact", where] / m)


def _seen(delta: dt.Delta, name: str) -> Tensor:
    """The parameter that the first layer sees."""
    unit, layer = delta.tree.units[0], delta.model[0]
    return layer._parameters[name] + unit.spec.difference(unit, name, layer._parameters[name])


def test_scales_have_no_gradient_at_the_start_and_coordinates_have() -> None:
    model = network()
    delta = dt.attach(model, "intrinsic(dimension=9)")
    model(normal(5, 8)).square().sum().backward()
    for name, parameter in delta.tree.named().items():
        assert bool(parameter.grad.any()) is name.endswith(".v"), name


# --- matrix product operators -------------------------------------------------------------------

SHAPES = {
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3), (12, 192, 192, 12)),
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16)),
    (30_000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2), (10, 200, 480, 12)),
}


@pytest.mark.parametrize("sides", SHAPES)
def test_shapes_and_bonds_are_those_of_the_paper(sides: tuple[int, int]) -> None:
    out = tensor_train.factors(sides[0], 5, rows=True)
    into = tensor_train.factors(sides[1], 5, rows=False)
    bonds = tensor_train.full_bonds(out, into, [None] * 4)
    assert (out, into, bonds) == SHAPES[sides]
    pairs = [i * j for i, j in zip(out, into, strict=True)]
    assert bonds == tuple(min(prod(pairs[:k]), prod(pairs[k:])) for k in range(1, 5))


@pytest.mark.parametrize(
    ("where", "trained", "total"),
    [
        ("attn.q[0]", 74_016, 663_840),
        ("ffn.up[0]", 184_720, 2_544_016),
        ("ffn.down[0]", 184_720, 2_544_016),
        ("attn, ffn", 7_986_048, 92_920_704),
    ],
)
def test_counts_are_those_of_the_paper(where: str, trained: int, total: int) -> None:
    made = dt.plan(meta_model("bert-base"), f"mpo(where='{where}')", head=False)
    assert made.count() == trained
    assert sum(prod(param.shape) for _, param in made.params()) == total


OUT, INTO = tensor_train.factors(24, 3, rows=True), tensor_train.factors(36, 3, rows=False)


@pytest.mark.parametrize(("rows", "columns", "count"), [(24, 36, 3), (768, 768, 5), (36, 24, 3)])
def test_a_full_train_is_its_matrix(rows: int, columns: int, count: int) -> None:
    out, into = tensor_train.factors(rows, count, True), tensor_train.factors(columns, count, False)
    W = normal(rows, columns)
    bonds = tensor_train.full_bonds(out, into, [None] * (count - 1))
    train = [core.float() for core in tensor_train.decompose(W, out, into, bonds)]
    assert float((tensor_train.contract(train) - W).abs().max()) < 1e-5


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_a_deficient_matrix_has_a_finite_train(rank: int) -> None:
    W = normal(24, rank) @ normal(rank, 36, seed=1)
    bonds = tensor_train.full_bonds(OUT, INTO, [None, None])
    train = tensor_train.decompose(W, OUT, INTO, bonds)
    assert all(core.isfinite().all() for core in train)
    assert torch.allclose(tensor_train.contract([core.float() for core in train]).double(), W,
                          atol=1e-5)  # fmt: skip


def unfolded(W: Tensor, cut: int) -> Tensor:
    """The matrix whose rows are the first `cut` pairs of indices and whose columns the others."""
    pairs = W.reshape(*OUT, *INTO).permute(0, 3, 1, 4, 2, 5)
    return pairs.reshape(prod(OUT[:cut]) * prod(INTO[:cut]), -1)


@pytest.mark.parametrize("most", [(1, 1), (3, 5), (7, 2), (30, 6)])
def test_cutting_bonds_errs_by_no_more_than_the_cut_spectrum(most: tuple[int, int]) -> None:
    """Bound: the root of the sum of the squared singular values beyond each bond of W unfolded."""
    W = normal(24, 36)
    full = tensor_train.full_bonds(OUT, INTO, [None, None])
    bonds = tensor_train.full_bonds(OUT, INTO, most)
    assert bonds == tuple(map(min, most, full, (24 * 36, most[0] * OUT[1] * INTO[1])))
    error = (tensor_train.contract(tensor_train.decompose(W, OUT, INTO, bonds)) - W).norm()
    cut = [
        torch.linalg.svdvals(unfolded(W, k + 1))[bond:].square().sum()
        for k, bond in enumerate(bonds)
    ]
    assert float(max(cut)) ** 0.5 - 1e-9 <= float(error) <= float(sum(cut)) ** 0.5 + 1e-9


def test_both_sides_of_a_bond_share_its_spectrum() -> None:
    """The left part of the train is U L^(1/2), the right part L^(1/2) V^T, at every bond."""
    W = normal(24, 36)
    bonds = tensor_train.full_bonds(OUT, INTO, [None, None])
    T1, T2, T3 = tensor_train.decompose(W, OUT, INTO, bonds)
    left = (T1.flatten(0, 2), torch.tensordot(T1, T2, 1).flatten(0, -2))
    right = (torch.tensordot(T2, T3, 1).flatten(1), T3.flatten(1))
    for k in (0, 1):
        spectrum = torch.linalg.svdvals(unfolded(W, k + 1))[: bonds[k]]
        for gram in (left[k].mT @ left[k], right[k] @ right[k].mT):
            assert torch.allclose(gram, torch.diag(spectrum), atol=1e-6)


def test_the_order_of_contraction_does_not_matter() -> None:
    """Oracle: `einsum` over all indices, and contraction from the right."""
    shapes = zip((1, 3, 5), OUT, INTO, (3, 5, 1), strict=True)
    train = [normal(*shape, seed=k) for k, shape in enumerate(shapes)]
    at_once = torch.einsum("aijb,bklc,cmnd->ikmjln", *train).reshape(24, 36)
    backwards = torch.tensordot(train[0], torch.tensordot(train[1], train[2], 1), 1)
    backwards = backwards.squeeze().permute(0, 2, 4, 1, 3, 5).reshape(24, 36)
    for expected in (at_once, backwards):
        assert torch.allclose(tensor_train.contract(train), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "torch-encoder"])
def test_each_matrix_becomes_the_product_of_its_own_train(name: str) -> None:
    """Fused, transposed and 3-D weights: the merged rows are the contraction of their tensors."""
    model = ZOO[name].build(0)
    delta = dt.attach(model, "mpo(cores=3, bonds=(3, 4), where='attn.q, attn.o, ffn')", head=False)
    delta.merge()
    for unit in delta.tree.units:
        site = unit.site
        stored = model.get_submodule(site.path)._parameters[site.param]
        made = tensor_train.contract([unit.A1, unit.C, unit.A2])
        assert made.shape == site.shape
        assert torch.allclose(site.matrix(stored), made, atol=1e-5)


def test_the_central_tensor_is_kept_and_never_trained() -> None:
    case = ZOO["bert"]
    delta = dt.attach(case.build(0), "mpo(cores=3)", seed=0)
    central = {n: t.clone() for n, t in delta.tensors().items() if n.endswith(".C")}
    assert len(central) == 12 and not any(n.endswith(".C") for n in delta.tree.named())
    optimiser = torch.optim.AdamW(delta.parameters(), lr=0.1)
    before = delta.vector()
    for step in range(3):
        optimiser.zero_grad()
        case.run(delta.model, step).square().mean().backward()
        optimiser.step()
    assert (delta.vector() != before).float().mean() > 0.9
    assert all(torch.equal(delta.tensors()[name], value) for name, value in central.items())


def test_auxiliary_tensors_have_a_rate_of_their_own_and_do_not_decay() -> None:
    delta = dt.attach(ZOO["bert"].build(0), "mpo(cores=3, rate=0.25)")
    made = groups(delta.parameters(), Course(delta.model), 1e-2, 0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in made for p in group["params"]}
    for name, parameter in delta.tree.named().items():
        decay = 0.1 if parameter.ndim > 1 else 0.0
        assert found[id(parameter)] == ((1e-2, decay) if "head" in name else (2.5e-3, 0.0)), name


def test_a_merged_delta_stays_when_a_matrix_is_decomposed() -> None:
    """The train is that of the pre-trained matrix, and its change adds to the merged one."""
    x, changed = normal(5, 8), []
    for merged in (True, False):
        model = network()
        lora = moved(model, "lora(rank=2, where='*')")
        if merged:
            lora.merge()
        dt.attach(model, "mpo(cores=3, bonds=3, where='*')")
        changed.append(model(x))
    assert torch.allclose(*changed)


@pytest.mark.parametrize("most", [(1, 1), (3, 5), (30, 6), (99, 99)])
def test_a_tuned_train_is_squeezed_within_the_spectrum_that_is_cut_off(
    most: tuple[int, int],
) -> None:
    """Oracle: `torch.linalg.svdvals` of the product unfolded at each bond."""
    full = tensor_train.full_bonds(OUT, INTO, [None, None])
    train = tensor_train.decompose(normal(24, 36), OUT, INTO, full)
    train = [core + 0.1 * normal(*core.shape, seed=k) for k, core in enumerate(train)]
    W = tensor_train.contract(train)
    spectra = tensor_train.spectra(train)
    for k, spectrum in enumerate(spectra):
        expected = torch.linalg.svdvals(unfolded(W, k + 1))
        assert torch.allclose(spectrum, expected[: full[k]])
    small = tensor_train.squeezed(train, most)
    bonds = tensor_train.full_bonds(OUT, INTO, most)
    assert tensor_train.sides(small) == (OUT, INTO)
    assert tuple(core.shape[-1] for core in small) == (*bonds, 1)
    cut = [float(s[bond:].square().sum()) for s, bond in zip(spectra, bonds, strict=True)]
    error = float((tensor_train.contract(small) - W).norm())
    assert max(cut) ** 0.5 - 1e-9 <= error <= sum(cut) ** 0.5 + 1e-9
    several = [torch.stack([core, 2 * core]) for core in train]
    one, two = tensor_train.contract(tensor_train.squeezed(several, most))
    assert torch.allclose(one, tensor_train.contract(small)) and torch.allclose(two, 8 * one)
    for spectrum, both in zip(spectra, tensor_train.spectra(several), strict=True):
        assert torch.allclose(both, torch.stack([spectrum, 8 * spectrum]))


def test_a_decomposed_model_is_squeezed_saved_loaded_and_counted(tmp_path: Path) -> None:
    """16 x 16 as (2 4 2) x (2 4 2) with bonds of 2: 8 + 64 + 8 scalars instead of 256."""
    case, names = ZOO["bert"], ("A1", "C", "A2")
    tuned = moved(case.build(0), "mpo(cores=3, where='attn')")
    small = dt.attach(case.build(0), "mpo(cores=3, bonds=2, where='attn')", head=False)
    tensors, allowed = {}, {}
    for unit in tuned.tree.units:
        train = [getattr(unit, name).detach() for name in names]
        cores = tensor_train.squeezed(train, [2, 2])
        path = unit.site.path
        tensors |= {f"mpo.{path}.{n}": core for n, core in zip(names, cores, strict=True)}
        cut = [float(s[2:].square().sum()) for s in tensor_train.spectra(train)]
        allowed[f"{path}.weight"] = tensor_train.contract(train), sum(cut) ** 0.5
    small.load_tensors(tensors)
    folder = small.save(tmp_path / "small")
    stored = load_file(folder / "delta.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == 8 * 80 < 8 * 256
    assert small.count() == 8 * 16
    loaded = dt.load(folder, case.build(0))
    acting = case.run(small.model)
    assert torch.equal(case.run(loaded.model), acting)
    assert distance(case.run(loaded.merge().model), acting) <= 1e-5
    for name, (whole, bound) in allowed.items():
        made = loaded.model.get_parameter(name)
        assert 0 < float((made - whole).norm()) <= bound * (1 + 1e-4)


# --- PHM and quaternions ------------------------------------------------------------------------


def kron_sum(A: Tensor, B: Tensor) -> Tensor:
    """sum_i A_i (x) B_i by `torch.kron`."""
    return sum((torch.kron(a, b) for a, b in zip(A, B, strict=True)), torch.zeros(()))


FACTORS = {
    "phm": ((4, 4, 4), (4, 3, 2)),
    "near-square": ((5, 3, 4), (5, 4, 2)),
    "one": ((1, 1, 1), (1, 12, 8)),
}


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("shapes", FACTORS.values(), ids=list(FACTORS))
def test_kronecker_sums_act_like_their_matrix(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], tokens: int
) -> None:
    """Oracle: `torch.kron`; few tokens go through the factors, many through the matrix."""
    A, B = normal(*shapes[0]), normal(*shapes[1], seed=1)
    change, W = KroneckerSum(A, B), kron_sum(A, B)
    x, onto = normal(tokens, W.shape[1], seed=2), normal(tokens, W.shape[0], seed=3)
    assert torch.allclose(change.dense(), W)
    assert torch.allclose(change.apply(x, 0.5, True), 0.5 * x @ W.mT)
    assert torch.allclose(change.apply(x, 0.5, True, onto), onto + 0.5 * x @ W.mT)
    assert torch.allclose(change._multiplied(x), x @ W.mT)
    ids = torch.arange(W.shape[1]).flip(0).view(1, -1)
    assert torch.allclose(change.rows(ids, 0.5, 0), 0.5 * W.mT[ids])
    several = KroneckerSum(torch.stack([A, 2 * A]), torch.stack([B, B]))
    assert torch.allclose(several.dense(), torch.stack([W, 2 * W]))


@pytest.mark.parametrize("text", ["phm(n=4, where='0')", "phm(algebra='quaternion', where='0')"])
def test_phm_adds_the_sum_of_kronecker_products(text: str) -> None:
    model, x = network(), normal(5, 8)
    plain = model[0](x)
    delta = moved(model, text)
    tensors = delta.tensors()
    assert tensors["phm.0.A"].shape == (4, 4, 4) and tensors["phm.0.S"].shape == (4, 3, 2)
    expected = plain + x @ kron_sum(tensors["phm.0.A"], tensors["phm.0.S"]).mT
    assert torch.allclose(model[0](x), expected)


def product(w: Tensor, x: Tensor) -> Tensor:
    """The Hamilton product of two quaternions (r, i, j, k)."""
    (a, b, c, d), (e, f, g, h) = w, x
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def test_quaternions_multiply_by_hamiltons_rules() -> None:
    """Each output block is the sum of Hamilton products of weights with blocks of the input."""
    S, x = normal(4, 3, 2), normal(4, 2, seed=1)
    made = KroneckerSum(hamilton().double(), S).dense() @ x.flatten()
    expected = product(S, x[:, None, :]).sum(-1)  # (4, 3)
    assert torch.allclose(made, expected.flatten())
    unit = S[:, :1, :1] / S[:, :1, :1].norm()
    rotation = KroneckerSum(hamilton().double(), unit).dense()
    assert torch.allclose(rotation @ rotation.mT, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert float((rotation @ x[:, 0]).norm()) == pytest.approx(float(x[:, 0].norm()))


def test_the_product_with_the_quaternion_one_is_the_identity() -> None:
    q = normal(4)
    one = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    rules = hamilton().double()
    assert torch.equal(KroneckerSum(rules, one.view(4, 1, 1)).dense() @ q, q)
    assert torch.equal(KroneckerSum(rules, q.view(4, 1, 1)).dense() @ one, q)


def test_phm_of_dimension_one_is_a_linear_map() -> None:
    model, x = network(), normal(5, 8)
    plain = model[0](x)
    delta = dt.attach(model, "phm(n=1, where='0')", head=False)
    S = normal(1, 12, 8, seed=4)
    delta.load_tensors({"phm.0.A": torch.ones(1, 1, 1).double(), "phm.0.S": S})
    assert torch.allclose(model[0](x), plain + F.linear(x, S[0]))


def test_learned_rules_start_xavier_uniform_and_weights_at_zero() -> None:
    """U(-a, a) with a = sqrt(6 / (fan in + fan out)) = sqrt(3) / n, as `torch.nn.init` has it."""
    model, oracle = nn.Sequential(nn.Linear(96, 96)), torch.empty(16, 16, 16)
    tensors = dt.attach(model, "phm(n=16, where='0')", seed=0).tensors()
    A = tensors["phm.0.A"]
    nn.init.xavier_uniform_(oracle)
    assert not tensors["phm.0.S"].any()
    assert float(A.abs().max()) <= math.sqrt(3) / 16
    for found in (A, oracle):
        assert float(found.std()) == pytest.approx(1 / 16, rel=0.05)


def test_quaternion_rules_are_kept_and_not_trained() -> None:
    delta = dt.attach(network(), "phm(algebra='quaternion', where='*')")
    assert [slot.name for slot in delta.layout] == ["phm.0.S", "phm.2.S"]
    assert torch.equal(delta.tensors()["phm.2.A"], hamilton().double())
    rules = hamilton()
    assert rules.abs().sum() == 16 and torch.equal(rules[0], torch.eye(4))
    for rule in rules[1:]:
        assert torch.equal(rule @ rule, -torch.eye(4))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("phm(where='attn.q[0]')", 147_520),
        ("phm(algebra='quaternion', where='attn.q[0]')", 147_456),
        ("kronecker(where='attn.q[0]')", 12_288),
    ],
)
def test_counts_of_a_square_matrix_are_those_of_the_formulas(text: str, count: int) -> None:
    assert dt.plan(meta_model("bert-base"), text, head=False).count() == count


# --- Kronecker sums -----------------------------------------------------------------------------


def test_factors_are_as_near_to_the_root_as_they_can_be() -> None:
    for number in range(1, 400):
        smaller, larger = near_root(number)
        assert smaller * larger == number and smaller <= larger
        assert not [k for k in range(smaller + 1, larger) if number % k == 0 and k * k <= number]
    assert (near_root(768), near_root(3072)) == ((24, 32), (48, 64))


def test_a_kronecker_delta_has_a_low_rank_only_when_rearranged() -> None:
    """12 x 8 as (3 x 4) (x) (4 x 2), rearranged entry by entry; one term has rank up to 6."""
    model = network()
    W = changes(moved(model, "kronecker(rank=2, where='0')"))["0.weight"]
    R = torch.zeros(12, 8, dtype=torch.float64)
    for a in range(3):
        for c in range(4):
            for b in range(4):
                for d in range(2):
                    R[a * 4 + c, b * 2 + d] = W[a * 4 + b, c * 2 + d]
    assert int(torch.linalg.matrix_rank(R)) == 2
    assert int(torch.linalg.matrix_rank(W)) == 8


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_nearest_sum_errs_by_the_tail_of_the_rearranged_spectrum(rank: int) -> None:
    W = normal(12, 8)
    nearest = KroneckerSum.nearest(W, rank, (3, 4), (4, 2))
    R = torch.stack([
        torch.stack([W[4 * a + b, 2 * c + d] for b in range(4) for d in range(2)])
        for a in range(3) for c in range(4)
    ])  # fmt: skip
    tail = torch.linalg.svdvals(R)[rank:].square().sum().sqrt()
    error = (kron_sum(nearest.A, nearest.B) - W).norm()
    assert float(error) == pytest.approx(float(tail), abs=1e-9)


def test_kronecker_starts_at_the_backbone_with_the_stated_deviation() -> None:
    model, x = nn.Sequential(nn.Linear(96, 96)), torch.randn(5, 96)
    plain = model(x)
    delta = dt.attach(model, "kronecker(rank=8, where='0')", seed=0)
    assert torch.equal(model(x), plain)
    A, B = delta.tensors().values()
    assert not B.any()
    assert float(A.std()) == pytest.approx((8 * 96) ** -0.25, rel=0.1)
    like = torch.randn(8, *B.shape[1:]) * (8 * 96) ** -0.25
    assert float(KroneckerSum(A, like).dense().var()) == pytest.approx(1 / 96, rel=0.3)
