"""Oracles: torch's unfused optimisers on the same gradients; the definition of clipping."""

import pytest
import torch
from torch import nn

from deltune.errors import TrainError
from deltune.training import optim
from deltune.training.course import Course
from deltune.training.settings import TrainSettings

PLAIN = Course(nn.Linear(1, 1))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), (), (2, 3, 2)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(tensors: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in tensors:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adamw_equals_torch_and_spares_vectors_from_decay(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    chosen = TrainSettings(learning_rate=0.1, weight_decay=0.3, betas=(0.7, 0.9), eps=1e-3)
    optimizer = optim.build(ours, chosen, PLAIN)
    common = {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "foreach": False, "fused": False}
    by_hand = [
        torch.optim.AdamW([theirs[0], theirs[3]], weight_decay=0.3, **common),
        torch.optim.AdamW([theirs[1], theirs[2]], weight_decay=0.0, **common),
    ]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        for other in by_hand:
            other.step()
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_adafactor_equals_torch() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = optim.build(ours, TrainSettings(learning_rate=0.1, optimizer="adafactor"), PLAIN)
    by_hand = torch.optim.Adafactor(theirs, lr=0.1, foreach=False)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        by_hand.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("most", [0.0, 0.5, 100.0])
def test_clipping(most: float) -> None:
    tensors = parameters()
    give_gradients(tensors, 0)
    before = torch.cat([p.grad.reshape(-1) for p in tensors])
    norm = optim.gradient_norm(tensors)
    torch.testing.assert_close(norm, before.norm())
    optim.clip(tensors, most, norm, norm.item())
    after = torch.cat([p.grad.reshape(-1) for p in tensors])
    scale = min(1.0, most / float(before.norm())) if most else 1.0
    torch.testing.assert_close(after, before * scale)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_round_trip_continues_bitwise(name: str) -> None:
    chosen = TrainSettings(optimizer=name, weight_decay=0.1)
    straight, first = parameters(), parameters()
    one, two = optim.build(straight, chosen, PLAIN), optim.build(first, chosen, PLAIN)
    for step in range(6):
        if step == 3:
            second = [nn.Parameter(p.detach().clone()) for p in first]
            state = {k: t.clone() for k, t in optim.state_tensors(two).items()}
            first, two = second, optim.build(second, chosen, PLAIN)
            optim.load_state_tensors(two, state)
        for tensors, optimizer in ((straight, one), (first, two)):
            give_gradients(tensors, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, first, strict=True))


def test_foreign_state_is_refused() -> None:
    optimizer = optim.build(parameters(), TrainSettings(), PLAIN)
    with pytest.raises(TrainError, match=r"`9\.exp_avg` does not belong to these 4 parameters"):
        optim.load_state_tensors(optimizer, {"9.exp_avg": torch.zeros(1)})
