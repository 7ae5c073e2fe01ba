"""A delta that gives back what quantising the backbone has lost."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import ConversionError, closest
from deltune.mechanisms.modules import at, pretrained
from deltune.mechanisms.weight import Weight


@torch.no_grad()
def restore_rounding(delta: Delta, plain: nn.Module | Mapping[str, Tensor]) -> float:
    """Starts a delta at what quantising the backbone has lost.

        s B A  =  the r largest singular triplets of  W - Q    for each matrix that the delta
                                                               changes, and for other methods the
                                                               nearest change that they can make

    W are the weights from before, Q the numbers that the backbone's codes stand for. Trained from
    there a delta begins with a model nearer to the one that was pre-trained.

    Args:
        delta: of changes of weights with a closed form for a given one (`lora`, as `deltune
            convert` knows them), attached to the quantised backbone; what it was is replaced.
        plain: W: the model in plain numbers, or its parameters by their names there.

    Returns:
        || W - Q - s B A || / || W - Q || over all of these matrices: what is still lost, of what
        was; 0 where nothing was lost.

    Raises:
        ConversionError: another method; a weight that `plain` lacks or has in another shape.
            Nothing is changed then.

    Source: Li et al. 2023, arXiv:2310.08659, eq. 6 to 8 with T = 1. Differs: Q is not quantised
        again from W - s B A (T > 1), since the backbone stays as it was given.

    Example:
        >>> import deltune as dt, torch
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> rounded = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> rounded[0].weight.data = plain[0].weight.data.round(decimals=1)
        >>> delta = dt.attach(rounded, "lora(rank=4, where='0')")
        >>> restore_rounding(delta, plain) < 1e-6
        True
    """
    weights = dict(plain.named_parameters()) if isinstance(plain, nn.Module) else plain
    lost = {}
    for unit in delta.tree.acting:
        spec, site = unit.spec, unit.site
        if spec.owns:
            continue
        if not isinstance(spec, Weight):
            raise ConversionError(f"`{spec}` is no change of weights; use one, such as lora")
        name = f"{site.path}.{site.param}".strip(".")
        seen = pretrained(at(delta.model, site.path), site.param)
        if name not in weights or weights[name].shape != seen.shape:
            has = "not there" + closest(name, weights)
            if name in weights:
                has = str(tuple(weights[name].shape))
            raise ConversionError(
                f"`{name}` is {tuple(seen.shape)} in the backbone and {has} in `plain`; give the "
                "model that was quantised, or its parameters by the names of this one"
            )
        lost[unit] = site.matrix(weights[name].to(seen) - seen)
    before = delta.vector()
    left = size = 0.0
    try:
        for unit, change in lost.items():
            spec, site = unit.spec, unit.site
            spec.nearest(unit, change)
            seen = pretrained(at(delta.model, site.path), site.param)
            found = site.matrix(unit.change(seen))
            left += float((change - found).double().square().sum())
            size += float(change.double().square().sum())
    except BaseException:
        delta.load_vector(before)
        raise
    return (left / size) ** 0.5 if size else 0.0
