"""Every method on every architecture obeys the same laws.

Oracles: the model before anything was attached, bit for bit; the attached model itself on another
way (merged, saved and loaded, called functionally, copied, checkpointed, compiled, row by row,
without a cache).
"""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from rows import leftward, rows
from snapshots import Snapshot, distance
from zoo import ZOO, Case

# sdpa picks other kernels where gradients are needed, so "equal" is only to rounding for some.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Method:
    """A spec and what METHODS.md promises: how near the start is to the identity; merging."""

    text: str
    start: float | None = None
    merges: bool = False


METHODS = {
    "lora": Method("lora(rank=2, dropout=0.1)", ROUNDING, merges=True),
    "lora-all": Method("lora(rank=2, where='attn, ffn')", ROUNDING, merges=True),
    "lora-embed": Method("lora(rank=2, where='embed')", ROUNDING, merges=True),
    "adapter-serial": Method("adapter(width=3)", 1e-3),
    "adapter-pfeiffer": Method("adapter(width=3, placement='pfeiffer', init='zero')", ROUNDING),
    "adapter-parallel": Method("adapter(width=3, placement='parallel', init='zero')", ROUNDING),
    "prefix": Method("prefix(tokens=3)"),
    "prefix-mlp": Method("prefix(tokens=3, mlp=4, dropout=0.1)"),
    "prefix-shift": Method("prefix(tokens=2, positions='shift')"),
    "prompt": Method("prompt(tokens=3)"),
    "bitfit": Method("bitfit", ROUNDING, merges=True),
    "bitfit-where": Method("bitfit(where='attn.q, ffn.up')", ROUNDING, merges=True),
    "full": Method("full", ROUNDING, merges=True),
    "last": Method("last(layers=1)", ROUNDING, merges=True),
    "head": Method("head", ROUNDING, merges=True),
    "lora+bitfit": Method("lora(rank=2) + bitfit", ROUNDING, merges=True),
    "prefix+adapter": Method("prefix(tokens=2) + adapter(width=3)"),
}
NO_BIASES = "modernbert llama qwen3 gemma3 phi3 mixtral qwen3-moe t5 t5-gated"
NO_HEAD = (
    "gpt2 gpt-neox opt llama qwen3 gemma3 phi3 mixtral qwen3-moe t5 t5-gated bart marian clip "
    "whisper torch-encoder torch-mlp"
)
PREFIXES = "prefix prefix-mlp prefix-shift prefix+adapter"
# (methods, architectures, what the error says): the pairs that cannot work.
REFUSED = [
    ("bitfit bitfit-where lora+bitfit", NO_BIASES, "has no biases to tune"),
    ("bitfit-where", "gpt2 gpt-neox torch-encoder", "`attn.q` .* matches nothing .*`attn.qkv`"),
    ("head", NO_HEAD, "no newly initialised task head"),
    ("lora-embed", "vit dinov2 torch-encoder", "`embed` matches nothing"),
    (PREFIXES, "deberta-v2 torch-encoder", "computes attention itself"),
    ("prefix-shift", "vit dinov2", "no position module was found"),
    ("prefix-shift", "clip whisper", "input of .* has a fixed length"),
    ("prompt", "vit dinov2 clip whisper torch-encoder", "takes `inputs_embeds`"),
    (PREFIXES, "torch-mlp", "needs attention layers"),
    ("prompt", "torch-mlp", "needs a stack of blocks"),
    ("last", "torch-mlp", "has no blocks"),
    (
        "lora lora-all lora-embed adapter-serial adapter-pfeiffer adapter-parallel bitfit-where "
        "lora+bitfit",
        "torch-mlp",
        "matches nothing .*no attention blocks found",
    ),
]


def refusals() -> dict[tuple[str, str], str]:
    """The reason for each pair that cannot work."""
    return {
        (method, name): reason
        for methods, names, reason in REFUSED
        for method in methods.split()
        for name in names.split()
    }


def pairs() -> Iterator[object]:
    """Every method on every architecture where it can work."""
    for name in ZOO:
        for method in METHODS:
            if (method, name) not in refusals():
                yield pytest.param(ZOO[name], METHODS[method], id=f"{name}-{method}")


def attached(case: Case, method: Method, seed: int = 0, noise: float = 0.05) -> dt.Delta:
    """A delta on a fresh model, away from its start."""
    delta = dt.attach(case.build(seed), method.text, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    change = torch.randn(delta.layout.size, generator=generator)
    return delta.load_vector(delta.vector() + noise * change)


def values(case: Case, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return case.run(model, seed)


def gradients(case: Case, delta: dt.Delta) -> Tensor:
    """The gradient of a loss, as a vector in layout order."""
    for parameter in delta.parameters():
        parameter.grad = None
    case.run(delta.model).square().mean().backward()
    return torch.cat([p.grad.reshape(-1) for p in delta.parameters() if p.grad is not None])


PAIRS = list(pairs())
every_pair = pytest.mark.parametrize(("case", "method"), PAIRS)
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
    listed = [
        (method, name)
        for methods, names, _ in REFUSED
        for method in methods.split()
        for name in names.split()
    ]
    assert len(listed) == len(set(listed))
    assert all(method in METHODS and name in ZOO for method, name in listed)


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
    for step in range(2):
        optimiser.zero_grad()
        case.run(model, step).square().mean().backward()
        optimiser.step()
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
    if not method.merges:
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


@every_pair
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


@every_pair
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


@every_pair
def test_two_of_a_kind_come_off_in_either_order(case: Case, method: Method) -> None:
    model, seeds, alone = case.build(0), {"a.b": 3, "second one": 4}, {}
    before = Snapshot.of(model)
    for name, seed in seeds.items():
        delta = joined(model, method.text, name, seed)
        alone[name] = values(case, model)
        delta.detach()
    for first, second in permutations(seeds):
        for name, seed in seeds.items():
            joined(model, method.text, name, seed)
        both = values(case, model)
        if method.text != "head":  # of several heads, the last attached is in force
            assert all(distance(both, single) > 1e-5 for single in alone.values())
        dt.deltas(model)[first].detach()
        assert torch.equal(values(case, model), alone[second])
        dt.deltas(model)[second].detach()
        before.check(model)


def joined(model: nn.Module, text: str, name: str, seed: int) -> dt.Delta:
    """One more delta on a model, away from its start."""
    delta = dt.attach(model, text, name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return delta.load_vector(
        delta.vector() + 0.05 * torch.randn(delta.layout.size, generator=generator)
    )


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
            joined(model, texts[i], str(i), i)
        for left in range(len(texts), 0, -1):
            acting = values(case, model)
            for i in order[-left:]:
                joined(other, texts[i], str(i), i)
            assert torch.equal(acting, values(case, other))
            for delta in dt.deltas(other).values():
                delta.detach()
            dt.deltas(model)[str(order[-left])].detach()
        before.check(model)


@every_pair
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


@every_case
def test_compiled_equals_eager(case: Case) -> None:
    # One delta of each mechanism at once: compiling each pair alone takes a quarter of an hour.
    model = case.build(0)
    texts = workable(case, "lora", "adapter-serial", "prefix", "prompt", "last")
    for text in texts or workable(case, "full"):
        joined(model, text, text, 5)
    expected = values(case, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert distance(values(case, compiled), expected) <= 1e-6
    for delta in dt.deltas(model).values():
        delta.load_vector(0.5 * delta.vector())
    assert distance(values(case, compiled), values(case, model)) <= 1e-6


@pytest.mark.parametrize(
    ("case", "method"),
    [p for p in PAIRS if p.values[0].family in ("encoder", "decoder", "encoder-decoder")],
)
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
                    mask = batch[
                        "decoder_attention_mask"
                        if "decoder_attention_mask" in batch
                        else "attention_mask"
                    ]
                    padded = padded[mask[i].bool()]
                assert distance(padded, alone) <= 1e-5


@pytest.mark.parametrize(("case", "method"), [p for p in PAIRS if p.values[0].generates])
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
