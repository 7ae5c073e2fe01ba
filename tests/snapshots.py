"""What a model is, down to hooks and attributes: to tell whether anything was left behind."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """Values, identities and flags of parameters; hooks, attributes and attention of modules."""

    values: dict[str, Tensor]
    parameters: dict[str, tuple[int, bool]]
    modules: dict[str, tuple[type, bool, frozenset[str], tuple[int, ...]]]
    attention: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        parameters = {
            name: (id(p), p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        modules = {
            path: (
                type(module),
                module.training,
                frozenset(module.__dict__),
                tuple(len(getattr(module, name)) for name in HOOKS),
            )
            for path, module in model.named_modules(remove_duplicate=False)
        }
        attention = {
            path: module.config._attn_implementation
            for path, module in model.named_modules()
            if hasattr(getattr(module, "config", None), "_attn_implementation")
        }
        values = {name: value.clone() for name, value in model.state_dict().items()}
        return cls(values, parameters, modules, attention)

    def check(self, model: nn.Module) -> None:
        """Fails where the model is not what it was, bit for bit."""
        self.check_twin(model)
        now = Snapshot.of(model)
        assert now.parameters == self.parameters
        for path, facts in self.modules.items():
            assert now.modules[path] == facts, path

    def check_twin(self, model: nn.Module) -> None:
        """Fails where another model has not the same values, hooks and settings."""
        now = Snapshot.of(model)
        assert now.values.keys() == self.values.keys()
        for name, value in self.values.items():
            assert torch.equal(now.values[name], value), name
        assert {n: flag for n, (_, flag) in now.parameters.items()} == {
            n: flag for n, (_, flag) in self.parameters.items()
        }
        assert now.modules.keys() == self.modules.keys()
        for path, facts in self.modules.items():
            assert now.modules[path][-1] == facts[-1], path
        assert now.attention == self.attention


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the scale of `b`."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max())
