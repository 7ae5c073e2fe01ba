"""Planes, surveys and paths. Oracles: linear algebra, scores by hand, a surface that is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deltune as dt
from deltune.errors import SubspaceError
from deltune.subspace.landscape import Landscape, Plane, between, box, survey
from deltune.subspace.linear import principal
from deltune.subspace.solutions import Solutions
from deltune.tasks.objectives import objective_for
from tasks_toys import tokenizer
from test_subspace_tuning import SETTINGS, SPECS, solutions, solved
from test_tasks_matching import backbone, task

__all__ = ["solutions", "solved"]  # a fixture is found by its name here


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(0, 10**6))
def test_a_plane_goes_through_its_codes(dimension: int, seed: int) -> None:
    codes = torch.randn(3, dimension, generator=torch.Generator().manual_seed(seed)).double()
    plane = Plane.through(*codes)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2).double())
    for code in codes:
        torch.testing.assert_close(plane.code(*plane.place(code)), code, atol=1e-9, rtol=1e-9)
    assert plane.place(codes[0]) == pytest.approx((0, 0), abs=1e-9)
    assert plane.place(codes[1])[1] == pytest.approx(0, abs=1e-9)
    outside = torch.randn(dimension).double()
    rest = outside - plane.code(*plane.place(outside))
    assert (plane.axes @ rest).abs().max() < 1e-9


def test_three_codes_on_a_line_span_no_plane() -> None:
    one, two = torch.randn(2, 6)
    for three in (one, two, one + 3 * (two - one)):
        with pytest.raises(SubspaceError, match="lie on one line"):
            Plane.through(one, two, three)


def test_a_survey_is_the_score_of_each_decoded_point(solutions: Solutions) -> None:
    space, model, toy, tok = principal(solutions, 3), backbone(), task(), tokenizer("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plane = Plane.through(*space.codes["Bits"][:3])
    told: list[tuple[int, int]] = []
    found = survey(
        space, model, tok, toy, plane, {"Bits": 0.5, "LoRA": 0.25}, SETTINGS,
        within=(-9.0, 9.0, -4.0, 4.0), points=3, on_point=lambda *at: told.append(at),
    )  # fmt: skip
    assert found.xs.tolist() == [-9, 0, 9] and found.ys.tolist() == [-4, 0, 4]
    seen = set()
    for name in SPECS:
        delta = space.attach(model, name)
        for row, y in enumerate(found.ys.tolist()):
            for column, x in enumerate(found.xs.tolist()):
                delta.load_vector(space.decode(name, plane.code(x, y)))
                objective = objective_for(toy, model, tok)
                score = dt.evaluate(model, tok, toy, "test", objective=objective).value
                assert found.values[name][row, column] == pytest.approx(score)
                seen.add(score)
        delta.detach()
    assert len(seen) > 1 and told == [(i, 18) for i in range(1, 19)]
    assert torch.equal(found.relative("LoRA"), found.values["LoRA"] / 0.25)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_survey_that_was_stopped_goes_on(solutions: Solutions) -> None:
    space, model, toy, tok = principal(solutions, 3), backbone(), task(), tokenizer("bert")
    plane, begun, told = Plane.through(*space.codes["Bits"][:3]), {}, []

    def surveyed(scores: dict[str, list[float]] | None, stop: int = 0) -> Landscape:
        def on_point(done: int, total: int) -> None:
            told.append(done)
            if done == stop:
                raise KeyboardInterrupt

        return survey(
            space, model, tok, toy, plane, {"Bits": 0.5, "LoRA": 0.25}, SETTINGS,
            within=(-9.0, 9.0, -4.0, 4.0), points=3, on_point=on_point, begun=scores,
        )  # fmt: skip

    whole = surveyed(None)
    for stop in (4, 11):  # within the first method, within the second
        with pytest.raises(KeyboardInterrupt):
            surveyed(begun, stop)
    begun["Bits"][0] = 7.0  # what is there is taken as it is
    again = surveyed(begun)
    assert told[18:] == list(range(1, 19))
    assert again.values["Bits"][0, 0] == 7.0
    again.values["Bits"][0, 0] = whole.values["Bits"][0, 0]
    assert all(torch.equal(again.values[name], whole.values[name]) for name in SPECS)


def test_the_region_is_where_all_reach_their_share() -> None:
    """Discs of known radius around two points: the region is their lens."""
    xs = torch.linspace(-2, 2, 401)
    y, x = torch.meshgrid(xs, xs, indexing="ij")
    values = {
        "one": 2.0 - ((x - 0.5) ** 2 + y**2),
        "two": 4.0 - 2 * ((x + 0.5) ** 2 + y**2),
    }  # 90 % of 2 within 0.2 ** 0.5, of 4 within 0.2 ** 0.5 too
    plane = Plane(torch.zeros(2), torch.eye(2))
    land = Landscape(plane, xs, xs, values, {"one": 2.0, "two": 4.0})
    assert land.area(0.9) == 0.0  # discs of radius 0.447 around points 1 apart
    half = land.area(0.5)  # discs of radius 1, 1 apart: the lens has 2 pi / 3 - sqrt(3) / 2
    assert half == pytest.approx((2 * torch.pi / 3 - 3**0.5 / 2) / 16, rel=0.01)
    assert bool(land.region(0.5)[200, 200]) and not bool(land.region(0.5)[200, 370])


def test_paths_and_boxes() -> None:
    one, two = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    path = between(one, two, 5)
    assert torch.equal(path[0], one) and torch.equal(path[-1], two) and len(path) == 5
    torch.testing.assert_close(path[1], torch.tensor([0.25, 1.5]))
    assert box([(0, 0), (2, 0), (1, 1)], margin=0.5) == (-1.0, 3.0, -1.0, 2.0)


def test_grids_and_references_that_mean_nothing_are_refused(solutions: Solutions) -> None:
    space = principal(solutions, 2)
    plane = Plane(torch.zeros(2), torch.eye(2))
    whole = (space, backbone(), tokenizer("bert"), task(), plane)
    with pytest.raises(SubspaceError, match="a grid of 1 points"):
        survey(*whole, {"Bits": 1.0}, SETTINGS, within=(0, 1, 0, 1), points=1)
    with pytest.raises(SubspaceError, match="has no area"):
        survey(*whole, {"Bits": 1.0}, SETTINGS, within=(1, 1, 0, 1))
    with pytest.raises(SubspaceError, match="not above 0"):
        survey(*whole, {"Bits": 0.0}, SETTINGS, within=(0, 1, 0, 1))
