"""The optimiser: its groups, gradient norm and state as plain tensors."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltune.errors import TrainError
from deltune.training.course import Course
from deltune.training.settings import TrainSettings


def groups(
    parameters: Sequence[nn.Parameter], course: Course, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: each tensor with the rate that its method asks for.
    Tensors of one dimension are not decayed.

    Under `transformers.Trainer`, for a method with rates of its own:

        Trainer(..., optimizers=(torch.optim.AdamW(groups(...)), None))
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        factor, decayed = course.rate(parameter)
        decay = weight_decay if decayed and parameter.ndim > 1 else 0.0
        found.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr": learning_rate * factor, "factor": factor}
        for (decay, factor), members in sorted(found.items(), key=lambda item: -item[0][0])
    ]


def build(parameters: Sequence[nn.Parameter], settings: TrainSettings, course: Course) -> Optimizer:
    """The optimiser of the settings."""
    lr = settings.learning_rate
    groups_ = groups(parameters, course, lr, settings.weight_decay)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(groups_, lr=lr, foreach=True)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    choice = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups_, lr=lr, betas=settings.betas, eps=settings.eps, **choice)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Joint 2-norm of all gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients, foreach=True)


def clip(parameters: Sequence[nn.Parameter], most: float, norm: Tensor, value: float) -> None:
    """Scales the gradients so that their joint norm, now `norm`, whose `value` is known on the
    CPU, is at most `most` (0: any)."""
    if clipping(most, value) < 1:
        nn.utils.clip_grads_with_norm_(parameters, most, norm, foreach=True)


def clipping(most: float, value: float) -> float:
    """What gradients of joint norm `value` are multiplied by."""
    return min(1.0, most / (value + 1e-6)) if most else 1.0  # as torch does


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state, one entry `<number of the parameter>.<name>` per tensor or number."""
    state = optimizer.state_dict()["state"]
    return {
        f"{at}.{name}": torch.as_tensor(value)
        for at, slot in state.items()
        for name, value in slot.items()
    }


def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undoes `state_tensors`.

    Raises:
        TrainError: the state is of another optimiser or of other parameters.
    """
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        at, _, name = key.partition(".")
        if not at.isdecimal() or int(at) >= count:
            raise TrainError(
                f"optimiser state `{key}` does not belong to these {count} parameters; "
                "delete the checkpoint and start again"
            )
        state.setdefault(int(at), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
