"""Records and tasks against the same rows written by json, csv, pyarrow and datasets."""

import csv
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltune.errors import DataError
from deltune.tasks.records import Columns, Record, load_task, read_records
from deltune.tasks.task import Task

ROWS: list[dict[str, Any]] = [
    {"input": 'It said "no", twice.', "target": "no", "options": ["yes", "no"]},
    {"input": "Zwei\nZeilen, größer als α", "target": "ja", "options": ["ja", "nein"]},
]
EXPECTED = [Record(r["input"], r["target"], tuple(r["options"])) for r in ROWS]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_gz(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            lists = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
            writer.writerow(lists)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_gz,
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"data.{form}"
    WRITERS[form](file, ROWS)
    assert read_records(file) == EXPECTED


@pytest.mark.parametrize("form", WRITERS)
def test_columns_are_renamed_joined_and_ignored(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"data.{form}"
    WRITERS[form](file, [{"first": "a b", "second": "c", "label": "x", "id": "7"}])
    columns = Columns(input=("first", "second"), target="label", ignore=("id",))
    assert read_records(file, columns=columns) == [Record("a b\nc", "x")]
    with pytest.raises(DataError, match="unknown field `id`"):
        read_records(file, columns=Columns(input=("first", "second"), target="label"))


GOOD = '{"input": "a", "target": "x"}\n'
BAD_LINES = {
    "not json": ('{"input": "a", target}', "unreadable as JSON"),
    "twice": ('{"input": "a", "input": "b", "target": "x"}', "'input' stands twice"),
    "list": ('["a", "x"]', "expected one JSON object a line"),
    "no input": ('{"inputs": "a", "target": "x"}', "unknown field `inputs`.*`input`"),
    "no target": ('{"input": "a"}', "no target .*`target` is None"),
    "null target": ('{"input": "a", "target": null}', "no target"),
    "blank target": ('{"input": "a", "target": " "}', "no target .*' '"),
    "blank input": ('{"input": "", "target": "x"}', "`input` is empty"),
    "number target": ('{"input": "a", "target": 1}', r"`target` is 1 \(int\); expected a text"),
    "number input": ('{"input": 2.5, "target": "x"}', r"`input` is 2.5 \(float\)"),
    "options text": ('{"input": "a", "target": "x", "options": "xy"}', "expected a list of texts"),
    "options number": ('{"input": "a", "target": "x", "options": ["x", 1]}', "list of texts"),
    "other options": (
        '{"input": "a", "target": "yess", "options": ["yes", "no"]}',
        "target `yess` is not among the options `yes`, `no`.*did you mean `yes`",
    ),
    "one option": ('{"input": "a", "target": "x", "options": ["x"]}', "only option is `x`"),
    "unknown": ('{"input": "a", "target": "x", "refs": []}', "unknown field `refs`.*`references`"),
    "surrogate": ('{"input": "\\ud800", "target": "x"}', "lone surrogate"),
    "deep": ("[" * 100_000, "unreadable as JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    file = tmp_path / "data.jsonl"
    file.write_text(GOOD + "\n" + line + "\n" + GOOD + "also wrong\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"data.jsonl`, line 3\b.*{message}") as caught:
        read_records(file)
    assert len(str(caught.value)) < 600


def test_labels_outside_the_set_are_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    write_jsonl(file, [{"input": "a", "target": "positive"}, {"input": "b", "target": "postive"}])
    with pytest.raises(DataError, match=r"line 2: the label `postive` .*did you mean `positive`"):
        read_records(file, labels=["positive", "negative"])


def test_records_may_lack_a_target_for_prediction(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    write_jsonl(file, [{"input": "a"}, {"input": "b", "target": "x"}])
    assert read_records(file, need_target=False) == [Record("a", ""), Record("b", "x")]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"data.{form}"
    if form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"input": pyarrow.array([], pyarrow.string())}), file)
    elif form == "jsonl.gz":
        file.write_bytes(gzip.compress(b"\n\n"))
    else:
        file.write_bytes(b"")
    with pytest.raises(DataError, match="holds no record"):
        read_records(file)


def test_broken_files_say_where(tmp_path: Path) -> None:
    packed = gzip.compress("".join(GOOD for _ in range(5000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) - 9])
    with pytest.raises(DataError, match="unreadable after line 5000"):
        read_records(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text(GOOD)
    with pytest.raises(DataError, match="unreadable after line 0"):
        read_records(tmp_path / "plain.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + '{"input": "é"'.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is unreadable as UTF-8"):
        read_records(tmp_path / "latin.jsonl")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="unreadable as parquet"):
        read_records(tmp_path / "text.parquet")
    (tmp_path / "data.tsv").write_text(GOOD)
    with pytest.raises(DataError, match=r"no known ending.*`\.csv`"):
        read_records(tmp_path / "data.tsv")
    with pytest.raises(DataError, match="there is no data file"):
        read_records(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('input,target\na,x\n"b\nc",y\nd\n', "line 5 has 1 cells and the header has 2"),
        ('input,target\na,x\n"b\nc",\n', "line 3: the record has no target"),
        ('input,target\na,x\n"b,y\n', "line 3 is unreadable as CSV"),
        ("input,input\na,x\n", "line 1 has the column names"),
        ("text,target\na,x\n", "line 2: unknown field `text`"),
        ('input,target,options\na,x,"x;y"\n', "line 2: the cell `options` is `x;y`"),
        ("target\nx\n", "line 2: the record has no `input`"),
    ],
)
def test_bad_csv_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_records(file)


def test_a_line_without_end_does_not_take_the_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("deltune.tasks.readers.LONGEST_LINE", 1000)
    file = tmp_path / "data.jsonl"
    file.write_text(GOOD + '{"input": "' + "a" * 1000)
    with pytest.raises(DataError, match="line 2 is longer than 1000 bytes"):
        read_records(file)


def test_whole_numbers_are_texts_in_parquet_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", [{"input": "a", "target": 3}])
    assert read_records(tmp_path / "data.parquet") == [Record("a", "3")]
    write_parquet(tmp_path / "more.parquet", [{"input": "a", "target": 0.5}])
    with pytest.raises(DataError, match=r"row 1: `target` is 0.5 \(float\)"):
        read_records(tmp_path / "more.parquet")


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir()
    meta = {"name": "toy", "kind": "classification", "metric": "accuracy", "licence": "MIT"}
    meta |= {"labels": ["bad", "good"]} | changes
    (path / "meta.json").write_text(json.dumps(meta))
    for count, (name, form) in enumerate(
        [("train", "jsonl.gz"), ("dev", "csv"), ("test", "jsonl")]
    ):
        rows = [
            {"input": f"{name} {i}", "target": ("bad", "good")[i % 2]} for i in range(2 + count)
        ]
        WRITERS[form](path / f"{name}.{form}", rows)
    return path


def test_a_task_folder_loads(tmp_path: Path) -> None:
    task = load_task(folder(tmp_path / "toy", positive="bad"))
    assert (task.name, task.kind, task.metric) == ("toy", "classification", "accuracy")
    assert task.labels == ("bad", "good") and task.positive == "bad"
    assert [len(task.split(name)) for name in ("train", "dev", "test")] == [2, 3, 4]
    assert task.dev[2] == Record("dev 2", "bad") and task.meta["licence"] == "MIT"
    assert load_task(folder(tmp_path / "b", labels=None)).labels == ("bad", "good")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "clasification"}, "unknown kind `clasification`.*`classification`"),
        ({"metric": "acuracy"}, "unknown metric `acuracy`.*`accuracy`"),
        ({"metric": "rougeL"}, "metric `rougeL` does not fit the kind `classification`"),
        ({"metric": "f1", "labels": ["bad", "good", "so"]}, "`f1` is for two labels"),
        ({"kind": None}, "lacks one of `kind`, `metric`"),
        ({"labels": ["bad"]}, "dev.csv`, line 3: the label `good`|line 2: the label `good`"),
        ({"labels": ["bad", "good", "bad"]}, "at least two different ones"),
        ({"labels": "bad good"}, "expected a list of texts"),
        ({"kind": "regression-as-classes"}, "label `bad`, which is not a number"),
        ({"kind": "generation", "metric": "exact_match"}, "of kind `generation` has labels"),
        ({"kind": "multiple_choice", "labels": None}, "has no options"),
        ({"positive": "god"}, "positive label `god` is not in the label set"),
        ({"n_dev": 5}, "split `dev` has 3 records and meta.json says 5"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(folder(tmp_path / "toy", **changes))


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    toy = folder(tmp_path / "toy")
    (toy / "dev.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match=r"2 files for the split `dev`.*`dev\.jsonl`, `dev\.csv`"):
        load_task(toy)
    (toy / "dev.jsonl").unlink()
    (toy / "test.jsonl").unlink()
    with pytest.raises(DataError, match="0 files for the split `test`"):
        load_task(toy)
    (toy / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json` is unreadable as JSON"):
        load_task(toy)
    (toy / "meta.json").unlink()
    with pytest.raises(DataError, match=r"has no meta\.json"):
        load_task(toy)
    with pytest.raises(DataError, match="there is no task at"):
        load_task(tmp_path / "none")


def test_a_single_file_is_cut_by_seed(tmp_path: Path) -> None:
    file = tmp_path / "toy.jsonl"
    write_jsonl(file, [{"input": f"{i}", "target": "ab"[i % 2]} for i in range(50)])
    task = load_task(file)
    parts = [task.train, task.dev, task.test]
    assert [len(part) for part in parts] == [40, 5, 5]
    assert sorted((r for p in parts for r in p), key=lambda r: int(r.input)) == read_records(file)
    assert (task.kind, task.metric, task.labels) == ("classification", "accuracy", ("a", "b"))
    assert load_task(file).train == task.train != load_task(file, seed=1).train
    assert len(load_task(file, fractions=(0.5, 0.3, 0.2)).dev) == 15
    with pytest.raises(DataError, match="do not cut"):
        load_task(file, fractions=(0.5, 0.5, 0.5))
    with pytest.raises(DataError, match="unknown kind"):
        load_task(file, kind="classify")
    write_jsonl(file, [{"input": "a", "target": "b"}] * 2)
    with pytest.raises(DataError, match="too few to cut"):
        load_task(file)


def test_the_kind_of_a_file_follows_its_records(tmp_path: Path) -> None:
    file = tmp_path / "toy.jsonl"
    write_jsonl(file, [{"input": f"{i}", "target": f"text {i}"} for i in range(20)])
    assert load_task(file).kind == "generation" and load_task(file).metric == "exact_match"
    assert load_task(file, metric="rougeL").metric == "rougeL"
    write_jsonl(file, ROWS * 5)
    assert load_task(file).kind == "multiple_choice"
    write_jsonl(file, [{"input": f"{i}", "target": f"{i % 3 - 1}"} for i in range(20)])
    assert load_task(file, kind="regression-as-classes").metric == "pearson"


def test_limited_draws_nested_random_subsets() -> None:
    records = [Record(str(i), "ab"[i >= 500]) for i in range(1000)]
    task = Task("toy", "classification", "accuracy", ("a", "b"), records, records, records)
    large, small = task.limited(train=400, dev=10), task.limited(train=100)
    assert len(large.train) == 400 and len(large.dev) == 10 and large.test == records
    assert set(small.train) < set(large.train)
    assert small.train == sorted(small.train, key=lambda r: int(r.input))
    assert 30 < sum(r.target == "a" for r in small.train) < 70
    assert task.limited(train=100, seed=1).train != small.train
    with pytest.raises(DataError, match="ask for at least 1"):
        task.limited(train=0)
    with pytest.raises(DataError, match=r"unknown split `tain`.*`train`"):
        task.split("tain")


def test_data_sets_of_the_hub_format(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = ["bad", "good"]
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = [{"id": i, "text": f"t{i}", "label": i % 2} for i in range(30)]
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows[:20], features=features),
        validation=datasets.Dataset.from_list(rows[20:], features=features),
    )
    data.save_to_disk(str(tmp_path / "saved"))
    columns = Columns(input="text", target="label")
    task = load_task(f"hf:{tmp_path}/saved", columns=columns)
    assert task.labels == ("bad", "good") and task.kind == "classification"
    assert task.dev == [Record(f"t{i}", names[i % 2]) for i in range(20, 30)]
    assert len(task.train) == 18 and len(task.test) == 2  # the test split is cut from train
    assert {r.input for r in task.train + task.test} == {f"t{i}" for i in range(20)}
    with pytest.raises(DataError, match=r"no split `valid`.*`validation`"):
        load_task(f"hf:{tmp_path}/saved", columns=columns, splits={"dev": "valid"})
    with pytest.raises(DataError, match="one split was chosen for two uses"):
        load_task(f"hf:{tmp_path}/saved", columns=columns, splits={"test": "validation"})
    with pytest.raises(DataError, match="the record has no `input`"):
        load_task(f"hf:{tmp_path}/saved", columns=Columns(target="label"))


def test_a_hidden_label_of_the_hub_counts_as_no_target(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"input": datasets.Value("string"), "target": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = [{"input": "x", "target": 0}, {"input": "y", "target": -1}]
    data = datasets.Dataset.from_list(rows, features=features)
    data.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="split `train`, row 2: the record has no target"):
        load_task(f"hf:{tmp_path}/saved")


def test_a_local_folder_through_datasets(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for name in ("train", "validation", "test"):
        rows = [{"input": f"{name}{i}", "target": f"{i % 2}"} for i in range(10)]
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    task = load_task(f"hf:{tmp_path}/data")
    assert task.dev[3] == Record("validation3", "1") and task.labels == ("0", "1")


def test_the_real_tasks_load() -> None:
    root = os.environ.get("DELTUNE_DATA")
    if not root:
        pytest.skip("DELTUNE_DATA names no folder of tasks")
    folders = sorted(path.parent for path in Path(root).glob("*/meta.json"))
    for path in random.Random(0).sample(folders, min(12, len(folders))):
        task, meta = load_task(path), json.loads((path / "meta.json").read_text())
        with gzip.open(path / "dev.jsonl.gz", "rt", encoding="utf-8") as handle:
            rows = [json.loads(line) for line in handle]
        assert [(r.input, r.target, list(r.options)) for r in task.dev] == [
            (row["input"], row["target"], row.get("options", [])) for row in rows
        ]
        assert len(task.train) == meta["n_train"] and task.kind == meta["kind"]
