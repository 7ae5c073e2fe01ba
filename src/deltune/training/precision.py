"""The arithmetic of forward passes."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.training.settings import Arithmetic, Precision


def resolve(precision: Precision, device: torch.device) -> Arithmetic:
    """What a precision means on a device: "auto" is bf16 where that is native, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; emulation is many times slower."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has is True for name, has in known.items() if "bf16" in name)


def autocast(device: torch.device, arithmetic: Arithmetic) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "bf16")


@contextmanager
def cast_once(model: nn.Module, arithmetic: Arithmetic) -> Generator[None]:
    """While it is open, frozen matrices are rounded to bfloat16 once, not in every forward as by
    autocast; results are the same bit for bit.

    A copy is made when a gradient first has to pass the matrix, so where autocast's own copy would
    be kept for backward: the peak of memory is the same too, but for gradient checkpointing, with
    which nothing is kept. A matrix that is changed meanwhile, or replaced while its module runs, is
    rounded anew as ever.

    Args:
        model: with everything that is not trained frozen.
        arithmetic: of the forward passes; nothing is done for fp32.
    """
    kept: list[nn.Linear] = []
    if arithmetic == "bf16" and not getattr(model, "is_gradient_checkpointing", False):
        kept = [one for one in model.modules() if isinstance(one, nn.Linear) and _frozen(one)]
    for module in kept:
        vars(module)["forward"] = Rounded(module)
    try:
        yield
    finally:
        for module in kept:
            vars(module).pop("forward", None)


class Rounded:
    """The forward of a linear module, with a kept copy of its matrix."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.of: tuple[Tensor | None, int] = None, 0
        self.copy: Tensor | None = None

    def __call__(self, input: Tensor) -> Tensor:
        own, kind = self.module.weight, input.device.type
        weight = own
        if (
            type(own) is nn.Parameter  # and not what a delta shows in its place
            and not (own.requires_grad or own.is_inference() or torch.compiler.is_compiling())
            and torch.is_autocast_enabled(kind)
            and torch.get_autocast_dtype(kind) == torch.bfloat16
        ):
            known, version = self.of
            if input.requires_grad and not (known is own and version == own._version):
                self.of, self.copy = (own, own._version), own.bfloat16()
                known, version = self.of
            if self.copy is not None and known is own and version == own._version:
                weight = self.copy
        return F.linear(input, weight, self.module.bias)


def _frozen(module: nn.Linear) -> bool:
    weight = module._parameters["weight"]
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    single = weight is not None and weight.dtype is torch.float32
    return plain and single and not weight.requires_grad
