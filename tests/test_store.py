"""Files: bytes on disk are the oracle; damage of every kind is named and nothing is lost."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune as dt
from deltune.errors import StoreError
from deltune.store import native
from zoo import ZOO

SPEC = "lora(rank=2) + bitfit"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, SPEC, "v1.5", seed=1)
    delta.load_vector(torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(2)))
    return delta.save(tmp_path / "delta")


def test_the_file_is_the_vector_in_layout_order(saved: Path) -> None:
    tensors = load_file(saved / native.TENSORS)
    about = json.loads((saved / native.ABOUT).read_text())
    model = ZOO["bert"].build(0)
    delta = dt.load(saved, model)
    assert delta.name == "v1.5" and str(delta.spec) == SPEC == about["text"]
    assert list(about["layout"]) == [slot.name for slot in delta.layout]
    joined = torch.cat([tensors[slot.name].flatten() for slot in delta.layout])
    assert torch.equal(joined, delta.vector())
    assert sum(t.numel() for t in tensors.values()) == delta.count()


def test_loading_keeps_scale_and_takes_another_name(tmp_path: Path) -> None:
    model = ZOO["gpt2"].build(0)
    delta = dt.attach(model, "lora(rank=2)", seed=1)
    delta.load_vector(delta.vector() + 0.1)
    delta.scale = 0.5
    delta.save(tmp_path / "d")
    expected = ZOO["gpt2"].run(model)
    fresh = ZOO["gpt2"].build(0)
    loaded = dt.load(tmp_path / "d", fresh, "other")
    assert loaded.name == "other" and loaded.scale == 0.5
    assert torch.equal(ZOO["gpt2"].run(fresh), expected)


def test_a_bfloat16_copy_is_the_same_backbone_and_another_seed_is_not(saved: Path) -> None:
    dt.load(saved, ZOO["bert"].build(0).to(torch.bfloat16))
    other = ZOO["bert"].build(1)
    with pytest.raises(StoreError) as caught:
        dt.load(saved, other)
    text = str(caught.value)
    assert "another backbone" in text and "\n  delta:" in text and "\n  here:" in text
    assert not hasattr(other, "deltas")
    dt.load(saved, other, force=True)


def test_a_merged_delta_does_not_change_the_backbones_identity() -> None:
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "lora(rank=2)")
    before = delta.backbone()
    delta.load_vector(delta.vector() + 1)
    assert delta.merge().backbone() == before
    first = dt.attach(ZOO["bert"].build(0), "bitfit").backbone()
    assert first == before


def _damage(folder: Path, how: str) -> None:
    file = folder / native.TENSORS
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".A"))
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-50])
        case "empty":
            file.write_bytes(b"")
        case "missing":
            tensors.pop(name)
        case "extra":
            tensors["surplus"] = torch.zeros(1)
        case "shape":
            tensors[name] = torch.zeros(3, 3)
        case "nan":
            tensors[name][0, 0] = float("nan")
        case "json":
            (folder / native.ABOUT).write_text("{")
        case "format":
            (folder / native.ABOUT).write_text('{"format": 99}')
        case "fields":
            (folder / native.ABOUT).write_text('{"format": 1, "spec": {"kind": "bitfit"}}')
        case "pickle":
            file.unlink()
            torch.save({}, folder / "delta.bin")
        case "scale" | "endless":
            about = json.loads((folder / native.ABOUT).read_text())
            about["scale"] = 10**400 if how == "scale" else float("inf")
            (folder / native.ABOUT).write_text(json.dumps(about))
        case "gone":
            shutil.rmtree(folder)
    if how in ("missing", "extra", "shape", "nan"):
        save_file(tensors, file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "truncated or no safetensors"), ("empty", "truncated or no safetensors"),
        ("missing", "missing: lora."), ("extra", "unexpected: surplus"),
        ("shape", "shape of lora."), ("nan", "not finite"), ("json", "not readable JSON"),
        ("format", "format 99"), ("fields", "incomplete or damaged"), ("pickle", "pickled tensors"),
        ("scale", "incomplete or damaged"), ("endless", "`scale` is inf"),
        ("gone", "there is no folder"),
    ],
)  # fmt: skip
def test_damage_is_named_and_the_model_untouched(saved: Path, how: str, said: str) -> None:
    _damage(saved, how)
    model = ZOO["bert"].build(0)
    with pytest.raises(StoreError) as caught:
        dt.load(saved, model)
    assert said in str(caught.value)
    assert not hasattr(model, "deltas") and not model.bert.pooler._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_a_scale_of_what_has_none_leaves_nothing_attached(tmp_path: Path) -> None:
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "prefix(tokens=3) + bitfit", head=False)
    folder = delta.save(tmp_path / "saved")
    delta.detach()
    about = json.loads((folder / native.ABOUT).read_text())
    (folder / native.ABOUT).write_text(json.dumps(about | {"scale": 0.5}))
    with pytest.raises(StoreError, match=r"has the scale 0\.5, and `prefix` has none"):
        dt.load(folder, model)
    assert not dt.deltas(model) and not hasattr(model, "deltas")


def test_an_existing_folder_is_not_overwritten_unasked(saved: Path, tmp_path: Path) -> None:
    delta = dt.attach(ZOO["bert"].build(0), "bitfit")
    before = (saved / native.TENSORS).read_bytes()
    with pytest.raises(StoreError, match="overwrite=True"):
        delta.save(saved)
    assert (saved / native.TENSORS).read_bytes() == before
    delta.save(saved, overwrite=True)
    assert json.loads((saved / native.ABOUT).read_text())["text"] == "bitfit"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="is no delta"):
        delta.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("fails", ["save_file", "write_text", "rename"])
def test_a_full_disk_leaves_the_old_delta(
    saved: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    delta = dt.attach(ZOO["bert"].build(0), "bitfit")
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import os

    if fails == "save_file":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    elif fails == "write_text":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        real = os.rename
        monkeypatch.setattr(
            os, "rename", lambda a, b: full() if not str(b).endswith(".old") and
            not str(a).endswith(".old") else real(a, b)
        )  # fmt: skip
    with pytest.raises(StoreError, match=r"No space left.*untouched"):
        delta.save(saved, overwrite=True)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
