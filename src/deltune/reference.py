"""The model without a delta, beside the model with it, on the same tensors."""

import copy

from torch import nn

from deltune.container import check_whole, container
from deltune.delta import Delta


def reference(delta: Delta) -> nn.Module:
    """The model as it is without this delta: modules of its own, and the tensors of the attached
    one, so that it takes no memory of the size of the model.

    For losses that compare a model with what it was before training, such as TRL's `ref_model`:
    both may run in any order, and each is in train or eval mode for itself. Other deltas act in the
    reference as they do now, and follow their training, since their tensors are the same.

    Args:
        delta: the one that is left out.

    Returns:
        A model of the same class, in eval mode. It requires no gradients of its own.

    Raises:
        AttachError: the model is sharded over processes, whose pieces only one model may have.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = dt.attach(model, "lora(rank=2, where='0')")
        >>> before = reference(delta)
        >>> before[0].weight is model[0].weight
        True
    """
    check_whole(delta.model, "left out")
    tensors = [*delta.model.parameters(), *delta.model.buffers()]
    held = container(delta.model)
    if held is not None:
        tensors += [*held.frozen, *(original for _, _, original in held.originals)]
    alone = copy.deepcopy(delta.model, {id(tensor): tensor for tensor in tensors})
    own = Delta(alone, delta.name)
    inside = own._container()
    inside.frozen.clear()  # the parameters are the attached model's, and stay frozen
    own.detach()
    return alone.eval()
