"""The figures of a report as files of their own: SVG, and PDF for papers."""

import io
import re
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

from deltune.errors import StudyError
from deltune.study.plan import read_plan
from deltune.study.records import write_atomic
from deltune.study.report import page_template, render
from deltune.study.state import State

FORMS = ("svg", "pdf")
FONT = "Vera"
"""Comes with reportlab, and has the signs that the fonts built into PDF lack."""
_FIGURE = re.compile(r"<figure><h3>(.*?)</h3>(<svg.*?</svg>)", re.DOTALL)
_NAMESPACE = "http://www.w3.org/2000/svg"


def write_figures(folder: str | Path, out: str | Path, form: str = "pdf") -> list[Path]:
    """Writes each figure of a study's report to a file of its own, in the colours of print.

    Args:
        folder: a folder that `run_study` wrote.
        out: folder of the files; numbered in the order of the report.
        form: `svg` or `pdf`.

    Returns:
        The paths, in order.

    Raises:
        StudyError: the folder holds no study, one without figures yet, or another form is asked
            for.
    """
    if form not in FORMS:
        raise StudyError(f"figures cannot be written as `{form}`; choose one of {', '.join(FORMS)}")
    page = render(State(read_plan(folder), Path(folder)))
    found = _FIGURE.findall(page)
    if not found:
        raise StudyError(f"the report of `{folder}` has no figures yet; run more of the study")
    rules, colours = _styles(page_template())
    paths = []
    for number, (title, picture) in enumerate(found, 1):
        name = re.sub(r"\W+", "-", unescape(title).lower()).strip("-")
        path = Path(out) / f"{number:02d}-{name}.{form}"
        text = standalone(picture, rules, colours)
        write_atomic(path, text if form == "svg" else _pdf(text))
        paths.append(path)
    return paths


def document(picture: str) -> str:
    """A picture of a report as an SVG document, in the colours of print."""
    return standalone(picture, *_styles(page_template()))


def standalone(picture: str, rules: list[tuple[str, str]], colours: dict[str, str]) -> str:
    """A picture of the page as a document that needs neither the page's styles nor its variables.

    Args:
        picture: the `svg` element.
        rules: (selector, declarations) of the page that concern pictures, in order.
        colours: the values of the page's variables.
    """
    ElementTree.register_namespace("", _NAMESPACE)
    root = ElementTree.fromstring(picture.replace("<svg ", f'<svg xmlns="{_NAMESPACE}" ', 1))
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"width": width, "height": height, "font-size": "11", "font-family": FONT}
    for element in root.iter():
        classes = set(element.get("class", "").split())
        slot = next((name for name in classes if re.fullmatch(r"s\d", name)), None)
        known = colours | ({"c": colours[slot]} if slot else {})
        if found := re.search(r"--v:([\d.]+)", element.attrib.pop("style", "")):
            # What the page says with color-mix.
            mixed = _mixed(colours["accent"], colours["card"], float(found[1]))
            for square in element.iter(f"{{{_NAMESPACE}}}rect"):
                square.attrib |= {"fill": mixed, "stroke": colours["rule"], "stroke-width": ".5"}
            for words in element.iter(f"{{{_NAMESPACE}}}text"):
                ink = colours["page" if "strong" in classes else "ink"]
                words.attrib |= {"fill": ink, "font-size": "10"}
        _dress(element, classes, rules, known)
        element.attrib.pop("data-m", None)
    for parent in list(root.iter()):
        for title in parent.findall(f"{{{_NAMESPACE}}}title"):
            parent.remove(title)
    return ElementTree.tostring(root, encoding="unicode")


def _dress(
    element: ElementTree.Element, classes: set[str], rules: list[tuple[str, str]],
    colours: dict[str, str],
) -> None:  # fmt: skip
    """Gives an element what the rules say of its classes, as attributes; later rules win."""
    said: dict[str, str] = {}
    for selector, declarations in rules:
        wanted = set(selector.split(".")[1:])
        tag = selector.partition(".")[0]
        if tag and not element.tag.endswith(f"}}{tag}"):
            continue
        if wanted <= classes:
            said |= dict(re.findall(r"([\w-]+):\s*([^;]+)", declarations))
    for name, value in said.items():
        if name not in element.attrib:
            plain = re.sub(r"var\(--(\w+)\)", lambda found: colours.get(found[1], "none"), value)
            element.set(name, plain.strip().removesuffix("px"))


def _styles(template: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The page's rules for pictures, without those that stand in one another, and its colours."""
    print_ = template[template.index("@media print") :]
    colours = dict(re.findall(r"--(\w+):\s*(#\w+)", template[: template.index("@media")]))
    colours |= dict(re.findall(r"--(\w+):\s*(#\w+)", print_))
    rules = re.findall(r"svg ([\w.]+) \{ ([^}]+) \}", template)
    return rules, colours


def _mixed(strong: str, weak: str, share: float) -> str:
    pairs = zip(_channels(strong), _channels(weak), strict=True)
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def _channels(colour: str) -> list[int]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return [int(digits[at : at + 2], 16) for at in (0, 2, 4)]


def _pdf(text: str) -> bytes:
    try:
        from reportlab.graphics import renderPDF
        from reportlab.pdfbase import pdfmetrics
        from reportlab.pdfbase.ttfonts import TTFont
        from svglib.fonts import register_font
        from svglib.svglib import svg2rlg
    except ImportError:
        raise StudyError(
            "figures as PDF need svglib; install it with `pip install 'deltune[study]'`, or write "
            "them as svg"
        ) from None
    for style, weight in (("", "normal"), ("Bd", "bold")):
        pdfmetrics.registerFont(TTFont(FONT + style, f"{FONT}{style}.ttf"))
        register_font(FONT, weight=weight, rlgFontName=FONT + style)
    drawing = svg2rlg(io.BytesIO(text.encode()))
    if drawing is None:
        raise StudyError("svglib cannot read a figure; write the figures as svg and report this")
    return renderPDF.drawToString(drawing)
