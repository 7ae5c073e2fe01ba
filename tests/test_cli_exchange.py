"""`deltune export` and `deltune import` do what the library does with the same folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
import tasks_toys
from deltune.cli.app import run
from deltune.exchange.adapterhub.checkpoint import load_adapterhub
from deltune.exchange.vllm import save_vllm
from test_exchange_others import LORA, write

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a training of a method that PEFT knows."""
    home = tasks_toys.home(tmp_path_factory.mktemp("exchange"))
    words = ["train", "lora(rank=2)", "--model", str(home / "model"), "--json", "--max-steps", "2"]
    words += ["--task", str(home / "task"), "--out", str(home / "one"), "--eval-steps", "2"]
    assert run([*words, "--head", "classification", "--learning-rate", "1e-1"]) == 0
    return home


def attached(home: Path) -> dt.Delta:
    shelf = json.loads((home / "one" / "result.json").read_text())["trained_on"]
    model, _ = dt.load_model(shelf["model"], shelf["head"], labels=shelf["labels"])
    return dt.load(home / "one" / "delta", model)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_training_goes_to_peft_and_comes_back(home: Path, tmp_path: Path, capsys: Any) -> None:
    out, back = tmp_path / "peft", tmp_path / "back"
    assert run(["export", str(home / "one"), "--to", "peft", "--out", str(out)]) == 0
    assert files(out) == files(dt.save_peft(attached(home), tmp_path / "expected"))
    words = ["import", str(out), "--from", "peft", "--model", str(home / "model")]
    words += ["--task", str(home / "task"), "--head", "classification", "--out", str(back)]
    assert run(words) == 0
    told = capsys.readouterr().out
    assert "lora(" in told and str(back) in told
    expected = attached(home)
    found = dt.load(back / "delta", expected.model, "back")
    assert torch.equal(found.vector(), expected.vector())
    scores = []
    for folder in (home / "one", back):
        assert run(["evaluate", str(folder), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["predictions"])
    assert scores[0] == scores[1]
    kept = files(back / "delta")
    assert run(words) == 2 and files(back / "delta") == kept
    assert run([*words, "--overwrite"]) == 0


def test_what_vllm_has_no_words_for_is_refused_and_nothing_is_written(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "served"
    assert run(["export", str(home / "one"), "--to", "vllm", "--out", str(out)]) == 2
    assert "head" in capsys.readouterr().err and not out.exists()
    model = dt.load_model(str(home / "model"), "embedding")[0]
    bare = dt.attach(model, "lora(rank=2)", head=False)
    bare.load_vector(torch.randn(bare.layout.size)).save(tmp_path / "bare")
    words = ["export", str(tmp_path / "bare"), "--model", str(home / "model"), "--to", "vllm"]
    assert run([*words, "--head", "embedding", "--out", str(out)]) == 0
    assert files(out) == files(save_vllm(bare, tmp_path / "expected"))


def test_what_is_not_there_or_not_known_is_refused(home: Path, tmp_path: Path, capsys: Any) -> None:
    model = ["--model", str(home / "model"), "--head", "embedding"]
    out = ["--out", str(tmp_path / "out")]
    nowhere = str(tmp_path / "nowhere")
    for words, said in (
        (["export", nowhere, "--to", "peft"], "there is no delta"),
        (["import", nowhere, "--from", "peft"], "nowhere"),
        (["import", nowhere, "--from", "opendelta", "--force"], "leave --force out"),
        (["import", nowhere, "--from", "peft", "--without-head"], "leave --without-head out"),
    ):
        assert run([*words, *model, *out]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_head_of_adapterhub_is_left_out_when_that_is_asked(
    home: Path, tmp_path: Path, capsys: Any
) -> None:
    model = dt.load_model(str(home / "model"), "embedding")[0]
    size, at = model.config.hidden_size, "encoder.layer.0.attention.self.query.loras.a.lora_"
    draw = {"A": torch.ones(2, size), "B": torch.ones(size, 2)}
    folder = tmp_path / "theirs"
    write(folder, LORA, {f"{at}{n}": t for n, t in draw.items()}, hidden_size=size)
    (folder / "head_config.json").write_text("{}")
    words = ["import", str(folder), "--from", "adapterhub", "--model", str(home / "model")]
    words += ["--head", "embedding", "--out", str(tmp_path / "out")]
    assert run(words) == 2
    assert "--without-head" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run([*words, "--without-head"]) == 0
    found = dt.load(tmp_path / "out" / "delta", model)
    expected = load_adapterhub(folder, model, "expected", head=False)
    assert torch.equal(found.vector(), expected.vector()) and found.count() == 4 * size
