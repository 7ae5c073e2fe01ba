"""Intrinsic dimension. Oracles: the published toy problem of ten constraints, curves by hand."""

import dataclasses
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

import deltune as dt
import study_fakes as fakes
from deltune.errors import SubspaceError
from deltune.study.page.dimension import dimension
from deltune.study.plan import write_plan
from deltune.study.records import write_record
from deltune.study.report import render
from deltune.study.state import State
from deltune.study.summary import tables
from deltune.subspace.dimension import Crossing, crossing

SIZE, CONSTRAINTS = 1000, 10


def performance(dimension: int, projection: str, seed: int, scope: str) -> float:
    """exp(-loss) at the best point of a random subspace of 1000 numbers, of which each block of a
    hundred has to sum to 1, 2, ..., 10: Li et al. 2018, arXiv:1804.08838, section 2."""
    model = nn.Sequential(nn.Linear(SIZE, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.zero_()
    map_ = f"projection='{projection}', seed={seed}, scope='{scope}'"
    delta = dt.attach(model, f"intrinsic(dimension={dimension}, variant='did', {map_})")
    blocks = torch.eye(CONSTRAINTS).repeat_interleave(SIZE // CONSTRAINTS, dim=1).double()
    wanted = torch.arange(1.0, CONSTRAINTS + 1).double()

    def sums(v: torch.Tensor) -> torch.Tensor:
        return delta.call(v, input=blocks)[:, 0]

    start = delta.vector()
    slopes = torch.autograd.functional.jacobian(sums, start)
    best = torch.linalg.lstsq(slopes, wanted[:, None].to(slopes.dtype)).solution[:, 0]
    return math.exp(-float((sums(start + best) - wanted).square().sum()))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("projection", ["dense", "fastfood", "sparse"])
def test_the_toy_problem_has_ten_dimensions(projection: str, scope: str) -> None:
    scores = {
        d: statistics.mean(performance(d, projection, seed, scope) for seed in range(5))
        for d in (1, 5, 8, 9, 10, 11, 20)
    }
    assert crossing(scores, full=1.0).first == CONSTRAINTS
    assert scores[9] < 0.9 and all(scores[d] == pytest.approx(1) for d in (10, 11, 20))


def test_the_crossing_is_the_first_that_reaches_it() -> None:
    scores = {1000: 0.9, 10: 0.5, 100: 0.7, 5000: 0.6}
    found = crossing(scores, full=0.9)
    assert found.first == 1000
    assert found.between == pytest.approx(100 * 10 ** ((0.81 - 0.7) / 0.2))
    assert crossing({10: 0.9, 100: 0.7}, full=0.9) == Crossing(10, None)
    assert crossing({10: 0.1, 100: 0.7}, full=0.9) == Crossing(None, None)
    assert crossing({10: 0.1, 100: 0.7}, full=0.9, share=0.7).first == 100
    above = crossing(scores, full=0.9, chance=0.5)  # 0.5 + 0.9 * 0.4 = 0.86
    assert above.first == 1000
    assert above.between == pytest.approx(100 * 10 ** ((0.86 - 0.7) / 0.2))
    assert crossing(scores, full=0.7, chance=0.6).first == 100  # and not 10, which is at 0.5
    assert crossing({0: 0.82, 10: 0.7}, full=0.9) == Crossing(0, None)  # nothing need move
    assert crossing({0: 0.8, 10: 0.81}, full=0.9) == Crossing(10, None)  # log 0 has no between
    for scores, full, chance in (({}, 0.9, 0.0), ({10: 0.1}, 0.0, 0.0), ({10: 0.1}, 0.5, 0.5)):
        with pytest.raises(SubspaceError, match=f"one dimension and a metric above {chance:g}"):
            crossing(scores, full, chance=chance)


def test_the_report_draws_the_curves_and_names_their_crossings(tmp_path: Path) -> None:
    scores = {10: 0.5, 100: 0.7, 1000: 0.9}
    made = {"Full": ({"kind": "full"}, 0.9), "Head": ({"kind": "head"}, 0.55)}
    for variant, scope, offset in (
        ("did", "tensor", 0.0), ("said", "tensor", -0.15), ("did", "global", 0.0)
    ):  # fmt: skip
        for d, score in scores.items():
            spec = {"kind": "intrinsic", "dimension": d, "variant": variant}
            spec |= {"projection": "fastfood", "where": "", "scope": scope}
            if d == 100:  # with a rate of its own for the head
                spec = {"kind": "sum", "parts": [spec, {"kind": "head", "rate": 3.0}]}
            name = f"{variant} {d}" if scope == "tensor" else f"global {d}"
            made[name] = spec, score + offset
    methods = [
        dataclasses.replace(fakes.make_method(name, spec["kind"]), spec=spec)
        for name, (spec, _) in made.items()
    ]
    for test, head, d90, above, said in (
        (4000, 0.55, r"1000 \(355\)", r"1000 \(631\)", "more than 1000"),  # 0.5 + 0.9 * 0.4 = 0.86
        (4000, 0.84, "0", r"1000 \(631\)", "more than 1000"),
        (6, 0.55, r"1000 \(355\)", "–", "–"),  # of six examples 0.9 is guessing two labels
    ):
        plan = fakes.make_plan(methods, (0,))
        (model,) = plan.models
        plan = dataclasses.replace(
            plan,
            tasks=tuple(dataclasses.replace(one, chance=0.5, test=test) for one in plan.tasks),
            models=(model, dataclasses.replace(model, name=f"{model.name}, random")),
        )
        state = State(plan, tmp_path / f"{test}-{head}")
        for cell in state.cells:
            (run,) = state.finals(cell)
            score = head if cell.method == "Head" else made[cell.method][1]
            record = fakes.make_record(run, fakes.make_result(score))
            state.add(record)
            write_record(state.folder, record)
        page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", dimension(tables(state))))
        ends = rf"0\.900 {head:.3f} 0\.900"
        for directions in ("DID, fastfood", "DID, fastfood, global"):
            assert len(re.findall(rf"{directions} {d90} {above} {ends}", page)) == 2
        first = "0" if d90 == "0" else "more than 1000"
        assert re.search(rf"SAID, fastfood {first} {said} 0\.900 {head:.3f} 0\.750", page)
        write_plan(plan, state.folder)
        report = state.folder / "report.html"
        report.write_text(render(state))
        right = fakes.rechecked(state.folder)
        assert right.returncode == 0, right.stderr
        report.write_text(report.read_text().replace(f'data-v="{head}"', 'data-v="0.56"'))
        assert "DID, fastfood: head only: 0.56" in fakes.rechecked(state.folder).stderr
    few = [method for method in methods if method.name in ("Full", "did 10", "said 10")]
    alone = State(fakes.make_plan(few, (0,)), tmp_path)
    assert dimension(tables(alone)) == ""  # one dimension is no curve
