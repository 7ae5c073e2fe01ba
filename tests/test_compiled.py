"""A compiled model is the model, whatever is attached, enabled, routed or taken off after it ran.

Oracle: a twin that is not compiled and has the same deltas.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from probes import moved
from snapshots import distance
from zoo import ZOO, Case


@pytest.fixture(autouse=True)
def as_torch_is() -> Iterator[None]:
    """Hooks are not looked at, as by default in torch, whatever this process did before."""
    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    yield
    torch.compiler.reset()


def whole(model: nn.Module) -> Callable[..., object]:
    return torch.compile(model, backend="eager")


def in_blocks(model: nn.Module) -> Callable[..., object]:
    for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
        block.compile(backend="eager")
    return model


WAYS = [("llama", whole), ("gpt2", in_blocks), ("t5", in_blocks), ("torch-encoder", whole)]


@pytest.mark.parametrize(("name", "compile_it"), WAYS)
def test_a_compiled_model_notices_deltas_that_come_later(
    name: str, compile_it: Callable[[nn.Module], Callable[..., object]]
) -> None:
    case = ZOO[name]
    model, twin = case.build(0), case.build(0)
    compiled, states = compile_it(model), []

    def same() -> None:
        with torch.no_grad():
            expected = case.run(twin)
            assert distance(_run(case, compiled), expected) <= 1e-6
        states.append(expected)

    same()
    for path, text in (("a", "lora(rank=2, where='attn.q')"), ("b", "adapter(width=3)")):
        for one in (model, twin):
            moved(one, text, path, head=False)
        same()
    for names in (None, "b", "a", ["a", "b"], None):
        for one in (model, twin):
            dt.activate(one, names)
        same()
    for one in (model, twin):
        moved(one, "lora(rank=2, where='ffn.up')", "c", head=False)
    with dt.route(model, ["a", "c", None]), dt.route(twin, ["a", "c", None]):
        same()
    for one in (model, twin):
        dt.deltas(one)["b"].detach()
    same()
    assert len({round(float(x.double().sum()), 6) for x in states}) >= 5
    assert torch._dynamo.config.skip_nnmodule_hook_guards is False


def _run(case: Case, compiled: Callable[..., object]) -> Tensor:
    return case.output(compiled(**case.batch(0)))
