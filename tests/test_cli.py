"""Commands do what the library does. Oracle: the library itself, HF models, exit statuses."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import study_fakes as fakes
import tasks_toys
from deltune.cli import show
from deltune.cli.app import run
from deltune.study import events, pool
from deltune.study.plan import write_plan
from deltune.study.records import write_record
from deltune.study.state import Status
from deltune.training.events import Evaluated, Started, Step
from train_toy import stopped

pytestmark = pytest.mark.xdist_group("cli")

TRAIN = ["--num-train-epochs", "2", "--per-device-train-batch-size", "8", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny backbone and a task."""
    return tasks_toys.home(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def trained(home) -> Path:
    out = home / "trained"
    words = ["train", "lora(rank=2)", "--model", str(home / "model"), "--task", str(home / "task")]
    words += ["--out", str(out), "--head", "classification", "--test", "--json", *TRAIN]
    assert run(words) == 0
    return out


def fresh(
    *words: str, given: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deltune", *words]
    environment = os.environ | environment
    return subprocess.run(
        command, input=given, capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"]])
def test_help_needs_no_torch(words):
    code = (
        "import sys\nfrom deltune.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_says_what_the_settings_say():
    text = " ".join(fresh("train", "--help").stdout.replace("│", " ").split())
    assert "Passes over the training data; not used when max_steps is given." in text
    assert "--learning-rate FLOAT" in text and "(default: 0.001)" in text


def test_a_refusal_is_one_message(home):
    done = fresh("plan", str(home / "model"), "lorra(rank=2)")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("deltune: unknown method `lorra` (did you mean `lora`?)")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
    for extra in ({"DELTUNE_TRACEBACK": "1"}, {}):
        flag = [] if extra else ["--traceback"]
        told = fresh("methods", "lorra", *flag, **extra)
        assert told.returncode == 1 and "Traceback" in told.stderr


def test_unknown_words_exit_with_2():
    assert fresh("tran").returncode == 2
    done = fresh("train", "lora", "--modle", "x")
    assert done.returncode == 2 and "--model" in done.stderr + done.stdout


def test_interrupt(monkeypatch, capsys):
    from deltune.cli.look import Methods

    def stop(self) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Methods, "run", stop)
    assert run(["methods"]) == 130
    assert capsys.readouterr().err == "deltune: interrupted\n"


def drawn(bar: type, told: tuple, terminal: bool, quiet: bool, monkeypatch) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system=None, width=150)
    monkeypatch.setattr(show, "err", lambda: console)
    with bar(quiet=quiet) as draw:
        for event in told:
            draw(event)
    return file.getvalue()


TRAINED = (
    Started(8, 4, 32, 256, 0, "fp32"),
    Step(3, 8, 0.25, 1e-3, 1.0),
    Evaluated(3, "dev", "accuracy", 0.5, True),
)
STUDIED = (events.StudyStarted(Status("A study", 4, 1, 0, 0, 3, 0, 60.0), 2, 1),)


@pytest.mark.parametrize("terminal", [True, False])
def test_bars(terminal, monkeypatch):
    """A training's bar is drawn everywhere, a study's on terminals; a study's lines everywhere."""
    text = drawn(show.TrainingBar, TRAINED, terminal, False, monkeypatch)
    assert "3/8 loss 0.250  dev accuracy 0.500 (best)" in text
    text = drawn(show.StudyBar, STUDIED, terminal, False, monkeypatch)
    assert "A study: 3 of 4 runs to do, 2 at once with 1 threads each" in text
    assert bool(re.search(r"1/4 \d:\d\d:\d\d about 60 s left", text)) is terminal
    for bar, told in ((show.TrainingBar, TRAINED), (show.StudyBar, STUDIED)):
        assert drawn(bar, told, terminal, True, monkeypatch) == ""


def test_methods(capsys):
    import deltune as dt

    assert run(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in rows} == set(dt.methods())
    assert run(["methods", "lora", "--json"]) == 0
    fields = {row["name"]: row for row in json.loads(capsys.readouterr().out)["fields"]}
    assert fields["rank"]["default"] == dt.LoRA().rank and fields["rank"]["doc"]
    assert run(["methods"]) == 0
    assert "reparameterization" in capsys.readouterr().out


def test_plan_and_inspect(home, capsys):
    model = str(home / "model")
    assert run(["plan", model, "lora(rank=2)", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # Two layers, query and value, A (2, 16) and B (16, 2).
    assert plan["trainable"] == 2 * 2 * (2 * 16 + 16 * 2)
    assert sum(site["trainable"] for site in plan["sites"]) == plan["trainable"]
    assert {site["role"] for site in plan["sites"]} == {"attn.q", "attn.v"}
    assert run(["plan", model, "lora(rank=2)"]) == 0
    assert "256 trainable" in capsys.readouterr().out
    assert run(["inspect", model, "--json"]) == 0
    assert "attn.q" in json.loads(capsys.readouterr().out)["roles"]


def test_train_writes_delta_and_result(home, trained, capsys):
    import deltune as dt

    data = json.loads((trained / "result.json").read_text())
    assert data["spec"] == "lora(rank=2)" and data["settings"]["learning_rate"] == 1e-2
    assert len(data["result"]["curve"]) == 2 and data["result"]["steps"] == 8
    assert not (trained / "checkpoints").exists()
    model, tokenizer = dt.load_model(str(home / "model"), "classification", labels=["bad", "good"])
    delta = dt.load(trained / "delta", model)
    assert delta.count() == data["trainable"]
    task = dt.load_task(home / "task")
    found = dt.evaluate(model, tokenizer, task, "test")
    assert found.value == data["test"]
    assert dt.evaluate(model, tokenizer, task, "dev").value == data["result"]["best_dev"]

    assert run(["evaluate", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == list(found.predictions)

    lines = "".join(json.dumps({"input": record.input}) + "\n" for record in task.test)
    source = home / "inputs.jsonl"
    source.write_text(lines)
    assert run(["predict", str(trained / "delta"), "--input", str(source)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"] for row in rows] == list(found.predictions)
    assert [row["input"] for row in rows] == [record.input for record in task.test]


def test_a_sweep_is_the_trainings_one_by_one(home, tmp_path, capsys, monkeypatch):
    words = ["--model", str(home / "model"), "--task", str(home / "task"), "--test", *TRAIN]
    words += ["--head", "classification", "--save-steps", "3"]
    alone = {}
    for rate in ("1e-3", "1e-2"):
        out = tmp_path / rate
        assert (
            run(["train", "lora(rank=2)", *words, "--learning-rate", rate, "--out", str(out)]) == 0
        )
        alone[float(rate)] = json.loads((out / "result.json").read_text())
    out, rates = tmp_path / "sweep", ["--learning-rates", "1e-2", "1e30", "1e-3"]
    sweep = ["sweep", "lora(rank=2)", *words, *rates, "--out", str(out)]
    assert run(sweep) == 2 and "a sweep tries --learning-rates" in capsys.readouterr().err
    at = sweep.index("--learning-rate")
    del sweep[at : at + 2]
    stopped(monkeypatch, 3)
    assert run(sweep) == 130 and "--resume goes on" in capsys.readouterr().err
    assert run([*sweep, "--resume"]) == 0 and not (out / "checkpoints").exists()
    assert "1e+30" in capsys.readouterr().out
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["learning_rate"] for row in rows] == [1e-3, 1e-2, 1e30]
    assert "expected finite numbers" in rows[2]["error"]
    for row in rows[:2]:
        result = alone[row["learning_rate"]]["result"]
        assert (row["best_dev"], row["best_step"]) == (result["best_dev"], result["best_step"])
    best = max(rows[:2], key=lambda row: (row["best_dev"], -row["learning_rate"]))["learning_rate"]
    data = json.loads((out / "result.json").read_text())
    assert data["settings"] == alone[best]["settings"] and data["test"] == alone[best]["test"]
    there = tmp_path / {1e-3: "1e-3", 1e-2: "1e-2"}[best] / "delta"
    for one, two in zip(
        load_file(out / "delta" / "delta.safetensors").values(),
        load_file(there / "delta.safetensors").values(), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert run([*sweep[:-1], str(tmp_path / "none"), "--eval-steps", "no"]) == 2
    assert "cannot choose" in capsys.readouterr().err


def test_predict_from_standard_input(home, trained):
    words = ["predict", str(trained), "--input", "-"]
    good = '{"input": "the film was good"}\n{"input": "the film was bad"}\n'
    done = fresh(*words, "--out", str(home / "out.jsonl"), given=good)
    assert done.returncode == 0, done.stderr
    assert len((home / "out.jsonl").read_text().splitlines()) == 2
    bad = fresh(*words, given='{"input": "fine"}\nnot json\n')
    assert bad.returncode == 2 and "line 2" in bad.stderr and "Traceback" not in bad.stderr


def test_merge_gives_a_plain_model(home, trained, capsys):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import deltune as dt

    assert run(["merge", str(trained), "--out", str(home / "merged")]) == 0
    assert run(["merge", str(trained), "--out", str(home / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err
    plain = AutoModelForSequenceClassification.from_pretrained(home / "merged").eval()
    batch = AutoTokenizer.from_pretrained(home / "merged")(
        ["the film was good"], return_tensors="pt"
    )
    model, _ = dt.load_model(str(home / "model"), "classification", labels=["bad", "good"])
    dt.load(trained / "delta", model)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert plain.config.id2label == {0: "bad", 1: "good"}
    assert {name.split(".")[0] for name in plain.state_dict()} == {"bert", "classifier"}


def test_convert_makes_another_method_and_says_how_alike(home, trained, capsys):
    import torch

    import deltune as dt

    out = home / "converted"
    words = ["convert", str(trained), "--to", "lora(rank=3)", "--out", str(out), "--probe", "8"]
    assert run([*words, "--how", "weights"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "by weights: 0.00% of the change of weights is left out" in said
    assert "the converted delta has of the source: 100.0% of the decisions" in said
    assert run(words) == 2 and "exists already" in capsys.readouterr().err
    assert run([*words, "--overwrite", "--json", "--learning-rate", "1e-2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["spec"], data["result"]["how"]) == ("lora(rank=3)", "weights")
    assert data["test"] == json.loads((trained / "result.json").read_text())["test"]
    rows = []
    for folder in (trained, out):
        model, tokenizer = dt.load_model(
            str(home / "model"), "classification", labels=["bad", "good"]
        )
        dt.load(folder / "delta", model)
        with torch.no_grad():
            rows.append(model(**tokenizer(["the film was good"], return_tensors="pt")).logits)
    torch.testing.assert_close(*rows, atol=1e-5, rtol=0)
    assert run(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == data["test"]
    short = [*words, "--how", "weights", "--overwrite", "--json", "--max-length", "3"]
    assert run(short) == 0
    data = json.loads(capsys.readouterr().out)
    model, tokenizer = dt.load_model(str(home / "model"), "classification", labels=["bad", "good"])
    dt.load(trained / "delta", model)
    task = dt.load_task(str(home / "task"))
    tested = dt.evaluate(model, tokenizer, task, "test", max_length=3).value
    assert (data["result"]["source_test"], data["trained_on"]["max_length"]) == (tested, 3)
    for more, message in (
        (["--probe", "99"], "--probe is 99 and there are 32 texts"),
        (["--how", "space"], "no space was given"),
        (["--how", "weights", "--to", "prefix(tokens=2)"], "is no change of weights"),
    ):
        assert run([*words, "--overwrite", *more]) == 2
        assert message in capsys.readouterr().err
        assert (out / "delta" / "delta.json").exists()  # what was there is


def test_train_keeps_what_is_there(home, trained, capsys):
    words = ["train", "lora(rank=2)", "--model", str(home / "model"), "--task", str(home / "task")]
    words += ["--head", "classification", "--out", str(trained), "--json", *TRAIN]
    before = (trained / "result.json").read_bytes()
    assert run(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert (trained / "result.json").read_bytes() == before
    mine = home / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert run([*words, "--out", str(mine), "--overwrite"]) == 2
    assert (mine / "thesis.txt").exists()
    assert run([*words, "--overwrite", "--resume"]) == 2


def test_study_commands(tmp_path, capsys, monkeypatch):
    plan = fakes.make_plan([fakes.make_method("LoRA", "lora"), fakes.make_method("Head", "head")])
    write_plan(plan, tmp_path)
    for cell in plan.cells():
        for run_ in plan.final_runs(cell, 1e-3):
            test = 0.8 if cell.method == "LoRA" else 0.7
            write_record(tmp_path, fakes.make_record(run_, fakes.make_result(test)))
    assert run(["study", "status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 4
    assert run(["study", "report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0.800 ± 0.000" in out and str(tmp_path / "report.html") in out
    assert run(["study", "report", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tables"][0]["rows"]
    assert [row["test"] for row in rows] == [0.8, 0.7]
    assert run(["study", "status", str(tmp_path / "no")]) == 2


STUDY = """
tasks = [{{ name = "{home}/task" }}]
models = [{{ name = "{home}/model", head = "classification" }}]
[study]
name = "Toy"
seeds = [0, 1]
[budget]
train = 24
[selection]
train = 16
dev = 8
[train]
num_train_epochs = 1
per_device_train_batch_size = 8
[[methods]]
name = "LoRA"
spec = "lora(rank=2)"
learning_rate = [1e-3, 1e-2]
[[methods]]
name = "Full"
spec = "full"
learning_rate = [1e-3]
[[methods]]
name = "Head"
spec = "head"
learning_rate = [1e-2]
[[methods]]
name = "Too high"
spec = "lora(rank=99)"
learning_rate = [1e-2]
"""


def test_a_real_study_end_to_end(home, tmp_path, capsys):
    """Every number of the records again, from the same run in this process."""
    import torch

    import deltune as dt
    from deltune.study.plan import Cell, read_plan
    from deltune.study.state import State
    from deltune.training.loop import train

    file = tmp_path / "toy.toml"
    file.write_text(STUDY.format(home=home))
    assert run(["study", "run", str(file), "--workers", "1"]) == 0
    out = capsys.readouterr()
    assert "report: " in out.out and "8/10" in out.err
    folder = tmp_path / "toy"
    state = State(read_plan(folder), folder)
    status = state.status()
    assert (status.finished, status.failed, status.left) == (8, 2, 0)
    assert all("99" in (r.failure.message if r.failure else "") for r in state.failures())

    record = state.results(Cell(f"{home}/model", f"{home}/task", "LoRA"))[1]
    result, spec = record.result, record.spec
    assert result and spec.seed == 1
    task = dt.load_task(home / "task").limited(train=24)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, tokenizer = dt.load_model(
        str(home / "model"), "classification", labels=task.labels, seed=1
    )
    torch.manual_seed(1)
    delta = dt.attach(model, dt.LoRA(rank=2))
    settings = dt.TrainSettings.from_json(spec.settings)
    trained = train(model, tokenizer, task, delta, settings)
    assert list(trained.losses) == pytest.approx(result.losses, abs=1e-5)
    assert trained.best_dev == result.dev
    assert dt.evaluate(model, tokenizer, task, "test").value == result.test
    assert delta.count() == result.trainable
    delta.save(tmp_path / "delta")
    sizes = [path.stat().st_size for path in (tmp_path / "delta").iterdir()]
    assert abs(sum(sizes) - result.saved_bytes) < 200
    assert result.peak_memory_bytes and result.peak_memory_bytes > 1e8
    assert not list((folder / "deltas").iterdir())


def test_tasks_of_a_folder(tmp_path, capsys):
    terms = 50 * "MIT "
    for name, about in {
        "sst2": {"kind": "classification", "metric": "accuracy", "labels": ["a", "b"], "n_dev": 7},
        "mine": {"kind": "generation", "metric": "rouge_l", "type": "summary", "licence": terms},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps(about))
    (tmp_path / "none").mkdir()
    assert run(["tasks", str(tmp_path), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], first["type"], first["labels"], first["dev"]) == (
        "sst2",
        "sentiment",
        2,
        7,
    )
    assert second == {
        "name": "mine", "type": "summary", "kind": "generation", "metric": "rouge_l",
        "labels": None, "train": None, "dev": None, "test": None, "licence": terms,
        "place": str(tmp_path / "mine"),
    }  # fmt: skip
    assert run(["tasks", str(tmp_path), "--type", "summary"]) == 0
    told = capsys.readouterr().out
    assert "mine" in told and "sst2" not in told and terms in told
    assert "1 tasks of 1 types" in told
    assert run(["tasks", str(tmp_path), "--type", "sumary"]) == 2
    assert "did you mean `summary`" in capsys.readouterr().err
    assert run(["tasks", str(tmp_path / "none")]) == 2
    assert "holds no folder with a meta.json" in capsys.readouterr().err
    (tmp_path / "mine" / "meta.json").write_text('{"kind": 3')
    assert run(["tasks", str(tmp_path)]) == 2
    assert "cannot be read as a task's metadata" in capsys.readouterr().err


def test_the_study_of_the_quickstart_is_sound(monkeypatch, tmp_path):
    """Ten methods, two seeds, and one worker command; nothing is run."""
    from importlib.resources import files

    from deltune.spec import parse
    from deltune.study.reading import read_study

    study = read_study(Path(str(files("deltune.study") / "quickstart.toml")))
    kinds = [parse(method.spec).kind for method in study.methods]
    assert len(study.study.seeds) == 2
    assert {"lora", "adapter", "prefix", "prompt", "bitfit", "full", "head", "last"} <= set(kinds)
    placements = {getattr(parse(method.spec), "placement", None) for method in study.methods}
    assert {"serial", "pfeiffer", "parallel"} <= placements
    assert pool.COMMAND[1:] == ["-m", "deltune.study.worker"]
