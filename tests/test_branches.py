"""Branches that read the whole sequence: PALs, APT, ladder side-tuning. Oracles: the formulas,
written out; the model without the branch; published counts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.families.addition.apt import APT
from deltune.families.addition.ladder import Ladder
from deltune.families.addition.p_tuning_v2 import PTuningV2
from deltune.families.addition.pals import PALs
from deltune.sites.discover import discover
from probes import logits, moved, of, seen
from rows import rows
from shapes import meta_model
from snapshots import distance
from zoo import HEADS, HIDDEN, INNER, LABELS, ZOO

LAYER = "bert.encoder.layer.1"
SMALL = PALs(width=4, heads=2)
RUNGS = Ladder(reduction=2, heads=2)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Attention head by head; `allowed` (batch, queries, keys)."""
    found = []
    for one, other, value in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
        scores = one @ other.mT / one.shape[-1] ** 0.5
        found.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value)
    return torch.cat(found, -1)


def pal(delta: dt.Delta, h: Tensor, path: str, stack: str, allowed: Tensor) -> Tensor:
    """GELU(D MHA(E h + b_E) + b_D)."""
    s, t = of(delta, f"shared:{stack}"), of(delta, path)
    x = F.linear(h, s["E"], s["b_E"])
    q, k, v = (F.linear(x, t[n], t[f"b_{n.lower()}"]) for n in "QKV")
    return F.gelu(F.linear(attention(q, k, v, SMALL.heads, allowed), s["D"], s["b_D"]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_pals_of_a_post_norm_block(implementation: str) -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    model.set_attn_implementation(implementation)
    delta, layer = moved(model, SMALL), model.get_submodule(LAYER)
    found = seen(model, [LAYER, f"{LAYER}.attention"], lambda: model(**batch))
    (h, out), (a, *_) = found[LAYER], found[f"{LAYER}.attention"][1]
    allowed = batch["attention_mask"].bool()[:, None, :].expand(-1, 7, -1)
    with torch.no_grad(), delta.disabled():
        ffn = layer.output.dense(layer.intermediate(a))
        change = pal(delta, h, LAYER, "encoder", allowed)
        assert distance(out, layer.output.LayerNorm(ffn + a + change)) <= 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_pals_of_a_causal_pre_norm_block(padded: bool, implementation: str) -> None:
    model, batch = ZOO["llama"].build(0), ZOO["llama"].batch(0)
    model.set_attn_implementation(implementation)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    delta, path = moved(model, SMALL), "model.layers.1"
    parts = [path, f"{path}.self_attn", f"{path}.post_attention_layernorm"]
    found = seen(model, parts, lambda: model(**batch))
    layer, (h, out), a = model.get_submodule(path), found[path], found[parts[2]][0]
    allowed = batch["attention_mask"].bool()[:, None, :] & torch.ones(7, 7).tril().bool()
    with torch.no_grad(), delta.disabled():
        plain = a + layer.mlp.down_proj(
            layer.mlp.act_fn(layer.mlp.gate_proj(x := found[parts[2]][1])) * layer.mlp.up_proj(x)
        )
        change = pal(delta, layer.input_layernorm(h), path, "decoder", allowed)
    assert distance(out, plain + change) <= 1e-5


def test_pals_count_share_and_vanish_as_published() -> None:
    plan = dt.plan(meta_model("bert-base"), "pals")
    assert plan.count() == 1_819_836
    assert sum(slot.size for slot in plan.layout if "shared:" in slot.name) == 314_316
    model, case = ZOO["bart"].build(0), ZOO["bart"]
    plain, delta = logits(model, case.batch(0)), moved(model, SMALL)
    shared = {id(unit.shared) for unit in delta.tree.units}
    assert len(shared) == 2 and len(delta.tree.units) == 4
    for stack in ("encoder", "decoder"):
        for name in ("D", "b_D"):
            of(delta, f"shared:{stack}")[name].zero_()
    assert torch.equal(logits(model, case.batch(0)), plain)


def test_branches_start_as_published() -> None:
    tensors = dt.attach(ZOO["bert"].build(0), PALs(width=48), head=False, seed=1).tensors()
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            assert not tensor.any(), name
        else:
            assert abs(float(tensor.std()) / 0.02 - 1) < 0.15, name
    tensors = dt.attach(ZOO["bert"].build(0), APT(tokens=200), head=False, seed=1).tensors()
    for name, tensor in tensors.items():
        if name.endswith(".lam"):
            assert torch.equal(tensor, torch.ones(1))
        else:
            assert abs(float(tensor.std()) / 0.02 - 1) < 0.1, name


def test_a_ladder_starts_with_plain_norms_half_open_gates_and_no_effect() -> None:
    tensors = dt.attach(ZOO["bert"].build(0), RUNGS, head=False, seed=1).tensors()
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if last in ("n", "n1", "n2"):
            assert tensor.eq(1).all(), name
        elif last in ("U", "u", "c", "a"):
            assert not tensor.any(), name
        else:
            bound = tensor.shape[-1] ** -0.5  # as PyTorch starts a linear map
            assert 0.85 * bound < float(tensor.abs().max()) <= bound, name


def test_only_the_task_that_acts_learns() -> None:
    model, case = ZOO["bert"].build(0), ZOO["bert"]
    first, second = (moved(model, SMALL, name) for name in ("first", "second"))
    second.disable()
    case.run(model).square().mean().backward()
    assert all(p.grad is not None for p in first.parameters())
    assert all(p.grad is None for p in second.parameters())


@pytest.mark.parametrize("spec", [SMALL, RUNGS, Ladder(reduction=2, attention=False)])
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3", "t5", "clip"])
def test_causal_branches_do_not_look_ahead(name: str, spec: dt.Spec) -> None:
    model, case = ZOO[name].build(0), ZOO[name]
    moved(model, spec)
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    batch = {n: t for n, t in case.batch(0).items() if not n.endswith("attention_mask")}
    later = {**batch, key: torch.cat([batch[key][:, :2], batch[key][:, 2:].flip(1)], 1)}
    states = []
    for given in (batch, later):
        with torch.no_grad():
            out = model(**given)
        states.append(out.text_model_output.last_hidden_state if name == "clip" else out.logits)
    assert distance(states[0][:, :2], states[1][:, :2]) <= 1e-6
    assert distance(states[0], states[1]) > 1e-3


@pytest.mark.parametrize("spec", [SMALL, APT(tokens=2), RUNGS])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_an_empty_cache_of_any_kind_is_no_hindrance(name: str, spec: dt.Spec) -> None:
    from transformers import DynamicCache, StaticCache

    model, batch = ZOO[name].build(0), ZOO[name].batch(0)
    moved(model, spec)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=12)):
            assert distance(model(**batch, past_key_values=cache).logits, expected) <= 1e-5
            with pytest.raises(dt.DeltuneError, match="pass `use_cache=False`"):
                model(input_ids=batch["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("summary", ["first", "mean"])
def test_an_adaptive_prefix_follows_the_formula(summary: str) -> None:
    model, batch, path = ZOO["bert"].build(0), ZOO["bert"].batch(0), LAYER[:-1] + "0.attention.self"
    embedded = seen(model, ["bert.embeddings"], lambda: model(**batch))["bert.embeddings"][1]
    delta = moved(model, APT(tokens=2, summary=summary, positions="keep"))  # type: ignore
    t, layer, mask = of(delta, path), model.get_submodule(path), batch["attention_mask"]
    x, found = seen(model, [path], lambda: model(**batch))[path]
    assert torch.equal(x, embedded)  # the gate of the first layer reads the embeddings
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    alpha = torch.sigmoid((x[:, 0] if summary == "first" else mean) @ t["W"].mT)[..., None]
    assert ((alpha > 0) & (alpha < 1)).all()
    with torch.no_grad():
        key, value = (
            torch.cat([t["lam"] * alpha * t[name], linear(x)], 1)
            for name, linear in (("K", layer.key), ("V", layer.value))
        )
        allowed = F.pad(mask.bool(), (2, 0), value=True)[:, None].expand(-1, 7, -1)
        expected = attention(layer.query(x), key, value, HEADS, allowed)
    assert distance(found[0], expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_open_gates_are_p_tuning_v2_bit_for_bit(name: str) -> None:
    model, batch = ZOO[name].build(0), ZOO[name].batch(0)
    plain = moved(model, PTuningV2(tokens=2))
    paths = [unit.site.path for unit in plain.tree.units if unit.site.role == "attn"]
    expected, read = logits(model, batch), seen(model, paths, lambda: model(**batch))
    tensors = {n.replace("p_tuning_v2", "apt"): t.clone() for n, t in plain.tensors().items()}
    plain.detach()
    delta = dt.attach(model, APT(tokens=2))
    for path in paths:  # W h = 50 for the first token of each row, and sigmoid(50) = 1
        w = torch.linalg.pinv(read[path][0][:, 0].double()) @ torch.full((3, 2), 50.0).double()
        tensors |= {f"apt.{path}.W": w.mT.float(), f"apt.{path}.lam": torch.ones(1)}
    assert torch.equal(logits(delta.load_tensors(tensors).model, batch), expected)
    for path in paths:
        tensors[f"apt.{path}.W"] = tensors[f"apt.{path}.W"] / 50
    assert distance(logits(delta.load_tensors(tensors).model, batch), expected) > 1e-3


def test_a_layer_scale_of_zero_leaves_zero_keys_that_draw_attention() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    base, found = logits(model, batch), []
    for spec, zero in ((APT(tokens=2, positions="keep"), "lam"), (dt.Prefix(tokens=2), "KV")):
        delta = dt.attach(model, spec, head=False)
        for name, tensor in delta.tensors().items():
            if name.rpartition(".")[2] in (zero, *zero):
                tensor.zero_()
        found.append(logits(model, batch))
        delta.detach()
    assert torch.equal(found[0], found[1]) and distance(found[0], base) > 1e-4


def test_apt_counts_as_published_and_folds() -> None:
    assert dt.plan(meta_model("bert-base"), "apt").count() == 552_972
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    delta = moved(model, APT(tokens=2, mlp=3))
    expected = logits(model, batch)
    assert str(delta.fold().spec) == "apt(tokens=2)"
    assert distance(logits(model, batch), expected) <= 1e-6


def test_a_ladder_follows_the_formula() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    blocks = [f"bert.encoder.layer.{i}" for i in (0, 1)]
    states = seen(model, blocks, lambda: model(**batch))
    delta = moved(model, RUNGS)
    found = seen(model, ["bert.encoder"], lambda: model(**batch))["bert.encoder"][1]
    shared = of(delta, "shared:encoder")
    allowed = batch["attention_mask"].bool()[:, None, :].expand(-1, 7, -1)

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo().eps).sqrt() * gain

    s = states[blocks[0]][0] @ shared["D"].mT + shared["c"]
    for path in blocks:
        t, h = of(delta, path), states[path][1]
        g = torch.sigmoid(t["a"] / 0.1)
        z = g * s + (1 - g) * (h @ t["D"].mT + t["c"])
        x = norm(z, t["n1"])
        y = z + attention(*(x @ t[n].mT for n in "QKV"), RUNGS.heads, allowed) @ t["O"].mT
        s = y + F.relu(norm(y, t["n2"]) @ t["W1"].mT) @ t["W2"].mT
    change = norm(s, shared["n"]) @ shared["U"].mT + shared["u"]
    assert distance(found.last_hidden_state, states[blocks[1]][1] + change) <= 1e-5
    delta.scale = 0.5
    half = seen(model, ["bert.encoder"], lambda: model(**batch))["bert.encoder"][1]
    assert distance(half.last_hidden_state, states[blocks[1]][1] + change / 2) <= 1e-5


def test_a_ladder_counts_what_it_says() -> None:
    d, w, layers = 768, 96, 12
    each = (d * w + w + 1) + (4 * w**2 + w) + (8 * w**2 + w)
    ends = d * w + w + w + d * w + d
    assert dt.plan(meta_model("bert-base"), "ladder").count() == layers * each + ends
    alone = dt.plan(meta_model("bert-base"), "ladder(attention=False)")
    assert alone.count() == layers * (each - 4 * w**2 - w) + ends
    t5 = dt.plan(meta_model("t5-base"), "ladder")
    assert t5.count() == layers * each + ends
    assert {step.site.stack for step in t5.steps} == {"decoder"}


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "torch-encoder"])
def test_backward_of_a_ladder_touches_nothing_inside_a_block(name: str) -> None:
    touched = {spec: inside(name, spec) for spec in (str(RUNGS), "adapter(width=3)")}
    assert touched[str(RUNGS)] == (False, False)
    assert touched["adapter(width=3)"] == (True, True)


def inside(name: str, spec: str) -> tuple[bool, bool]:
    """Whether anything that modules of the blocks put out needs a gradient, and whether backward
    keeps any of it, other than what the blocks themselves put out."""
    model, case = ZOO[name].build(0), ZOO[name]
    atlas = discover(model)
    blocks = [atlas.modules[site.path] for site in atlas.sites if site.role == "block"]
    parts = {id(m) for block in blocks for m in block.modules()} - {id(block) for block in blocks}
    moved(model, spec)
    made: list[tuple[nn.Module, Tensor]] = []  # all live to the end: no address is used twice
    kept: set[int] = set()

    def note(module: nn.Module, args: object, output: object) -> None:
        made.append((module, output if isinstance(output, Tensor) else output[0]))  # type: ignore

    for module in atlas.modules.values():
        if not isinstance(module, nn.ModuleList) and id(module) in parts | set(map(id, blocks)):
            module.register_forward_hook(note)

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(model).square().mean().backward()
    within, out = (
        {tensor.data_ptr() for module, tensor in made if (id(module) in parts) == part}
        for part in (True, False)
    )
    return any(tensor.requires_grad for _, tensor in made), bool((within - out) & kept)


def test_no_gradient_goes_through_a_ladder_into_another_delta() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    lora = moved(model, "lora(rank=2)", "lora")
    ladder = moved(model, "ladder(reduction=2, heads=2)[1:]", "ladder")
    states: list[Tensor] = []
    for path in ("bert.encoder.layer.1", "bert.encoder"):
        model.get_submodule(path).register_forward_hook(
            lambda m, args, out: states.append(getattr(out, "last_hidden_state", out))
        )
    model(**batch)
    change = (states[1] - states[0]).square().sum()
    for delta, reached in ((lora, False), (ladder, True)):
        own = [p for n, p in delta.tree.named().items() if not n.startswith("head")]
        found = torch.autograd.grad(change, own, retain_graph=True)
        assert any(bool(grad.any()) for grad in found) == reached


@pytest.mark.parametrize("name", ["deberta-v2", "bart", "vit", "albert"])
def test_a_ladder_reaches_the_logits_and_leaves_the_blocks_as_they_are(name: str) -> None:
    model, case = ZOO[name].build(0), ZOO[name]
    plain, before = logits(model, case.batch(0)), dt.attach(model, RUNGS, head=False)
    paths = [unit.site.path for unit in before.tree.units]
    states = seen(model, paths, lambda: case.run(model))
    assert torch.equal(logits(model, case.batch(0)), plain)
    before.detach()
    moved(model, RUNGS, head=False)
    assert distance(logits(model, case.batch(0)), plain) > 1e-3
    for path, (_, out) in seen(model, paths, lambda: case.run(model)).items():
        pair = [x if isinstance(x, Tensor) else x[0] for x in (out, states[path][1])]
        assert torch.equal(*pair)


def test_a_ladder_beside_some_blocks_and_a_prompt() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    moved(model, "prompt(tokens=2)", "prompt")
    delta = moved(model, "ladder(reduction=2, heads=2)[1:]")
    assert [unit.site.layer for unit in delta.tree.units if unit.site.role == "block"] == [1]
    alone = torch.cat([logits(model, row) for row in rows(batch)])
    assert distance(logits(model, batch), alone) <= 1e-5
    dt.deltas(model)["prompt"].detach()
    moved(model, "prompt(tokens=2)", "later")
    with pytest.raises(dt.DeltuneError, match="attach a prompt before it"):
        model(**batch)
    assert delta.tree.units[0].shared.rungs is None  # a call that failed leaves nothing behind


class Classifier(nn.Module):
    """A list of blocks at the root of a model that puts out something else."""

    def __init__(self) -> None:
        super().__init__()
        make = (nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=True) for _ in "ab")
        self.blocks, self.head = nn.ModuleList(make), nn.Linear(HIDDEN, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_ladder_needs_a_stack_that_ends_with_hidden_states() -> None:
    model = Classifier().eval()
    dt.attach(model, RUNGS)
    with pytest.raises(dt.DeltuneError, match="ends with hidden states"):
        model(torch.randn(2, 5, HIDDEN))


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("bert", "pals(width=5, heads=2)", "`heads` must be a divisor of the width 5"),
        ("bert", "pals(width=0)", "`width` must be 1 or more"),
        ("bert", "pals(where='attn')", "matches nothing"),
        ("bert", "apt(gate=True)", "`gate` must be left out"),
        ("bert", "apt(tokens=0)", "`tokens` must be 1 or more"),
        ("bert", "apt(summary='last')", "is not one of `first`, `mean`"),
        ("gpt2", "apt(summary='mean')", "tokens only look back"),
        ("bert", "ladder(reduction=3)", "16 wide .* `reduction` must divide that"),
        ("bert", "ladder(reduction=4, heads=3)", "`heads` what is left"),
        ("bert", "ladder(temperature=0.0)", "`temperature` must be above 0"),
        ("t5", "ladder(reduction=2)[encoder]", "leaves none"),
    ],
)
def test_bad_input_says_what_is_expected(name: str, spec: str, reason: str) -> None:
    with pytest.raises(dt.DeltuneError, match=reason):
        dt.plan(ZOO[name].build(0), spec)
