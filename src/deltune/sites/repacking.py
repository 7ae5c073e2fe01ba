"""New numbers for weights that are held in fewer bits than they mean.

torchao's tensors say in how many bits and in which blocks they are, and by their zero points
whether codes lie on both sides of zero alike. How scales were sought they do not say: they are
found here as torchao finds them by default, from the least and the largest value of a block.
"""

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.sites.packed import kind


def repacked(weight: Tensor, value: Tensor, module: nn.Module) -> nn.Parameter:
    """These values, held as a weight of a module is.

    Args:
        weight: the one there.
        value: of the shape that it means.
        module: the one that it belongs to.

    Raises:
        AttachError: of a kind that cannot be made here.
    """
    make = MAKERS.get(type(weight).__name__)
    if make is None or getattr(weight, "act_pre_scale", None) is not None:
        why = (
            "which says too little of how it was made to be made again"
            if make is None
            else "with its inputs scaled before, which its numbers leave out"
        )
        raise AttachError(
            f"a weight of {type(module).__name__} is held as {kind(weight)}, {why}, so that "
            "nothing can be merged into it and no rounding told; leave the delta unmerged, or load "
            "the model in plain numbers, load the delta there with `force=True`, and merge it "
            "there"
        )
    made = make(weight, value, module)
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made, requires_grad=False)


def _four_bits(weight: Any, value: Tensor, module: nn.Module) -> Any:
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    told = {name: getattr(weight, name) for name in names}
    value = value.to(weight.quant_state.dtype).cpu()
    return type(weight)(value, requires_grad=False, **told).to(weight.device)


def _eight_bits(weight: Any, value: Tensor, module: nn.Module) -> Any:
    if weight.CB is None:  # its first forward has moved them; the module asks for them again
        state: Any = module.state
        weight.CB, weight.SCB = state.CB, state.SCB
    made = type(weight)(value.half().cpu(), requires_grad=False, has_fp16_weights=False)
    return made.to(weight.device)


def _torchao_int8(weight: Any, value: Tensor, module: nn.Module) -> Any:
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
    told = {name: getattr(weight, name) for name in names}
    value = value.to(weight.dtype)
    return type(weight).from_hp(value, _blocks(weight), _mapping(weight), **told)


def _torchao_intx(weight: Any, value: Tensor, module: nn.Module) -> Any:
    value, same = value.to(weight.dtype), (tuple(weight.block_size), weight.target_dtype)
    told = {"activation_quantization": weight.activation_quantization}
    made = type(weight).from_hp(value, *same, mapping_type=_mapping(weight), **told)
    if made.scale.dtype == weight.scale.dtype:
        return made
    scale = made.scale.to(weight.scale.dtype)
    return type(weight).from_hp(
        value, *same, custom_scale=scale, custom_zero_point=made.zero_point,
        intx_choose_qparams_algorithm=None, **told,
    )  # fmt: skip


def _torchao_float8(weight: Any, value: Tensor, module: nn.Module) -> Any:
    names = ("mm_config", "kernel_preference", "act_quant_kwargs")
    told = {name: getattr(weight, name) for name in names}
    value = value.to(weight.dtype)
    return type(weight).from_hp(value, weight.qdata.dtype, _blocks(weight), **told)


def _blocks(weight: Any) -> Any:
    """The blocks with a scale each, as torchao is told of them."""
    return import_module("torchao.quantization.granularity").PerBlock(tuple(weight.block_size))


def _mapping(weight: Any) -> Any:
    """How the codes lie about zero."""
    kinds = import_module("torchao.quantization.quant_primitives").MappingType
    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    return kinds.ASYMMETRIC if shifted else kinds.SYMMETRIC


MAKERS = {
    "Params4bit": _four_bits,
    "Int8Params": _eight_bits,
    "Int8Tensor": _torchao_int8,
    "IntxUnpackedToInt8Tensor": _torchao_intx,
    "Float8Tensor": _torchao_float8,
}
"""Kinds of weights that can be made from numbers alone."""
