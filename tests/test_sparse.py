"""Sparse selections of the backbone's entries.

Oracles: the backbone itself with the changes written into its weights; sums of squared gradients
and their sorted order, computed on the model without any delta; `torch.optim.AdamW` on the model's
own parameters; `numpy.percentile`; counts from the papers.
"""

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainingArguments

import deltune as dt
from deltune.errors import AttachError, SpecError, TrainError, WhereError
from deltune.families.specification.sparse import sample
from deltune.mechanisms import sparse as mechanism
from deltune.training.callback import DeltaCallback
from deltune.training.course import Course
from deltune.training.events import Event, Step
from deltune.training.loop import train
from deltune.training.world import World
from shapes import meta_model
from snapshots import Snapshot, distance
from test_train_delta import Digits
from train_toy import Squares, linear, network, settings, toy_task
from zoo import ZOO, Case

BERT = ZOO["bert"]
TASK = toy_task(24, 10)
SPECS = [
    "sparse(count=60)",
    "fish(count=60, examples=10)",
    "child(share=0.4)",
    "child(mode='D', share=0.4)",
    "apet(budget=600, rank=2, width=3, backbone='entries')",
]
every_case = pytest.mark.parametrize("case", ZOO.values(), ids=list(ZOO))


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's parameters in model order, each once; without the task head."""
    return {n: p for n, p in model.named_parameters() if not n.startswith("classifier")}


def batches(case: Case, size: int = 1) -> list[dict[str, Tensor]]:
    """Pieces of a batch."""
    batch = case.batch(0)
    count = len(next(iter(batch.values())))
    return [
        {name: tensor[at : at + size] for name, tensor in batch.items()}
        for at in range(0, count, size)
    ]


def losses(case: Case, model: nn.Module, order: Sequence[int] = (0, 1, 2)) -> Callable[..., Any]:
    """What training gives a method to look at: mean squares of the outputs of single rows."""

    def look(most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        found = batches(case, size or 2)
        for at in [i for i in order if i < len(found)][:most]:
            model.train(training)
            yield case.output(model(**found[at])).square().mean()
            model.eval()

    return look


class Later:
    """Losses that are computed when they are asked for, as training computes them."""

    def __init__(self, loss: Callable[[], Tensor], times: int = 1) -> None:
        self.loss, self.times = loss, times

    def __call__(self, most: int, size: int | None = None, training: bool = True) -> Any:
        return (self.loss() for _ in range(self.times))


def squares(case: Case, model: nn.Module, parameters: Sequence[Tensor]) -> Tensor:
    """Sums of squared gradients of single rows, on the model without any delta, end to end."""
    total = torch.zeros(sum(p.numel() for p in parameters))
    for loss in losses(case, model)(3, size=1, training=False):
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        total += torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]
        ).square()
    return total


def prepared(case: Case, text: str, order: Sequence[int] = (0, 1, 2)) -> dt.Delta:
    delta = dt.attach(case.build(0), text, seed=0)
    with Course(delta.model) as course:
        course.prepare(losses(case, delta.model, order))
    return delta


def index_of(delta: dt.Delta) -> Tensor:
    return next(t for n, t in delta.tensors().items() if n.endswith("shared:all.index"))


def values_of(delta: dt.Delta) -> nn.Parameter:
    return next(p for n, p in delta.tree.named().items() if n.endswith("shared:all.values"))


# --- the mechanism ------------------------------------------------------------------------------


@every_case
def test_values_act_at_their_positions_and_take_the_gradient_there(case: Case) -> None:
    delta = dt.attach(case.build(0), "sparse(density=0.1)", seed=0, head=False)
    delta.load_vector(0.1 * torch.randn(delta.count(), generator=torch.Generator().manual_seed(0)))
    twin, index = case.build(0).requires_grad_(True), index_of(delta).long()
    chosen = [twin.get_parameter(_name(unit.site)) for unit in delta.tree.units]
    whole = torch.cat([p.detach().flatten() for p in chosen])
    whole[index] += delta.vector()
    with torch.no_grad():
        for p, part in zip(chosen, whole.split([p.numel() for p in chosen]), strict=True):
            p.copy_(part.view_as(p))
    acting, expected = case.run(delta.model), case.run(twin)
    assert distance(acting, expected) <= 1e-6
    acting.square().mean().backward()
    found = torch.autograd.grad(expected.square().mean(), chosen, allow_unused=True)
    pairs = zip(found, chosen, strict=True)
    joined = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    assert distance(values_of(delta).grad, joined[index]) <= 1e-5


def test_forwards_before_one_backward_and_calls_beside_the_root() -> None:
    delta = dt.attach(BERT.build(0), "sparse(density=0.1)", seed=0, head=False)
    model, values = delta.model, values_of(delta)
    delta.load_vector(delta.vector() + 0.1)
    grads = []
    for use in (lambda seed: model.bert(**BERT.batch(seed)), lambda seed: model(
        **BERT.batch(seed), output_hidden_states=True
    )):  # fmt: skip
        outputs = [use(seed) for seed in (0, 1)]
        states = [
            output.hidden_states[-1] if output.get("hidden_states") else output.last_hidden_state
            for output in outputs
        ]
        values.grad = None
        torch.stack(states).square().mean().backward()
        grads.append(values.grad)
    assert distance(*grads) <= 1e-6


def test_a_failed_forward_leaves_nothing_behind() -> None:
    delta = dt.attach(BERT.build(0), "sparse(density=0.1)", seed=0, head=False)
    with pytest.raises(Exception, match="index out of range"):
        delta.model(input_ids=torch.tensor([[10_000]]))
    assert all(unit.shared.book.open is None for unit in delta.tree.units)


def test_a_model_without_values_takes_the_delta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    assert dt.attach(model, "sparse(count=3)").count() == 3
    assert "not chosen" in repr(dt.attach(model, "fish(count=3)", "second"))


def _name(site: Any) -> str:
    return f"{site.path}.{site.param}".lstrip(".")


def test_all_of_the_backbone_is_chosen_from_in_model_order() -> None:
    delta = dt.attach(BERT.build(0), "sparse(count=1)", seed=0)
    names = [_name(unit.site) for unit in delta.tree.units if unit.spec.kind == "sparse"]
    assert names == list(own(BERT.build(0)))
    total = sum(p.numel() for p in own(BERT.build(0)).values())
    assert {unit.site.segment.total for unit in delta.tree.units if unit.site.segment} == {total}


@pytest.mark.parametrize("name", ["gpt2", "t5", "albert"])
def test_a_tied_parameter_is_chosen_from_once(name: str) -> None:
    model = ZOO[name].build(0)
    once = sum(p.numel() for n, p in own(model).items())
    assert dt.plan(model, "sparse(density=1.0)", head=False).count() == once


@pytest.mark.parametrize(("total", "count"), [(5, 1), (5, 2), (5, 4), (32, 1), (32, 2), (48, 2)])
def test_every_set_of_entries_is_equally_likely(total: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sets = list(combinations(range(total), count))
    expected = 20
    draws = expected * len(sets)
    drawn = (sample(total, count, torch.device("cpu"), generator).tolist() for _ in range(draws))
    seen = Counter(map(tuple, drawn))
    assert set(seen) <= set(sets)
    chi_squared = sum((seen[one] - expected) ** 2 / expected for one in sets)
    freedom = len(sets) - 1
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("count", [1, 17, 62, 63, 500, 999, 1000])
def test_a_sample_has_the_exact_size_and_no_repeats(count: int) -> None:
    drawn = sample(1000, count, torch.device("cpu"), None)
    assert len(drawn) == count
    assert bool((drawn[1:] > drawn[:-1]).all()) and int(drawn[0]) >= 0 and int(drawn[-1]) < 1000


def test_the_seed_of_attach_draws_the_entries() -> None:
    one, two, other = (dt.attach(BERT.build(0), "sparse(count=50)", seed=s) for s in (0, 0, 1))
    assert torch.equal(index_of(one), index_of(two))
    assert not torch.equal(index_of(one), index_of(other))


def test_counts() -> None:
    bert = meta_model("bert-base")
    assert dt.plan(bert, "sparse(count=100000)").count() == 100_000  # the control of BitFit
    assert dt.plan(bert, "sparse(density=0.005)").count() == 547_411  # int(0.005 * 109,482,240)
    assert dt.plan(bert, "sparse").count() == 547_411
    assert dt.plan(bert, "sparse(density=1.0, where='attn.q')").count() == 12 * (768 * 768 + 768)
    assert dt.plan(bert, "sparse(density=1.0)[4:6]").count() == 2 * 7_087_872


def test_the_index_has_four_bytes_an_entry_until_eight_are_needed(tmp_path: Path) -> None:
    delta = dt.attach(BERT.build(0), "sparse(count=50)", head=False)
    stored = load_file(delta.save(tmp_path / "delta") / "delta.safetensors")
    assert {n.rpartition(".")[2]: (t.dtype, t.numel()) for n, t in stored.items()} == {
        "values": (torch.float32, 50), "index": (torch.int32, 50),
    }  # fmt: skip
    with torch.device("meta"):
        wide = nn.Sequential(nn.Linear(2**16, 2**15, bias=False))
        below = nn.Sequential(nn.Linear(2**16 - 1, 2**15, bias=False))
    kinds = [
        dict(dt.plan(model, "sparse(count=5)").params())["sparse.shared:all.index"].dtype
        for model in (wide, below)
    ]
    assert kinds == [torch.int64, torch.int32]


def test_a_bfloat16_backbone_gets_float32_values() -> None:
    delta = dt.attach(BERT.build(0).bfloat16(), "sparse(count=50)", seed=0)
    assert values_of(delta).dtype == torch.float32
    delta.load_vector(delta.vector() + 0.1)
    acting = BERT.run(delta.model)
    assert acting.dtype == torch.bfloat16
    assert torch.equal(BERT.run(delta.merge().model), acting)


@pytest.mark.parametrize("text", ["sparse(count=60)", "fish(count=60)", "child(mode='D')"])
def test_entries_that_are_not_selected_stay_bit_for_bit_under_weight_decay(text: str) -> None:
    delta, before = prepared(BERT, text), own(BERT.build(0))
    model = delta.model.train()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    with Course(model) as course:
        for step in range(3):
            course.before_step(step, 3)
            BERT.run(model, step).square().mean().backward()
            course.after_backward()
            optimizer.step()
            optimizer.zero_grad()
    delta.merge()
    masked = [unit.site for unit in delta.tree.units if unit.site.segment]
    after, start = own(model), torch.cat([before[_name(s)].flatten() for s in masked])
    moved = (torch.cat([after[_name(s)].flatten() for s in masked]) != start).nonzero().flatten()
    assert len(moved) > 10 and set(moved.tolist()) <= set(index_of(delta).tolist())


def test_what_is_written_to_the_index_is_seen_at_once(tmp_path: Path) -> None:
    one, two = (dt.attach(BERT.build(0), "sparse(count=50)", seed=s) for s in (0, 1))
    one.load_vector(one.vector() + 0.1)
    want, kept = BERT.run(one.model), two.tensors() | {}
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    assert torch.equal(BERT.run(two.load_tensors(one.tensors()).model), want)
    two.load_tensors(kept)
    assert not torch.equal(BERT.run(two.model), want)
    two.model.load_state_dict(one.model.state_dict())
    assert torch.equal(BERT.run(two.model), want)
    loaded = dt.load(one.save(tmp_path / "one"), BERT.build(0))
    assert torch.equal(BERT.run(loaded.model), want)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_does_not_take_over_what_was_looked_up(twin: Callable[..., Any]) -> None:
    """A copied index counts its writes anew, and may reach an old count with other positions."""
    delta, other = (dt.attach(BERT.build(0), "sparse(count=50)", seed=s) for s in (0, 1))
    delta.load_vector(delta.vector() + 0.1)
    other.load_vector(delta.vector())
    for _ in range(3):
        delta.load_tensors(delta.tensors())
    BERT.run(delta.model)
    again = dt.deltas(twin(delta.model))["delta"]
    assert index_of(again)._version < index_of(delta)._version
    while index_of(again)._version < index_of(delta)._version:
        again.load_tensors(other.tensors())
    assert torch.equal(BERT.run(again.model), BERT.run(other.model))


def test_what_another_process_sends_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broadcasting writes without counting; the looked-up positions must follow all the same."""
    delta, other = (dt.attach(BERT.build(0), "sparse(count=50)", seed=s) for s in (0, 1))
    other.load_vector(other.vector() + 0.1)
    BERT.run(delta.model)
    sent = iter(other.tensors().values())
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, _: tensor.data.copy_(next(sent)))
    World(0, 2).same_start(list(delta.tensors().values()))
    assert torch.equal(BERT.run(delta.model), BERT.run(other.model))


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.flip(0),
        lambda index: index.clamp(max=int(index[-2])),
        lambda index: index + 10_000,
        lambda index: index - int(index[0]) - 1,
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[..., Tensor]) -> None:
    folder = dt.attach(BERT.build(0), "sparse(count=50)", seed=0).save(tmp_path / "delta")
    tensors = load_file(folder / "delta.safetensors")
    tensors["sparse.shared:all.index"] = damage(tensors["sparse.shared:all.index"]).contiguous()
    save_file(tensors, folder / "delta.safetensors")
    model = BERT.build(0)
    before = Snapshot.of(model)
    with pytest.raises(dt.DeltuneError, match=r"index of `sparse` is damaged.*load .* again"):
        dt.load(folder, model)
    before.check(model)


# --- BitFit: counts of the paper ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("attn.q, ffn.up", 46_080),  # the paper's half-size variant
        ("attn.q", 9_216),
        ("attn.k", 9_216),
        ("attn.v", 9_216),
        ("*.attention.output.LayerNorm", 9_216),
        ("ffn.up", 36_864),
        ("ffn.down", 9_216),
        ("re:encoder.layer.*[0-9].output.LayerNorm", 9_216),
        ("pooler.dense", 768),
        ("", 102_912),
    ],
)
def test_bitfit_trains_the_biases_that_where_names(where: str, count: int) -> None:
    assert dt.plan(meta_model("bert-base"), f"bitfit(where={where!r})").count() == count


def test_bitfit_changes_vectors_named_bias_and_no_matrix() -> None:
    delta, before = dt.attach(BERT.build(0), "bitfit", seed=0, head=False), BERT.build(0)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        BERT.run(delta.model.train(), step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta.merge()
    for name, old in before.named_parameters():
        new = delta.model.get_parameter(name)
        if name.startswith("classifier") or not name.endswith("bias"):
            assert torch.equal(new, old), name
        else:
            assert new.ndim == 1 and not torch.equal(new, old), name


def test_bitfit_on_bert_large() -> None:
    assert dt.plan(meta_model("bert-large"), "bitfit").count() == 272_384


# --- FISH Mask ----------------------------------------------------------------------------------


@every_case
def test_fish_takes_the_largest_squared_gradients(case: Case) -> None:
    delta = prepared(case, "fish(count=40, examples=3)")
    sites = [unit.site for unit in delta.tree.units if unit.site.segment]
    plain = case.build(0).requires_grad_(True)
    scores = squares(case, plain, [plain.get_parameter(_name(site)) for site in sites])
    found, best = index_of(delta).long(), scores.sort(descending=True, stable=True)
    margin = best.values[39] - best.values[40]
    if margin > 1e-5 * best.values[39]:  # else rounding may order them either way
        assert torch.equal(found, best.indices[:40].sort().values)
    assert float(scores[found].min()) >= float(best.values[39]) * (1 - 1e-5)
    assert len(found.unique()) == 40


def test_fish_counts_the_head() -> None:
    model = BERT.build(0)
    head = 3 * 16 + 3
    total = sum(p.numel() for p in model.parameters())
    plan = dt.plan(model, "fish(density=0.02)")
    assert plan.count() == int(0.02 * total)
    assert dt.plan(model, "fish(density=0.02)", head=False).count() == int(0.02 * total) - head
    assert dt.plan(meta_model("bert-large"), "fish").count() == int(0.005 * 335_141_888)
    with pytest.raises(SpecError, match=r"budget of 46 .*head alone has 51.*raise `density`"):
        dt.plan(model, "fish(density=0.008)")


def test_fish_looks_at_as_many_examples_as_it_is_told() -> None:
    delta = dt.attach(BERT.build(0), "fish(count=5, examples=2)")
    seen = []

    def look(most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        seen.append((most, size, training))
        yield from losses(BERT, delta.model)(most, size, training)

    with Course(delta.model) as course:
        course.prepare(look)
    assert seen == [(2, 1, False)]


def test_the_order_of_the_examples_does_not_matter() -> None:
    one, two = (prepared(BERT, "fish(count=40)", order) for order in ((0, 1, 2), (2, 0, 1)))
    assert torch.equal(index_of(one), index_of(two))


def test_equal_scores_are_taken_in_model_order() -> None:
    model = nn.Linear(6, 1)
    delta = dt.attach(model, "fish(count=3)")
    with Course(model) as course:
        course.prepare(Later(lambda: model(torch.ones(1, 6)).sum()))
    assert index_of(delta).tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["fish(count=40)", "child(mode='D')"])
def test_looking_at_the_data_changes_nothing_but_the_index(text: str) -> None:
    model = BERT.build(0)
    plain = BERT.run(model)
    delta = dt.attach(model, text, seed=0)
    model.eval()
    before = Snapshot.of(model)
    with Course(model) as course:
        course.prepare(losses(BERT, model))
    assert all(p.grad is None for p in model.parameters())
    name = next(n for n in before.values if n.endswith(".index"))
    assert not torch.equal(model.state_dict()[name], before.values[name])
    before.values[name] = model.state_dict()[name].clone()
    before.check(model)
    assert torch.equal(BERT.run(model), plain)
    delta.detach()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_gradient_checkpointing_selects_the_same(name: str, reentrant: bool) -> None:
    """Train mode, with checkpoints, and without dropout."""
    masks = []
    for checkpoints in (False, True):
        model = ZOO[name].build(0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        delta = dt.attach(model, "child(mode='D', share=0.1)")
        with Course(model) as course:
            model.train()
            course.prepare(Later(lambda model=model: ZOO[name].run(model).square().mean()))
        masks.append(index_of(delta).clone())
    assert torch.equal(*masks)


def test_a_second_delta_stays_in_force_while_the_first_looks() -> None:
    """The gradients are those at the weights as all other deltas leave them."""
    case, text = BERT, "lora(rank=2, where='attn, ffn')"
    merged = case.build(0)
    lora = dt.attach(merged, text, "lora", seed=0)
    lora.load_vector(lora.vector() + 0.1)
    acting = pickle.loads(pickle.dumps(merged))
    lora.merge()
    masks = []
    for model in (merged, acting):
        delta = dt.attach(model, "fish(count=40)", "fish", head=False)
        with Course(model) as course:
            course.prepare(losses(case, model))
        masks.append(index_of(delta))
    assert torch.equal(*masks)


def test_fish_folds_into_plain_sparse(tmp_path: Path) -> None:
    delta = prepared(BERT, "fish(count=40, where='ffn')[0:1]")
    delta.load_vector(delta.vector() + 0.1)
    acting, index, vector = BERT.run(delta.model), index_of(delta).clone(), delta.vector()
    plain = delta.fold()
    assert str(plain.spec) == "sparse(count=40, where='ffn')[0:1]"
    assert torch.equal(index_of(plain), index) and torch.equal(plain.vector(), vector)
    assert torch.equal(BERT.run(plain.model), acting)
    assert "not chosen" not in repr(plain)
    loaded = dt.load(plain.save(tmp_path / "plain"), BERT.build(0))
    assert torch.equal(BERT.run(loaded.model), acting)
    BERT.run(loaded.model.train()).square().mean().backward()  # trains in any loop
    fresh = dt.attach(BERT.build(0), "fish(count=40)")
    assert "entries not chosen yet" in repr(fresh)
    with pytest.raises(AttachError, match="chosen no entries yet"):
        fresh.fold()


# --- Child-Tuning -------------------------------------------------------------------------------


def test_child_f_is_unbiased_and_has_the_stated_variance() -> None:
    share, draws = 0.3, 4000
    model = network().float()
    delta = dt.attach(model, f"child(share={share})")
    course = Course(model, seed=0)
    weight = delta.parameters()[0]
    gradient = torch.full_like(weight, -2.0)
    found = []
    for step in range(draws):
        course.before_step(step, draws)
        weight.grad = gradient.clone()
        course.after_backward()
        found.append(weight.grad)
    kept = torch.stack(found) / gradient
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / share])
    sigma = math.sqrt((1 - share) / share)
    assert float((kept.mean(0) - 1).abs().max()) < 5 * sigma / math.sqrt(draws)
    assert float(kept.var(0).mean()) == pytest.approx((1 - share) / share, rel=0.02)
    assert float((kept.flatten(1).T.corrcoef() - torch.eye(24)).abs().max()) < 5 / math.sqrt(draws)


def test_child_f_draws_by_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[Tensor]:
        model = network()
        delta = dt.attach(model, "child")
        course = Course(model, seed)
        for parameter in delta.parameters():
            parameter.grad = torch.ones_like(parameter)
        course.before_step(step, 9)
        course.after_backward()
        return [p.grad for p in delta.parameters() if p.grad is not None]

    again = zip(drawn(0, 3), drawn(0, 3), strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    for other in (drawn(0, 4), drawn(1, 3)):
        assert not torch.equal(drawn(0, 3)[0], other[0])


def run(model: nn.Module, delta: Any, **extra: Any) -> Any:
    chosen = settings(learning_rate=0.02, num_train_epochs=3, eval_steps=2, max_grad_norm=0)
    return train(model, None, TASK, delta, chosen, objective=Digits(), **extra)


def test_child_f_of_everything_is_full_tuning_with_adamw() -> None:
    chosen = settings(weight_decay=0.1, max_grad_norm=0.5)
    one, two = network(), network()
    child, full = dt.attach(one, "child(share=1.0)"), dt.attach(two, "full")
    for model, delta in ((one, child), (two, full)):
        train(model, None, toy_task(), delta, chosen, objective=Squares())
    assert torch.equal(child.vector(), full.vector())

    plain, chosen = network(), settings(weight_decay=0.0, max_grad_norm=0)
    other = network()
    train(plain, None, toy_task(), None, chosen, objective=Squares())
    delta = dt.attach(other, "child(share=1.0)")
    train(other, None, toy_task(), delta, chosen, objective=Squares())
    delta.merge()
    for p, (name, q) in zip(plain.parameters(), own(other).items(), strict=False):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)


def test_child_d_takes_the_quantile_of_squared_clipped_gradients() -> None:
    case, share, clip = BERT, 0.3, 0.005
    delta = dt.attach(case.build(0), f"child(mode='D', share={share}, clip={clip})", seed=0)
    plain = case.build(0)
    blocks = {n: p for n, p in own(plain).items() if ".layer." in n}
    assert [_name(u.site) for u in delta.tree.units if u.site.segment] == list(blocks)
    clipped, sums = 0, {name: torch.zeros_like(p) for name, p in blocks.items()}
    for model in (delta.model, plain):  # dropout is on: the same draws for both
        torch.manual_seed(0)
        if model is delta.model:
            with Course(model) as course:
                course.prepare(losses(case, model))
            continue
        for loss in losses(case, plain)(10):
            plain.zero_grad()
            loss.backward()
            for name, p in blocks.items():
                norm = nn.utils.clip_grad_norm_(p, clip)
                clipped += int(norm > clip)
                assert p.grad is not None
                sums[name] += p.grad.square() / 2
    assert clipped > 5
    scores = torch.cat([one.flatten() for one in sums.values()]).double().numpy()
    kept = scores >= np.percentile(scores, (1 - share) * 100)
    expected = torch.from_numpy(kept).nonzero().flatten()
    assert torch.equal(index_of(delta).long(), expected)
    dense = [n for n in delta.tree.named() if n.startswith("child.bert.")]
    others = [n for n in own(plain) if ".layer." not in n]
    assert dense == [f"child.{n.rpartition('.')[0]}.{n.rpartition('.')[2]}" for n in others]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("total", [10, 13, 14, 20, 21, 5000])
def test_child_d_keeps_as_many_as_reach_the_percentile(share: float, total: int) -> None:
    scores = np.random.default_rng(0).permutation(total).astype(float)
    expected = int((scores >= np.percentile(scores, (1 - share) * 100)).sum())
    spec: Any = dt.parse(f"child(mode='D', share={share})")
    assert spec.kept(total, None) == expected


def test_child_d_counts() -> None:
    blocks, rest = 12 * 7_087_872, 109_482_240 - 12 * 7_087_872
    found = dt.plan(meta_model("bert-base"), "child(mode='D')").count() - rest
    assert abs(found - 0.3 * blocks) < 1
    assert dt.plan(meta_model("bert-base"), "child").count() == 109_482_240


# --- APET ---------------------------------------------------------------------------------------


def pieces(plan: Any) -> dict[str, int]:
    """Trained scalars of each kind."""
    found: Counter[str] = Counter()
    for slot in plan.layout:
        found[slot.name.partition(".")[0]] += slot.size
    return dict(found)


@pytest.mark.parametrize("model", ["bert-base", "t5-base"])
@pytest.mark.parametrize("budget", [30_000, 100_001, 589_824, 2_300_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_apet_fills_both_halves_as_far_as_pieces_fit(model: str, budget: int, seed: int) -> None:
    built = meta_model(model)
    text = f"apet(budget={budget}, rank=8, width=24, seed={seed})"
    plan = dt.plan(built, text)
    found = pieces(plan)
    inserted = found.pop("lora", 0) + found.pop("adapter", 0)
    pair, bottleneck, half = 8 * 2 * 768, 2 * 768 * 24 + 24 + 768, budget // 2
    assert 0 <= half - inserted < bottleneck
    sites = Counter(step.spec.kind for step in plan.steps)
    assert inserted == sites["lora"] * pair + sites["adapter"] * bottleneck
    if sites["lora"] < len(dt.plan(built, "lora").steps):
        assert half - inserted < pair
    sizes = {name: p.numel() for name, p in built.named_parameters()}
    taken = [slot.name.removeprefix("tensors.") for slot in plan.layout if "tensors." in slot.name]
    left = budget - half - sum(sizes[name] for name in taken)
    assert 0 <= left < min(size for name, size in sizes.items() if name not in taken)
    assert dt.plan(built, text).layout == plan.layout
    entries = pieces(dt.plan(built, f"{text[:-1]}, backbone='entries')"))
    assert entries["sparse"] == budget - half


def test_apet_draws_by_its_seed() -> None:
    bert = meta_model("bert-base")
    plans = [dt.plan(bert, f"apet(seed={seed})") for seed in (0, 1)]
    assert plans[0].layout != plans[1].layout
    sets = [{step.key for step in plan.steps if step.spec.kind != "tensors"} for plan in plans]
    assert sets[0] != sets[1]


def test_what_folds_beside_apet_leaves_it_whole(tmp_path: Path) -> None:
    text = "apet(budget=600, rank=2, width=3) + prefix(tokens=2{})"
    delta = dt.attach(BERT.build(0), text.format(", mlp=4"), seed=0)
    acting, count = BERT.run(delta.model), delta.count()
    delta.fold()
    assert str(delta.spec) == text.format("") and delta.count() != count
    assert distance(BERT.run(delta.model), acting) <= 1e-6
    loaded = dt.load(delta.save(tmp_path / "delta"), BERT.build(0))
    assert torch.equal(BERT.run(loaded.model), BERT.run(delta.model))


def test_apet_keeps_its_name_and_its_pieces(tmp_path: Path) -> None:
    text = "apet(budget=600, rank=2, width=3)"
    delta = dt.attach(BERT.build(0), text, seed=0)
    delta.load_vector(delta.vector() + 0.1)
    loaded = dt.load(delta.save(tmp_path / "delta"), BERT.build(0))
    assert str(loaded.spec) == text
    assert torch.equal(BERT.run(loaded.model), BERT.run(delta.model))


# --- training -----------------------------------------------------------------------------------


def attached(text: str) -> tuple[nn.Module, Any]:
    model = BERT.build(0)
    return model, dt.attach(model, text, seed=0)


@pytest.mark.parametrize("text", SPECS)
def test_trains_and_resumes_bit_for_bit_without_looking_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step == 11:
            raise KeyboardInterrupt

    (straight, one), (killed, two), (resumed, three) = (attached(text) for _ in range(3))
    before = Snapshot.of(BERT.build(0))
    start = one.vector()
    whole = run(straight, one)
    assert not torch.equal(one.vector(), start) and whole.losses[-1] < whole.losses[0]
    with pytest.raises(KeyboardInterrupt):
        run(killed, two, folder=tmp_path, on_event=kill)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("looked again")

    for spec, _ in three.tree.members():
        monkeypatch.setattr(type(spec), "prepare", refuse)
    parts = run(resumed, three, folder=tmp_path)
    assert torch.equal(one.vector(), three.vector())
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.tensors().values(), three.tensors().values(), strict=True)
    )
    assert parts.losses == whole.losses and parts.best_step == whole.best_step
    for delta in (one, three):
        delta.detach()
        before.check_twin(delta.model)


@pytest.mark.parametrize("text", ["fish(count=60, examples=10)", "child(mode='D', share=0.4)"])
def test_a_chosen_mask_stays_when_training_goes_on(text: str) -> None:
    model, delta = attached(text)
    run(model, delta)
    index, vector = index_of(delta).clone(), delta.vector()
    run(model, delta)
    assert torch.equal(index_of(delta), index) and not torch.equal(delta.vector(), vector)


@pytest.mark.parametrize("text", ["fish(count=60)", "child(mode='D', share=0.4)", "child"])
def test_a_plain_loop_is_refused(text: str) -> None:
    model, delta = attached(text)
    model.train()
    with pytest.raises(TrainError, match=r"asks for more.*deltune.train.*DeltaCallback"):
        BERT.run(model)
    if text == "child":
        return
    with Course(model) as course, pytest.raises(TrainError, match="before it has chosen"):
        course.before_step(0, 1)
    assert bool((index_of(delta) == -1).all())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_data_that_tell_nothing_are_refused(value: float) -> None:
    model = linear().float()
    delta = dt.attach(model, "fish(count=2)")
    look = Later(lambda: (model(torch.ones(1, 3)) * value).sum())
    with Course(model) as course, pytest.raises(TrainError, match="cannot choose entries"):
        course.prepare(look)
    with Course(model) as course, pytest.raises(TrainError, match="cannot choose entries"):
        course.prepare(Later(look.loss, times=0))
    assert bool((index_of(delta) == -1).all())


def rows() -> list[dict[str, Tensor]]:
    digits = Digits()
    found = []
    for example in digits.encode(TASK.train):
        batch = digits.collate([example])
        found.append({name: tensor[0] for name, tensor in batch.items()})
    return found


def trainer(model: nn.Module, delta: Any, out: Path, **changes: Any) -> Trainer:
    usual: dict[str, Any] = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.02,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **(usual | changes))
    return Trainer(model, arguments, train_dataset=rows(), callbacks=[DeltaCallback(delta)])


def test_trainer_chooses_the_same_mask_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "fish(count=60, examples=1000)"
    (ours, one), (theirs, two), (again, three) = (attached(text) for _ in range(3))
    run(ours, one)
    trainer(theirs, two, tmp_path).train()
    assert torch.equal(index_of(one), index_of(two)) and int(index_of(one)[0]) >= 0
    assert bool(values_of(two).any())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("looked again")

    monkeypatch.setattr(mechanism, "choose", refuse)
    resumed = trainer(again, three, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(two.tensors().values(), three.tensors().values(), strict=True)
    )


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sparse(count=0)", "`count` must be 1 or more"),
        ("sparse(density=0.0)", r"`density` must be in \(0, 1\]"),
        ("sparse(density=1.5)", r"`density` must be in \(0, 1\]"),
        ("sparse(density=0.1, count=3)", "`density` must be left out"),
        ("fish(count=0)", "`count` must be 1 or more"),
        ("fish(density=-0.1)", r"`density` must be in \(0, 1\]"),
        ("fish(density=0.1, count=3)", "`density` must be left out"),
        ("fish(examples=0)", "`examples` must be 1 or more"),
        ("child(share=0.0)", r"`share` must be in \(0, 1\]"),
        ("child(share=1.1)", r"`share` must be in \(0, 1\]"),
        ("child(clip=-1.0)", "`clip` must be 0 or more"),
        ("child(mode='E')", "one of"),
        ("apet(budget=1)", "`budget` must be 2 or more"),
        ("sparse(count=9999)", r"selects 9,999 of the 5,792 entries .* choose 1 to 5,792"),
        ("sparse(density=0.0001)", r"selects 0 of the 5,792 entries"),
        ("fish(count=9999)", r"selects 9,999 of the 5,792 entries"),
        ("sparse(count=5, where='attn.x')", "matches no module"),
        ("apet(budget=60, rank=2, width=3)", r"30 of its 60 scalars for LoRA pairs and adapters"),
        ("apet(budget=9000, rank=2, width=3)", r"716 together; choose a `budget` whose half"),
        ("apet(budget=40, rank=99, width=3)", "rank"),
    ],
)
def test_bad_input_is_named(text: str, reason: str) -> None:
    with pytest.raises(dt.DeltuneError, match=reason):
        dt.plan(BERT.build(0), text)


def test_child_d_needs_blocks() -> None:
    with pytest.raises(WhereError, match=r"has no blocks.*child\(mode='F'\)"):
        dt.plan(network(), "child(mode='D')")
