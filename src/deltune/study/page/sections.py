"""The sections of a report, each computed from the records."""

from collections.abc import Sequence

from deltune.study import numbers
from deltune.study.overview import Overview
from deltune.study.page import html, questions
from deltune.study.page.dimension import dimension
from deltune.study.page.figures import figures, gallery, slots
from deltune.study.page.findings import edge_of_grid, overall, sentences, shortfalls
from deltune.study.page.html import Cell
from deltune.study.page.performance import convergence, named, performance
from deltune.study.page.subspace import subspace
from deltune.study.state import State
from deltune.study.summary import Row, Table


def subtitle(state: State) -> str:
    """What was compared, in one line."""
    plan, status = state.plan, state.status()
    parts = [
        f"{len(plan.methods)} methods",
        _count(len(plan.models), "model"),
        _count(len(plan.tasks), "task"),
        _count(len(plan.seeds), "seed"),
        f"{status.finished} of {status.total} runs finished",
    ]
    return " · ".join(parts)


MANY = 6
"""From more tables on, the page tells of all tasks together and not of each."""


def short(state: State, made: list[Table], views: list[Overview]) -> str:
    """The result in plain sentences, and the warnings."""
    parts = [_unfinished(state)]
    for view in views if len(made) > MANY else ():
        if len(views) > 1:
            parts.append(f"<h3>{html.escape(view.model)}</h3>")
        parts.append(html.items(overall(view)))
    for table in made if len(made) <= MANY else ():
        if len(made) > 1:
            parts.append(f"<h3>{html.escape(_title(table))}</h3>")
        parts.append(_tiles(table))
        parts.append(html.items(sentences(table)))
        parts.append(_warning(table))
    return html.section("In short", *parts, css="short")


def results(made: list[Table]) -> list[str]:
    """Table and figures of each model and task."""
    return [
        html.section(
            _title(table) if len(made) > 1 else "Results",
            html.paragraph(_setting(table), "note"),
            _table(table),
            gallery(figures(table), 3),
        )
        for table in made
        if table.rows and len(made) <= MANY
    ]


def across(state: State, made: list[Table], views: list[Overview]) -> list[str]:
    """What the study says over tasks and models: performance, convergence, combination, scale,
    transfer, subspaces, intrinsic dimension and cost, as far as it has asked."""
    of = {view.model: f" of {view.model}" if len(views) > 1 else "" for view in views}
    several = [view for view in views if len(view.tables) > 1]
    parts = [performance(view, f"Performance{of[view.model]}") for view in several]
    parts += [convergence(view, f"Convergence{of[view.model]}") for view in several]
    parts += [questions.combination(state, made), questions.scale(views)]
    parts += [questions.transfer(state), subspace(state), dimension(made)]
    return [*parts, questions.cost(state)]


def every_run(state: State) -> str:
    """One line per final run."""
    rows = []
    for cell in state.cells:
        for record in state.results(cell):
            result, run = record.result, record.spec
            if result is None:
                continue
            rows.append(
                (
                    Cell(run.method),
                    Cell(run.task["name"]),
                    html.plain(run.seed),
                    Cell(numbers.rate(run.learning_rate), run.learning_rate),
                    Cell(numbers.metric(result.test), result.test or 0.0),
                    Cell(numbers.metric(result.dev), result.dev),
                    Cell(f"{result.best_step} of {result.steps}", result.best_step),
                    Cell(f"{_last(result.losses):.3f}", _last(result.losses)),
                    Cell(numbers.seconds(result.train_seconds), result.train_seconds),
                    Cell(numbers.seconds(result.eval_seconds), result.eval_seconds),
                    Cell(numbers.size(result.peak_memory_bytes), result.peak_memory_bytes or 0),
                    Cell(numbers.size(result.saved_bytes), result.saved_bytes or 0),
                    Cell(record.digest[:12], css="mono"),
                )
            )
    columns = ("method", "task", "seed", "learning rate", "test", "best dev", "best step")
    columns += ("last loss", "training", "evaluation", "peak memory", "saved", "record")
    return html.section(
        "Every run", html.details(_count(len(rows), "final run"), html.table(columns, rows))
    )


def failed(state: State) -> str:
    """Every failed run with its error."""
    parts = [
        html.details(
            f"{record.run['method']} on {record.run['task']['name']}, seed {record.run['seed']}, "
            f"learning rate {numbers.rate(record.spec.learning_rate)}: {record.failure.type}",
            html.code((record.failure.message + "\n\n" + record.failure.traceback).strip()),
        )
        for record in state.failures()
        if record.failure
    ]
    return html.section("Failed runs", *parts) if parts else ""


def _last(losses: list[float]) -> float:
    tenth = losses[-max(1, len(losses) // 10) :]
    return numbers.mean(tenth)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _title(table: Table) -> str:
    return f"{table.task.title} with {table.model}"


def _setting(table: Table) -> str:
    task = table.task
    return (
        f"{table.model} on {task.title}: {task.train:,} training, {task.dev:,} dev and "
        f"{task.test:,} test examples. Test {task.metric} is read once per final run, at the step "
        "with the best dev metric."
    )


def _unfinished(state: State) -> str:
    status = state.status()
    parts = []
    if status.left or status.running:
        parts.append(f"{status.left + status.running} runs are still to do")
    lost = [record for record in state.failures() if record.run["kind"] == "final"]
    if lost:
        parts.append(f"{_count(len(lost), 'final run')} failed (see below)")
    if status.blocked:
        parts.append(f"{status.blocked} cannot start because no learning rate of their grid worked")
    if not parts:
        return ""
    return html.paragraph("This study is incomplete: " + "; ".join(parts) + ".", "warning")


def _tiles(table: Table) -> str:
    from deltune.study.page.findings import best_delta

    best, full = best_delta(table), table.reference
    if best is None:
        return ""
    tiles = [
        (numbers.metric(best.test), f"{best.name}, the best delta"),
    ]
    if full:
        relative = table.relative(best)
        tiles.append((numbers.metric(full.test), "full fine-tuning"))
        tiles.append((numbers.percent(relative or 0.0), "of full fine-tuning kept"))
        tiles.append((f"{full.saved / best.saved:,.0f} ×", "smaller on disk"))
    return (
        '<div class="tiles">'
        + "".join(
            f"<div><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>"
            for big, small in tiles
        )
        + "</div>"
    )


def _warning(table: Table) -> str:
    found = shortfalls(table)
    if not found:
        return ""
    lines = "".join(
        f"<li><b>{html.escape(one.method)}</b>: {html.escape(one.text)}</li>" for one in found
    )
    count = _count(len(found), "method")
    verb = "does" if len(found) == 1 else "do"
    return (
        f'<div class="warning"><b>{count} {verb} not beat training the head alone.</b>'
        f"<ul>{lines}</ul></div>"
    )


def _table(table: Table) -> str:
    columns = ("method", f"test {table.task.metric}", "of full", "trained", "saved")
    columns += ("training", "peak memory", "rate", "seeds")
    best = max(table.rows, key=lambda row: row.test)
    slot = slots([row.name for row in table.rows])
    return html.table(
        columns, (_row(table, row, slot[row.name], row is best) for row in table.rows)
    )


def _row(table: Table, row: Row, slot: int, best: bool) -> Sequence[Cell]:
    relative, rate = table.relative(row), row.learning_rate or 0.0
    edge, step = edge_of_grid(row), 1000 * row.step_seconds
    baseline = row.method.family == "baseline"
    return (
        named(row.name, slot, baseline, row.method.text),
        Cell(numbers.metric(row.test, row.test_spread), row.test, "num best" if best else ""),
        Cell("–" if relative is None else numbers.percent(relative), relative or 0.0),
        _double(f"{row.trainable:,}", numbers.percent(row.share), row.trainable),
        Cell(numbers.size(row.saved), row.saved),
        _double(numbers.seconds(row.seconds), f"{step:.0f} ms per step", row.seconds),
        Cell(numbers.size(row.peak), row.peak or 0.0),
        _double(numbers.rate(row.learning_rate), f"{edge} tried" if edge else "", rate),
        Cell(str(len(row.records)), len(row.records)),
    )


def _double(first: str, second: str, value: float) -> Cell:
    body = f"{html.escape(first)}<small>{html.escape(second)}</small>"
    return Cell(body, value, raw=True)
