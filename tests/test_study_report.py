"""The report says what the records say. Oracle: statistics by hand, an HTML parser, XML."""

import dataclasses
import itertools
import math
import re
import statistics
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

import study_fakes as fakes
from deltune.study import numbers
from deltune.study.page.figures import figures
from deltune.study.page.findings import sentences, shortfalls
from deltune.study.page.svg import Axis, covering, spaced
from deltune.study.plan import Cell, Plan, write_plan
from deltune.study.records import Failure, write_record
from deltune.study.report import render, write_report
from deltune.study.state import State
from deltune.study.summary import tables

TEST = {"LoRA": (0.80, 0.82), "Prompt": (0.60, 0.62), "Full": (0.84, 0.86), "Head": (0.70, 0.72)}
RISING, FLAT = (0.5, 0.55, 0.62), (0.6, 0.8, 0.8)


def fill(folder, *, names=tuple(TEST), rates=(1e-3, 1e-2), **prompt) -> State:
    kinds = {"LoRA": "lora", "Prompt": "prompt", "Full": "full", "Head": "head"}
    plan = fakes.make_plan([fakes.make_method(name, kinds[name], rates) for name in names])
    write_plan(plan, folder)
    for cell in plan.cells():
        for run in plan.selection_runs(cell):
            write_record(folder, fakes.make_record(run, fakes.make_result(None, dev=0.7)))
        for run, test in zip(State(plan, folder).finals(cell), TEST[cell.method], strict=True):
            options = {"curve": FLAT, "saved": 90_000_000 if cell.method == "Full" else 4000}
            if cell.method == "Prompt":
                options |= {"curve": RISING} | prompt
            write_record(folder, fakes.make_record(run, fakes.make_result(test, **options)))
    return State(plan, folder)


def test_means_spreads_and_relatives(tmp_path):
    (table,) = tables(fill(tmp_path))
    for row in table.rows:
        assert row.test == pytest.approx(statistics.fmean(TEST[row.name]))
        assert row.test_spread == pytest.approx(statistics.stdev(TEST[row.name]))
        assert table.relative(row) == pytest.approx(statistics.fmean(TEST[row.name]) / 0.85)
    assert {row.learning_rate for row in table.rows} == {1e-3}  # equal on dev: the smaller


def test_a_method_below_head_only_is_named_with_the_reason(tmp_path):
    (table,) = tables(fill(tmp_path))
    (one,) = shortfalls(table)
    assert one.method == "Prompt"
    assert "0.610 ± 0.014" in one.text and "0.710 ± 0.014" in one.text
    assert "still rising" in one.text and "0.550 to 0.620" in one.text
    assert "smallest of its grid" in one.text
    assert "within the spread" not in one.text
    page = render(State(fill(tmp_path).plan, tmp_path))
    assert "1 method does not beat training the head alone" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"curve": FLAT, "losses": (0.7, 0.7, 0.7, 0.7)}, "training loss hardly fell"),
        ({"curve": (0.6, 0.9, 0.7)}, "overfitting"),
        ({"curve": FLAT}, "do not say why"),
    ],
)
def test_other_reasons(tmp_path, options, words):
    (table,) = tables(fill(tmp_path, rates=(1e-3,), **options))
    (one,) = shortfalls(table)
    assert words in one.text and "rising" not in one.text and "grid:" not in one.text


def test_level_with_head_only(tmp_path, monkeypatch):
    monkeypatch.setitem(TEST, "Prompt", (0.695, 0.715))
    (table,) = tables(fill(tmp_path))
    (one,) = shortfalls(table)
    assert "within the spread" in one.text


def test_seeds_that_disagree(tmp_path, monkeypatch):
    monkeypatch.setitem(TEST, "Prompt", (0.5, 0.7))
    (table,) = tables(fill(tmp_path))
    assert "Prompt differs widely from seed to seed" in " ".join(sentences(table))
    assert "its seeds disagree (0.500 to 0.700)" in shortfalls(table)[0].text


def test_all_beat_head_only(tmp_path):
    state = fill(tmp_path, names=("LoRA", "Full", "Head"))
    (table,) = tables(state)
    assert shortfalls(table) == []
    text = " ".join(sentences(table))
    assert "all 2 other methods beat it" in text and "differ" not in text
    assert "best delta is LoRA with 0.810 ± 0.014, 95.3 % of full fine-tuning" in text
    assert 'class="warning"' not in render(state)


class Page(HTMLParser):
    """Checks nesting and collects what the page would fetch."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(tmp_path):
    fill(tmp_path)
    text = write_report(tmp_path).read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.fetched == []
    assert "@import" not in text and "url(" not in text and "http" not in text
    words = " ".join(page.text)
    for needed in ("0.810 ± 0.014", "95.3 %", "Abacus", "num_train_epochs", "1e-2", "0" * 64):
        assert needed in words
    assert "$" not in words


def test_the_figures_draw_the_data(tmp_path):
    (table,) = tables(fill(tmp_path))
    made = figures(table)
    assert len(made) == 5
    for figure in made:
        root = ET.fromstring(figure.picture)
        groups = {group.get("data-m") for group in root.iter("g")}
        assert groups == set(TEST)
        box = [float(word) for word in root.get("viewBox", "").split()]
        for name in ("cx", "x1", "x2", "x"):
            found = [float(e.get(name, 0)) for e in root.iter() if e.get(name)]
            assert all(0 <= value <= box[2] for value in found)
    steps = made[0]
    assert len(steps.data) == 2 * 4 * 3
    row = next(line for line in steps.data if line[:3] == ("Prompt", 0, 30))
    assert row[4] == RISING[-1]
    dots = ET.fromstring(steps.picture).findall(".//g[@data-m='Prompt']/circle")
    heights = [float(dot.get("cy", 0)) for dot in dots]
    assert len(dots) == 3 and heights == sorted(heights, reverse=True)
    step = (RISING[1] - RISING[0]) / (RISING[2] - RISING[0])
    assert (heights[0] - heights[1]) / (heights[0] - heights[2]) == pytest.approx(step, abs=0.01)


def test_names_are_escaped(tmp_path):
    nasty = "<i>&\"'"
    plan = fakes.make_plan([fakes.make_method(nasty, "lora"), fakes.make_method("Head", "head")])
    plan = dataclasses.replace(plan, name=nasty, about=nasty)
    write_plan(plan, tmp_path)
    runs = [run for cell in plan.cells() for run in plan.final_runs(cell, 1e-3)]
    for run in runs[:-1]:
        write_record(tmp_path, fakes.make_record(run, fakes.make_result(0.7)))
    failure = Failure("Bad", nasty, nasty)
    write_record(tmp_path, fakes.make_record(runs[-1], None, failure))
    text = write_report(tmp_path).read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and "<i>&" not in text
    assert "1 final run failed" in text


def test_a_report_of_nothing_yet(tmp_path):
    plan = fakes.make_plan([fakes.make_method("LoRA", "lora")])
    write_plan(plan, tmp_path)
    assert "2 runs are still to do" in write_report(tmp_path).read_text()


def test_several_tasks_are_averaged(tmp_path):
    plan = fakes.make_plan([fakes.make_method("LoRA", "lora"), fakes.make_method("Full", "full")])
    tasks = (plan.tasks[0], dataclasses.replace(plan.tasks[0], name="other", title="Other"))
    plan: Plan = dataclasses.replace(plan, tasks=tasks, seeds=(0,))
    write_plan(plan, tmp_path)
    tests = {
        ("toy", "LoRA"): 0.4,
        ("toy", "Full"): 0.8,
        ("other", "LoRA"): 0.9,
        ("other", "Full"): 0.9,
    }
    for cell in plan.cells():
        for run in plan.final_runs(cell, 1e-3):
            result = fakes.make_result(tests[cell.task, cell.method])
            write_record(tmp_path, fakes.make_record(run, result))
    state = State(plan, tmp_path)
    assert [row.test for table in tables(state) for row in table.rows] == [0.4, 0.8, 0.9, 0.9]
    page = re.sub(r"<[^>]+>", " ", render(state))
    assert "Performance" in page and "75.0 %" in page


def test_axes_and_labels():
    axis = Axis(0, 10, 100, 200)
    assert axis.at(5) == 150 and axis.ticks() == [0, 2, 4, 6, 8, 10]
    log = Axis(10, 1000, 0, 100, log=True)
    assert log.at(100) == pytest.approx(50) and log.ticks() == [10, 100, 1000]
    assert covering([1, 1]) == (pytest.approx(0.94), pytest.approx(1.06))
    placed = spaced([50, 50, 51, 99], 10, 0, 100)
    assert sorted(placed) == placed and placed[-1] <= 100
    assert min(b - a for a, b in itertools.pairwise(placed)) >= 10
    crowded = spaced([5.0] * 20, 10, 0, 100)
    assert min(crowded) >= -1e-9 and max(crowded) <= 100 + 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(950, "950 B"), (1234, "1.23 kB"), (90_900_000, "90.9 MB"), (1.02e9, "1.02 GB"), (None, "–")],
)
def test_sizes(value, text):
    assert numbers.size(value) == text


def test_numbers():
    assert [numbers.rate(x) for x in (1e-3, 3e-5, 2.5e-4, 0.1)] == [
        "1e-3",
        "3e-5",
        "2.5e-4",
        "1e-1",
    ]
    assert [numbers.seconds(x) for x in (3.14, 42.2, 125, 7300)] == [
        "3.1 s", "42 s", "2 min 05 s", "2 h 01 min",
    ]  # fmt: skip
    assert numbers.percent(0.00123) == "0.12 %" and numbers.percent(0.9876) == "98.8 %"
    assert numbers.metric(math.nan) == "–" and numbers.spread([1.0]) is None


def test_status_of_cells(tmp_path):
    state = fill(tmp_path)
    assert state.chosen(Cell("tiny", "toy", "LoRA")) == 1e-3
    assert state.status().done and state.status().total == 16
