"""Ways of merging. Oracles: PEFT's merge_utils, the formulas written out, `torch.linalg.lstsq`,
autograd on the dense weight, toys whose best weights are known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import MergeError
from deltune.merging import Recipe, fishers, grams, greedy_soup, merge, search_weights
from deltune.merging.recipe import RECIPES
from test_merging import changes, drawn, plain, saved
from zoo import ZOO

LORA = "lora(rank=2, where='0')"


def vectors(count: int = 3, size: int = 60) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
def test_pruning_and_ties_are_peft_s(density: float) -> None:
    theirs: Any = pytest.importorskip("peft.utils.merge_utils")
    some, ones = vectors(), torch.ones(3, dtype=torch.float64)
    ties = replace(RECIPES["ties"], density=density)
    torch.testing.assert_close(ties.blend(some, [1.0] * 3), theirs.ties(some, ones, density))
    counted = replace(ties, consensus="count")
    wanted = theirs.ties(some, ones, density, "frequency")
    torch.testing.assert_close(counted.blend(some, [1.0] * 3), wanted)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    pruned = replace(RECIPES["magnitude"], density=density)
    wanted = theirs.magnitude_prune(some, weights, density)
    torch.testing.assert_close(pruned.blend(some, weights.tolist()), wanted)


def test_ties_by_its_definition_with_weights() -> None:
    """Weighted before the election; the mean of those that agree is weighted too."""
    a, b, c = vectors()
    weights, found = (0.5, 1.0, 2.0), []
    for i in range(len(a)):
        kept = []
        for one, w in zip((a, b, c), weights, strict=True):
            rank = int((one.abs() > one[i].abs()).sum())
            kept.append((w, w * float(one[i]) if rank < 12 else 0.0))
        sign = 1.0 if sum(v for _, v in kept) >= 0 else -1.0
        agree = [(w, v) for w, v in kept if v * sign > 0]
        found.append(sum(v for _, v in agree) / sum(w for w, _ in agree) if agree else 0.0)
    ties = RECIPES["ties"].blend([a, b, c], weights)
    torch.testing.assert_close(ties, torch.tensor(found, dtype=torch.float64))
    assert not ties.eq(RECIPES["ties"].blend([a, b, c], [1.0] * 3)).all()


def test_dare_is_right_on_average_also_of_a_few_large_entries() -> None:
    """With 1 / p; matching the sum of absolute values takes from the large entries what it gives
    to the small ones."""
    heavy = torch.distributions.StudentT(1.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        change = heavy.sample((64,)).double()
    large, times = change.abs().topk(4).indices, 3000
    dare = replace(RECIPES["dare"], density=0.2)
    biased = replace(dare, rescale="norm")
    seen = torch.stack([dare.blend([change], [1.0], seed) for seed in range(times)])
    assert set((seen[:, 0] / change[0]).round(decimals=6).tolist()) == {0.0, 5.0}
    deviation = (0.8 / 0.2 / times) ** 0.5  # of the mean of a scaled Bernoulli variable
    assert ((seen.mean(0) / change - 1.0).abs() < 4.5 * deviation).all()
    wrong = torch.stack([biased.blend([change], [1.0], seed) for seed in range(times)]).mean(0)
    assert (wrong / change)[large[0]] < 1.0 - 4.5 * deviation
    again = [dare.blend([change, change], [0.5, 0.5], 1, place) for place in ("a", "a", "b")]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_breadcrumbs_leave_the_middle_also_of_small_tensors() -> None:
    (large,) = vectors(1, 1000)
    order = large.abs().argsort(descending=True)
    found = Recipe("outliers", density=0.3, gamma=0.02).blend([large], [1.0])
    wanted = torch.zeros_like(large).index_copy(0, order[20:320], large[order[20:320]])
    torch.testing.assert_close(found, wanted)
    (bias,) = vectors(1, 64)
    kept = RECIPES["breadcrumbs"].blend([bias], [1.0])
    assert int((kept != 0).sum()) == 57 and kept.abs().max() == bias.abs().max()
    three = torch.tensor([1.0, -2.0, 3.0])
    assert RECIPES["ties"].blend([three], [1.0]).tolist() == [0.0, 0.0, 3.0]
    assert RECIPES["breadcrumbs"].blend([three[:1]], [1.0]).tolist() == [1.0]


def test_a_recipe_on_deltas_is_that_of_each_dense_change(tmp_path: Path) -> None:
    """One matrix after another; kept as entries, or at a rank by its singular values."""
    model, weights = ZOO["gpt2"].build(0).double(), [0.5, -0.25]
    folders = saved(model, ["lora(rank=2, where='attn.q, ffn.up') + norms"] * 2, tmp_path)
    each = [changes(model, folder) for folder in folders]
    for how, name in (("ties", "shira"), (Recipe("random", 0.5, rescale="density"), "shira")):
        merged = merge(folders, how, weights, seed=3)
        assert f"{name}(" in str(merged.spec) and merged.error == 0.0
        found = changes(model, merged, tmp_path / f"{how}")
        recipe = RECIPES[how] if isinstance(how, str) else how
        for key, change in found.items():
            fused = key.endswith("c_attn.weight")
            pair = [(one[key].mT if key.endswith("c_fc.weight") else one[key]) for one in each]
            pair = [change[:, :16].mT if fused else change for change in pair]
            path, _, own = key.rpartition(".")
            place = f"{path}.q" if fused else path if "c_fc" in path else f"{path}.{own}"
            wanted = recipe.blend(pair, weights, 3, place)
            ours = change[:, :16].mT if fused else change.mT if "c_fc" in path else change
            torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)
    short = merge(folders, "ties", weights, rank=3)
    assert "lora(" in str(short.spec) and "rank=3" in str(short.spec) and short.error > 0.1
    near, whole = (changes(model, merge(folders, "ties", weights, rank=r), tmp_path / f"r{r}")
                   for r in (3, 16))  # fmt: skip
    for key in whole:
        if "c_fc" in key:
            u, s, vh = torch.linalg.svd(whole[key])
            torch.testing.assert_close(near[key], u[:, :3] * s[:3] @ vh[:3], atol=1e-10, rtol=0)


@pytest.mark.parametrize("spec", ["c3a(block=1, where='0')", LORA])
def test_the_factor_of_a_recipe_is_on_the_result_of_every_method(spec: str, tmp_path: Path) -> None:
    """Also where tensors are summed as they are, and times the factor that `merge` is given."""
    model, recipe = plain(7, 5), Recipe(factor=0.5)
    folders = saved(model, [spec, spec], tmp_path)
    a, b = (changes(model, folder)["0.weight"] for folder in folders)
    for factor in (1.0, -3.0):
        merged = merge(folders, recipe, [1.0, 2.0], factor=factor)
        found = changes(model, merged, tmp_path / f"{factor}")["0.weight"]
        torch.testing.assert_close(found, factor * 0.5 * (a + 2.0 * b))


def test_slerp_goes_along_the_arc(tmp_path: Path) -> None:
    model, t = plain(7, 5), 0.3
    folders = saved(model, [LORA, LORA], tmp_path)
    merged = merge(folders, "slerp", [1 - t, t])
    assert "rank=4" in str(merged.spec)
    a, b = (changes(model, folder)["0.weight"] for folder in folders)
    angle = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    wanted = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    found = changes(model, merged, tmp_path / "arc")["0.weight"]
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    straight = merge([folders[0], folders[0]], "slerp", [0.5, 0.5])
    torch.testing.assert_close(changes(model, straight, tmp_path / "line")["0.weight"], a)
    turned = dt.load(folders[0], model)
    turned.scale = -turned.scale
    with pytest.raises(MergeError, match="opposite"):
        merge([folders[0], turned], "slerp")


def test_regmean_solves_the_least_squares_of_all_inputs(tmp_path: Path) -> None:
    """min_M sum_i w_i || X_i (M - T_i)^T ||^2, at the sum of the ranks, as lstsq solves it."""
    model, weights = plain(6, 4), (1.0, 3.0)
    folders = saved(model, [LORA, LORA], tmp_path)
    inputs = [rows.view(-1, 6) for rows in vectors(2, 90)]
    statistics = []
    for folder, rows in zip(folders, inputs, strict=True):
        delta = dt.load(folder, model)
        statistics.append(grams(delta, (model(part) for part in rows.view(3, 5, 6))))
        delta.detach()
    torch.testing.assert_close(statistics[0]["0"], inputs[0].T @ inputs[0])
    merged = merge(folders, "regmean", weights, statistics=statistics, mixing=1.0)
    assert "rank=4" in str(merged.spec)
    each = [changes(model, folder)["0.weight"] for folder in folders]
    rows = torch.cat([w**0.5 * x for w, x in zip(weights, inputs, strict=True)])
    wanted = torch.cat([w**0.5 * x @ t.T for w, x, t in zip(weights, inputs, each, strict=True)])
    best = torch.linalg.lstsq(rows, wanted).solution.T
    found = changes(model, merged, tmp_path / "best")["0.weight"]
    torch.testing.assert_close(found, best, atol=1e-12, rtol=1e-10)
    few = [{"0": inputs[0][:2].T @ inputs[0][:2]}] * 2
    with pytest.raises(MergeError, match="span less than the whole space"):
        merge(folders, "regmean", statistics=few, mixing=1.0)
    assert merge(folders, "regmean", statistics=few).error == 0.0
    mixed = [0.9 * g["0"] + 0.1 * torch.diag(g["0"].diag()) for g in statistics]
    wanted = sum(t @ g for t, g in zip(each, mixed, strict=True)) @ torch.linalg.inv(sum(mixed))  # type: ignore[arg-type]
    found = changes(model, merge(folders, "regmean", [1.0, 1.0], statistics=statistics),
                    tmp_path / "mixed")["0.weight"]  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


def test_fisher_weighs_each_entry_by_its_information(tmp_path: Path) -> None:
    """F_i by autograd on the dense weights of the merged model, example by example."""
    model, spec = ZOO["bert"].build(0).double(), "lora(rank=2, where='ffn.up') + bitfit"
    folders, statistics = saved(model, [spec, spec], tmp_path), []
    batch = ZOO["bert"].batch(0)
    examples = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    paths = [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]

    def losses() -> Any:
        return (model(**one).logits.log_softmax(-1)[0, 0] for one in examples)

    for folder in folders:
        delta = dt.load(folder, model)
        statistics.append(fishers(delta, losses()))
        delta.merge()
        wanted = {f"{path}.{own}": torch.zeros(()) for path in paths for own in ("weight", "bias")}
        for loss in losses_of(model, losses, wanted):
            for name, gradient in loss.items():
                wanted[name] = wanted[name] + gradient.square() / 3
        for path in paths:
            for name, key in ((f"{path}.weight", path), (f"{path}.bias", f"{path}.bias")):
                torch.testing.assert_close(statistics[-1][key], wanted[name], atol=1e-14, rtol=1e-6)
        delta.detach()
    merged = merge(folders, "fisher", [1.0, 2.0], statistics=statistics, keep_head=0)
    found = changes(model, merged, tmp_path / "merged")
    a, b = (changes(model, folder) for folder in folders)
    for path in paths:
        for name, key in ((f"{path}.weight", path), (f"{path}.bias", f"{path}.bias")):
            f, g = statistics[0][key], 2.0 * statistics[1][key]
            wanted_change = (f * a[name] + g * b[name]) / (f + g)
            torch.testing.assert_close(found[name], wanted_change, atol=1e-12, rtol=1e-9)


def losses_of(model: nn.Module, losses: Any, names: dict[str, Tensor]) -> Any:
    """The gradient of each loss to named parameters."""
    parameters = {name: model.get_parameter(name).requires_grad_() for name in names}
    for loss in losses():
        yield dict(zip(names, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    for parameter in parameters.values():
        parameter.requires_grad_(False)


def test_weights_are_found_without_gradients() -> None:
    """Of a quadratic loss the best weights are those that made its target; then the penalty."""
    model = plain(4, 3)
    rows, wanted = vectors(1, 40)[0].view(10, 4), (0.9, -0.4)
    pair = [drawn(model, "full", seed).disable() for seed in range(2)]
    pair[0].scale = 0.5
    before = model(rows)
    for delta, weight in zip(pair, wanted, strict=True):
        delta.enable().scale = delta.scale * weight
    target = model(rows).detach()
    pair[0].scale, pair[1].scale = 0.5, 1.0
    pair[1].disable()

    def loss() -> float:
        return float((model(rows) - target).square().mean())

    found = search_weights(pair, loss, penalty=0.0, steps=200)
    assert found.weights == pytest.approx(wanted, abs=0.02) and found.tried <= 200
    assert (pair[0].scale, pair[1].scale, pair[0].enabled, pair[1].enabled) == (
        0.5,
        1.0,
        True,
        False,
    )
    strict = search_weights(pair, loss, penalty=1e6, steps=30)
    assert strict.weights == (0.0, 0.0) and strict.tried <= 30
    assert strict.value == pytest.approx(float((before - target).square().mean()))
    with pytest.raises(MergeError, match="no finite number at any of"):
        search_weights(pair, lambda: float("nan"), steps=5)
    with pytest.raises(MergeError, match="`delta 0` is merged into the weights"):
        search_weights([pair[0].merge()], loss)


def test_a_greedy_soup_takes_what_does_not_score_lower(tmp_path: Path) -> None:
    """Errors +1, -1 and +5 of one value: the first two cancel out, the third does not help."""
    model = ZOO["bert"].build(0)
    deltas = [dt.attach(model, "bitfit", f"{i}") for i in range(3)]
    name = next(n for n in deltas[0].tensors() if n.startswith("head.") and n.endswith("bias"))
    with torch.no_grad():
        for delta, value in zip(deltas, (-1.2, 1.0, 5.0), strict=True):
            delta.load_tensors({n: torch.zeros_like(t) if n[:5] != "head." else torch.full_like(t, 
                value if n == name else 0.0) for n, t in delta.tensors().items()})  # fmt: skip
    states = [{n: t.clone() for n, t in delta.tensors().items()} for delta in deltas]
    batch, asked = ZOO["bert"].batch(0), []

    def score() -> float:
        asked.append(float(model(**batch).logits.mean()))
        return -abs(asked[-1])

    found = greedy_soup(deltas, score)
    assert found.members == (1, 0) and found.score == pytest.approx(-0.1, abs=1e-5)
    assert found.scores == pytest.approx((-1.2, -1.0, -5.0), abs=1e-5)
    assert asked == pytest.approx([-1.2, 1.0, 5.0, -0.1, 4.8 / 3], abs=1e-5)
    for delta, state in zip(deltas, states, strict=True):
        assert delta.enabled and all(torch.equal(t, state[n]) for n, t in delta.tensors().items())
    merged = merge([deltas[i] for i in found.members], keep_head="mean")
    for delta in deltas:
        delta.detach()
    dt.load(merged.save(tmp_path / "soup"), model)
    assert float(model(**batch).logits.detach().mean()) == pytest.approx(-0.1, abs=1e-5)
