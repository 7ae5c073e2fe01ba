"""Frozen matrices rounded once. Oracle: the same training with autocast's own rounding, bit for
bit, and a count of the roundings."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deltune as dt
from deltune.training import loop
from deltune.training.precision import autocast, cast_once
from tasks_toys import tokenizer
from test_train_trunk import model_of, task_of

CPU = torch.device("cpu")
SPECS = ("lora + bitfit", "adapter + prefix(tokens=3)", "movement(keep=0.5)", "last", "full")


class Roundings(TorchDispatchMode):
    """Counts the copies of a matrix of one shape in bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].shape == self.shape
        return func(*args, **kwargs)


def trained(spec: str) -> tuple[tuple[float, ...], list[Tensor], nn.Module]:
    model = model_of("bert")
    delta = dt.attach(model, spec, seed=0)
    chosen = dt.TrainSettings(
        learning_rate=1e-2, max_steps=5, per_device_train_batch_size=4, eval_steps=2,
        precision="bf16",
    )  # fmt: skip
    result = dt.train(model, tokenizer("bert"), task_of("bert"), delta, chosen)
    return result.losses, [t.clone() for t in delta.tensors().values()], model


@pytest.mark.parametrize("spec", SPECS)
def test_training_is_the_same_bit_for_bit(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, tensors, model = trained(spec)
    monkeypatch.setattr(loop, "cast_once", lambda *_: nullcontext())
    plain, others, _ = trained(spec)
    assert losses == plain
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def step(model: nn.Module, x: Tensor) -> Tensor:
    with autocast(CPU, "bf16"):
        return model(x).float()


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).requires_grad_(False)
    model[0].bias.requires_grad_()
    return model


def test_a_matrix_is_rounded_once_and_only_where_a_gradient_passes() -> None:
    model, x = two_layers(), torch.randn(3, 6)
    for shape, expected in (((6, 6), 4), ((5, 6), 1)):  # no gradient passes the first
        with cast_once(model, "bf16"), Roundings(shape) as seen:
            for _ in range(4):
                step(model, x).sum().backward()
        assert seen.count == expected
        with cast_once(model, "fp32"), Roundings(shape) as seen:
            for _ in range(4):
                step(model, x).sum().backward()
        assert seen.count == 4


def test_a_changed_matrix_is_rounded_anew() -> None:
    model, x = two_layers(), torch.randn(3, 6)
    with cast_once(model, "bf16"):
        step(model, x)
        with torch.no_grad():
            model[1].weight.mul_(-1.0)
        found = step(model, x)
        other = torch.func.functional_call(model, {"1.weight": torch.ones(5, 6)}, (x,))
        outside = model(x)
    assert torch.equal(found, step(model, x))
    assert torch.equal(
        other, torch.func.functional_call(model, {"1.weight": torch.ones(5, 6)}, (x,))
    )
    assert torch.equal(outside, model(x))
    assert outside.dtype == torch.float32
