"""Gates, and the masks that they look at. Oracles: the formulas, written out; each row of a batch
alone; the parts of a combination; published counts."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.families.addition.unipelt import UniPELT
from deltune.mechanisms.masks import allowed_pairs
from deltune.sites import quirks
from probes import logits, moved, of, seen
from rows import rows
from shapes import meta_model
from snapshots import distance
from zoo import HEADS, HIDDEN, ZOO

LAYER = "bert.encoder.layer.1"
FORMS = [True, "padded", "token"]
GATED = ["lora(rank=2, gate=True)", "adapter(width=3, gate=True)", "prefix(tokens=2, gate=True)"]
SMALL = "unipelt(reduction=4, tokens=2, mlp={}, rank=2)"


def gate(x: Tensor, t: dict[str, Tensor], form: bool | str, mask: Tensor) -> Tensor:
    """G = mean over tokens of sigmoid(w_g . x + b_g), the real ones or all; or no mean."""
    value = torch.sigmoid(x @ t["w_g"] + t["b_g"])[..., None]
    if form == "token":
        return value
    weight = mask.float()[..., None] if form is True else torch.ones_like(value)
    return (value * weight).sum(1, True) / weight.sum(1, True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_a_gate_stands_for_alpha_over_r(form: bool | str, attention: str) -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    model.set_attn_implementation(attention)
    for path in (f"{LAYER}.attention.self.query", f"{LAYER}.output.dense"):
        delta = moved(model, dt.LoRA(rank=2, where=path, gate=form))
        x, found = seen(model, [path], lambda: model(**batch))[path]
        t, plain = of(delta, path), model.get_submodule(path)
        g = gate(x, t, form, batch["attention_mask"])
        assert ((g > 0) & (g < 1)).all()
        assert form == "token" or (g.shape == (3, 1, 1) and g.unique().numel() == 3)
        expected = F.linear(x, plain.weight, plain.bias) + g * (x @ t["A"].mT @ t["B"].mT)
        assert distance(found, expected) <= 1e-5
        tensors = {name: tensor.clone() for name, tensor in delta.tensors().items()}
        delta.detach()
        other = dt.attach(model, dt.LoRA(rank=2, where=path, gate=form, alpha=99, scaling="root"))
        other.load_tensors(tensors)
        assert torch.equal(seen(model, [path], lambda: model(**batch))[path][1], found)
        other.detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_gated_pfeiffer_adapter_follows_the_formula(form: bool | str) -> None:
    model, batch, norm = ZOO["bert"].build(0), ZOO["bert"].batch(0), f"{LAYER}.output.LayerNorm"
    spec = dt.Adapter(width=3, placement="pfeiffer", activation="relu", where="ffn", gate=form)
    delta = moved(model, spec)
    t = of(delta, f"{LAYER}.output.dense")
    parts = [f"{LAYER}.output.dense", f"{LAYER}.attention", norm]
    found = seen(model, parts, lambda: model(**batch))
    normed = model.get_submodule(norm)
    h = found[parts[0]][1] + found[parts[1]][1][0]
    u = F.layer_norm(h, (HIDDEN,), normed.weight, normed.bias, normed.eps)
    change = F.relu(u @ t["D"].mT + t["b1"]) @ t["U"].mT + t["b2"]
    change = gate(u, t, form, batch["attention_mask"]) * change
    expected = F.layer_norm(h + change, (HIDDEN,), normed.weight, normed.bias, normed.eps)
    assert distance(found[norm][1], expected) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_gated_prefix_follows_the_formula(form: bool | str, attention: str) -> None:
    model, batch, path = ZOO["bert"].build(0), ZOO["bert"].batch(0), f"{LAYER}.attention.self"
    model.set_attn_implementation(attention)
    delta = moved(model, dt.Prefix(tokens=2, gate=form))
    t, layer = of(delta, path), model.get_submodule(path)
    x, found = seen(model, [path], lambda: model(**batch))[path]
    g = gate(x, t, form, batch["attention_mask"])

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    with torch.no_grad():
        key = heads(torch.cat([g * t["K"], layer.key(x)], 1))
        value = heads(torch.cat([g * t["V"], layer.value(x)], 1))
        scores = heads(layer.query(x)) @ key.mT / (HIDDEN // HEADS) ** 0.5
    hidden = F.pad(batch["attention_mask"] == 0, (2, 0))[:, None, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    assert distance(found[0], (weights @ value).transpose(1, 2).flatten(2)) <= 1e-5


@pytest.mark.parametrize("spec", [*GATED, "adapter(width=3, gate=True) + lora(rank=2, gate=True)"])
def test_a_mean_over_real_tokens_knows_nothing_of_padding(spec: str) -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    for form, equal in (("True", True), ("'padded'", False)):
        delta = moved(model, spec.replace("gate=True", f"gate={form}"))
        whole = logits(model, batch)
        alone = torch.cat([logits(model, row) for row in rows(batch)])
        assert (distance(whole, alone) <= 1e-5) == equal
        delta.detach()


def test_prompt_tokens_count_in_the_mean() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    moved(model, "lora(rank=2, gate=True) + prompt(tokens=2)")
    alone = torch.cat([logits(model, row) for row in rows(batch)])
    assert distance(logits(model, batch), alone) <= 1e-5


def test_a_gate_of_each_token_keeps_what_is_to_come_out() -> None:
    model, batch = ZOO["gpt2"].build(0), ZOO["gpt2"].batch(0)
    moved(model, "lora(rank=2, gate='token') + adapter(width=3, gate='token')")
    ids = batch["input_ids"][:1]
    changed = torch.cat([ids[:, :4], ids[:, 4:] + 1], 1)
    whole, other = logits(model, {"input_ids": ids}), logits(model, {"input_ids": changed})
    assert torch.equal(whole[:, :4], other[:, :4]) and not torch.equal(whole, other)


def test_without_adapter_and_lora_unipelt_is_its_prefix() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    delta = moved(model, SMALL.format(4))
    shut = {
        n: torch.full_like(t, -1e4) if n.endswith("b_g") and not n.startswith("prefix") else t
        for n, t in delta.tensors().items()
    }
    found = logits(delta.load_tensors(shut).model, batch)
    kept = {n: t.clone() for n, t in delta.tensors().items() if n.startswith(("prefix", "head"))}
    delta.detach()
    plain = logits(model, batch)
    dt.attach(model, "prefix(tokens=2, mlp=4, gate=True)").load_tensors(kept)
    expected = logits(model, batch)
    assert distance(found, expected) <= 1e-6 and distance(found, plain) > 1e-3


def test_a_prefix_shut_off_still_draws_attention() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    plain = logits(model, batch)
    delta = moved(model, "prefix(tokens=2, gate=True)")
    delta.load_tensors({
        n: torch.full_like(t, -1e4) if n.endswith("b_g") else t for n, t in delta.tensors().items()
    })  # fmt: skip
    found, head = logits(model, batch), of(delta, "classifier")
    delta.detach()
    zero = dt.attach(model, "prefix(tokens=2)")
    zero.load_tensors({
        n: head[n.rpartition(".")[2]] if n.startswith("head") else torch.zeros_like(t)
        for n, t in zero.tensors().items()
    })  # fmt: skip
    assert distance(found, logits(model, batch)) <= 1e-6
    assert distance(found, plain) > 1e-3


def test_unipelt_is_its_parts_and_counts_as_published() -> None:
    model = meta_model("bert-base")
    kept, trained = (dt.plan(model, UniPELT(mlp=mlp)) for mlp in (None, 512))
    assert trained.spec == dt.parse("unipelt")
    assert kept.count() == 1_410_672 and trained.count() == 11_083_376
    gates = sum(s.size for s in kept.layout if s.name.endswith(("w_g", "b_g")))
    assert gates == 4 * 12 * (768 + 1) == 36_912
    parts = [
        dt.Adapter(reduction=16, placement="pfeiffer", activation="relu", init="bert",
                   where="ffn", gate="padded"),
        dt.Prefix(tokens=10, gate="padded"), dt.LoRA(gate="padded"),
    ]  # fmt: skip
    whole = dt.plan(model, "unipelt(mlp=None, gate='padded')")
    assert whole.layout == dt.plan(model, parts[0] + parts[1] + parts[2]).layout
    upper = dt.plan(model, "unipelt[4:]")
    assert {step.site.layer for step in upper.steps} == set(range(4, 12))


def test_gates_start_about_half_open() -> None:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4,
    )  # fmt: skip
    tensors = dt.attach(hf.BertModel(config).eval(), "unipelt(mlp=None)", head=False).tensors()
    for part in ("adapter", "prefix", "lora"):
        own = {n: t for n, t in tensors.items() if n.startswith(part)}
        weight = torch.cat([t for n, t in own.items() if n.endswith("w_g")])
        bias = torch.cat([t for n, t in own.items() if n.endswith("b_g")])
        if part == "adapter":
            assert abs(float(weight.std()) / 0.02 - 1) < 0.1 and not bias.any()
            assert float(weight.abs().max()) > 0.05  # no bound
        else:  # U(-1/16, 1/16), as PyTorch starts a map of 256 features
            assert 0.95 / 16 < float(weight.abs().max()) <= 1 / 16
            assert abs(float(weight.std()) * 16 * 3**0.5 - 1) < 0.1
            assert bias.any() and float(bias.abs().max()) <= 1 / 16


def test_folding_keeps_the_gates() -> None:
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    delta = moved(model, SMALL.format(4))
    expected = logits(model, batch)
    folded = delta.fold()
    assert distance(logits(model, batch), expected) <= 1e-6
    assert folded.layout == dt.plan(ZOO["bert"].build(0), SMALL.format(None)).layout


@pytest.mark.parametrize("spec", [*GATED, SMALL.format(4), "pals(width=4, heads=2)"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_two_batches_before_one_backward_keep_their_masks(name: str, spec: str) -> None:
    """Checkpointing runs blocks again in another order than that of the calls."""
    model, case, found = ZOO[name].build(0), ZOO[name], []
    delta = moved(model, spec)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        sum(case.run(model, seed).square().mean() for seed in (0, 1)).backward()
        found.append(torch.cat([p.grad.flatten() for p in delta.parameters()]))  # type: ignore
        copy.deepcopy(model)  # nothing that cannot be copied is left behind
        model.zero_grad()
    assert distance(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("spec", [*GATED, SMALL.format(4), "pals", "apt(tokens=2)", "ladder"])
def test_half_precision_stays_what_it_is(spec: str) -> None:
    spec = {"pals": "pals(width=4, heads=2)", "ladder": "ladder(reduction=2)"}.get(spec, spec)
    model, batch = ZOO["bert"].build(0), ZOO["bert"].batch(0)
    moved(model, spec)
    exact = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(logits(model, batch).float(), exact) <= 0.1
    for module in (model.bert, model.classifier):
        module.to(torch.bfloat16)
    found = logits(model, batch)
    assert found.dtype == torch.bfloat16 and distance(found.float(), exact) <= 0.1


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 24, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_pytorch_are_read_as_pytorch_reads_them(kind: str) -> None:
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(3, 6, HIDDEN)
    padded = torch.arange(6) >= torch.tensor([6, 4, 3])[:, None]
    ahead = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if kind == "float":
        padding, later = (m.float().masked_fill(m, -torch.inf) for m in (padded, ahead))
    else:
        padding, later = padded, ahead
    with torch.no_grad():
        delta = moved(model, "adapter(width=3, gate=True) + pals(width=4, heads=2)")
        whole = model(x, src_key_padding_mask=padding)
        for i, n in enumerate([6, 4, 3]):
            assert distance(whole[i, :n], model(x[i : i + 1, :n])[0]) <= 1e-5
        delta.detach()
        moved(model, "pals(width=4, heads=2)")
        whole = model(x, mask=later, src_key_padding_mask=padding)
        for n in (1, 3):
            assert distance(whole[:, :n], model(x[:, :n], mask=later[:n, :n])) <= 1e-5
        with pytest.raises(dt.DeltuneError, match="tokens only look back"):
            moved(model, "adapter(width=3, gate=True)", "gated")
            model(x, mask=later, is_causal=True)


REAL = torch.tensor([[1, 1, 1], [1, 1, 0]])
BACK = torch.ones(3, 3, dtype=torch.bool).tril()
EACH = REAL.bool()[:, None, None]
LOW = torch.finfo(torch.float32).min


class Bare(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


MULTIHEAD = nn.MultiheadAttention(4, 2, batch_first=True)


@pytest.mark.parametrize(
    ("attention", "given", "expected"),
    [
        (Bare(False), {}, None),
        (Bare(True), {}, BACK[None, None]),
        (Bare(True), {"is_causal": False}, None),
        (Bare(False), {"attention_mask": REAL}, EACH),
        (Bare(False), {"attention_mask": REAL.float()}, EACH),
        (Bare(True), {"attention_mask": REAL}, EACH & BACK),
        (Bare(False), {"mask": EACH.expand(2, 1, 3, 3)}, EACH.expand(2, 1, 3, 3)),
        (Bare(True), {"attention_mask": EACH.expand(2, 1, 3, 3)}, EACH.expand(2, 1, 3, 3)),
        (Bare(False), {"attention_mask": (EACH & BACK).long()}, EACH & BACK),
        (Bare(False), {"attention_mask": torch.where(EACH & BACK, 0, LOW)}, EACH & BACK),
        (Bare(False), {"attention_mask": F.pad(EACH & BACK, (0, 4))}, EACH & BACK),
        (Bare(False), {"encoder_attention_mask": REAL}, None),
        (MULTIHEAD, {"key_padding_mask": REAL == 0}, EACH),
        (MULTIHEAD, {"key_padding_mask": torch.where(REAL == 0, -torch.inf, 0)}, EACH),
        (MULTIHEAD, {"attn_mask": ~BACK, "key_padding_mask": REAL == 0}, EACH & BACK),
        (MULTIHEAD, {"attn_mask": torch.where(BACK, 0, -torch.inf)}, BACK[None, None]),
        (MULTIHEAD, {"attn_mask": ~BACK.expand(4, 3, 3)}, BACK.expand(2, 2, 3, 3)),
        (Bare(False), {"attn_mask": torch.where(BACK, 0, -1e9)}, BACK[None, None]),
    ],
)
def test_a_mask_of_each_form_says_who_may_look_at_whom(
    attention: nn.Module, given: dict[str, Tensor], expected: Tensor | None
) -> None:
    found = allowed_pairs(attention, {"hidden_states": torch.zeros(2, 3, 4), **given}, 3)
    assert found is None if expected is None else torch.equal(found, expected)


@pytest.mark.parametrize("given", [{"attn_mask": BACK}, {"attention_mask": object()}])
def test_a_mask_of_no_known_meaning_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(dt.DeltuneError, match="not known what `att"):
        allowed_pairs(Bare(False), given, 3)


class Twice(nn.Module):
    """A block that calls its norm twice behind its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.norm(x + self.down(self.up(x)))


def test_a_place_that_is_called_twice_is_refused() -> None:
    model = nn.Sequential(Twice(), Twice())
    dt.attach(model, "adapter(width=3, where='0.norm', gate=True)")
    with pytest.raises(dt.DeltuneError, match=r"`0\.norm` was called twice"):
        model(torch.zeros(2, 3, HIDDEN))


def test_without_a_gate_nothing_looks_at_masks() -> None:
    model = ZOO["bert"].build(0)
    attention = model.get_submodule(f"{LAYER}.attention.self")
    dt.attach(model, "lora(rank=2) + adapter(width=3)")
    assert not attention._forward_pre_hooks
    dt.attach(model, "lora(rank=2, gate=True)", "gated")
    assert attention._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("bert", "lora(gate='half')", "`lora.gate='half'` is not .*`padded`, `token`"),
        ("bert", "unipelt(gate='token')", "is not one of `mean`, `padded`"),
        ("bert", "unipelt(rank=0)", "`rank` must be 1 or more"),
        ("bert", "unipelt(reduction=0.5)", "`reduction` must be 1 or more"),
        ("bert", "prefix(tokens=2, gate='token')", "the same for all tokens of a row"),
        ("bert", "lora(where='classifier', gate=True)", "in no block with a self-attention"),
        ("t5", "lora(where='cross.attn.v', gate=True)", "tokens only look back"),
        ("mixtral", "lora(where='ffn', gate='token')", "a gate belongs to one example"),
    ],
)
def test_what_cannot_be_gated_says_why(name: str, spec: str, reason: str) -> None:
    with pytest.raises(dt.DeltuneError, match=reason):
        dt.plan(ZOO[name].build(0), spec)


def test_a_place_before_the_attention_has_no_mask_yet() -> None:
    model, case = ZOO["vit"].build(0), ZOO["vit"]
    dt.attach(model, "adapter(width=3, where='vit.layers.0.layernorm_before', gate=True)")
    for _ in range(2):  # what the call before left behind is no mask for this one
        with pytest.raises(dt.DeltuneError, match="was not called before in this block"):
            case.run(model)


def test_a_tower_that_turns_out_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quirks, "CAUSAL_TOWERS", frozenset())
    model, case = ZOO["clip"].build(0), ZOO["clip"]
    dt.attach(model, "lora(rank=2, gate=True)")
    with pytest.raises(dt.DeltuneError, match="tokens only look back"):
        case.run(model)


def test_the_batch_has_to_come_first() -> None:
    with pytest.raises(dt.DeltuneError, match="batch_first=True"):
        dt.plan(encoder(batch_first=False), "adapter(width=3, gate=True)")
