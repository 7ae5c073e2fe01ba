"""Study files are read strictly. Oracle: the errors that each wrong file must give."""

import dataclasses
import errno
import json
import os

import pytest

import study_fakes as fakes
from deltune.errors import StudyError
from deltune.study.codec import decode
from deltune.study.plan import Cell, Plan, read_plan, run_from_json, write_plan
from deltune.study.reading import place_of, read_study
from deltune.study.records import write_atomic
from deltune.study.resolve import _settings
from deltune.study.settings import Budget

GOOD = """
tasks = [{ name = "toy" }]
models = [{ name = "tiny" }]

[study]
name = "A study"

[budget]
train = 10

[[methods]]
name = "LoRA"
spec = "lora(rank=8)"
learning_rate = [1e-3, 3e-3]
"""


def read(tmp_path, text):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return read_study(path)


def test_reads_what_it_says(tmp_path):
    study = read(tmp_path, GOOD)
    assert study.study.seeds == (0, 1) and study.budget == Budget(train=10)
    assert study.methods[0].learning_rate == (1e-3, 3e-3)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("train = 10", "trian = 10", "budget has no field `trian`"),
        ("train = 10", "trian = 10", "did you mean `train`"),
        ("train = 10", "train = 'ten'", "train='ten'"),
        ("train = 10", "train = 0", "1 or more"),
        ("[budget]", "[budgets]", "did you mean `budget`"),
        ("[1e-3, 3e-3]", "[]", "above 0"),
        ("[1e-3, 3e-3]", "[1e-3, -1]", "above 0"),
        ("[1e-3, 3e-3]", "[1e-3, 1e-3]", "twice"),
        ("[1e-3, 3e-3]", "1e-3", "learning_rate"),
        ('name = "A study"', "seeds = [1]", "lacks `name`"),
        ('name = "A study"', 'name = "A"\nseeds = []', "at least one"),
        ('tasks = [{ name = "toy" }]', "tasks = []", "`tasks` is empty"),
        ('tasks = [{ name = "toy" }]', 'tasks = ["toy"]', "expected a table"),
        ('{ name = "toy" }', '{ name = "toy" }, { name = "toy" }', "twice"),
        ("[study]", "[study", "not TOML"),
    ],
)
def test_names_the_mistake(tmp_path, old, new, words):
    with pytest.raises(StudyError) as caught:
        read(tmp_path, GOOD.replace(old, new))
    assert words in str(caught.value) and "study.toml" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(StudyError, match="No such file"):
        read_study(tmp_path / "study.toml")


def test_places(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("SOME_DATA", "/data")
    assert place_of("$SOME_DATA/toy", tmp_path) == "/data/toy"
    assert place_of("data", tmp_path) == str(tmp_path / "data")
    assert place_of("pkg:some-model", tmp_path) == "pkg:some-model"
    with pytest.raises(StudyError, match="not set"):
        place_of("$NO_SUCH_PLACE/toy", tmp_path)


def plan() -> Plan:
    return fakes.make_plan([fakes.make_method("LoRA", "lora", (1e-3, 3e-3))], places={"tiny": "/x"})


def test_a_plan_comes_back_whole(tmp_path):
    write_plan(plan(), tmp_path)
    assert read_plan(tmp_path) == plan()
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(StudyError, match="damaged"):
        read_plan(tmp_path)
    with pytest.raises(StudyError, match="no study"):
        read_plan(tmp_path / "elsewhere")


def test_a_run_is_known_by_everything_that_decides_it():
    cell = Cell("tiny", "toy", "LoRA")
    run = plan().final_runs(cell, 1e-3)[0]
    assert run_from_json(json.loads(json.dumps(run.to_json()))) == run
    others = [
        plan().final_runs(cell, 1e-3)[1],
        plan().final_runs(cell, 3e-3)[0],
        plan().selection_runs(cell)[0],
        dataclasses.replace(run, task={**run.task, "digest": "1" * 64}),
        dataclasses.replace(run, task={**run.task, "train": 95}),
        dataclasses.replace(run, settings={**run.settings, "num_train_epochs": 4.0}),
        dataclasses.replace(run, spec={"kind": "lora", "rank": 4}),
    ]
    assert len({run.digest(), *(other.digest() for other in others)}) == 8
    # Where the data lie is not what they are.
    moved = dataclasses.replace(plan(), places={"tiny": "/y"})
    assert moved.final_runs(cell, 1e-3)[0].digest() == run.digest()


def test_a_setting_that_is_new_leaves_the_runs_without_it_what_they_were():
    """As written before the setting existed; the digest of a run is over these."""
    old = _settings({"num_train_epochs": 1}, "here")
    assert "cache_frozen" not in old
    assert _settings({"num_train_epochs": 1, "cache_frozen": False}, "here") == old
    on = _settings({"num_train_epochs": 1, "cache_frozen": True}, "here")
    assert on == old | {"cache_frozen": True}


def test_one_rate_is_not_searched():
    single = fakes.make_plan([fakes.make_method("Head", "head", (1e-2,))])
    assert single.selection_runs(Cell("tiny", "toy", "Head")) == []


def test_codec_takes_nothing_for_something_else():
    with pytest.raises(StudyError, match="not a whole number"):
        decode(Budget, {"train": True}, "budget")
    with pytest.raises(StudyError, match="expected a table"):
        decode(Budget, [1], "budget")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StudyError, match=r"No space left.*make room"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
