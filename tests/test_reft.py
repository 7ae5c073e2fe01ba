"""Interventions on hidden states. Oracle: the formula of the paper, written out token by token over
the states that the blocks put out; `torch.nn.utils.parametrizations.orthogonal`."""

from typing import Any

import pytest
import torch
from torch import Tensor

import deltune as dt
from zoo import ZOO, Case


def states(case: Case, model: Any, blocks: list[str], change: Any) -> Tensor:
    """The output with `change(block, row, state)` in the place of what a block puts out."""
    handles = []
    for path in blocks:

        def hook(module: Any, args: Any, output: Any, path: str = path) -> Any:
            main = output if isinstance(output, Tensor) else output[0]
            made = torch.stack([change(path, row, one) for row, one in enumerate(main)])
            return made if isinstance(output, Tensor) else (made, *output[1:])

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        return case.run(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bert", "loreft(rank=3, prefix=2, suffix=2)"),
        ("bert", "loreft(rank=3, prefix=4, suffix=1, tied=True, orthogonal=False)"),
        ("bert", "direft(rank=2, prefix=0, suffix=2)"),
        ("t5", "direft(rank=2, prefix=1, suffix=3)[encoder]"),
        ("llama", "loreft(rank=2, prefix=3)"),
    ],
)
def test_each_token_is_changed_as_the_paper_says(name: str, text: str) -> None:
    """LENGTHS of rows are 7, 5 and 3, so that of the shortest one tokens are first and last."""
    case = ZOO[name]
    delta = dt.attach(case.build(0), text, head=False, seed=0)
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(delta.vector() + 0.3 * torch.randn(delta.layout.size, generator=draw))
    spec: Any = delta.spec
    units: Any = delta.tree.units
    found = {unit.site.path: unit for unit in units}
    lengths = case.batch(0)["attention_mask"].sum(1).tolist()
    assert len(found) == 2 and set(lengths) == {7, 5, 3}

    def edited(t: Any, h: Tensor, end: str) -> Tensor:
        R, W, b = (t.own(f"{one}{end}") for one in "RWb")
        if spec.kind == "direft":
            return R.mT @ (W @ h + b)
        if spec.orthogonal:
            Q, T = torch.linalg.qr(R.mT)
            R = (Q @ torch.diag(T.diagonal().sign())).mT
            assert torch.allclose(R @ R.mT, torch.eye(len(R)), atol=1e-5)
        return R.mT @ (W @ h + b - R @ h)

    def change(path: str, row: int, rows: Tensor) -> Tensor:
        out, n = [], lengths[row]
        for i, h in enumerate(rows):
            first, last = i < spec.prefix and i < n, n - spec.suffix <= i < n
            more = torch.zeros_like(h)
            if spec.tied and (first or last):
                more = edited(found[path], h, "")
            elif not spec.tied:
                more = edited(found[path], h, "") if first else more
                more = edited(found[path], h, "_last") if last else more
            out.append(h + more)
        return torch.stack(out)

    with torch.no_grad():
        ours = case.run(delta.model)
        with delta.disabled():
            plain = case.run(delta.model)
            oracle = states(case, delta.model, list(found), change)
    assert (ours - plain).abs().max() > 1e-3
    batch = case.batch(0)
    mask = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    real: Any = slice(None) if name == "bert" else mask
    assert (ours[real] - oracle[real]).abs().max() < 1e-5


def test_the_directions_are_those_that_are_stored_where_they_are_orthonormal() -> None:
    """And torch's parametrisation says of the same matrix that it is its own orthonormal form."""
    delta = dt.attach(ZOO["bert"].build(0), "loreft(rank=3)", seed=0)
    unit = next(u for u in delta.tree.units if u.spec.kind == "loreft")
    R = unit.spec.rotation(unit.R)
    assert torch.allclose(R, unit.R, atol=1e-6)
    linear = torch.nn.Linear(16, 3, bias=False)
    torch.nn.utils.parametrizations.orthogonal(linear)
    linear.weight = R.detach()
    assert torch.allclose(linear.weight, R, atol=1e-5)
    with torch.no_grad():
        unit.R.mul_(torch.tensor([[2.0], [0.5], [3.0]]))
    assert torch.allclose(unit.spec.rotation(unit.R), R, atol=1e-6)


def test_what_cannot_be_counted_is_refused() -> None:
    for name, text, words in (
        ("gemma3", "loreft(prefix=5)", "sees 4 tokens, so that the first 5"),
        ("llama", "direft(prefix=0, suffix=1)", "tokens only look back"),
        ("bert", "loreft(rank=17)", "rank 17 is above the 16 features"),
        ("bert", "loreft(prefix=0)", "`prefix` must be 1 or more without `suffix`"),
    ):
        with pytest.raises(dt.DeltuneError, match=words):
            dt.attach(ZOO[name].build(0), text)
