"""The sections at the end of a report: grids, settings, machine, how to read it."""

import json
from typing import Any

from deltune.study import numbers
from deltune.study.page import html
from deltune.study.page.html import Cell
from deltune.study.state import State


def grids(state: State) -> str:
    """Every learning rate that was tried, and what the dev split chose."""
    rows = []
    for cell in state.cells:
        chosen = state.chosen(cell)
        for run, record in state.grid(cell):
            result = record.result if record else None
            mark = "chosen" if run.learning_rate == chosen else ""
            rows.append(
                (
                    Cell(cell.method),
                    Cell(cell.task),
                    Cell(numbers.rate(run.learning_rate), run.learning_rate),
                    Cell(numbers.metric(result.dev) if result else _state_of(record), _dev(result)),
                    Cell(mark, css="chosen" if mark else ""),
                    Cell(numbers.seconds(record.seconds) if record else "–", _cost(record)),
                )
            )
    fixed = [
        f"{method.name}: {numbers.rate(method.learning_rate[0])}, not searched. {method.note}"
        for method in state.plan.methods
        if len(method.learning_rate) == 1
    ]
    parts = [html.paragraph(_selection_rule(state))]
    if fixed:
        parts.append(html.items(fixed))
    if rows:
        columns = ("method", "task", "learning rate", "best dev", "", "whole run")
        parts.append(html.details("The whole grid", html.table(columns, rows)))
    return html.section("How the learning rates were chosen", *parts)


def settings(state: State) -> str:
    """The exact settings, so that a run can be repeated."""
    plan = state.plan
    common = _common([method.settings for method in plan.methods])
    rows = [
        (
            Cell(method.name),
            Cell(method.text, css="mono"),
            Cell(", ".join(map(numbers.rate, method.learning_rate)), css="mono"),
            Cell(_differences(common, method.settings) or "–", css="mono"),
            Cell(_differences(method.settings, method.selection_settings) or "–", css="mono"),
            Cell(method.note, css="wrap"),
        )
        for method in plan.methods
    ]
    columns = ("method", "spec", "learning rates tried", "own settings", "in selection", "note")
    tasks = [
        f"{task.name}: {task.kind}, {task.metric}, {task.train}/{task.dev}/{task.test} examples, "
        f"labels {', '.join(task.labels) if task.labels else '–'}, digest {task.digest}"
        for task in plan.tasks
    ]
    models = [f"{model.name}: head {model.head}, loaded in {model.dtype}" for model in plan.models]
    seeds = f"Seeds {', '.join(map(str, plan.seeds))}."
    return html.section(
        "Exact settings",
        html.paragraph(seeds + " The same examples are used by every run."),
        html.items(models + tasks),
        html.details("Methods", html.table(columns, rows)),
        html.details("Training, the same for all methods", html.code(json.dumps(common, indent=1))),
    )


def machine(state: State) -> str:
    """Where the numbers were measured."""
    seen: dict[str, dict[str, Any]] = {}
    for record in state.records.values():
        if record.machine:
            seen.setdefault(json.dumps(record.machine, sort_keys=True), record.machine)
    parts = [html.items(_machine(one)) for one in seen.values()]
    if len(seen) > 1:
        text = "The runs come from different machines or versions: do not compare their times."
        parts.insert(0, html.paragraph(text, "warning"))
    return html.section("Machine and versions", *parts)


def reading(state: State) -> str:
    """What each column means."""
    lines = [
        "Test and dev: the task's metric, higher is better. ± is the sample standard deviation "
        f"over {len(state.plan.seeds)} seeds; with so few seeds it is itself only a rough figure.",
        "Of full: the mean test metric divided by that of full fine-tuning.",
        "Trained: parameters that training changes, the new classification head included; "
        "share: over all parameters of the model.",
        "Saved: what one trained delta takes on disk, its description included.",
        "Training: time in training steps, without loading and evaluation. The runs of several "
        "worker processes share the machine, so compare times with each other only.",
        "Peak memory: the largest resident memory of the run's own process while it trained "
        "(on a GPU: the most that tensors held there).",
        "Learning rate: (smallest) or (largest) says that it ends its grid, so a better one may "
        "lie outside.",
    ]
    return html.section("How to read this page", html.items(lines))


def _machine(machine: dict[str, Any]) -> list[str]:
    versions = machine.get("versions", {})
    lines = [
        f"{machine.get('processor')}, {machine.get('cores')} cores, "
        f"{numbers.size(machine.get('memory_bytes'))} memory, {machine.get('system')}",
        f"{machine.get('workers')} worker processes with {machine.get('threads')} threads each",
        f"Python {machine.get('python')}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    if machine.get("accelerator"):
        lines.insert(1, str(machine["accelerator"]))
    return lines


def _selection_rule(state: State) -> str:
    runs = [record for cell in state.cells for _, record in state.grid(cell) if record]
    if not runs:
        return "Every learning rate was set beforehand; nothing was searched."
    selection, cost = state.plan.selection, sum(record.seconds for record in runs)
    return (
        f"Each learning rate was chosen by the dev metric alone, from the small grid stated below, "
        f"in a run with seed {selection['seed']} on at most {selection['train']:,} training and "
        f"{selection['dev']:,} dev examples; the test split is not read before the final runs. "
        f"The {len(runs)} selection runs took {numbers.seconds(cost)} of process time in all."
    )


def _common(tables: list[dict[str, Any]]) -> dict[str, Any]:
    first = tables[0]
    return {name: value for name, value in first.items() if all(t[name] == value for t in tables)}


def _differences(base: dict[str, Any], other: dict[str, Any]) -> str:
    changed = {
        name: value for name, value in other.items() if name not in base or base[name] != value
    }
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in changed.items())


def _state_of(record: Any) -> str:
    return "failed" if record else "not run"


def _dev(result: Any) -> float:
    return result.dev if result else -1.0


def _cost(record: Any) -> float:
    return record.seconds if record else 0.0
