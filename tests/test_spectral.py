"""FourierFT and C3A, and the places that a seed draws.

Oracles: the sums of the formulas written out, and PEFT's own lookup of patterns.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import ExchangeError, SpecError
from deltune.exchange.names import BEHIND_A_DOT, behind_a_dot, looked_up
from deltune.exchange.peft.checkpoint import load_peft, save_peft
from deltune.mechanisms.circulant import BlockCirculant
from test_reparameterization import changes, moved, network, normal


def at(delta: dt.Delta, name: str) -> Tensor:
    return delta.tensors()[name].detach()


def test_fourierft_is_a_sum_of_cosines_at_the_drawn_places() -> None:
    delta = moved(network(), "fourierft(frequencies=5, alpha=3.0, seed=4, where='0')")
    order = torch.randperm(12 * 8, generator=torch.Generator().manual_seed(4))
    p, q = torch.arange(12.0).double()[:, None], torch.arange(8.0).double()
    expected = torch.zeros(12, 8, dtype=torch.float64)
    for c, place in zip(at(delta, "fourierft.0.c"), order.tolist(), strict=False):
        j, k = divmod(place, 8)
        expected += 3.0 * c * torch.cos(2 * math.pi * (p * j / 12 + q * k / 8)) / (12 * 8)
    assert torch.allclose(changes(delta)["0.weight"], expected)


def test_places_come_from_the_seed_alone_and_no_file_holds_them() -> None:
    def drawn(options: str, seed: int) -> Tensor:
        model = nn.Sequential(nn.Linear(8, 12, bias=False))
        delta = dt.attach(model, f"fourierft(frequencies=5, where='0'{options})", seed=seed)
        assert list(delta.tensors()) == ["fourierft.0.c"] and delta.count() == 5
        delta.load_vector(torch.ones(5))
        return changes(delta)["0.weight"]

    assert torch.allclose(drawn("", 0), drawn("", 1), atol=1e-5)
    assert not torch.allclose(drawn("", 0), drawn(", seed=1", 0))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 5), (3, 1, 1), (2, 2, 2)])
def test_c3a_blocks_are_turned_kernels(shape: tuple[int, int, int]) -> None:
    m, n, b = shape
    K, x = normal(*shape), normal(7, n * b, seed=1)
    update = BlockCirculant(K, 0.5)
    expected = torch.zeros(m * b, n * b, dtype=torch.float64)
    for i in range(m):
        for j in range(n):
            for u in range(b):
                row = expected[i * b + u, j * b : (j + 1) * b]
                row.copy_(0.5 * K[i, j].roll(u))
    assert torch.allclose(update.dense(), expected)
    assert torch.allclose(update.apply(x, 3.0, True), 3.0 * x @ expected.mT)
    assert torch.allclose(update.apply(x, 3.0, True, onto=normal(7, m * b)),
                          normal(7, m * b) + 3.0 * x @ expected.mT)  # fmt: skip
    ids = torch.arange(n * b).reshape(1, -1)
    assert torch.allclose(update.rows(ids, 2.0, None), 2.0 * expected.mT[None])


def test_c3a_divides_by_the_inputs_and_starts_as_it_says() -> None:
    delta = moved(network(), "c3a(block=4, where='0')")
    K = at(delta, "c3a.0.K")
    assert K.shape == (3, 2, 4)
    assert torch.allclose(changes(delta)["0.weight"], BlockCirculant(K, 1 / 8).dense())
    bounds = {"xavier": math.sqrt(6 / 120), "kaiming": math.sqrt(1 / 40), "zero": 0.0}
    for init, bound in bounds.items():
        delta = dt.attach(nn.Linear(40, 80), f"c3a(block=2, init='{init}', where='*')", seed=0)
        most = float(delta.vector().abs().max())
        assert 0.99 * bound <= most <= bound


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("fourierft(frequencies=0)", "`frequencies` must be 1 or more"),
        ("fourierft(alpha=0.0)", "`alpha` must be other than 0"),
        ("fourierft(frequencies=97, where='0')",
         "the spectrum of the 12 x 8 matrix at `0` has 96 places; use at most"),
        ("c3a(block=0)", "`block` must be 1 or more"),
        ("c3a(block=8, where='0')",
         "8 does not divide both sides of the 12 x 8 matrix at `0`; use a divisor of 4"),
    ],
)  # fmt: skip
def test_bad_specs_say_what_to_do(text: str, what: str) -> None:
    model = network()
    with pytest.raises(SpecError, match=what):
        dt.attach(model, text)
    assert not dt.deltas(model)


# --- patterns as PEFT has them here ------------------------------------------------------------


def nested() -> nn.Module:
    """Modules of which one's name is the end of another's."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8))


@pytest.mark.parametrize("text", [
    "c3a(block=2, where='0') + c3a(block=4, where='1.0, 1.1, 2')",
    "c3a(block=2, where='0, 1.1') + c3a(block=4, where='1.0') + c3a(block=8, where='2')",
    "fourierft(frequencies=3, alpha=3.0, where='1.0, 2') + "
    "fourierft(frequencies=5, alpha=3.0, where='0, 1.1')",
])  # fmt: skip
def test_patterns_mean_one_module_each_there_and_here(text: str, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    delta, x = moved(nested().double(), text), normal(5, 8)
    delta.scale = 0.7
    save_peft(delta, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(nested(), tmp_path / "ours").double()
    assert torch.allclose(again.base_model.model(x), delta.model(x), atol=1e-6)
    back = load_peft(tmp_path / "ours", nested())
    assert torch.allclose(back.model.double()(x), delta.model(x), atol=1e-6)


def test_a_name_without_a_dot_is_known_by_itself_alone() -> None:
    patterns = behind_a_dot({"0": 1, "a.0": 2, "b.a.0": 3}, 1)
    for path, value in {"0": 1, "a.0": 2, "b.a.0": 3}.items():
        assert looked_up(patterns, path, 9, BEHIND_A_DOT) == value
    assert looked_up({"0": 1}, "a.0", 9, BEHIND_A_DOT) == 1
    assert looked_up({"^0": 1}, "0", 9, BEHIND_A_DOT) == 9
    with pytest.raises(ExchangeError, match="expected a number"):
        looked_up({"0": "x"}, "0", 9, BEHIND_A_DOT)
