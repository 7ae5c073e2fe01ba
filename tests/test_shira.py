"""SHiRA. Oracles: a loop over the places, and PEFT with a mask that no seed gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune as dt
from deltune.errors import AttachError, ExchangeError, SpecError
from deltune.exchange.peft.checkpoint import load_peft
from test_exchange_peft import both_ways, theirs
from test_reparameterization import changes, moved, network
from zoo import HIDDEN, ZOO

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_values_are_added_at_different_places_drawn_by_the_seed_of_attaching() -> None:
    indices = []
    for seed in (0, 1):
        delta = moved(network(), "shira(rank=2, where='0')", seed)
        values, index = (delta.tree.stored()[f"shira.0.{own}"] for own in ("v", "index"))
        assert delta.count() == len(index.unique()) == 2 * (8 + 12)
        expected = torch.zeros(12, 8, dtype=torch.float64)
        for value, place in zip(values.detach(), index.tolist(), strict=True):
            expected[place // 8, place % 8] = value
        assert torch.allclose(changes(delta)["0.weight"], expected)
        indices.append(index)
    assert not torch.equal(*indices)


def test_a_rank_with_more_entries_than_the_matrix_is_refused() -> None:
    with pytest.raises(SpecError, match="`rank` must be 1 or more"):
        dt.attach(network(), "shira(rank=0)")
    with pytest.raises(SpecError, match=r"100 entries .* `0` has; use a rank of at most 4"):
        dt.attach(network(), "shira(rank=5, where='0')")


def test_a_share_of_the_entries_is_not_written_for_peft(tmp_path: Path) -> None:
    delta = dt.attach(ZOO["bert"].build(0), "shira(density=0.3, where='attn.q')", head=False)
    assert delta.count() == 2 * 77  # of 16 x 16 in each of two layers
    with pytest.raises(ExchangeError, match="PEFT counts them by a rank"):
        dt.save_peft(delta, tmp_path / "peft")
    with pytest.raises(SpecError, match=r"`density` must be in \(0, 1\]"):
        dt.parse("shira(density=1.5)")


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    folder = moved(network(), "shira(rank=1, where='0')").save(tmp_path / "saved")
    file = folder / "delta.safetensors"
    tensors = load_file(file)
    tensors["shira.0.index"][3] = 96
    save_file(tensors, file)
    model = network()
    with pytest.raises(AttachError, match="index of `shira` at `0` is damaged"):
        dt.load(folder, model)
    assert not dt.deltas(model)


def checkpoint(folder: Path) -> Any:
    """PEFT's model with a mask of its user, saved: the first columns of every matrix."""

    def columns(layer: Any, r: int, **options: Any) -> torch.Tensor:
        mask = torch.zeros_like(layer.weight)
        mask[:, : r * sum(mask.shape) // len(mask)] = 1
        return mask

    class Config(peft.ShiraConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.mask_fn = columns

    targets = ["query", "value"]
    return theirs(ZOO["bert"], folder, Config, r=2, mask_type="columns", target_modules=targets)


def test_a_mask_of_its_user_is_in_the_file(tmp_path: Path) -> None:
    delta = both_ways(ZOO["bert"], checkpoint(tmp_path / "theirs"), tmp_path)
    index = next(t for n, t in delta.tree.stored().items() if n.endswith("index"))
    assert set((index % HIDDEN).tolist()) == {0, 1, 2, 3}


def test_places_that_are_none_are_refused(tmp_path: Path) -> None:
    case, file = ZOO["bert"], tmp_path / "adapter_model.safetensors"
    checkpoint(tmp_path)
    whole = load_file(file)
    first = next(name for name in whole if name.endswith("indices"))

    def read(places: torch.Tensor | None) -> dt.Delta:
        others = {name: tensor for name, tensor in whole.items() if name != first}
        save_file(others if places is None else {**others, first: places}, file, {"format": "pt"})
        return load_peft(tmp_path, case.build(0))

    for places in (None, whole[first] + 20, -whole[first], whole[first][0], whole[first] / 2):
        with pytest.raises(ExchangeError, match="no `shira_indices` at `bert"):
            read(places)
    for dtype in (torch.float32, torch.int64):  # the former as written on some systems
        assert read(whole[first].to(dtype)).count()
    with pytest.raises(ExchangeError, match="expected floating point"):
        read(whole[first].bool())
