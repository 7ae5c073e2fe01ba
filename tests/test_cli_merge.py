"""`deltune merge` and `deltune diff` do what the library does with the same folders."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import deltune as dt
import tasks_toys
from deltune.cli.app import run
from deltune.merging import diff, fishers, merge
from deltune.tasks.objectives import objective_for

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two trainings of one backbone on one task."""
    home = tasks_toys.home(tmp_path_factory.mktemp("merge"))
    for name, seed in (("one", "1"), ("two", "2")):
        words = ["train", "lora(rank=2)", "--model", str(home / "model"), "--json"]
        words += ["--task", str(home / "task"), "--out", str(home / name), "--max-steps", "2"]
        words += ["--head", "classification", "--learning-rate", "1e-1", "--seed", seed]
        assert run([*words, "--eval-steps", "2"]) == 0
    return home / "one", home / "two"


def test_two_trainings_become_one_folder_that_later_commands_know(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    capsys.readouterr()
    words = ["merge", *map(str, pair), "--weights", "1.5", "-0.5", "--keep-head", "1"]
    assert run([*words, "--rank", "3", "--out", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr().out
    expected = merge([p / "delta" for p in pair], weights=[1.5, -0.5], rank=3, keep_head=1)
    assert f"{expected.error:.2%} of the merged change is left out" in told
    assert f"-0.5 x lora(rank=2), {pair[1]}" in told and "lora(rank=3, alpha=24.0)" in told
    shelf = json.loads((pair[1] / "result.json").read_text())["trained_on"]
    assert json.loads((tmp_path / "merged" / "result.json").read_text())["trained_on"] == shelf
    model, _ = dt.load_model(shelf["model"], "classification", labels=shelf["labels"])
    found = dt.load(tmp_path / "merged" / "delta", model).tensors()
    assert found.keys() == expected.tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.tensors.items())
    assert run(["evaluate", str(tmp_path / "merged"), "--json"]) == 0
    assert 0.0 <= json.loads(capsys.readouterr().out)["value"] <= 1.0


def test_a_comparison_in_a_table_as_data_and_as_a_picture(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    capsys.readouterr()
    words, picture = ["diff", *map(str, pair), "--top", "2"], tmp_path / "diff.svg"
    assert run([*words, "--json", "--figure", str(picture)]) == 0
    data, found = json.loads(capsys.readouterr().out), diff(*(p / "delta" for p in pair), top=2)
    assert [row["cosine"] for row in data["places"]] == [p.cosine for p in found.places]
    assert data["places"][0]["read"] == found.places[0].inputs.tolist()  # type: ignore[union-attr]
    assert run(words) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 + len(found.places) + 1 + 2
    first, cosine = found.places[0], found.places[0].cosine
    assert told[1].split()[:4] == [
        first.address, *(f"{norm:.4g}" for norm in first.norms), f"{cosine:.3f}"
    ]  # fmt: skip
    assert told[-3].split()[0] == "all" and f"{found.cosine:.3f}" in told[-3]
    drawn = ElementTree.fromstring(picture.read_text())
    squares = [element for element in drawn.iter() if element.tag.endswith("rect")]
    assert len(squares) == 3 * len(found.places) + 2 * 2 * 2 and "var(" not in picture.read_text()
    width, height = float(drawn.attrib["width"]), float(drawn.attrib["height"])
    for square in squares:
        assert float(square.attrib["x"]) + float(square.attrib["width"]) <= width
        assert float(square.attrib["y"]) + float(square.attrib["height"]) <= height


def test_ways_that_look_at_data_know_the_task_of_each_training(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    """Oracle: the library's functions on the same examples, one after another."""
    shelf = json.loads((pair[0] / "result.json").read_text())["trained_on"]
    task = dt.load_task(shelf["task"])
    model, tokenizer = dt.load_model(shelf["model"], "classification", labels=shelf["labels"])
    objective = objective_for(task, model, tokenizer, max_length=128)
    rows = [objective.collate([one]) for one in objective.encode(task.train[:3])]
    deltas, scores = [dt.load(p / "delta", model, p.name).disable() for p in pair], []
    statistics = []
    for delta in deltas:
        delta.enable()
        statistics.append(fishers(delta, (objective.loss(model, row) for row in rows)))
        scores.append(dt.evaluate(model, tokenizer, task, "dev").value)
        delta.disable()
    folders = [p / "delta" for p in pair]
    expected = merge(folders, "fisher", statistics=statistics, keep_head=0, to="shira")
    words = ["merge", *map(str, pair), "--examples", "3", "--keep-head", "0"]
    out = tmp_path / "fisher"
    assert run([*words, "--how", "fisher", "--to", "shira", "--out", str(out)]) == 0
    found = dt.load(out / "delta", model).disable().tensors()
    for name, value in expected.tensors.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4)
    capsys.readouterr()
    assert run([*words, "--how", "regmean", "--out", str(tmp_path / "regmean")]) == 0
    assert "merged by regmean: lora(rank=4, alpha=32.0)" in capsys.readouterr().out
    assert run([*words[:3], "--how", "soup", "--out", str(tmp_path / "soup")]) == 0
    told = capsys.readouterr().out
    assert f"of each alone: {scores[0]:.4f}, {scores[1]:.4f}" in told
    assert run([*words, "--how", "lorahub", "--out", str(tmp_path / "hub")]) == 0
    told = capsys.readouterr().out
    assert "after 40 tries" in told and "merged by lorahub: lora(rank=4" in told


def test_what_is_refused_is_one_line_and_writes_nothing(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    one, two = map(str, pair)
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
        (["merge", one, two, *out], "heads of the sources `0`, `1` differ"),
        (["merge", one, two, "--keep-head", "first", *out], "a number from 0 on, mean or none"),
        (["merge", one, two, "--keep-head", "²", *out], "a number from 0 on, mean or none"),
        (["merge", one, "--rank", "0", *out], "1 or more, got 0"),
        (["merge", one, two, "--keep-head", "7", *out], "source 7 has no task head"),
        (["merge", one, two, "--how", "tie", *out], "unknown way `tie` (did you mean `ties`?)"),
        (["merge", one, two, "--weights", "1", *out], "2 deltas and 1 weights"),
        (["merge", one, str(tmp_path), *out], "holds no delta"),
        (["merge", one, two, "--out", one], "exists already"),
        (["merge", one, two, "--how", "soup", "--weights", "1", "1", *out], "leave --weights out"),
        (["merge", one, two, "--how", "soup", "--keep-head", "1", *out], "is the mean of its"),
        (["diff", one, two, "--top", "0"], "`top` must be 1 or more"),
    ):
        assert run(words) == 2, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_may_be_overwritten_and_is_read_before(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing is deleted before there is what takes its place."""
    one, two = (Path(shutil.copytree(p, tmp_path / p.name)) for p in pair)
    shelf = json.loads((one / "result.json").read_text())["trained_on"]
    words = ["merge", str(one), str(two), "--keep-head", "0", "--out", str(one), "--overwrite"]
    expected = merge([p / "delta" for p in pair], keep_head=0).tensors
    assert run(words) == 0
    assert json.loads((one / "result.json").read_text())["trained_on"] == shelf
    model, tokenizer = dt.load_model(shelf["model"], "classification", labels=shelf["labels"])
    found = dt.load(one / "delta", model).tensors()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    wrong = ["--out", str(two), "--overwrite", "--model", str(tmp_path / "none")]
    assert run(["merge", str(two), *wrong]) == 2
    assert (two / "delta" / "delta.safetensors").is_file()
    dt.deltas(model)["merged"].merge()
    batch = tokenizer(["good"], return_tensors="pt")
    assert run(["merge", str(one), "--out", str(one), "--overwrite"]) == 0
    whole, _ = dt.load_model(str(one), "classification", labels=shelf["labels"])
    with torch.no_grad():
        pair_of = (m.eval()(**batch).logits for m in (whole, model))
        torch.testing.assert_close(*pair_of)
