"""The algebra of deltas: every operator is the law that it states.

Oracles: the parts run one by one and put together by the operator's formula, written out here;
dense matrices; a small interpreter of specs on one linear map.
"""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune import spec as codec
from deltune.algebra import average, compose, drop, fuse, gate, split
from deltune.errors import AttachError, MergeError, SpecError, StoreError, WhereError
from deltune.mechanisms.unit import Spot
from deltune.merging import merge
from deltune.training.course import Course
from deltune.training.joining import Call, Joiner
from probes import moved, seen
from rows import leftward, rows
from snapshots import Snapshot, distance
from test_laws import check_compiled, gradients, values
from zoo import ZOO, Batch, Case

MANY = ("bert", "gpt2", "llama", "t5", "torch-encoder")
every_model = pytest.mark.parametrize("case", [ZOO[n] for n in MANY], ids=MANY)


def two(model: nn.Module, text: str, other: str = "") -> list[dt.Delta]:
    """The deltas `a` and `b`, far from their starts."""
    found = []
    for seed, (name, spec) in enumerate((("a", text), ("b", other or text))):
        delta = dt.attach(model, spec, name, head=False, seed=seed)
        draw = torch.Generator().manual_seed(seed + 7)
        noise = torch.randn(delta.layout.size, generator=draw)
        found.append(delta.load_vector(delta.vector() + 0.3 * noise))
    return found


def alone(model: nn.Module, name: str | None, act: Callable[[], Tensor]) -> Tensor:
    """What comes out with one delta and no other."""
    dt.activate(model, name)
    return act()


def real(case: Case, batch: Batch) -> Tensor:
    """True at real tokens, of the first stack."""
    return batch.get("attention_mask", batch.get("mask")).bool()  # type: ignore[union-attr]


# --- at one place --------------------------------------------------------------------------------

PLACES = {
    "adapter": "adapter(width=3, where='{}ffn[0]')",
    "pfeiffer": "adapter(width=3, where='{}ffn[0]', placement='pfeiffer')",
    "parallel": "adapter(width=3, where='{}ffn[0]', placement='parallel')",
    "ia3": "ia3(where='{}ffn.down[0]', inputs='')",
    "ia3-inputs": "ia3(where='{}ffn.down[0]')",
    "lora": "lora(rank=2, where='{}attn.v[0]')",
    "dora": "dora(rank=2, where='{}attn.v[0]')",
    "compacter": "compacter(n=2, width=4, where='{}ffn[0]')",
    "loreft": "loreft(rank=2, where='{}block[0]')",
    "direft": "direft(rank=2, where='{}block[0]')",
}
PLAIN = {"adapter", "pfeiffer", "parallel"}  # of those what serves nn.TransformerEncoderLayer


def place_of(model: nn.Module, text: str) -> Spot:
    steps = dt.plan(model, text, head=False).steps
    spots = {step.spec.spot(step.site, model.get_submodule(step.site.path)) for step in steps}
    (spot,) = spots
    assert spot is not None
    return spot


def there(model: nn.Module, spot: Spot, batch: Batch) -> Tensor:
    """What is at a spot in one run."""
    given, output = seen(model, [spot.path], lambda: model(**batch))[spot.path]
    if spot.side == "input":
        return given
    return output if isinstance(output, Tensor) else output[0]


def formula(op: str, t: dict[str, Tensor], h: Tensor, z: list[Tensor], query: Tensor,
            positions: Tensor, mask: Tensor) -> Tensor:  # fmt: skip
    """The law of each operator at one place, for two parts."""
    z_a, z_b = z
    if op == "average":
        return h + 0.3 * z_a + 0.9 * z_b
    if op == "split":
        return torch.where(positions[..., None] < 2, h + z_a, h + z_b)
    if op.startswith("gate"):
        read = h
        if "example" in op:
            share = mask[..., None].float()
            read = ((h * share).sum(1) / share.sum(1))[:, None]
        scores = read @ t["W"].T + t["b"]
        shares = scores.sigmoid() if "sigmoid" in op else scores.softmax(-1)
        return h + shares[..., :1] * z_a + shares[..., 1:] * z_b
    q = query @ t["Q"].T + t["b_q"]
    scores = torch.stack([(q * (one @ t["K"].T + t["b_k"])).sum(-1) for one in z], -1)
    s_a, s_b = scores.softmax(-1).split(1, -1)
    return h + (s_a * z_a + s_b * z_b) @ t["V"].T


OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "average": ("average", {"weights": (0.3, 0.9)}),
    "split": ("split", {"at": 2}),
    "gate": ("gate", {}),
    "gate-sigmoid": ("gate", {"shares": "sigmoid"}),
    "gate-example": ("gate", {"by": "example"}),
    "fuse": ("fuse", {"frozen": True}),
}


def serves(case: Case, form: str, op: str) -> bool:
    """Whether there is such a place in the model, and such a mean at it."""
    inserts = form in (*PLAIN, "compacter")
    if case.name == "torch-encoder" and form not in PLAIN:
        return False
    return inserts if op == "fuse" else op != "gate-example" or case.family != "decoder"


@pytest.mark.parametrize("form", PLACES)
@every_model
def test_at_its_place_an_operator_is_its_formula(case: Case, form: str) -> None:
    stack = "encoder." if case.name == "t5" else ""
    batch = leftward(case.batch(0)) if case.family == "decoder" else case.batch(0)
    model, text, mask = case.build(0), PLACES[form].format(stack), real(case, batch)
    kinds = [op for op in OPTIONS if serves(case, form, op)]
    if not kinds:
        pytest.skip("the model has no such place")
    spot, sources = place_of(model, text), two(model, text)
    h, *outs = (alone(model, one, partial(there, model, spot, batch)) for one in (None, "a", "b"))
    normed = form == "pfeiffer" and spot.side == "input"
    query = model.get_submodule(spot.path).forward(h) if normed else h
    for op in kinds:
        kind, options = OPTIONS[op]
        delta = compose(model, kind, sources, head=False, **options)
        assert [d.enabled for d in sources] == [False, False]
        noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
        own = [slot.name.startswith(f"{kind}.") for slot in delta.layout for _ in range(slot.size)]
        delta.load_vector(delta.vector() + 0.3 * noise * torch.tensor(own))
        tensors = delta.tensors().items()
        t = {n.rpartition(".")[2]: x for n, x in tensors if n.startswith(f"{kind}.")}
        z = [out - h for out in outs]
        oracle = formula(op, t, h, z, query, mask.long().cumsum(1) - 1, mask)
        found = there(model, spot, batch)
        assert distance(found[mask], oracle[mask]) <= 1e-5, op
        assert distance(oracle[mask], h[mask]) > 1e-3, op
        assert not any(distance(oracle[mask], out[mask]) <= 1e-4 for out in outs), op
        delta.scale = 0.5
        half = there(model, spot, batch)
        assert distance(half[mask], 0.5 * (h + oracle)[mask]) <= 1e-5, op
        delta.detach()


# --- stacks --------------------------------------------------------------------------------------


@every_model
def test_a_stack_of_what_has_no_order_is_the_sum(case: Case) -> None:
    texts = ["lora(rank=2, where='ffn')", "lora(rank=1, where='ffn')"]
    texts += ["bitfit"] if case.name in ("bert", "gpt2") else []
    texts += ["prefix(tokens=2)", "prompt(tokens=2)"] if case.name != "torch-encoder" else []
    model = case.build(0)
    stack, plus = " >> ".join(texts), " + ".join(texts)
    delta = moved(model, stack)
    found, vector = values(case, model), delta.vector()
    delta.detach()
    delta = dt.attach(model, plus)
    assert torch.equal(values(case, delta.load_vector(vector).model), found)


def test_a_later_prompt_stands_before_an_earlier_one() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    both = moved(model, "prompt(tokens=1) >> prompt(tokens=2)", head=False)
    found, (a, b) = values(case, model), both.tensors().values()
    both.detach()
    one = dt.attach(model, "prompt(tokens=3)", head=False)
    one.load_vector(torch.cat([b, a]).reshape(-1))
    assert distance(values(case, model), found) <= 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stacked_loras_are_both_trained_from_their_start(name: str) -> None:
    """Neither reads the other's change, which is zero at first."""
    case = ZOO[name]
    delta = dt.attach(case.build(0), "lora(rank=2) >> lora(rank=2)", seed=0)
    case.run(delta.model).square().mean().backward()
    for key, parameter in delta.tree.named().items():
        assert parameter.grad is not None
        assert parameter.grad.any() == key.endswith(".B")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_stacked_functions_act_in_the_order_written(name: str) -> None:
    """h <- h + f_a(h), then h <- h + f_b: also where a sum has the parallel one first."""
    case = ZOO[name]
    model, batch = case.build(0), case.batch(0)
    where = {"where": "ffn[0]"}
    a = codec.build("adapter", {"width": 3, **where})
    b = codec.build("adapter", {"width": 3, "placement": "parallel", **where})
    first, second = moved(model, a, "a"), moved(model, b, "b")
    (step,) = dt.plan(model, a, head=False).steps
    entry, exit_ = step.site.entry, step.site.exit
    dt.activate(model, None)
    plain = seen(model, [entry, exit_], lambda: model(**batch))
    x, h = plain[entry][0], plain[exit_][1]
    h = h if isinstance(h, Tensor) else h[0]

    def f(delta: dt.Delta, spec: dt.Spec, x: Tensor) -> Tensor:
        return spec.transform(delta.tree.units[0], x)  # type: ignore[attr-defined]

    with torch.no_grad():
        ab = h + f(first, a, h) + f(second, b, x)
        ba = h + f(second, b, x)
        ba = ba + f(first, a, ba)
    for sources, operator, oracle in (
        ([first, second], "stack", ab), ([second, first], "stack", ba),
        ([first, second], "sum", ba),
    ):  # fmt: skip
        delta = compose(model, operator, sources)
        found = there(model, Spot("output", exit_), batch)
        assert distance(found, oracle) <= 1e-5
        delta.detach()
    assert distance(ab, ba) > 1e-3


# --- changes of weights --------------------------------------------------------------------------


@every_model
def test_the_average_of_loras_is_the_mean_of_their_products(case: Case, tmp_path: Path) -> None:
    where = "attn.q, attn.v, ffn" if case.name != "torch-encoder" else "ffn"
    model = case.build(0)
    sources = two(
        model, f"lora(rank=2, where='{where}')", f"lora(rank=2, alpha=3.0, where='{where}')"
    )
    weights, changes = (0.3, 0.5), []
    for delta in sources:
        found: dict[tuple[int, str], Tensor] = {}
        for unit in delta.tree.units:
            for owner, name, _, change in unit.weights(model):
                key = (id(owner), name)
                found[key] = found.get(key, torch.zeros(())) + change.detach()
        changes.append(found)
    mean = compose(model, "average", sources, weights=weights, head=False)
    acting = values(case, model)
    mean.merge()
    originals = {(id(o), n): p for o, n, p in mean._container().originals}
    assert originals.keys() == changes[0].keys()
    for owner, name, original in mean._container().originals:
        dense = sum(w * c[id(owner), name] for w, c in zip(weights, changes, strict=True))
        assert distance(owner._parameters[name], original + dense) <= 1e-6
    assert distance(values(case, model), acting) <= 1e-5
    mean.unmerge()
    unit, *_ = sources[0].tree.units
    other = sources[1].tree.units[0]
    product = (0.3 * unit.B + 0.5 * other.B) @ (0.3 * unit.A + 0.5 * other.A)
    true = 0.3 * unit.spec.difference(unit, None) + 0.5 * other.spec.difference(other, None)  # type: ignore
    assert distance(product, true) > 0.1
    mean.scale = 0.0
    dt.activate(model, "composed")
    assert distance(values(case, model), alone(model, None, lambda: values(case, model))) <= 1e-6


@pytest.mark.parametrize("text", ["ia3", "list(width=2)", "bitfit", "dora(rank=2)", "norms"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_averages_merge_where_their_parts_do(name: str, text: str) -> None:
    case = ZOO[name]
    model = case.build(0)
    before = Snapshot.of(case.build(0))
    mean = compose(model, "average", two(model, text), weights=(0.25, 0.5))
    acting = values(case, model)
    assert distance(values(case, mean.merge().model), acting) <= 1e-5
    assert torch.equal(values(case, mean.unmerge().model), acting)
    for delta in dt.deltas(model).values():
        delta.detach()
    before.check_twin(model)


def test_the_scale_of_a_source_goes_along() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    a, b = two(model, "lora(rank=2) + adapter(width=3)")
    a.scale = 0.4
    alone_a = alone(model, "a", lambda: values(case, model))
    delta = compose(model, "average", [a, b], weights=(1.0, 0.0), head=False)
    assert distance(values(case, model), alone_a) <= 1e-5
    assert "weights=(0.4,)" in str(delta.spec)


# --- layers --------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "text", ["adapter(width=3) + lora(where='ffn')", "compacter(n=2, width=4)"]
)
def test_dropped_layers_are_those_skipped(case: Case, text: str) -> None:
    model = case.build(0)
    whole = moved(model, text, "whole")
    vector, names = whole.vector(), {slot.name: slot for slot in whole.layout}
    whole.skip([0])
    skipped = values(case, model)
    whole.detach()
    delta = dt.attach(model, drop(text, layers="0"))
    assert delta.count() < len(vector)
    delta.load_tensors(
        {s.name: vector[names[s.name].offset :][: s.size].view(s.shape) for s in delta.layout}
        | {n: t for n, t in delta.tensors().items() if n not in names}
    )
    assert torch.equal(values(case, model), skipped)


@every_model
def test_each_layer_may_have_a_method_of_its_own(case: Case) -> None:
    """`a[0:1] + b[1:]` is a where layer 1 is skipped and b where layer 0 is."""
    if case.name == "t5":
        pytest.skip("its stacks are counted one by one: brackets name them")
    a, b = "lora(rank=2, where='ffn')", "adapter(width=3)"
    model = case.build(0)
    both = moved(model, f"{a}[0:1] + {b}[1:]", "both")
    found, tensors = values(case, model), both.tensors()
    both.detach()
    for text, kind, layer in ((a, "lora", 1), (b, "adapter", 0)):
        delta = dt.attach(model, text, kind, head=kind == "lora")
        own = {n: tensors.get(n, t) for n, t in delta.tensors().items()}
        delta.load_tensors(own).skip([layer])
    assert torch.equal(values(case, model), found)


# --- all rows through several --------------------------------------------------------------------


@every_model
def test_parallel_is_the_single_runs_one_behind_the_other(case: Case) -> None:
    model = case.build(0)
    lora = (
        "lora(rank=2, where='attn.q, ffn')" if case.name != "torch-encoder" else "lora(where='ffn')"
    )
    other = "adapter(width=3) + bitfit" if case.name in ("bert", "gpt2") else "adapter(width=3)"
    two(model, lora, f"average({other}, {other})")
    names = ["a", None, "b"]
    singles = [alone(model, name, lambda: values(case, model)) for name in names]
    for delta in dt.deltas(model).values():
        delta.enable()
    outputs = dt.parallel(model, names, **case.batch(0))
    assert len(outputs) == 3
    for output, single in zip(outputs, singles, strict=True):
        assert distance(case.output(output), single) <= 1e-5
    case.output(outputs[2]).square().mean().backward()
    grads = [d.parameters()[0].grad for d in dt.deltas(model).values()]
    assert not grads[0].any() and grads[1].abs().sum() > 0  # type: ignore[union-attr]


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


class Twice(nn.Module):
    """With parameters of its own, and an output of names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Pair:
        return Pair(x * self.weight, 2 * x)


class Sums(nn.Module):
    """Reads a module's output by its names."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = Twice()

    def forward(self, x: Tensor) -> Pair:
        found = self.twice(x)
        return Pair(found.one + found.two, found.two)


def test_tuples_with_names_stay_what_they_are() -> None:
    """Of a module that runs again for rows, and of the model; in shared forwards too."""
    model = Sums()
    two(model, "full", "full")
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    a, b = (dt.deltas(model)[name].vector() for name in "ab")
    found = dt.parallel(model, ["a", None, "b"], x)
    for output, delta in zip(found, (a, torch.zeros(4), b), strict=True):
        assert isinstance(output, Pair)
        torch.testing.assert_close(output.one, x * (1 + delta) + 2 * x)
    calls = [Call((x[:1],), {}), Call((x[1:],), {})]
    joined = Joiner(model).join(calls)
    for part, call in zip(joined.split(model(*joined.call.args)), calls, strict=True):
        assert isinstance(part, Pair)
        torch.testing.assert_close(part.two, 2 * call.args[0])


def test_parallel_refuses_what_cannot_be_taken_apart() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    two(model, "lora(rank=2)")
    batch = case.batch(0)
    with pytest.raises(AttachError, match="leave `labels` out"):
        dt.parallel(model, ["a", "b"], **batch, labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(AttachError, match="a name for each output"):
        dt.parallel(model, [], **batch)
    with pytest.raises(AttachError, match="names the delta `aa`"):
        dt.parallel(model, ["aa"], **batch)
    clip = ZOO["clip"]
    with pytest.raises(AttachError, match="compares the rows of a batch"):
        dt.parallel(clip.build(0), [None, None], **clip.batch(0))


# --- one delta like any other --------------------------------------------------------------------

NESTED = [
    "lora(rank=2, where='ffn') >> adapter(width=2) >> adapter(width=3, placement='parallel')",
    "average(lora(rank=1, where='ffn'), adapter(width=2) >> adapter(width=2), weights=(0.4, -1.0))",
    "split(lora(rank=2, where='ffn'), average(adapter(width=2), adapter(width=3)), at=2)",
    "gate(lora(rank=2, where='ffn'), fuse(adapter(width=2), adapter(width=3)) + adapter(width=1))",
    "drop(fuse(adapter(width=2), adapter(width=3), dropout=0.1), layers='0') + lora(where='ffn')",
]


@pytest.mark.parametrize("text", NESTED)
@every_model
def test_a_composite_is_a_delta_like_any_other(case: Case, text: str, tmp_path: Path) -> None:
    model = case.build(0)
    plain, before = values(case, model), Snapshot.of(model)
    assert dt.parse(str(dt.parse(text))) == dt.parse(text)
    assert dt.plan(model, text).count() == dt.attach(model, text).count()
    dt.deltas(model)["delta"].detach()
    before.check(model)
    delta = moved(model, text, head=False)
    acting = values(case, model)
    assert distance(acting, plain) > 1e-3
    # saved, loaded, copied
    loaded = dt.load(delta.save(tmp_path / "saved"), case.build(0))
    assert loaded.spec == delta.spec and torch.equal(loaded.vector(), delta.vector())
    assert torch.equal(values(case, loaded.model), acting)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(values(case, twin), acting)
        dt.deltas(twin)["delta"].load_vector(0.5 * delta.vector())
        assert torch.equal(values(case, model), acting)
        assert distance(values(case, twin), acting) > 1e-4
    # a vector, with gradients to all of it and to nothing else
    vector = delta.vector().requires_grad_()
    case.output(delta.call(vector, **case.batch(0))).square().mean().backward()
    assert distance(vector.grad, gradients(case, delta)) <= 1e-5  # type: ignore[arg-type]
    own = {id(p) for p in delta.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    # rows of their own, checkpointed, off and on
    other = dt.attach(model, "lora(rank=2, where='ffn')", "other", seed=0)
    other.load_vector(other.vector() + 0.1)
    with dt.route(model, ["delta", None, "other"]):
        routed = values(case, model)
    for row, name in enumerate(("delta", None, "other")):
        single = alone(model, name, lambda: values(case, model))
        assert distance(routed[row], single[row]) <= 1e-5
    other.detach()
    dt.activate(model, "delta")
    if getattr(twin, "supports_gradient_checkpointing", False):
        again = dt.deltas(twin)["delta"].load_vector(delta.vector())
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        twin.train().gradient_checkpointing_enable(**options)
        torch.manual_seed(0)  # of dropout
        expected = gradients(case, again)
        twin.gradient_checkpointing_disable()
        torch.manual_seed(0)
        assert distance(gradients(case, again), expected) <= 1e-5
    with delta.disabled():
        assert distance(values(case, model), plain) <= 1e-5
    assert torch.equal(values(case, model), acting)
    layers = {unit.site.layer for unit in delta.tree.units} - {None}
    delta.skip(layers)
    assert distance(values(case, model), plain) <= 1e-5
    delta.skip(())
    delta.scale = 0.0
    assert distance(values(case, model), plain) <= 1e-5
    delta.detach()
    before.check(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_split_counts_real_tokens_whatever_the_padding_and_the_cache(name: str) -> None:
    case = ZOO[name]
    where = "attn.q, ffn" if name != "t5" else "encoder.ffn, decoder.ffn"
    model = case.build(0)
    moved(model, f"split(lora(rank=2, where='{where}'), adapter(width=3), at=3)")
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    cached, whole = (model.generate(**case.prompt(), use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert distance(torch.stack(cached.logits), torch.stack(whole.logits)) <= 1e-5
    batches = [case.batch(0)] + ([leftward(case.batch(0))] if name != "t5" else [])
    for batch in batches:
        with torch.no_grad():
            found = model(**batch).logits
            for i, row in enumerate(rows(batch)):
                mask = batch.get("decoder_attention_mask", batch["attention_mask"])[i].bool()
                assert distance(found[i][mask], model(**row).logits[0]) <= 1e-5


def test_a_gate_starts_as_the_average_and_reads_real_tokens_alone() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    sources = two(model, "lora(rank=2, where='attn, ffn') + ia3", "adapter(width=3)")
    found = []
    for kind, options in (("average", {}), ("gate", {}), ("gate", {"by": "example"})):
        delta = compose(model, kind, sources, head=False, **options)
        found.append(values(case, model))
        if options:
            noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(2))
            delta.load_vector(delta.vector() + 0.2 * noise)
            whole = values(case, model)
            assert distance(whole, found[0]) > 1e-3
            batch = case.batch(0)
            alone_ = torch.cat([model(**row).logits for row in rows(batch)])
            assert distance(whole, alone_) <= 1e-5
            with dt.route(model, [None, "composed", "a"]):
                assert distance(values(case, model)[1], whole[1]) <= 1e-5
        delta.detach()
    assert distance(found[1], found[0]) <= 1e-5 and distance(found[2], found[0]) <= 1e-5


def test_parts_fold_in_their_places() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    delta = moved(model, "gate(lora(where='ffn'), adapter(width=2)) >> prefix(tokens=2, mlp=4)")
    acting = values(case, model)
    folded = delta.fold()
    assert str(folded.spec) == "gate(lora(where='ffn'), adapter(width=2)) >> prefix(tokens=2)"
    assert distance(values(case, model), acting) <= 1e-6
    with pytest.raises(AttachError, match="already in its plain form"):
        folded.fold()


def test_a_mean_of_loras_is_one_lora_for_peft(tmp_path: Path) -> None:
    case = ZOO["bert"]
    model = case.build(0)
    delta = moved(model, "average(lora(rank=2), lora(rank=3), weights=(0.2, 0.5))")
    acting = values(case, model)
    dt.save_peft(delta, tmp_path / "peft")
    delta.detach()
    assert str(dt.load_peft(tmp_path / "peft", model).spec) == "lora(rank=5, alpha=5.0)"
    assert distance(values(case, model), acting) <= 1e-5


def test_a_compiled_composite_is_the_eager_one() -> None:
    case = ZOO["bert"]
    text = "split(fuse(adapter(width=2), adapter(width=3)), lora(rank=2, where='attn.v'), at=2)"
    check_compiled(case, moved(case.build(0), text).model)


# --- fusion --------------------------------------------------------------------------------------


def test_fusion_is_learned_over_saved_adapters_that_stay_as_they_are(tmp_path: Path) -> None:
    case = ZOO["bert"]
    model = case.build(0)
    text = "adapter(width=3, placement='pfeiffer', where='ffn')"
    folders = [d.save(tmp_path / d.name) for d in two(model, text)]
    before = {
        f"{d.name}.{n}": t.clone()
        for d in dt.deltas(model).values()
        for n, t in d.tensors().items()
    }
    for delta in list(dt.deltas(model).values()):
        delta.detach()
    fused = compose(model, "fuse", folders, frozen=True, seed=0)
    d = 16
    assert fused.count(head=False) == 2 * (3 * d * d + 2 * d)
    with pytest.raises(dt.DeltuneError, match="plain optimiser steps"):
        case.run(model.train())
    model.eval()
    penalties = []
    optimiser = torch.optim.AdamW(fused.parameters(), lr=1e-2)
    with Course(model) as course:
        for step in range(2):
            optimiser.zero_grad()
            course.before_step(step, 2)
            case.run(model).square().mean().backward()
            without = [p.grad.clone() for p in fused.parameters()]  # type: ignore[union-attr]
            course.after_backward()
            penalties.append([p.grad - g for p, g in zip(fused.parameters(), without, strict=True)])
            optimiser.step()
            course.after_step()
    tensors = fused.tensors()
    for name, value in before.items():
        source, _, own = name.partition(".")
        kept = own if source == "a" else own.replace("adapter.", "adapter_2.", 1)
        assert torch.equal(tensors[kept], value)
    # The gradient of 0.01 ||V - I||^2 is 0.02 (V - I), which was 1e-6 beside the diagonal at first.
    (first, *_), (second, *_) = (
        [g for g, s in zip(grads, fused.layout, strict=True) if s.name.endswith(".V")]
        for grads in penalties
    )
    assert distance(first, 0.02 * 1e-6 * (1 - torch.eye(d))) <= 1e-2  # a small part of the whole
    assert second.abs().max() > 1e-4
    again = dt.load(fused.save(tmp_path / "fused"), case.build(0))
    assert torch.equal(values(case, again.model), values(case, model))
    assert again.spec == fused.spec and {n: t.shape for n, t in again.tensors().items()} == {
        n: t.shape for n, t in tensors.items()
    }


def test_the_schedule_of_a_frozen_part_is_over() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    sources = [moved(model, "adalora(rank=3, target=1)", "a"), moved(model, "lora(rank=2)", "b")]
    gated = compose(model, "gate", sources, frozen=True, seed=0)
    before = {n: t.clone() for n, t in gated.tensors().items()}
    assert gated.count(head=False) == sum(t.numel() for n, t in before.items() if "gate." in n)
    with Course(model) as course:
        assert course.idle
        course.before_step(0, 2)
        case.run(model.train()).square().mean().backward()
        course.after_backward()
        course.after_step()
    case.run(model)  # nor does a plain loop leave anything out
    assert all(torch.equal(t, before[n]) for n, t in gated.tensors().items())


def test_one_adapter_or_two_alike_are_fused_to_the_adapter() -> None:
    """METHODS: with V = I, N = 1 or N equal parts give the single part, whatever Q and K."""
    case = ZOO["gpt2"]
    model = case.build(0)
    a = moved(model, "adapter(width=3)", "a")
    single = values(case, model)
    for sources in ([a], [a, a]):
        fused = compose(model, "fuse", sources)
        exact = {
            n: torch.eye(len(t)) if n.endswith(".V") else t for n, t in fused.tensors().items()
        }
        fused.load_tensors(exact)
        assert distance(values(case, model), single) <= 1e-5
        fused.detach()
        a.enable()


# --- which of many act ---------------------------------------------------------------------------


def test_activating_leaves_the_order_of_attaching() -> None:
    case = ZOO["bert"]
    texts = ["adapter(width=2)", "adapter(width=3) >> adapter(width=2, placement='parallel')"]
    texts += ["prefix(tokens=2)", "average(adapter(width=1), adapter_bias(reads='output'))"]
    texts += ["prompt(tokens=2)", "adapter(width=4)", "lora(rank=2, where='ffn')"]
    model = case.build(0)
    before = Snapshot.of(case.build(0))
    for i, text in enumerate(texts):
        moved(model, text, str(i), head=i == 0)
    whole = values(case, model)
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        names = [str(i) for i in range(len(texts)) if torch.rand((), generator=draw) < 0.5]
        dt.activate(model, names)
        found = values(case, model)
        dt.activate(model, None)
        for delta in dt.deltas(model).values():  # all hooks anew, in the order of attaching
            if delta.name in names:
                delta.enable()
        assert torch.equal(values(case, model), found)
        dt.activate(model, [str(i) for i in range(len(texts))])
        assert torch.equal(values(case, model), whole)
    for delta in list(dt.deltas(model).values()):
        delta.detach()
    before.check_twin(model)


def test_activating_touches_the_sites_of_those_that_change_alone() -> None:
    model = ZOO["gpt2"].build(0)
    for k in range(20):
        dt.attach(model, "adapter(width=2)", str(k))
    dt.activate(model, "3")
    calls = []
    for delta in dt.deltas(model).values():
        for unit in delta.tree.units:
            unit.__dict__["install"] = lambda root, u=unit: (
                calls.append(u),
                type(u).install(u, root),
            )
    dt.activate(model, "4")
    assert len(calls) == len(dt.deltas(model)["4"].tree.units)
    calls.clear()
    dt.activate(model, ["4", "19"])
    assert len(calls) == len(dt.deltas(model)["19"].tree.units)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("average(prefix(tokens=2), prefix(tokens=3))", "`prefix` has no mean"),
        ("average(prompt(tokens=2), lora)", "`prompt` has no mean"),
        ("average(head, lora)", "`head` has no mean"),
        ("split(bitfit, lora, at=2)", "`bitfit` at .* changes what is one for all tokens"),
        ("gate(prefix(tokens=2), lora)", "`prefix` at .* changes what is one for all tokens"),
        ("fuse(adapter, lora)", "`lora` at .* is none; mix it by"),
        ("fuse(adapter, gate(lora, lora))", "`gate` at .* is none; mix it by"),
        ("drop(lora, layers='7')", "leaves nothing out"),
        ("drop(prompt(tokens=2), layers='0')", "leaves nothing out"),
        ("drop(lora, layers='0:9')", "reaches to 9"),
        ("drop(lora, layers='0, 1')", "leaves nothing of its parts"),
        ("split(lora(where='embed'), lora, at=2)", "is in no block with a self-attention"),
        ("fuse(adapter, adapter, frozen=True)", "would stay as they start"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(text: str, said: str) -> None:
    model = ZOO["bert"].build(0)
    before = Snapshot.of(model)
    with pytest.raises((AttachError, WhereError), match=said):
        dt.attach(model, text)
    before.check(model)


def test_shares_of_an_example_and_tokens_of_another_stack_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="would show them what is to come"):
        dt.attach(ZOO["llama"].build(0), "gate(lora, lora, by='example')")
    with pytest.raises(AttachError, match="reads those of the other"):
        dt.attach(ZOO["t5"].build(0), "split(lora(where='cross.attn.k'), lora, at=2)")
    with pytest.raises(AttachError, match="in no block with a self-attention"):
        dt.attach(ZOO["torch-mlp"].build(0), "split(lora(where='0'), lora(where='0'), at=2)")
    delta = dt.attach(ZOO["gpt2"].build(0), "split(lora, adapter, at=2)")
    with pytest.raises(AttachError, match="mixes its parts anew for each token"):
        delta.merge()
    with pytest.raises(dt.DeltuneError, match="PEFT keeps one method"):
        dt.save_peft(delta, "never")
    for source in (delta, delta.save(tmp_path / "split")):
        with pytest.raises(MergeError, match="made by `split`, and its tensors are no terms"):
            merge([source, source])


def test_sources_are_checked(tmp_path: Path) -> None:
    model, other = ZOO["bert"].build(0), ZOO["bert"].build(1)
    a = moved(model, "adapter(width=2)", "a")
    theirs = moved(other, "adapter(width=2)", "b")
    before = len(dt.deltas(model))
    for source in (theirs, theirs.save(tmp_path / "b")):
        with pytest.raises((AttachError, StoreError), match="another backbone"):
            compose(model, "average", [a, source])
    with pytest.raises(SpecError, match="no operator `mean`"):
        compose(model, "mean", [a])
    with pytest.raises(AttachError, match="is attached already"):
        compose(model, "average", [a], "a")
    assert len(dt.deltas(model)) == before and a.enabled
    both = compose(model, "average", [a, theirs], force=True)
    assert both.count() == 2 * a.count(head=False) + both.count() - both.count(head=False)
    with pytest.raises(AttachError, match="no delta `b` is attached"):
        dt.activate(model, ["b"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("average(lora, weights=(1.0, 2.0))", "one for each of the 1 parts"),
        ("average()", "1 specs or more"),
        ("split(lora, at=2)", "2 specs or more"),
        ("split(lora, lora, at=(3, 2))", "1 rising positions"),
        ("split(lora, lora, at=0)", "1 rising positions"),
        ("drop(lora)", "layers such as"),
        ("fuse(lora, penalty_weight=-1.0)", "0 or more"),
        ("average(lora, bogus=1)", "no field `bogus`"),
        ("averege(lora, lora)", "is not a spec"),
        ("average(lora, 3)", "is not a spec"),
        ("average(lora)[4:]", "put the brackets behind each method"),
        ("lora(adapter)", "is not a spec"),
    ],
)
def test_bad_text_is_named(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said.replace("(", r"\(")):
        dt.parse(text)


def test_bad_json_is_refused() -> None:
    part = {"kind": "bitfit"}
    for data in (
        {"kind": "average", "parts": "x"}, {"kind": "average"}, {"kind": "stack", "parts": [part]},
        {"kind": "split", "parts": [part] * 2, "at": "x"},
        {"kind": "average", "parts": [part], "within": "0:2"},
    ):  # fmt: skip
        with pytest.raises(SpecError):
            codec.from_json(data)
    for _ in range(40):
        part = {"kind": "average", "parts": [part]}
    with pytest.raises(SpecError, match="operators inside each other"):
        codec.from_json(part)


# --- nested at random ----------------------------------------------------------------------------

LEAVES = st.sampled_from(
    [
        "lora(rank=1, where='0')", "lora(rank=2, where='0')", "bitfit(where='0')",
        "adapter(width=2, where='0')", "adapter(width=2, where='0', placement='parallel')",
        "ia3(where='0', inputs='')",
    ]
).map(dt.parse)  # fmt: skip
TOKENWISE = LEAVES.filter(lambda spec: spec.kind != "bitfit")
INSERTS = LEAVES.filter(lambda spec: spec.kind == "adapter")


def nested(leaves: st.SearchStrategy[dt.Spec], depth: int) -> st.SearchStrategy[dt.Spec]:
    if depth == 0:
        return leaves
    below = nested(leaves, depth - 1)
    some = st.lists(below, min_size=1, max_size=2)
    few = st.lists(below, min_size=2, max_size=2)
    found = [
        leaves,
        few.map(lambda parts: parts[0] + parts[1]),
        few.map(lambda parts: parts[0] >> parts[1]),
        st.builds(
            lambda parts, w: average(*parts, weights=w[: len(parts)]),
            some,
            st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=2),
        ),
    ]
    if leaves is not LEAVES:
        found.append(
            st.builds(
                lambda p, k: gate(*p, shares=k), some, st.sampled_from(["softmax", "sigmoid"])
            )
        )
    if leaves is INSERTS:
        found.append(some.map(lambda parts: fuse(*parts)))
    return st.one_of(found)


SPECS = st.one_of(nested(LEAVES, 2), nested(TOKENWISE, 2), nested(INSERTS, 2))


@given(SPECS, st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_nested_operators_are_written_and_read_back(spec: dt.Spec, at: int) -> None:
    for one in (spec, split(spec, spec, at=at), drop(spec, layers="0:2"), spec >> spec + spec):
        assert dt.parse(str(one)) == one
        assert codec.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert (spec >> spec) >> spec == spec >> (spec >> spec)


Function = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Unit:
    """One function (h, x) -> h at the place; those of turn 0 are changes of the weight."""

    turn: int
    act: Function


def chain(units: list[Unit]) -> Function:
    def act(h: Tensor, x: Tensor) -> Tensor:
        for unit in sorted(units, key=lambda unit: unit.turn):
            h = unit.act(h, x)
        return h

    return act


class Meaning:
    """What a spec means at the output of one linear map, without deltune: the operators' laws."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.times, self.bias = tensors, {}, torch.zeros(4)

    def own(self, kind: str, place: str = "0") -> dict[str, Tensor]:
        n = self.times[kind] = self.times.get(kind, 0) + 1
        mark = f"{kind if n == 1 else f'{kind}_{n}'}.{place}."
        return {k.removeprefix(mark): t for k, t in self.tensors.items() if k.startswith(mark)}

    def units(self, spec: dt.Spec, factor: float = 1.0) -> list[Unit]:
        if isinstance(spec, codec.Sum):
            return [unit for part in spec.parts for unit in self.units(part, factor)]
        if isinstance(spec, codec.Stack):
            found: list[Unit] = []
            for part in spec.parts:
                floor = max((unit.turn for unit in found), default=0)
                found += [
                    Unit(u.turn and max(u.turn, floor), u.act) for u in self.units(part, factor)
                ]
            return found
        if spec.kind == "average":
            return self.averaged(spec, factor)
        if spec.kind in ("gate", "fuse"):
            return self.mixed(spec, factor)
        return [unit for unit in self.leaf(spec, factor)]

    def leaf(self, spec: dt.Spec, s: float) -> list[Unit]:
        t = self.own(spec.kind)
        if spec.kind == "lora":
            dw = spec.alpha / spec.rank * t["B"] @ t["A"]  # type: ignore[attr-defined]
            return [Unit(0, lambda h, x: h + s * x @ dw.T)]
        if spec.kind == "bitfit":
            self.bias = self.bias + s * t["bias"]
            return []
        if spec.kind == "ia3":
            return [Unit(2, lambda h, x: h + s * t["d"] * h)]

        def f(x: Tensor) -> Tensor:
            return F.gelu(x @ t["D"].T + t["b1"], approximate="tanh") @ t["U"].T + t["b2"]

        if spec.placement == "parallel":  # type: ignore[attr-defined]
            return [Unit(1, lambda h, x: h + s * f(x))]
        return [Unit(2, lambda h, x: h + s * f(h))]

    def averaged(self, spec: dt.Spec, factor: float) -> list[Unit]:
        parts, weights = spec.parts, spec.factors  # type: ignore[attr-defined]
        found = []
        for part, w in zip(parts, weights, strict=True):
            # Changes of the weight are scaled, functions mixed: only the former have the factor.
            meant = self.scaled(part, factor * w)
            found.append((w, meant))
        first = [unit for _, units in found for unit in units if unit.turn == 0]
        later = [(w, [u for u in units if u.turn]) for w, units in found]
        if not any(units for _, units in later):
            return first

        def act(h: Tensor, x: Tensor) -> Tensor:
            return h + factor * sum(w * (chain(us)(h, x) - h) for w, us in later if us)

        return [*first, Unit(max(u.turn for _, us in later for u in us), act)]

    def scaled(self, part: dt.Spec, factor: float) -> list[Unit]:
        """A part of an average: its changes of weights with a factor, its functions without."""
        times, bias = dict(self.times), self.bias
        changed = [unit for unit in self.units(part, factor) if unit.turn == 0]
        with_bias, self.times, self.bias = self.bias, times, bias
        functions = [unit for unit in self.units(part, 1.0) if unit.turn]
        self.bias = with_bias
        return changed + functions

    def mixed(self, spec: dt.Spec, factor: float) -> list[Unit]:
        groups = [self.units(part) for part in spec.parts]  # type: ignore[attr-defined]
        n = self.times[spec.kind] = self.times.get(spec.kind, 0) + 1
        name, found = spec.kind if n == 1 else f"{spec.kind}_{n}", []
        for level, place in ((True, "0.weight"), (False, "0")):
            parts = [[u for u in units if (u.turn == 0) == level] for units in groups]
            if not any(parts):
                continue
            mark = f"{name}.{place}."
            t = {k.removeprefix(mark): v for k, v in self.tensors.items() if k.startswith(mark)}

            def act(h: Tensor, x: Tensor, parts=parts, t=t) -> Tensor:  # type: ignore
                here = [i for i, units in enumerate(parts) if units]
                z = torch.stack([chain(parts[i])(h, x) - h for i in here], -2)
                if spec.kind == "gate":
                    scores = h @ t["W"].T + t["b"]
                    soft = spec.shares == "softmax"  # type: ignore[attr-defined]
                    shares = (scores.softmax(-1) if soft else scores.sigmoid())[..., here]
                    return h + factor * (shares[..., None] * z).sum(-2)
                q, k = h @ t["Q"].T + t["b_q"], z @ t["K"].T + t["b_k"]
                s = (q[..., None, :] * k).sum(-1).softmax(-1)
                return h + factor * ((s[..., None] * z).sum(-2)) @ t["V"].T

            found.append(Unit(max(u.turn for us in parts for u in us), act))
        return found


@example(dt.parse("gate(lora(rank=1, where='0'), adapter(where='0'))"), 1)
@example(
    dt.parse("average(ia3(where='0', inputs=''), lora(rank=1, where='0') >> adapter(where='0'))"), 1
)
@given(SPECS, st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_nested_operators_mean_what_their_laws_say(spec: dt.Spec, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
        x = torch.randn(2, 3, 4)
    delta = dt.attach(model, spec, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    delta.load_vector(0.5 * torch.randn(delta.layout.size, generator=draw))
    meaning = Meaning(delta.tensors())
    units = meaning.units(spec)
    with torch.no_grad():
        found = model(x)
        plain = F.linear(x, model[0].weight, model[0].bias + meaning.bias)
        oracle = chain(units)(plain, x)
    assert distance(found, oracle) <= 1e-5 * float(oracle.abs().max().clamp(min=1))
