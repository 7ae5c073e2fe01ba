"""The page on adding a method, followed literally. Oracles: the method's formula; the laws."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
import test_laws as laws
from deltune import catalogue, spec
from methods import METHODS, ROUNDING, Method
from test_docs import ROOT, blocks
from zoo import ZOO

PAGE = ROOT / "docs/add-a-method.md"


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names that the page's code leaves behind; its method is forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    file, use, row = blocks(PAGE, "python")
    Path("rescale.py").write_text(file.lstrip())
    importlib.invalidate_caches()
    space: dict[str, Any] = {"METHODS": dict(METHODS), "Method": Method, "ROUNDING": ROUNDING}
    try:
        exec(compile(use, PAGE, "exec"), space)
        exec(compile(row, PAGE, "exec"), space)
        yield space
    finally:
        spec.METHODS.pop("rescale", None)
        sys.modules.pop("rescale", None)


def test_the_method_of_the_page_is_its_formula(followed: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    x = torch.randn(5, 3)
    plain = model(x)
    delta = dt.attach(model, "rescale(strength=0.5, where='0')")
    factors = torch.tensor([1.0, -2.0, 0.0, 3.0])
    delta.load_vector(factors)
    assert torch.allclose(model(x), (1 + 0.5 * factors) * plain, atol=1e-6)
    assert followed["delta"].spec == dt.parse("rescale(strength=0.5, where='ffn') + bitfit[1:]")
    assert "(1 + strength e) h" in catalogue.entry("rescale").doc
    with pytest.raises(dt.DeltuneError, match=r"strength=0.0.*other than 0"):
        dt.parse("rescale(strength=0.0)")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_its_row_holds_it_to_the_laws(name: str, followed: dict[str, Any], tmp_path: Path) -> None:
    case, method = ZOO[name], followed["METHODS"]["rescale"]
    laws.test_attach_train_detach_leaves_the_backbone_bit_for_bit(case, method)
    laws.test_gradients_reach_the_delta_and_nothing_else(case, method)
    laws.test_merged_equals_unmerged(case, method)
    laws.test_the_tensors_are_the_delta(case, method, tmp_path)
    laws.test_copies_and_pickles_act_by_their_own_tensors(case, method)
    laws.test_two_of_a_kind_come_off_in_either_order(case, method)
    laws.test_gradient_checkpointing_changes_nothing(case, method)
    laws.test_a_padded_batch_equals_its_rows(case, method)
