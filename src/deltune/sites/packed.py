"""Weights that are held in fewer bits than they mean: their shape and their values.

bitsandbytes has codes in the place of a weight, those of four bits in another shape; torchao a
tensor that says it is floating point and adds nothing; others no `weight` at all, but a linear map
that declares its features. None of these packages is imported before a weight of its is met.
"""

from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import AttachError

_BITSANDBYTES = ("Params4bit", "Int8Params")


def packed(weight: Tensor) -> bool:
    """Whether a weight is not simply the numbers that it means."""
    plain = weight.is_floating_point() or weight.is_complex()
    if not plain or weight.element_size() < 2:
        return True
    return type(weight) not in (Tensor, nn.Parameter) and _dequantizes(weight)


def declared(module: nn.Module) -> bool:
    """Whether a module is a linear map by its features, with a weight of its own kind or none."""
    own = module.__dict__
    return type(own.get("in_features")) is type(own.get("out_features")) is int and (
        not module._modules
    )


def different(module: nn.Module) -> bool:
    """Whether a module has a packed weight, or is a linear map without a weight."""
    weight = module._parameters.get("weight")
    return declared(module) if weight is None else packed(weight)


def passes(module: Any, dtype: torch.dtype) -> bool:
    """Whether gradients flow through a packed linear map to what it is given."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    if device is None or device.type == "meta":
        return True
    with torch.enable_grad():
        x = torch.zeros(32, module.in_features, device=device, dtype=dtype, requires_grad=True)
        try:
            return module.forward(x).requires_grad
        except Exception:  # a kernel that wants something else; its first real call says what
            return True


def meant(weight: Tensor) -> tuple[int, ...]:
    """The shape of the values that a weight stands for."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def size(weight: Tensor) -> int:
    """The number of values that a weight stands for."""
    return prod(meant(weight))


def kind(weight: Tensor) -> str:
    """What a packed weight is, for messages."""
    own = type(weight).__name__
    return str(weight.dtype).removeprefix("torch.") if own in ("Tensor", "Parameter") else own


def values(weight: Tensor | None, module: nn.Module | None = None) -> Tensor:
    """The numbers that a packed weight means, in its shape.

    Args:
        weight: packed; None where the module has no parameter of the name.
        module: the one that it belongs to; bitsandbytes keeps the scales of 8 bits there.

    Raises:
        AttachError: of a kind whose numbers cannot be read here.
    """
    match type(weight).__name__:
        case "Params4bit":
            return _four_bits(weight)
        case "Int8Params":
            return _eight_bits(weight, module)
    if weight is not None and _dequantizes(weight):
        return weight.dequantize()
    how = "in a form of its own" if weight is None else f"as {kind(weight)}"
    raise AttachError(
        f"{type(module).__name__} holds its weight {how}, whose numbers cannot be read here; use a "
        "method that does not need them, such as LoRA or an adapter, and leave it unmerged, or "
        "load the model in plain numbers"
    )


def numbers(owner: nn.Module, value: Tensor | None) -> Tensor:
    """The numbers of a parameter of a module, also where they are held in another form.

    Raises:
        AttachError: they cannot be read.
    """
    return values(value, owner) if value is None or packed(value) else value


def check_readable(owner: nn.Module, name: str) -> None:
    """Refuses a parameter whose numbers cannot be read.

    Raises:
        AttachError: it is held in a form that is not known.
    """
    value = owner._parameters.get(name)
    known = value is not None and (
        not packed(value) or type(value).__name__ in _BITSANDBYTES or _dequantizes(value)
    )
    if not known:
        values(value, owner)


def steady(weight: Tensor) -> Tensor:
    """What of a packed weight is the same wherever it lies: its numbers, or its codes where the
    module has the scales."""
    known = type(weight).__name__ == "Params4bit" or _dequantizes(weight)
    return values(weight) if known else weight.data


def _dequantizes(weight: Tensor) -> bool:
    return type(weight).dequantize is not Tensor.dequantize


def rearranges(module: nn.Module) -> bool:
    """Whether a module would put its weight into an order of its processor at its first inference,
    through which bitsandbytes has no gradients.

    Raises:
        AttachError: it has done so.
    """
    _check_order(module._parameters.get("weight"))
    return bool(module.__dict__.get(REARRANGES))


REARRANGES = "support_avx512bf16_for_cpu"


def _check_order(weight: Any) -> None:
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise AttachError(
            "bitsandbytes has put the weights of this model into an order for inference on this "
            "processor, through which no gradients flow, without a word; load the model again and "
            "attach before its first forward in eval mode: the order stays then"
        )


def _four_bits(weight: Any) -> Tensor:
    functional: Any = import_module("bitsandbytes.functional")
    _check_order(weight)
    return functional.dequantize_4bit(weight.data, weight.quant_state)


def _eight_bits(weight: Any, module: Any) -> Tensor:
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return weight.data * (scales.view(-1, 1) / 127)
