"""Every method on every architecture obeys the same laws.

Oracles: the model before anything was attached, bit for bit; the attached model itself on another
way (merged, saved and loaded, called functionally, copied, checkpointed, compiled, row by row,
without a cache).
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import deltune as dt
from deltune.mechanisms.unit import Losses
from deltune.training.course import Course
from methods import (
    EXACT,
    FIRST_OF_KIN,
    FIRST_ON,
    METHODS,
    REFUSED,
    Method,
    refusals,
    usual,
)
from rows import leftward, rows
from snapshots import Snapshot, distance
from zoo import ZOO, Case


def attached(case: Case, method: Method, seed: int = 0, noise: float = 0.05) -> dt.Delta:
    """A delta on a fresh model, away from its start."""
    return joined(case, case.build(seed), method.text, "delta", seed, noise)


def losses(case: Case, model: nn.Module) -> Losses:
    """Losses of two batches, for methods that look at data before the first step."""

    def given(most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        mode = model.training
        for seed in range(2):
            torch.manual_seed(seed)  # of dropout
            loss = case.run(model.train(training), seed).square().mean()
            model.train(mode)
            yield loss

    return given


def values(case: Case, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return case.run(model, seed)


def gradients(case: Case, delta: dt.Delta) -> Tensor:
    """The gradient of a loss, as a vector in layout order."""
    for parameter in delta.parameters():
        parameter.grad = None
    with Course(delta.model):
        case.run(delta.model).square().mean().backward()
    return torch.cat([p.grad.reshape(-1) for p in delta.parameters() if p.grad is not None])


def pairs_where(
    holds: Callable[[Case, Method], bool], on: str = " ".join(ZOO)
) -> pytest.MarkDecorator:
    """A law on every method on every architecture where it can work and `holds`; on every run on
    those named by `on` alone."""
    chosen = [
        pytest.param(
            ZOO[name], METHODS[method], id=f"{name}-{method}",
            marks=() if usual(method, name) and name in on.split() else pytest.mark.thorough,
        )
        for name in ZOO
        for method in METHODS
        if (method, name) not in refusals() and holds(ZOO[name], METHODS[method])
    ]  # fmt: skip
    return pytest.mark.parametrize(("case", "method"), chosen)


every_pair = pairs_where(lambda case, method: True)
# Of handles and trees, which know no architecture.
pairs_of_handles = pairs_where(lambda case, method: True, f"{FIRST_ON} whisper torch-encoder")
# Of what takes long and turns on little of an architecture.
pairs_of_kinds = pairs_where(lambda case, method: True, FIRST_OF_KIN)
every_case = pytest.mark.parametrize("case", ZOO.values(), ids=list(ZOO))


@pytest.mark.parametrize(
    ("method", "name", "reason"),
    [pytest.param(*pair, reason, id="-".join(pair)) for pair, reason in refusals().items()],
)
def test_pairs_that_cannot_work_say_why_and_leave_the_model_alone(
    method: str, name: str, reason: str
) -> None:
    model = ZOO[name].build(0)
    before = Snapshot.of(model)
    for act in (dt.plan, dt.attach):
        with pytest.raises(dt.DeltuneError, match=reason):
            act(model, METHODS[method].text)
    before.check(model)


def test_the_table_of_refusals_names_known_pairs_once() -> None:
    listed = sum(len(methods.split()) * len(names.split()) for methods, names, _ in REFUSED)
    assert listed == len(refusals())
    assert all(method in METHODS and name in ZOO for method, name in refusals())


@every_pair
def test_attach_train_detach_leaves_the_backbone_bit_for_bit(case: Case, method: Method) -> None:
    model = case.build(0)
    values(case, model.train())  # what forwards leave on modules by themselves is there before
    plain = values(case, model.eval())
    before = Snapshot.of(model)
    delta = dt.attach(model, method.text, seed=0)
    start = values(case, model)
    if method.start is not None:
        assert distance(start, plain) <= method.start
    vector = delta.vector()
    model.train()
    optimiser = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    with Course(model) as course:
        course.prepare(losses(case, model))
        for step in range(2):
            optimiser.zero_grad()
            course.before_step(step, 2)
            case.run(model, step).square().mean().backward()
            course.after_backward()
            optimiser.step()
            course.after_step()
    model.eval()
    assert not torch.equal(delta.vector(), vector)
    assert distance(values(case, model), start) > 1e-5
    delta.detach()
    before.check(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(values(case, model), plain)


@every_pair
def test_gradients_reach_the_delta_and_nothing_else(case: Case, method: Method) -> None:
    delta = attached(case, method)
    own = {id(parameter) for parameter in delta.parameters()}
    assert {id(p) for p in delta.model.parameters() if p.requires_grad} == own
    expected = gradients(case, delta)
    for name, parameter in delta.tree.named().items():
        assert parameter.grad is not None, name
    assert torch.isfinite(expected).all()
    assert all(p.grad is None for p in delta.model.parameters() if id(p) not in own)
    vector = delta.vector().requires_grad_()
    case.output(delta.call(vector, **case.batch(0))).square().mean().backward()
    assert vector.grad is not None
    assert distance(vector.grad, expected) <= 1e-5


@every_pair
def test_merged_equals_unmerged(case: Case, method: Method) -> None:
    delta = attached(case, method)
    model, before = delta.model, Snapshot.of(delta.model)
    acting = values(case, model)
    if not method.merges_into(case.name):
        with pytest.raises(dt.DeltuneError, match="cannot be merged"):
            delta.merge()
        before.check(model)
        return
    delta.merge()
    assert delta.merged
    assert distance(values(case, model), acting) <= 1e-5
    delta.unmerge()
    before.check(model)
    assert torch.equal(values(case, model), acting)


@pairs_where(lambda case, method: method.merges_into(case.name) and case.name in EXACT.split())
def test_merging_is_exact_but_for_rounding(case: Case, method: Method) -> None:
    """The float32 law allows for rounding; in float64 nothing else is left of the difference."""
    delta = attached(case, method, noise=0.5)
    model = delta.model.to(torch.float64)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    acting = values(case, model)
    delta.merge()
    assert acting.dtype == torch.float64
    assert float((values(case, model) - acting).abs().max()) <= 1e-10


@pairs_of_kinds
def test_the_tensors_are_the_delta(case: Case, method: Method, tmp_path: Path) -> None:
    delta = attached(case, method)
    acting, vector = values(case, delta.model), delta.vector()
    with torch.no_grad():
        # Views of a vector lie on other addresses, which moves matrix products by a rounding.
        assert distance(case.output(delta.call(vector, **case.batch(0))), acting) <= 1e-6
    loaded = dt.load(delta.save(tmp_path / "delta"), case.build(0))
    assert loaded.spec == delta.spec and loaded.layout == delta.layout
    assert torch.equal(loaded.vector(), vector)
    assert torch.equal(values(case, loaded.model), acting)
    other = attached(case, method, seed=1)
    assert not torch.equal(other.vector(), vector)
    delta.load_vector(other.vector())
    assert torch.equal(delta.vector(), other.vector())
    assert distance(values(case, delta.model), acting) > 1e-5
    other.model.load_state_dict(loaded.model.state_dict())
    for written in (delta.load_vector(vector), other):
        assert torch.equal(written.vector(), vector)
        assert torch.equal(values(case, written.model), acting)


@pairs_of_handles
def test_copies_and_pickles_act_by_their_own_tensors(case: Case, method: Method) -> None:
    delta, plain = attached(case, method), Snapshot.of(case.build(0))
    acting = values(case, delta.model)
    change = 0.1 * torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(2))
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        twin = duplicate(delta.model)
        handle = dt.deltas(twin)["delta"]
        assert torch.equal(values(case, twin), acting)
        handle.load_vector(delta.vector() + change)
        changed = values(case, twin)
        assert distance(changed, acting) > 1e-5
        assert torch.equal(values(case, delta.model), acting)
        vector = delta.vector()
        delta.load_vector(vector - change)
        assert torch.equal(values(case, twin), changed)
        delta.load_vector(vector)
        handle.detach()
        plain.check_twin(twin)
        assert torch.equal(values(case, delta.model), acting)


@pairs_of_handles
def test_two_of_a_kind_come_off_in_either_order(case: Case, method: Method) -> None:
    model, seeds, alone = case.build(0), {"a.b": 3, "second one": 4}, {}
    before = Snapshot.of(model)
    for name, seed in seeds.items():
        delta = joined(case, model, method.text, name, seed)
        alone[name] = values(case, model)
        delta.detach()
    for first, second in permutations(seeds):
        for name, seed in seeds.items():
            joined(case, model, method.text, name, seed)
        both = values(case, model)
        if method.text != "head":  # of several heads, the last attached is in force
            assert all(distance(both, single) > 1e-5 for single in alone.values())
        dt.deltas(model)[first].detach()
        assert torch.equal(values(case, model), alone[second])
        dt.deltas(model)[second].detach()
        before.check(model)


def joined(
    case: Case, model: nn.Module, text: str, name: str, seed: int, noise: float = 0.05
) -> dt.Delta:
    """One more delta on a model, ready and away from its start."""
    delta = dt.attach(model, text, name, seed=seed)
    if any(part.demands for part, _ in delta.tree.members()):
        with ExitStack() as alone, Course(model) as course:  # what it chooses is its own matter
            for other in dt.deltas(model).values():
                if other.name != name:
                    alone.enter_context(other.disabled())
            course.prepare(losses(case, model))
    generator = torch.Generator().manual_seed(seed + 1)
    change = torch.randn(delta.layout.size, generator=generator)
    return delta.load_vector(delta.vector() + noise * change)


def workable(case: Case, *methods: str) -> list[str]:
    """The texts of those methods that serve this architecture."""
    return [METHODS[m].text for m in methods if (m, case.name) not in refusals()]


@every_case
def test_three_deltas_come_and_go_in_any_order(case: Case) -> None:
    texts = workable(case, "full", "lora-all", "adapter-serial", "prefix", "prompt", "last")[:3]
    model, other = case.build(0), case.build(0)
    before = Snapshot.of(model)
    for order in list(permutations(range(len(texts))))[::2]:
        for i in order:
            joined(case, model, texts[i], str(i), i)
        for left in range(len(texts), 0, -1):
            acting = values(case, model)
            for i in order[-left:]:
                joined(case, other, texts[i], str(i), i)
            assert torch.equal(acting, values(case, other))
            for delta in dt.deltas(other).values():
                delta.detach()
            dt.deltas(model)[str(order[-left])].detach()
        before.check(model)


@pairs_of_kinds
def test_gradient_checkpointing_changes_nothing(case: Case, method: Method) -> None:
    delta = attached(case, method)
    model = delta.model.train()
    if not getattr(model, "supports_gradient_checkpointing", False):
        pytest.skip("the model has no gradient checkpointing of its own")
    torch.manual_seed(0)  # dropout stays on: checkpointing replays the generator
    expected = gradients(case, delta)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    assert distance(gradients(case, delta), expected) <= 1e-5


def check_compiled(case: Case, model: nn.Module) -> None:
    """Fails where the compiled model is not the eager one, before and after a change of deltas."""
    captured = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        captured.append(graph)
        return graph.forward

    expected = values(case, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    assert distance(values(case, compiled), expected) <= 1e-6
    assert captured
    for delta in dt.deltas(model).values():
        delta.load_vector(0.5 * delta.vector())
    assert distance(values(case, compiled), values(case, model)) <= 1e-6


@every_case
def test_compiled_equals_eager(case: Case) -> None:
    """One delta of each mechanism at once; every pair alone is the law below."""
    model = case.build(0)
    texts = workable(case, "lora", "adapter-serial", "prefix", "prompt", "last")
    for text in texts or workable(case, "full"):
        joined(case, model, text, text, 5)
    check_compiled(case, model)


@pytest.mark.thorough
@every_pair
def test_each_compiled_equals_eager(case: Case, method: Method) -> None:
    check_compiled(case, attached(case, method).model)


@pairs_where(lambda case, method: case.family in ("encoder", "decoder", "encoder-decoder"))
def test_a_padded_batch_equals_its_rows(case: Case, method: Method) -> None:
    model = attached(case, method).model
    batches = [case.batch(0)]
    if case.family == "decoder":
        batches.append(leftward(batches[0]))
    for batch in batches:
        with torch.no_grad():
            whole = model(**batch).logits
            for i, row in enumerate(rows(batch)):
                alone, padded = model(**row).logits[0], whole[i]
                if case.family != "encoder":
                    mask = batch.get("decoder_attention_mask", batch["attention_mask"])
                    padded = padded[mask[i].bool()]
                assert distance(padded, alone) <= 1e-5


@pairs_where(lambda case, method: case.generates and method.whole)
def test_a_cache_is_refused_by_what_reads_the_whole_sequence(case: Case, method: Method) -> None:
    model = attached(case, method).model
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with pytest.raises(dt.DeltuneError, match="use_cache=False"):
        model.generate(**case.prompt(), **options)
    assert model.generate(**case.prompt(), **options, use_cache=False).shape[1] >= 4


@pairs_where(lambda case, method: case.generates and not method.whole)
def test_cached_generation_equals_uncached(case: Case, method: Method) -> None:
    model = attached(case, method).model
    made = [
        model.generate(
            **case.prompt(), use_cache=use_cache, do_sample=False, max_new_tokens=4,
            min_new_tokens=4, output_logits=True, return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert distance(torch.stack(made[0].logits), torch.stack(made[1].logits)) <= 1e-5
