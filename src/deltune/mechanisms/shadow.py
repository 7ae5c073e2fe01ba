"""Parameters of the backbone: as they were given, and others in their place for a while."""

from torch import Tensor, nn

from deltune.mechanisms.quantised import numbers

ORIGINALS = "_originals"


def pretrained(owner: nn.Module, name: str) -> Tensor:
    """A parameter of the backbone as it was given, also while a delta is merged into it."""
    value = owner.__dict__.get(ORIGINALS, owner._parameters).get(name)
    return numbers(owner, owner._parameters.get(name) if value is None else value)


class Shadow:
    """Lets a module see changed parameters while its forward runs, without touching them.

    An entry in the instance dictionary hides the registered parameter of the same name. Entries of
    several deltas add up, since each starts from what it sees.
    """

    @staticmethod
    def cast(owner: nn.Module, name: str, change: Tensor) -> None:
        """Hides `owner.name` behind `owner.name + change`."""
        seen = getattr(owner, name)
        owner.__dict__[name] = seen + change.to(seen.dtype)

    @staticmethod
    def replace(owner: nn.Module, name: str, value: Tensor) -> None:
        """Hides `owner.name` behind `value`."""
        owner.__dict__[name] = value.to(getattr(owner, name).dtype)

    @staticmethod
    def lift(owner: nn.Module, name: str) -> None:
        """Shows the registered parameter again."""
        owner.__dict__.pop(name, None)
