"""Figures as files. Oracle: the report's own pictures, and svglib's reading of the PDF's source."""

import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import study_fakes as fakes
from deltune.errors import StudyError
from deltune.study.drawings import write_figures
from deltune.study.page.figures import slots
from deltune.study.page.svg import Canvas
from deltune.study.plan import write_plan
from deltune.study.report import page_template, write_report
from deltune.study.summary import tables
from test_study_report import RISING, TEST, fill

SVG = "{http://www.w3.org/2000/svg}"


def colours() -> dict[str, str]:
    """The palette of print, as the page states it."""
    return dict(re.findall(r"--(\w+):\s*(#\w+)", page_template().split("@media print")[1]))


def test_a_figure_is_a_document_of_its_own_in_the_page_s_colours(tmp_path: Path) -> None:
    (table,) = tables(fill(tmp_path))
    page = write_report(tmp_path).read_text()
    paths = write_figures(tmp_path, tmp_path / "svg", "svg")
    assert len(paths) == page.count("<figure>") and len({path.name for path in paths}) == len(paths)
    first = next(path for path in paths if "dev-metric-against-step" in path.name)
    root = ET.parse(first).getroot()
    assert "var(" not in first.read_text() and root.tag == f"{SVG}svg"
    palette, names = colours(), [row.name for row in table.rows]
    curves = [e for e in root.iter(f"{SVG}path") if "curve" in (e.get("class") or "")]
    for name, curve in zip(names, curves, strict=True):
        stroke = palette[f"s{slots(names)[name]}"]
        assert (curve.get("fill"), curve.get("stroke")) == ("none", stroke)
    dots = [e for e in root.iter(f"{SVG}circle") if "dashed" in (e.get("class") or "")]
    assert dots and {e.get("fill") for e in dots} == {palette["page"]}
    texts = [e.text for e in root.iter(f"{SVG}text")]
    assert {*TEST} <= set(texts) and not list(root.iter(f"{SVG}title"))


def test_a_heat_map_s_colours_are_mixed_as_the_page_mixes_them(tmp_path: Path) -> None:
    from deltune.study import drawings

    canvas = Canvas("heat")
    for value in (0.0, 0.5, 1.0):
        canvas.heat(0, 0, 10, value, "x", "y")
    rules, known = drawings._styles(page_template())
    root = ET.fromstring(drawings.standalone(canvas.render(), rules, known))
    got = [square.get("fill") for square in root.iter(f"{SVG}rect")]
    strong, weak = (
        [int(known[name][i : i + 2], 16) for i in (1, 3, 5)] if len(known[name]) == 7 else [255] * 3
        for name in ("accent", "card")
    )
    middle = [(a + b) / 2 for a, b in zip(strong, weak, strict=True)]
    half = [int((got[1] or "")[i : i + 2], 16) for i in (1, 3, 5)]
    assert got[0] == "#ffffff" and got[2] == known["accent"]
    assert half == pytest.approx(middle, abs=1)
    assert [e.get("fill") for e in root.iter(f"{SVG}text")] == [known["ink"]] * 2 + [known["page"]]


@pytest.mark.filterwarnings("ignore")
def test_a_pdf_has_the_points_and_embeds_its_font(tmp_path: Path) -> None:
    svglib = pytest.importorskip("svglib.svglib")
    from reportlab.graphics.shapes import Circle, Group

    fill(tmp_path)
    svg, pdf = (write_figures(tmp_path, tmp_path / form, form) for form in ("svg", "pdf"))
    assert [path.stem for path in svg] == [path.stem for path in pdf]
    for path in pdf:
        data = path.read_bytes()
        assert data.startswith(b"%PDF") and b"BitstreamVera" in data and b"/FontFile2" in data
    at = next(i for i, path in enumerate(svg) if "dev-metric-against-step" in path.name)

    def circles(group: Group) -> int:
        return sum(
            circles(one) if isinstance(one, Group) else isinstance(one, Circle)
            for one in group.contents
        )

    assert circles(svglib.svg2rlg(io.BytesIO(svg[at].read_bytes()))) == len(TEST) * len(RISING)


def test_nothing_to_draw_and_another_form_are_refused(tmp_path: Path) -> None:
    write_plan(fakes.make_plan([fakes.make_method("LoRA", "lora")]), tmp_path)
    with pytest.raises(StudyError, match="has no figures yet"):
        write_figures(tmp_path, tmp_path / "out")
    with pytest.raises(StudyError, match="cannot be written as `png`; choose one of svg, pdf"):
        write_figures(tmp_path, tmp_path / "out", "png")
    assert not (tmp_path / "out").exists()
