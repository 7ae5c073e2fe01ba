"""Subspaces in closed form. Oracles: planted spaces, numpy's SVD, scikit-learn's PCA."""

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import deltune as dt
from deltune.errors import SubspaceError
from deltune.subspace import solutions as solutions_module
from deltune.subspace.linear import bound, correlated, drawn, principal
from deltune.subspace.solutions import Solutions, inner_products, unrelated
from deltune.subspace.space import Subspace
from deltune.vector import Layout
from zoo import ZOO

SIZES = {"adapter": 90, "lora": 130, "prefix": 70}
TASKS = tuple(f"task {i}" for i in range(12))


def planted(
    dimension: int, noise: float = 0.0, seed: int = 0
) -> tuple[Solutions, torch.Tensor, dict[str, torch.Tensor]]:
    """Solutions of known codes through known maps: (solutions, codes, maps)."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randn(len(TASKS), dimension, generator=draw, dtype=torch.float64)
    maps = {n: torch.randn(s, dimension, generator=draw).double() for n, s in SIZES.items()}
    rows = {
        name: codes @ up.T + noise * torch.randn(len(TASKS), len(up), generator=draw).double()
        for name, up in maps.items()
    }
    starts = {name: torch.randn(size, generator=draw).double() for name, size in SIZES.items()}
    return Solutions.of(TASKS, rows, starts), codes, maps


def angle(one: torch.Tensor, two: torch.Tensor) -> float:
    """Sine of the largest angle between the spaces of the columns."""
    q, r = torch.linalg.qr(one)[0], torch.linalg.qr(two)[0]
    return float(torch.linalg.matrix_norm(r - q @ (q.T @ r), 2))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_a_planted_space_is_recovered(dimension: int, seed: int, agree: bool) -> None:
    solutions, codes, maps = planted(dimension, seed=seed)
    space = correlated(solutions, dimension) if agree else principal(solutions, dimension)
    assert space.dimension == dimension and space.methods == tuple(SIZES)
    for name, rows in solutions.each():
        assert angle(maps[name], space.ups[name].project(torch.eye(dimension).double()).T) < 1e-6
        assert angle(codes, space.codes[name].double()) < 1e-5
        whole = space.decode(name, space.encode(name, rows))
        torch.testing.assert_close(whole - solutions.starts[name], rows, atol=1e-8, rtol=1e-8)
    for errors in space.reconstruction(solutions).values():
        assert errors.max() < 1e-9
    # One code for all methods: what one solution says, another's map can say.
    code = space.encode("lora", solutions.read["lora"]([3])[0])
    again = space.decode("prefix", code) - solutions.starts["prefix"]
    torch.testing.assert_close(again, solutions.read["prefix"]([3])[0], atol=1e-8, rtol=1e-8)


def test_one_method_alone_is_its_svd() -> None:
    rows = torch.randn(12, 200, dtype=torch.float64)
    solutions = Solutions.of(TASKS, {"lora": rows})
    for dimension in (1, 5, 11):
        space = principal(solutions, dimension)
        _, values, right = np.linalg.svd(rows.numpy())
        expected = np.sqrt((values[dimension:] ** 2).sum() / (values**2).sum())
        up = space.ups["lora"].project(torch.eye(dimension).double()).T
        assert angle(torch.from_numpy(right[:dimension].T), up) < 1e-7
        assert float(bound(solutions, dimension)["lora"]) == pytest.approx(expected, rel=1e-9)
        again = up @ space.encode("lora", rows).T
        assert float((rows.T - again).norm() / rows.norm()) == pytest.approx(expected, rel=1e-9)
        assert space.codes["lora"].square().mean(dim=0) == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.floats(0.01, 3), st.integers(0, 10**6))
def test_no_joint_space_is_below_the_bound(dimension: int, noise: float, seed: int) -> None:
    solutions, _, _ = planted(3, noise, seed)
    least = bound(solutions, dimension)
    for space in (principal(solutions, dimension), correlated(solutions, dimension)):
        for name, rows in solutions.each():
            again = space.ups[name].project(space.encode(name, rows))
            assert float((rows - again).norm() / rows.norm()) >= float(least[name]) * (1 - 1e-9)


def test_joint_components_are_those_of_the_stacked_solutions() -> None:
    """Each method weighed by one over its length, then one PCA without centring."""
    solutions, _, _ = planted(4, 0.5)
    stacked = torch.cat([rows / rows.norm() for _, rows in solutions.each()], dim=1)
    left = torch.linalg.svd(stacked, full_matrices=False)[0]
    space = principal(solutions, 4)
    assert angle(left[:, :4], space.codes["lora"].double()) < 1e-6
    for name, rows in solutions.each():
        fitted = torch.linalg.lstsq(space.codes["lora"].double(), rows).solution
        torch.testing.assert_close(
            space.ups[name].project(torch.eye(4).double()), fitted, atol=1e-6, rtol=1e-6
        )


def test_correlation_finds_what_methods_share_under_what_each_has_alone() -> None:
    """A shared code of two numbers, under a private one that is five times as long."""
    draw, rows = torch.Generator().manual_seed(0), {}
    shared = torch.randn(len(TASKS), 2, generator=draw).double()
    for name, size in SIZES.items():
        private = 5 * torch.randn(len(TASKS), 2, generator=draw).double()
        maps = torch.randn(4, size, generator=draw).double()
        rows[name] = torch.cat([shared, private], dim=1) @ maps
    solutions = Solutions.of(TASKS, rows)
    found = angle(shared, correlated(solutions, 2, ridge=1e-3).codes["lora"].double())
    assert found < 0.02 < 0.9 < angle(shared, principal(solutions, 2).codes["lora"].double())


@pytest.mark.parametrize("kind", ["dense", "fastfood"])
def test_random_maps_decode_to_the_length_of_the_solutions(kind: str) -> None:
    solutions, _, _ = planted(4, 1.0)
    solutions = Solutions.of(TASKS, {n: rows.float() for n, rows in solutions.each()})
    space = drawn(solutions, 6, seed=1, kind=kind)
    codes = torch.randn(4000, 6)
    for name, rows in solutions.each():
        lengths = (space.decode(name, codes) - solutions.starts[name]).square().sum(dim=1).mean()
        assert float(lengths) == pytest.approx(float(rows.square().sum(dim=1).mean()), rel=0.1)
        code = torch.randn(3, 6)
        again = space.encode(name, space.decode(name, code) - solutions.starts[name])
        nearest = torch.linalg.lstsq(space.ups[name].project(torch.eye(6)).T, rows.T).solution.T
        torch.testing.assert_close(space.codes[name], nearest, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(again, code, atol=1e-4, rtol=1e-4)
    other = drawn(solutions, 6, seed=2, kind=kind)
    assert not torch.allclose(other.decode("lora", codes[0]), space.decode("lora", codes[0]))
    again = drawn(solutions, 6, seed=1, kind=kind)
    assert torch.equal(again.decode("lora", codes[0]), space.decode("lora", codes[0]))


def test_gradients_reach_the_code() -> None:
    solutions, _, _ = planted(3)
    space = principal(solutions, 3)
    code = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: space.decode("adapter", c).sin(), (code,))
    rows = solutions.read["adapter"]([0])[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: space.encode("adapter", x).sin(), (rows,))


def test_inner_products_in_blocks() -> None:
    rows, other = torch.randn(5, 1000), torch.randn(3, 1000)
    expected = rows.double() @ rows.double().T
    torch.testing.assert_close(inner_products(rows, rows, columns=7), expected)
    expected = rows.double() @ other.double().T
    torch.testing.assert_close(inner_products(rows, other, columns=7), expected)


@pytest.mark.parametrize("block", [1, 260, 700, 10**9])
def test_solutions_are_read_in_blocks_and_give_the_same(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that knows which of its rows are alive: of twelve solutions of up to 130 numbers two
    blocks are the most, one where no pairs are wanted, and the results are those of all at once."""
    solutions, _, _ = planted(4, 0.5)
    alive = most = 0

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(read: Any, chosen: Any) -> torch.Tensor:
        nonlocal alive, most
        rows = read(chosen).clone()
        alive, most = alive + rows.numel(), max(most, alive + rows.numel())
        weakref.finalize(rows, gone, rows.numel())
        return rows

    wrapped = {name: partial(counted, read) for name, read in solutions.read.items()}
    streamed = dataclasses.replace(solutions, read=wrapped)
    held = max(max(n, min(block // n, 12) * n) for n in SIZES.values())

    def peak(work: Callable[[Solutions], Any]) -> tuple[Any, Any, int]:
        nonlocal most
        whole, most = work(solutions), 0
        with monkeypatch.context() as patch:
            patch.setattr(solutions_module, "BLOCK", block)
            found = work(streamed)
        assert alive == 0
        return whole, found, most

    def same(one: Any, two: Any) -> None:
        for name in SIZES:
            torch.testing.assert_close(two[name], one[name], atol=1e-12, rtol=1e-12)

    whole, found, numbers = peak(lambda given: given.grams)
    same(whole, found)
    assert numbers <= 2 * held
    known, again, numbers = peak(lambda given: principal(given, 4))
    assert numbers <= 2 * held
    same(*({n: up.weight for n, up in space.ups.items()} for space in (known, again)))
    whole, found, numbers = peak(known.reconstruction)
    same(whole, found)
    assert numbers <= 2 * held
    known, again, numbers = peak(lambda given: drawn(given, 5, seed=1))
    same(known.codes, again.codes)
    assert numbers <= 2 * held


def saved(folder: Path, spec: str, seed: int = 0, arch: str = "bert") -> Path:
    """A delta of a tiny model, of values drawn by the seed, or untouched at seed 0."""
    model = ZOO[arch].build(0)
    delta = dt.attach(model, spec, seed=0, head=False)
    if seed:
        draw = torch.Generator().manual_seed(seed)
        delta.load_vector(delta.vector() + torch.randn(delta.layout.size, generator=draw))
    delta.save(folder)
    return folder


def test_solutions_of_saved_deltas(tmp_path: Path) -> None:
    specs = {"LoRA": "lora(rank=2)", "BitFit": "bitfit"}
    folders = {
        name: {f"t{i}": saved(tmp_path / name / f"{i}", spec, i) for i in (1, 2, 3)}
        for name, spec in specs.items()
    }
    starts = {name: saved(tmp_path / name / "start", spec) for name, spec in specs.items()}
    solutions = Solutions.saved(folders, starts)
    assert solutions.tasks == ("t1", "t2", "t3") and solutions.methods == ("LoRA", "BitFit")
    for name, spec in specs.items():
        delta = dt.attach(ZOO["bert"].build(0), spec, seed=0, head=False)
        assert torch.equal(solutions.starts[name], delta.vector())
        rows = solutions.read[name](range(3))
        for row, seed in zip(rows, (1, 2, 3), strict=True):
            draw = torch.Generator().manual_seed(seed)
            expected = torch.randn(delta.layout.size, generator=draw)
            torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-6)
    space: Subspace = principal(solutions, 2)
    delta.load_vector(space.decode("BitFit", space.codes["BitFit"][0]))


def test_solutions_that_span_no_common_space_are_named(tmp_path: Path) -> None:
    good = {f"t{i}": saved(tmp_path / f"{i}", "lora(rank=2)", i) for i in (1, 2)}
    start = saved(tmp_path / "start", "lora(rank=2)")
    other = saved(tmp_path / "other", "lora(rank=4)", 3)
    away = saved(tmp_path / "away", "lora(rank=2)", 3, arch="roberta")
    bits = {name: saved(tmp_path / f"b{name}", "bitfit", 1) for name in ("t1", "t9")}
    zero = saved(tmp_path / "zero", "bitfit")
    for folders, starts, words in (
        (
            {"A": {**good, "t3": other}},
            {"A": start},
            "the spec of `t3` .* is not that of the others",
        ),
        ({"A": {**good, "t3": away}}, {"A": start}, "`t3` was trained on RobertaFor"),
        ({"A": good, "B": bits}, {"A": start, "B": zero}, "`B` has not the tasks .* `t2`, `t9`"),
        ({"A": {}}, {"A": start}, "there are no solutions"),
        ({}, {}, "there are no solutions"),
    ):
        with pytest.raises(SubspaceError, match=words):
            Solutions.saved(folders, starts)


def moved(folder: Path, seed: int, begun: int = 0, by: float = 0.3) -> Path:
    """A LoRA of a tiny model that began as drawn by `begun` and went `by` a deviation of that in
    all directions."""
    spec = "lora(rank=16, where='attn, ffn')"
    delta = dt.attach(ZOO["bert"].build(0), spec, seed=begun, head=False)
    vector = delta.vector()
    draw = torch.Generator().manual_seed(seed)
    step = torch.randn(len(vector), generator=draw) * vector[vector != 0].std()
    delta.load_vector(vector + by * step)
    return delta.save(folder)


def broken(folder: Path, how: str) -> Path:
    """A solution with which something is wrong."""
    if how == "another start":
        return moved(folder, 2, begun=1)
    moved(folder, 2)
    file = folder / "delta.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[3] = torch.nan
        save_file(tensors, file)
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [("truncated", "cannot be read: .* truncated"), ("not finite", "cannot be read: .* not finite"),
     ("another start", "was not trained from the start of the others")],
)  # fmt: skip
def test_a_bad_solution_in_the_middle_is_named_and_the_rest_is_a_space(
    how: str, words: str, tmp_path: Path
) -> None:
    places = {f"t{i}": moved(tmp_path / f"{i}", i) for i in (1, 3, 4)}
    bad = broken(tmp_path / "2", how)
    whole = {"t1": places["t1"], "t2": bad, "t3": places["t3"], "t4": places["t4"]}
    start = {"A": moved(tmp_path / "start", 0, by=0.0)}
    solutions = Solutions.saved({"A": whole}, start)
    with pytest.raises(SubspaceError, match=f"`t2` by `A` .*{words}.*leave the task out"):
        principal(solutions, 2)
    rest, alone = principal(solutions.without("t2"), 2), Solutions.saved({"A": places}, start)
    assert rest.tasks == ("t1", "t3", "t4")
    expected, code = principal(alone, 2), torch.tensor([0.3, -0.4])
    assert torch.equal(rest.decode("A", code), expected.decode("A", code))
    for tasks, said in ((("t5",), "no task `t5`"), (("t1", "t2", "t3", "t4"), "no task would be")):
        with pytest.raises(SubspaceError, match=said):
            solutions.without(*tasks)


def test_how_far_a_solution_may_go_from_its_start() -> None:
    """z of independent numbers has deviation 1; a move of k deviations leaves sqrt(n / (1 + k^2))
    of it, so that of 4096 numbers fifteen are too many and eight are not."""
    draw = torch.Generator().manual_seed(0)
    layout = Layout.of({"A": (64, 64), "U": (64, 64), "scale": (64,)})
    start = torch.randn(layout.size, generator=draw)
    start[4096:8192], start[8192:] = 0.0, 1.0  # no random numbers
    step = torch.randn(layout.size, generator=draw)
    assert not unrelated(start + 8 * step, start, layout)
    assert unrelated(start + 100 * step, start, layout)
    assert unrelated(step, start, layout) and not unrelated(start, start, layout)
    few = Layout.of({"A": (31, 33), "rest": (layout.size - 31 * 33,)})
    start[31 * 33 :] = 0.0
    assert not unrelated(step, start, few)  # 1023 numbers say nothing


def test_what_no_space_can_be_is_refused() -> None:
    solutions, _, _ = planted(3)
    space, one = principal(solutions, 3), solutions.without(*solutions.tasks[1:])
    still = Solutions.of(TASKS[:2], {"a": torch.ones(2, 5), "b": torch.zeros(2, 5)})
    for work, words in (
        (lambda: principal(solutions, 4), "dimension is 4 and 12 tasks' solutions span 3"),
        (lambda: principal(solutions, 0), "choose 1 to 3"),
        (lambda: principal(one, 2), "dimension is 2 and 1 tasks' solutions span 1; choose 1 to 1"),
        (lambda: correlated(one, 2), "dimension is 2 and 1 tasks' solutions span 1"),
        (lambda: correlated(solutions, 3, ridge=0), "ridge is 0"),
        (lambda: drawn(solutions, 3, kind="sparse"), "choose one of dense, fastfood"),
        (lambda: drawn(solutions, 71), "is 71 and a solution of `prefix` has 70 .*choose 1 to 70"),
        (lambda: drawn(solutions, 0), "dimension is 0"),
        (lambda: space.decode("lorra", torch.zeros(3)), "no method `lorra` .did you mean `lora`"),
        (lambda: space.decode("lora", torch.zeros(4)), "4 numbers and the space 3"),
        (lambda: space.encode("lora", torch.zeros(4)), "4 numbers and `lora` 130"),
        (lambda: Solutions.of(TASKS[:2], {"a": torch.ones(3, 5)}), "one row for each task"),
        (lambda: Solutions.of(TASKS[:1], {"a": torch.tensor([[torch.nan]])}), "not finite"),
        (lambda: Solutions.of((), {}), "there are no solutions"),
        (lambda: principal(still, 1), "every solution of `b` is its start"),
        (lambda: correlated(still, 1), "every solution of `b` is its start"),
        (lambda: drawn(still, 1), "every solution of `b` is its start"),
        (lambda: bound(still, 1), "every solution of `b` is its start"),
    ):
        with pytest.raises(SubspaceError, match=words):
            work()
