"""`deltune subspace` does what the library does with the same study."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
import study_fakes as fakes
from deltune.cli import subspaces
from deltune.cli.app import run
from deltune.study.plan import Cell, read_plan
from deltune.study.records import write_record
from deltune.subspace import learned
from deltune.subspace.linear import principal
from deltune.subspace.store import load
from deltune.tasks.objectives import objective_for
from study_spaces import SPECS, solutions
from train_toy import stopped

pytestmark = pytest.mark.xdist_group("spaces")

TRAIN = ["--max-steps", "4", "--eval-steps", "2", "--per-device-train-batch-size", "8"]


@pytest.fixture(scope="module")
def fitted(space_study: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "space"
    words = ["subspace", "fit", str(space_study[0] / "out"), "--out", str(out), "--dimension", "2"]
    assert run([*words, "--tasks", "a", "b", "c"]) == 0
    return out


def test_fit_finds_the_space_of_the_study(space_study: Any, fitted: Path, tmp_path: Path) -> None:
    home, state = space_study
    expected, found = principal(solutions(home, state, "abc", tmp_path), 2), load(fitted)
    code = torch.tensor([0.3, -0.4])
    assert found.tasks == ("a", "b", "c") and found.about["head"] == "embedding"
    for name in SPECS:
        torch.testing.assert_close(found.decode(name, code), expected.decode(name, code))


def test_fit_says_how_much_of_all_deltas_together_is_left_out(
    space_study: Any, tmp_path: Path, capsys: Any
) -> None:
    """The closed form of one method is the SVD, so that it leaves the least; a mean over tasks of
    what is left of each is below that here."""
    home, state = space_study
    words = ["subspace", "fit", str(home / "out"), "--out", str(tmp_path / "out")]
    words += ["--dimension", "1", "--tasks", "a", "b", "c", "--methods", "LoRA"]
    assert run(words) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if "LoRA " in line)
    ((_, rows),) = solutions(home, state, "abc", tmp_path, ["LoRA"]).each()
    values = torch.linalg.svdvals(rows.double())
    least = f"{float((values[1:].square().sum() / values.square().sum()).sqrt()):.3f}"
    assert row == ["LoRA", "3", least, least]


def test_a_damaged_delta_is_named_and_can_be_left_out(
    space_study: Any, fitted: Path, tmp_path: Path, capsys: Any
) -> None:
    home, state = space_study
    study = shutil.copytree(home / "out", tmp_path / "study")
    (last,) = state.finals(Cell("tiny", "new", "LoRA"))[:1]
    file = study / "deltas" / last.digest() / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    words = ["subspace", "fit", str(study), "--out", str(tmp_path / "out"), "--dimension", "2"]
    assert run(words) == 2 and not (tmp_path / "out").exists()
    assert "the solution of `new` by `LoRA`" in " ".join(capsys.readouterr().err.split())
    assert run([*words, "--without", "new"]) == 0
    code, found = torch.tensor([0.3, -0.4]), load(tmp_path / "out")
    for name in SPECS:
        assert torch.equal(found.decode(name, code), load(fitted).decode(name, code))


def changed(study: Path, to: Path, **plan: Any) -> Path:
    """The study as if its plan had been another."""
    shutil.copytree(study, to)
    said = json.loads((to / "study.json").read_text())
    (to / "study.json").write_text(json.dumps(said | plan))
    return to


def test_the_pilots_of_a_study_need_not_be_in_its_space(
    space_study: Any, fitted: Path, tmp_path: Path
) -> None:
    """The deltas are those of the rates that the study has chosen, by whatever tasks."""
    home, state = space_study
    grids = [
        dataclasses.asdict(dataclasses.replace(method, learning_rate=(1e-4, 1e-2)))
        for method in state.plan.methods
    ]
    study = changed(home / "out", tmp_path / "study", pilots=["new"], methods=grids)
    plan = read_plan(study)
    for cell in plan.cells():
        for one in plan.selection_runs(cell):
            result = fakes.make_result(None, dev=0.9 if one.learning_rate == 1e-2 else 0.1)
            write_record(study, fakes.make_record(one, result))
    words = ["subspace", "fit", str(study), "--out", str(tmp_path / "out"), "--dimension", "2"]
    assert run([*words, "--without", "new"]) == 0
    code, found = torch.tensor([0.3, -0.4]), load(tmp_path / "out")
    for name in SPECS:
        assert torch.equal(found.decode(name, code), load(fitted).decode(name, code))


def test_methods_that_have_no_single_delta_are_left_out(
    space_study: Any, tmp_path: Path, capsys: Any
) -> None:
    home, state = space_study
    methods = [dataclasses.asdict(method) for method in state.plan.methods]
    stages = methods[0] | {"name": "Two", "stages": ["LoRA", "Bits"], "family": "sequence"}
    study = changed(home / "out", tmp_path / "study", methods=[*methods, stages])
    words = ["subspace", "fit", str(study), "--out", str(tmp_path / "out"), "--dimension", "2"]
    assert run(words) == 0 and load(tmp_path / "out").methods == tuple(SPECS)
    assert run([*words, "--methods", "Two", "LoRA", "--overwrite"]) == 2
    assert "no method `Two`; it has `LoRA`" in capsys.readouterr().err
    for one in methods:
        one["family"] = "baseline"
    study = changed(home / "out", tmp_path / "other", methods=methods)
    assert run(["subspace", "fit", str(study), "--out", str(tmp_path / "x")]) == 2
    assert "methods are baselines or trained in stages" in capsys.readouterr().err


def test_deltas_that_were_not_kept_say_how_to_keep_them(
    space_study: Any, tmp_path: Path, capsys: Any
) -> None:
    study = changed(space_study[0] / "out", tmp_path / "study", subspace=None)
    shutil.rmtree(study / "deltas")
    words = ["subspace", "fit", str(study), "--out", str(tmp_path / "out")]
    assert run(words) == 2
    assert "set `keep_deltas = true`" in capsys.readouterr().err
    changed(study, tmp_path / "kept", keep_deltas=True)
    assert run(["subspace", "fit", str(tmp_path / "kept"), *words[3:]]) == 2
    assert "to train it again" in capsys.readouterr().err


def tuned(home: Path, fitted: Path, method: str, out: Path, *more: str) -> int:
    words = ["subspace", "tune", str(fitted), method, "--task", str(home / "unseen")]
    return run([*words, "--model", str(home / "model"), "--out", str(out), *TRAIN, *more])


def test_a_code_is_tuned_decoded_and_drawn(
    space_study: Any, fitted: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = space_study
    for method in SPECS:
        assert tuned(home, fitted, method, tmp_path / method) == 0
    said = capsys.readouterr().out
    assert said.count("trained") == 3 and said.count("transferred") == 6
    data = json.loads((tmp_path / "Bits" / "tuned.json").read_text())
    words = ["subspace", "transfer", str(tmp_path / "Bits"), "LoRA"]
    assert run([*words, "--out", str(tmp_path / "decoded")]) == 0
    space, task = load(fitted), dt.load_task(home / "unseen")
    model, tokenizer = dt.load_model(str(home / "model"), "embedding", labels=task.labels)
    objective = objective_for(task, model, tokenizer, max_length=128)
    for folder, name in ((tmp_path / "Bits" / "delta", "Bits"), (tmp_path / "decoded", "LoRA")):
        delta = dt.load(folder, model)
        expected = space.decode(name, torch.tensor(data["code"]))
        torch.testing.assert_close(delta.vector(), expected)
        found = dt.evaluate(model, tokenizer, task, "test", objective=objective)
        assert found.value == data["tests"][name]
        delta.detach()
    words = ["subspace", "landscape", *(str(tmp_path / name) for name in SPECS)]
    assert run([*words, "--out", str(tmp_path / "plane.svg"), "--points", "3"]) == 0
    rows = json.loads((tmp_path / "plane.json").read_text())
    assert len([row for row in rows if "value" in row]) == 3 * 9
    picture = (tmp_path / "plane.svg").read_text()
    assert not (tmp_path / "plane.svg.part").exists()
    assert picture.startswith("<svg") and picture.count("<circle") == 9
    assert "decoded as Adapter" in picture and "var(" not in picture

    write, calls = subspaces._Kept.write, []

    def stopping(self: Any, asked: Any, scores: Any) -> None:
        calls.append(sum(len(values) for values in scores.values()))
        write(self, asked, scores, every=0.0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(subspaces._Kept, "write", stopping)
    again, part = tmp_path / "again.svg", tmp_path / "again.svg.part"
    words += ["--points", "3", "--out", str(again)]
    assert run(words) == 130 and "; the same command goes on" in capsys.readouterr().err
    assert run(words) == 0
    assert calls == list(range(1, 28))  # 3 * 9, each once
    assert json.loads(again.with_suffix(".json").read_text()) == rows
    calls[:] = range(9)
    part.write_text('[["another"], {"LoRA": [0.5]}]')
    assert run(words) == 0 and calls[9:] == list(range(1, 28))
    assert "again.svg.part is not of this survey: begun anew" in "".join(
        capsys.readouterr().err.split("\n")
    )


def test_a_learned_space_goes_on_where_it_was_stopped(
    space_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    study, kept = space_study[0] / "out", space_study[0] / "out" / "checkpoints"
    words = ["subspace", "fit", str(study), "--how", "learned", "--dimension", "2", "--steps", "6"]
    words += ["--tasks", "a", "b", "c", "--learning-rate", "1e-3"]
    assert run([*words, "--out", str(tmp_path / "whole")]) == 0
    assert not kept.exists() and "6/6" in capsys.readouterr().err
    taken = stopped(monkeypatch, 4)
    monkeypatch.setattr(learned, "SAVE_SECONDS", 0.0)
    assert run([*words, "--out", str(tmp_path / "again")]) == 130
    assert "; the same command goes on" in capsys.readouterr().err
    assert len(list(kept.iterdir())) == 1
    assert run([*words, "--out", str(tmp_path / "again")]) == 0
    assert taken == [1, 2, 3, 4, 5, 6] and not list(kept.iterdir())
    one, two = load(tmp_path / "whole"), load(tmp_path / "again")
    for name in SPECS:
        assert torch.equal(one.decode(name, torch.ones(2)), two.decode(name, torch.ones(2)))


def test_a_code_goes_on_where_it_was_stopped_and_nowhere_else(
    space_study: Any, fitted: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = space_study
    more = ["--save-steps", "1"]
    assert tuned(home, fitted, "Bits", tmp_path / "whole", *more) == 0
    taken = stopped(monkeypatch, 2)
    out = tmp_path / "again"
    assert tuned(home, fitted, "Bits", out, *more) == 130
    assert "; the same command with --resume goes on" in capsys.readouterr().err
    other = tmp_path / "other"
    words = ["subspace", "fit", str(home / "out"), "--out", str(other), "--dimension", "2"]
    assert run([*words, "--how", "random"]) == 0
    capsys.readouterr()
    for space, method, said in ((fitted, "LoRA", "`method`"), (other, "Bits", "`space`")):
        assert tuned(home, space, method, out, *more, "--resume") == 2
        assert f"run, {said}" in capsys.readouterr().err
    assert tuned(home, fitted, "Bits", out, *more, "--resume") == 0
    assert taken == [1, 2, 3, 4]
    one, two = (json.loads((at / "tuned.json").read_text()) for at in (tmp_path / "whole", out))
    assert one == two


def test_what_is_refused(space_study: Any, fitted: Path, tmp_path: Path, capsys: Any) -> None:
    home, _ = space_study
    study, out = str(home / "out"), str(tmp_path / "x")
    ready, other = tmp_path / "bits", tmp_path / "other"
    assert tuned(home, fitted, "Bits", ready) == 0
    spaces = [fitted, fitted, other]
    words = ["subspace", "fit", study, "--out", str(other), "--dimension", "2", "--how", "random"]
    assert run(words) == 0
    three = [str(tmp_path / name) for name in SPECS]
    for space, method, place in zip(spaces, SPECS, three, strict=True):
        assert tuned(home, space, method, Path(place)) == 0
    damaged = shutil.copytree(ready, tmp_path / "damaged") / "tuned.json"
    damaged.write_text('{"code": [0.1, 0.2]}')
    no_code = ["landscape", str(damaged.parent), *three[1:], "--out", out]
    again = ["tune", str(ready / "space"), "Bits", "--task", "t", "--out", str(ready)]
    picture = ["landscape", *three, "--out"]
    for words, message in (
        (["transfer", str(damaged.parent), "LoRA", "--out", out], "tuned.json: 'method'"),
        (no_code, "holds no tuned code"),
        ([*again, "--overwrite"], "which --overwrite replaces"),
        ([*picture, str(tmp_path / "x.json")], "expected a file for the picture"),
        ([*picture, str(tmp_path)], "expected a file for the picture"),
        (["fit", study, "--out", out, "--methods", "Adaptor"], "did you mean `Adapter`"),
        (["fit", study, "--out", out, "--tasks", "z"], "the study has no task `z`"),
        (["fit", study, "--out", out, "--dimension", "9"], "4 tasks' solutions span 4"),
        (["fit", study, "--out", str(fitted)], "exists already"),
        (["fit", str(tmp_path), "--out", out], "holds no study"),
        (["tune", str(tmp_path), "Bits", "--task", "t", "--out", out], "holds no subspace"),
        (["transfer", str(tmp_path), "LoRA", "--out", out], "holds no tuned code"),
        (["transfer", str(ready), "Lora", "--out", out], "knows no method `Lora`"),
        (["landscape", *[str(ready)] * 3, "--out", out], "a landscape is of three methods"),
        (["landscape", *three, "--out", out], "the codes are of different spaces"),
        (["dimension", study], "has no `intrinsic` in several dimensions"),
    ):
        assert run(["subspace", *words]) == 2, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and (ready / "space").is_dir()
