"""Deltas on the hub. Oracle: a hub that is a folder, with calls and errors of the real client."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers.utils.hub  # noqa: F401  before the client is replaced
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

import deltune as dt
from deltune.errors import StoreError
from zoo import ZOO


class Hub:
    """Repositories as folders `root/owner/name/revision`."""

    def __init__(self, root: Path) -> None:
        self.root, self.told = root, []

    def api(self, token: str | None = None) -> "Hub":
        self.told.append(token)
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / name / "main").mkdir(parents=True, exist_ok=exist_ok)
        self.told.append(private)
        return SimpleNamespace(repo_id=name)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        (self.root / repo_id / branch).mkdir(exist_ok=exist_ok)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, revision: str | None
    ) -> str:
        to = self.root / repo_id / (revision or "main")
        shutil.copytree(folder_path, to, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/{commit_message}"

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: Sequence[str]
    ) -> str:
        there = self.root / repo_id / (revision or "main")
        if not there.is_dir():
            raise LocalEntryNotFoundError(f"no snapshot of {repo_id}\nand more lines")
        to = self.root / "cache" / repo_id / (revision or "main")
        to.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (there / name).exists():
                shutil.copy(there / name, to / name)
        return str(to)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def trained(spec: str = "lora(rank=2) + bitfit") -> tuple[Any, dt.Delta]:
    model: Any = ZOO["bert"].build(0)
    model.config._name_or_path = "org/tiny-bert"
    delta = dt.attach(model, spec, "mine", seed=0)
    return model, delta.load_vector(delta.vector() + 0.1)


def test_a_delta_goes_to_the_hub_and_comes_back(hub: Hub) -> None:
    model, delta = trained()
    address = delta.push_to_hub("org/mine", private=True, commit_message="first", token="secret")
    assert address == "https://hub/org/mine/commit/first" and hub.told == ["secret", True]
    repository = hub.root / "org/mine/main"
    assert {file.name for file in repository.iterdir()} == {
        "README.md", "delta.json", "delta.safetensors"
    }  # fmt: skip
    out, vector = ZOO["bert"].run(model), delta.vector()
    delta.load_vector(2 * vector).push_to_hub("org/mine", revision="later")
    delta.detach()
    loaded = dt.load("hub:org/mine", model)
    assert torch.equal(ZOO["bert"].run(model), out) and loaded.name == "mine"
    assert "secret" not in "".join(
        file.read_text() for file in repository.iterdir() if file.suffix != ".safetensors"
    )
    assert torch.equal(dt.load("hub:org/mine@later", model, "later").vector(), 2 * vector)
    assert not (hub.root / "cache/org/mine/main/README.md").exists()


def test_the_card_says_what_a_delta_is_and_how_to_load_it(hub: Hub, tmp_path: Path) -> None:
    _, delta = trained("lora(rank=2, where='re:.*(query|value)') + bitfit")
    delta.push_to_hub("org/mine")
    card = ModelCard((hub.root / "org/mine/main/README.md").read_text())
    said = card.data.to_dict()
    assert said["base_model"] == "org/tiny-bert" and said["base_model_relation"] == "adapter"
    assert said["library_name"] == "deltune"
    assert {"lora", "bitfit", "head"} <= set(said["tags"])
    assert f"{delta.count():,} in {len(delta.layout)} tensors" in card.text
    assert str(delta.backbone()["weights"])[:16] in card.text
    assert 'dt.load("hub:org/mine", model)' in card.text
    assert "re:.*(query value)" in card.text  # no bar, which would end the cell of a table

    folder = delta.save(tmp_path / "odd\u2028name", card=True)
    assert 'dt.load("path/to/this/folder", model)' in (folder / "README.md").read_text()
    assert not (delta.save(tmp_path / "plain") / "README.md").exists()
    delta.model.config._name_or_path = "x\n---\nevil: `yes`"
    (folder,) = [delta.save(tmp_path / "evil", card=True)]
    evil = ModelCard((folder / "README.md").read_text())
    assert "base_model" not in evil.data.to_dict() and "evil" not in evil.data.to_dict()


def test_a_card_says_the_task_and_the_results(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the client's own reading of a `model-index`."""
    from deltune.store.card import pipeline

    _, delta = trained()
    results = {"movie reviews: |v2|": {"accuracy": 0.5, "f1": 0.25}, "sst2": {"accuracy": 0.75}}
    delta.push_to_hub("org/mine", results=results)
    card = ModelCard((hub.root / "org/mine/main/README.md").read_text())
    assert card.data.pipeline_tag == "text-classification" and card.data.model_name == "mine"
    told = [
        (one.task_type, one.dataset_type, one.dataset_name, one.metric_type, one.metric_value)
        for one in card.data.eval_results
    ]
    assert told == [
        ("text-classification", "movie-reviews-v2", "movie reviews: |v2|", "accuracy", 0.5),
        ("text-classification", "movie-reviews-v2", "movie reviews: |v2|", "f1", 0.25),
        ("text-classification", "sst2", "sst2", "accuracy", 0.75),
    ]
    assert "| `accuracy on sst2` | 0.7500 |" in card.text
    plain = ModelCard((delta.save(tmp_path / "plain", card=True) / "README.md").read_text())
    assert plain.data.eval_results is None and "model-index" not in plain.data.to_dict()
    for name, task in (
        ("gpt2", "text-generation"), ("llama", "text-generation"), ("t5", "text2text-generation"),
        ("bert", "text-classification"), ("torch-mlp", None),
    ):  # fmt: skip
        assert pipeline(type(ZOO[name].build(0)).__name__) == task


def test_the_words_of_transformers_are_those_of_deltune(hub: Hub, tmp_path: Path) -> None:
    model, delta = trained()
    folder = delta.save_pretrained(tmp_path / "mine", results={"sst2": {"accuracy": 0.75}})
    plain = delta.save(tmp_path / "plain")
    for name in ("delta.json", "delta.safetensors"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    assert "accuracy on sst2" in (folder / "README.md").read_text() and not hub.told
    with pytest.raises(StoreError, match="exists; choose another folder or pass `overwrite=True`"):
        delta.save_pretrained(folder)
    vector = delta.vector()
    delta.load_vector(2 * vector).save_pretrained(
        folder, overwrite=True, push_to_hub=True, repo_id="org/mine", revision="v2", token="secret"
    )
    delta.load_vector(3 * vector).save_pretrained(folder, overwrite=True, push_to_hub=True)
    assert hub.told == ["secret", None, None, None]
    delta.detach()
    for place, revision, times in (
        (str(folder), None, 3), (folder, None, 3), ("org/mine", "v2", 2), ("me/mine", None, 3),
        ("hub:org/mine@v2", None, 2),
    ):  # fmt: skip
        again = dt.Delta.from_pretrained(model, place, "again", revision=revision)
        assert torch.equal(again.vector(), times * vector) and again.name == "again"
        again.detach()
    assert dt.Delta.from_pretrained(model, "org/mine", revision="v2").name == "mine"
    for place, revision, words in (
        (folder, "v2", "is a folder or has its revision"),
        ("hub:org/mine@v2", "v2", "is a folder or has its revision"),
        ("org/none", None, "`hub:org/none` could not be fetched"),
        (tmp_path / "none", None, "there is no folder"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=words):
            dt.Delta.from_pretrained(model, place, "other", revision=revision)


def test_checkpoints_of_peft_come_from_the_hub_too(hub: Hub) -> None:
    model, delta = trained("lora(rank=2)")
    dt.save_peft(delta, hub.root / "org/peft/main")
    out = ZOO["bert"].run(model)
    delta.detach()
    (hub.root / "org/peft/main/adapter_model.bin").write_bytes(b"as large again")
    dt.load_peft("hub:org/peft", model).detach()
    assert not (hub.root / "cache/org/peft/main/adapter_model.bin").exists()
    file = hub.root / "org/peft/main/adapter_model.safetensors"
    (hub.root / "org/old/main").mkdir(parents=True)
    torch.save(load_file(file), hub.root / "org/old/main/adapter_model.bin")
    shutil.copy(file.parent / "adapter_config.json", hub.root / "org/old/main")
    dt.load_peft("hub:org/old", model)
    torch.testing.assert_close(ZOO["bert"].run(model), out)


def test_what_cannot_be_reached_is_said_and_nothing_is_lost(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, delta = trained()
    vector = delta.vector()
    for place, words in (
        (
            "hub:org/none",
            "could not be fetched .LocalEntryNotFoundError: no snapshot of org/none.;",
        ),
        ("hub:org/mine/../..", "is no place on the hub"),
        ("hub:", "is no place on the hub"),
        ("hub:org/mine@", "is no place on the hub"),
    ):
        for load in (dt.load, dt.load_peft):
            with pytest.raises(StoreError, match=words):
                load(place, model, "other")
    (hub.root / "org/empty/main").mkdir(parents=True)
    with pytest.raises(StoreError, match="holds no delta"):
        dt.load("hub:org/empty", model, "other")

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("401 Client Error\nfor url")

    monkeypatch.setattr(hub, "upload_folder", refuses)
    with pytest.raises(
        StoreError, match=r"nothing was pushed.*org/mine.*PermissionError: 401 Client Error.*login"
    ):
        delta.push_to_hub("org/mine")
    assert torch.equal(delta.vector(), vector) and list(dt.deltas(model)) == ["mine"]


def test_without_a_network_the_real_client_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, delta = trained()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StoreError, match="`hub:org/none` could not be fetched"):
        dt.load("hub:org/none", model, "other")
    with pytest.raises(StoreError, match=r"nothing was pushed to `org/none`.*Offline"):
        delta.push_to_hub("org/none", token="none")
