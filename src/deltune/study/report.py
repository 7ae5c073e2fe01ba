"""The report: one self-contained HTML page computed from the records of a study."""

import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from deltune.study.overview import overviews
from deltune.study.page import appendix, sections
from deltune.study.plan import read_plan
from deltune.study.records import write_atomic
from deltune.study.state import State
from deltune.study.summary import tables


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` from whatever has finished in a study folder.

    Args:
        folder: a folder that `run_study` wrote.

    Returns:
        The path of the page: one file that needs nothing from outside.

    Raises:
        StudyError: the folder holds no study, or a record is damaged.
    """
    folder = Path(folder)
    path = folder / "report.html"
    write_atomic(path, render(State(read_plan(folder), folder)))
    return path


def page_template() -> str:
    """The page before anything is filled in."""
    return (files("deltune.study.page") / "report.html.tmpl").read_text(encoding="utf-8")


def render(state: State) -> str:
    """The page of a study as it stands."""
    page = Template(page_template())
    made = tables(state)
    views = overviews(made)
    body = [
        sections.short(state, made, views),
        *sections.across(state, made, views),
        *sections.results(made),
        appendix.grids(state),
        sections.every_run(state),
        sections.failed(state),
        appendix.settings(state),
        appendix.machine(state),
        appendix.reading(state),
    ]
    return page.substitute(
        title=escape(state.plan.name),
        about=escape(state.plan.about),
        subtitle=escape(sections.subtitle(state)),
        body="\n".join(part for part in body if part),
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
