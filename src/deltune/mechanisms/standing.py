"""Whether a model is still what deltas can act on: whole, and of the modules they know."""

from torch import nn

from deltune.errors import AttachError
from deltune.mechanisms.modules import at
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import walk
from deltune.vector import sharded


def check_whole(model: nn.Module, what: str) -> None:
    """Refuses what would act on the pieces of weights that several processes hold.

    Raises:
        AttachError: a parameter of the backbone lies in pieces.
    """
    for path, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and sharded(parameter):
                raise AttachError(
                    f"`{path}.{name}` lies in pieces in several processes, so that no delta can be "
                    f"{what} here; attach, load and merge on the whole model, before "
                    "`fully_shard(model)`"
                )


def check_home(root: nn.Module, unit: Unit) -> None:
    """Refuses to run where another module stands in the place of the one that a unit acts on."""
    try:
        found = at(root, unit.site.path)
    except KeyError:  # it is inside a wrapper, such as that of a compiled block
        return
    if found is not unit.home and all(module is not unit.home for module in found.modules()):
        raise AttachError(
            f"`{unit.site.path}` is another module than the one that `{unit.spec.kind}` was "
            "attached to, and would run without it: the model was quantised or dequantised, or its "
            "embeddings resized; save the delta, and load it after that"
        )
