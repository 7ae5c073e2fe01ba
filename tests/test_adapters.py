"""Adapters, and what drops and merges them.

Oracles: each formula written out on the tensors of the delta, Kronecker products by `torch.kron`,
published parameter counts, the frozen backbone bit for bit, and the acting model beside the merged.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.errors import AttachError, SpecError, TrainError, WhereError
from deltune.families.addition.adapter import Adapter
from deltune.families.addition.compacter import Compacter
from deltune.mechanisms.phm import phm_linear, phm_matrix
from deltune.training.course import Course
from shapes import meta_model
from snapshots import Snapshot, distance
from zoo import ZOO

SIDE_NORMS = "*.output.LayerNorm, !*.attention.output.LayerNorm, embeddings.LayerNorm"


def moved(model: nn.Module, spec: dt.Spec | str, name: str = "delta", seed: int = 0) -> dt.Delta:
    """A delta without head, away from its start."""
    delta = dt.attach(model, spec, name, head=False, seed=seed)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(seed + 1))
    return delta.load_vector(delta.vector() + 0.2 * noise)


def at(delta: dt.Delta, place: str) -> dict[str, Tensor]:
    """The tensors of a delta at the places whose path holds `place`, by their last name."""
    return {n.rpartition(".")[2]: t for n, t in delta.tensors().items() if place in n}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(name: str, model: nn.Module) -> Tensor:
    """The output of an architecture of the zoo, without gradients."""
    with torch.no_grad():
        return ZOO[name].run(model)


def near(a: Tensor, b: Tensor) -> bool:
    return distance(a, b) <= 1e-5


def deep(layers: int = 4, dropout: float = 0.0) -> Any:
    """A tiny BERT with several layers."""
    import transformers as hf

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.BertConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=4, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        return hf.BertModel(config).eval()


IDS = {"input_ids": torch.tensor([[5, 7, 9, 11], [6, 8, 10, 12]])}


def states(model: Any) -> tuple[Tensor, ...]:
    """What enters each layer, and what leaves the last."""
    with torch.no_grad():
        return model(**IDS, output_hidden_states=True).hidden_states


# --- forms of the bottleneck --------------------------------------------------------------------


def test_a_serial_adapter_follows_its_formula_with_a_norm_of_its_own() -> None:
    model = ZOO["t5"].build(0)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    g = random(2, 5, 32)
    h = wo(g)
    spec = Adapter(width=3, activation="relu", norm=True, scale=0.5, where="ffn")
    t = at(moved(model, spec), "encoder.block.0.")
    assert sorted(t) == sorted(["D", "b1", "U", "b2", "gain", "bias"])
    mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, correction=0)
    normed = (h - mean) / (variance + 1e-5).sqrt() * t["gain"] + t["bias"]
    change = 0.5 * ((normed @ t["D"].T + t["b1"]).relu() @ t["U"].T + t["b2"])
    assert near(wo(g), h + change)


def test_without_biases_an_adapter_is_two_matrices() -> None:
    model = ZOO["t5"].build(0)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    h = wo(read := random(2, 5, 32))
    t = at(moved(model, Adapter(width=3, bias=False, where="ffn")), "encoder.block.0.")
    assert sorted(t) == ["D", "U"]
    assert near(wo(read), h + gelu(h @ t["D"].T) @ t["U"].T)


def test_a_pfeiffer_adapter_reads_behind_the_norm_and_writes_before_it() -> None:
    model = ZOO["bert"].build(0)
    part = model.bert.encoder.layer[0].output
    g, a = random(2, 5, 24), random(2, 5, 16, seed=1)
    h, norm = part.dense(g), part.LayerNorm
    t = at(moved(model, Adapter.pfeiffer(4.0)), "layer.0.")
    z = (norm.forward(h + a) @ t["D"].T + t["b1"]).relu() @ t["U"].T + t["b2"]
    assert near(part(g, a), norm.forward(z + h + a))


def test_a_parallel_adapter_reads_what_the_feed_forward_part_reads() -> None:
    model = ZOO["bert"].build(0)
    layer = model.bert.encoder.layer[0]
    x = random(2, 5, 16)
    h = layer.output.dense(layer.intermediate(x))
    t = at(moved(model, Adapter.parallel(width=3, scale=4.0)), "layer.0.")
    z = (x @ t["D"].T + t["b1"]).relu() @ t["U"].T + t["b2"]
    expected = layer.output.LayerNorm.forward(h + 4.0 * z + x)
    assert near(layer.output(layer.intermediate(x), x), expected)


def gelu(x: Tensor) -> Tensor:
    """By its approximation with tanh."""
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def test_in_training_what_is_added_comes_behind_the_dropout_of_the_part() -> None:
    g, x, a = random(2, 5, 24), random(2, 5, 16), random(2, 5, 16, seed=1)
    for text in ("adapter(width=3)", "adapter_bias", str(Adapter.parallel(3, dropout=0.0))):
        model = deep(dropout=0.5).train()
        layer = model.encoder.layer[0]
        parts = [(layer.output, g, "output.dense")]
        if text == "adapter(width=3)":
            parts.append((layer.attention.output, x, "attention"))
        delta = moved(model, text)
        for part, read, place in parts:
            t = at(delta, f"layer.0.{place}")
            if "parallel" in text:
                layer.intermediate(x)
            torch.manual_seed(3)
            found = part(read, a)
            with delta.disabled():
                torch.manual_seed(3)
                h = part.dropout(part.dense(read))
                if text == "adapter_bias":
                    change = (g @ t["w"] + t["c"])[..., None] * t["v"]
                else:
                    act = torch.relu if "parallel" in text else gelu
                    hidden = act((x if "parallel" in text else h) @ t["D"].T + t["b1"])
                    change = (2.0 if "parallel" in text else 1.0) * (hidden @ t["U"].T + t["b2"])
                assert near(found, part.LayerNorm(h + change + a)), (text, place)


@pytest.mark.parametrize(
    ("name", "g"),
    [
        ("gelu", gelu),
        ("relu", lambda x: x * (x > 0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    ],
)
def test_each_activation_is_the_one_of_its_name(name: Any, g: Callable[[Tensor], Tensor]) -> None:
    model = ZOO["t5"].build(0)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    h = wo(read := random(2, 5, 32))
    t = at(moved(model, Adapter(width=3, activation=name, where="ffn")), "encoder.block.0.")
    assert near(wo(read), h + g(h @ t["D"].T + t["b1"]) @ t["U"].T + t["b2"])


def test_adapters_start_as_their_names_say() -> None:
    for spec, std, most in [
        (Adapter(width=64), 0.8796e-3, 2e-3),  # N(0, 0.001^2) cut at two deviations
        (Adapter.pfeiffer(0.25 * 16), 0.02, 0.2),
        (Adapter(width=64, init="bert"), 0.02, 0.2),
        (Adapter(width=64, init="speech"), 0.01, 0.1),
    ]:
        tensors = dt.attach(deep(), spec, head=False, seed=0).tensors()
        for letter in "DU":
            drawn = torch.cat([t.flatten() for n, t in tensors.items() if n.endswith(letter)])
            assert abs(float(drawn.std()) / std - 1) < 4 / (2 * drawn.numel()) ** 0.5, (
                spec,
                letter,
            )
            assert (2.5 * std if most > 5 * std else 2 * std) < float(drawn.abs().max()) <= most
        assert all(not t.any() for n, t in tensors.items() if n.endswith(("b1", "b2")))
    tensors = dt.attach(deep(), Adapter.parallel(64), head=False, seed=0).tensors()
    down = torch.cat([t.flatten() for n, t in tensors.items() if n.endswith(".D")])
    assert 0.99 / 4 < float(down.abs().max()) <= 1 / 4  # Kaiming-uniform, of 16 features
    assert abs(float(down.std()) * 4 * 3**0.5 - 1) < 0.05
    assert all(not t.any() for n, t in tensors.items() if not n.endswith(".D"))


def test_a_pfeiffer_adapter_of_a_pre_norm_model_is_serial() -> None:
    case, outputs = ZOO["llama"], []
    for placement in ("pfeiffer", "serial"):
        model = case.build(0)
        moved(model, f"adapter(width=3, placement='{placement}', where='ffn')")
        outputs.append(case.run(model))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("spec", [Adapter.pfeiffer(4.0), Adapter.speech(3)])
def test_of_two_tasks_the_one_that_acts_gives_the_output_and_learns(spec: Adapter) -> None:
    case = ZOO["bert"]
    alone = []
    for seed in (1, 2):
        moved(model := case.build(0), spec, seed=seed)
        alone.append(case.run(model))
    model = case.build(0)
    plain = case.run(model)
    both = [moved(model, spec, name, seed) for name, seed in (("a", 1), ("b", 2))]
    assert not torch.equal(*alone)
    for active, other, expected in [(*both, alone[0]), (*both[::-1], alone[1])]:
        active.enable(), other.disable()
        model.zero_grad()
        output = case.run(model)
        assert torch.equal(output, expected)
        output.square().mean().backward()
        assert all(p.grad is not None for p in active.parameters())
        assert all(p.grad is None for p in other.parameters())
    both[1].disable()
    assert torch.equal(case.run(model), plain)


@pytest.mark.parametrize(
    "spec", [Adapter.houlsby(3), Adapter.pfeiffer(4), Adapter.parallel(3), Adapter.speech(3)]
)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_without_u_and_b2_the_model_is_the_backbone_bit_for_bit(name: str, spec: Adapter) -> None:
    model = ZOO[name].build(0)
    plain = values(name, model)
    delta = moved(model, spec)
    assert not torch.equal(values(name, model), plain)
    tensors = delta.tensors()
    zeroed = {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith((".U", ".b2"))}
    delta.load_tensors(tensors | zeroed)
    assert torch.equal(values(name, model), plain)


def test_dropout_in_the_bottleneck_leaves_the_mean_and_acts_in_training_only() -> None:
    model = ZOO["t5"].build(0)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    g = random(1, 1, 32)
    moved(model, Adapter(width=3, dropout=0.5, where="ffn"))
    whole = wo(g).detach()
    assert torch.equal(wo(g), whole)
    model.train()
    torch.manual_seed(0)
    drawn = wo(g.expand(4000, 1, 32)).detach()
    assert len(drawn.unique(dim=0)) == 2**3  # each of the three may be dropped
    assert float((drawn.mean(0) - whole[0]).abs().max()) < 0.1 * float(drawn.std(0).max())


def test_an_adapter_on_a_module_that_is_never_called_is_refused() -> None:
    model = ZOO["torch-encoder"].build(0)
    assert isinstance(model.encoder.layers[0].self_attn.out_proj, nn.Linear)
    with pytest.raises(WhereError, match="matches no module"):
        dt.plan(model, "adapter(width=3, where='encoder.layers.0.self_attn.out_proj')")


# --- PHM and Compacter --------------------------------------------------------------------------


def kronecker_sum(A: Tensor, S: Tensor) -> Tensor:
    return torch.stack([torch.kron(a, s) for a, s in zip(A, S, strict=True)]).sum(0)


@pytest.mark.parametrize(
    ("n", "k", "m", "r"),
    [(4, 48, 8, 1), (4, 8, 48, 1), (2, 8, 4, 1), (3, 6, 9, 2), (1, 5, 7, 3), (4, 8, 8, 5)],
)
def test_a_phm_layer_is_a_product_with_the_sum_of_kronecker_products(
    n: int, k: int, m: int, r: int
) -> None:
    A, x, bias = random(n, n, n).double(), random(2, 3, k).double(), random(m).double()
    u, v = random(n, k // n, r, seed=1).double(), random(n, r, m // n, seed=2).double()
    H = kronecker_sum(A, u @ v)
    assert H.shape == (k, m)
    for S in (u @ v, (u, v)):
        assert float((phm_matrix(A, S) - H).abs().max()) <= 1e-12
        assert float((phm_linear(x, A, S, bias) - (x @ H + bias)).abs().max()) <= 1e-12


def test_the_factored_product_never_makes_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltune.mechanisms.phm.phm_matrix", None)  # fails where it is called
    n, r = 4, 1
    for k, m in [(768, 24), (24, 768)]:
        u, v = random(n, k // n, r), random(n, r, m // n)
        assert phm_linear(random(2, k), random(n, n, n), (u, v), random(m)).shape == (2, m)


def test_the_rank_of_a_compacter_matrix_is_bounded_and_one_term_is_a_low_rank_map() -> None:
    n, r = 3, 2
    A, u, v = random(n, n, n), random(n, 8, r), random(n, r, 8)
    terms = [torch.kron(A[i], u[i] @ v[i]) for i in range(n)]
    ranks = [int(torch.linalg.matrix_rank(term, rtol=1e-5)) for term in terms]
    assert max(ranks) <= n * r
    assert int(torch.linalg.matrix_rank(phm_matrix(A, (u, v)), rtol=1e-5)) <= n * n * r
    one = torch.ones(1, 1, 1)
    u, v, x = random(1, 6, r), random(1, r, 10), random(4, 6)
    assert near(phm_linear(x, one, (u, v), torch.zeros(10)), x @ u[0] @ v[0])


@pytest.mark.parametrize(
    "spec",
    [
        Compacter(n=2, rank=2, width=4), Compacter(n=2, width=4, share=False),
        Compacter(n=4, rank=None, width=4), Compacter.phm(n=2, reduction=4.0),
    ],
    ids=str,
)  # fmt: skip
def test_compacter_follows_its_formula(spec: Compacter) -> None:
    model = ZOO["t5"].build(0)
    wo = model.decoder.block[1].layer[2].DenseReluDense.wo
    g = random(2, 5, 32)
    h = wo(g)
    delta = moved(model, spec)
    t = at(delta, "decoder.block.1.layer.2.")
    shared = at(delta, "shared:")
    H = {}
    for side in "DU":
        A = shared["A"] if spec.share else t[f"A_{side}"]
        S = t[f"S_{side}"] if spec.rank is None else t[f"u_{side}"] @ t[f"v_{side}"]
        H[side] = kronecker_sum(A, S)
    hidden = F.gelu(h @ H["D"] + t["b1"], approximate="tanh")
    assert near(wo(g), h + hidden @ H["U"] + t["b2"])


def test_all_adapters_read_one_tensor_of_rules_and_add_up_in_its_gradient() -> None:
    case = ZOO["t5"]
    gradients = {}
    shared = moved(case.build(0), Compacter(n=2, width=4))
    assert [n for n in shared.tensors() if n.endswith(".A")] == ["compacter.shared:rules.A"]
    units = shared.tree.units
    assert len({id(unit.shared.A) for unit in units}) == 1 and len(units) == 8
    apart = dt.attach(case.build(0), Compacter(n=2, width=4, share=False))
    rules = shared.tensors()["compacter.shared:rules.A"]
    tensors = shared.tensors()
    apart.load_tensors({n: tensors.get(n, rules) for n in apart.tensors()})
    for delta in (shared, apart):
        case.run(delta.model).square().mean().backward()
        named = delta.tree.named().items()
        gradients[delta.spec] = sum(p.grad for n, p in named if ".A" in n and p.grad is not None)
    assert near(*gradients.values())  # type: ignore[arg-type]


def test_compacter_leaves_cross_attention_out_by_default() -> None:
    atlas = {
        step.site.address for step in dt.plan(ZOO["t5"].build(0), "compacter(n=2, width=4)").steps
    }
    assert not any(address.startswith("cross") for address in atlas) and len(atlas) == 8
    plus = dt.plan(ZOO["t5"].build(0), "compacter(n=2, width=4, plus=True)").steps
    assert {step.site.role for step in plus} == {"ffn"} and len(plus) == 4
    wider = dt.plan(ZOO["t5"].build(0), "compacter(n=2, width=4, where='attn, ffn')").steps
    assert len(wider) == 10


def test_compacter_starts_as_its_sheet_says() -> None:
    tensors = dt.attach(deep(), Compacter(n=2, width=8), head=False, seed=0).tensors()
    apart = dt.attach(deep(), Compacter.phm(n=4, reduction=2.0), head=False, seed=0).tensors()
    for found, shape in [(tensors, (2, 8, 1)), (apart, (4, 4, 2))]:
        drawn = torch.cat([t.flatten() for n, t in found.items() if tuple(t.shape) == shape])
        bound = 2**0.5 * (6 / sum(shape[1:])) ** 0.5
        assert 0.9 * bound < float(drawn.abs().max()) <= bound
        assert abs(float(drawn.std()) / (bound / 3**0.5) - 1) < 0.15
    one = tensors["compacter.shared:rules.A"]
    many = torch.cat([t.flatten() for n, t in apart.items() if ".A_" in n])
    assert float(one.abs().max()) < 5e-4
    assert abs(float(many.std()) / 0.01 - 1) < 0.1
    assert all(not t.any() for n, t in (tensors | apart).items() if n.endswith(("b1", "b2")))


def test_a_compacter_becomes_the_plain_adapter_of_its_matrices() -> None:
    case = ZOO["bert"]
    delta = moved(case.build(0), Compacter(n=2, rank=2, width=4))
    rules = delta.tensors()["compacter.shared:rules.A"]
    dense = dt.attach(case.build(0), Adapter(width=4), head=False)
    tensors = {}
    for name in dense.tensors():
        own = name.replace("adapter.", "compacter.", 1)
        place, _, last = own.rpartition(".")
        if last in "DU":
            u, v = (delta.tensors()[f"{place}.{letter}_{last}"] for letter in "uv")
            tensors[name] = phm_matrix(rules, (u, v)).T
        else:
            tensors[name] = delta.tensors()[own]
    dense.load_tensors(tensors)
    assert near(case.run(dense.model), case.run(delta.model))


# --- linear adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("reads", ["inner", "output"])
def test_adapter_bias_shifts_each_token_along_one_vector(reads: str, share: bool) -> None:
    model = ZOO["bert"].build(0)
    part = model.bert.encoder.layer[1].output
    g, a = random(2, 5, 24), random(2, 5, 16, seed=1)
    z = part.dense(g)
    delta = moved(model, f"adapter_bias(reads='{reads}', share={share})")
    t = at(delta, "layer.1.") | (at(delta, "shared:") if share else {})
    amount = (g if reads == "inner" else z) @ t["w"] + t["c"]
    expected = part.LayerNorm(z + amount[..., None] * t["v"] + a)
    assert near(part(g, a), expected)


def test_adapter_bias_starts_at_the_backbone_with_a_gradient_for_v_alone() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    plain = case.run(model)
    delta = dt.attach(model, "adapter_bias", head=False, seed=0)
    assert torch.equal(case.run(model), plain)
    case.run(model).square().mean().backward()
    for name, parameter in delta.tree.named().items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.endswith(".v"), name
    w = torch.cat([t for n, t in delta.tensors().items() if n.endswith(".w")])
    assert 0.8 / 24**0.5 < float(w.abs().max()) <= 1 / 24**0.5


def test_linear_adapters_merge_by_their_closed_forms() -> None:
    eye = torch.eye(16)
    forms: list[tuple[str, Callable[..., tuple[Tensor, Tensor]]]] = [
        ("adapter_bias", lambda W, b, t: (W + torch.outer(t["v"], t["w"]), b + t["c"] * t["v"])),
        (
            "adapter_bias(reads='output')",
            lambda W, b, t: (
                (eye + torch.outer(t["v"], t["w"])) @ W,
                (eye + torch.outer(t["v"], t["w"])) @ b + t["c"] * t["v"],
            ),
        ),
        (
            "list(width=3, where='ffn')",
            lambda W, b, t: ((eye + t["U"] @ t["D"]) @ W, (eye + t["U"] @ t["D"]) @ b),
        ),
    ]
    for text, form in forms:
        for name, path, flipped in [("bert", "bert.encoder.layer.0.output.dense", False),
                                    ("gpt2", "transformer.h.0.mlp.c_proj", True)]:  # fmt: skip
            model = ZOO[name].build(0)
            dense = model.get_submodule(path)
            W, b = dense.weight.detach().clone(), dense.bias.detach().clone()
            delta = moved(model, text)
            t = at(delta, ".0.")
            new, shift = form(W.T if flipped else W, b, t)
            delta.merge()
            assert near(dense.weight.T if flipped else dense.weight, new), (text, name)
            assert near(dense.bias, shift), (text, name)


def test_the_scale_of_a_merged_linear_adapter_is_that_of_its_change() -> None:
    model = ZOO["bert"].build(0)
    delta = moved(model, "list(width=3)")
    delta.scale = 0.25
    acting = ZOO["bert"].run(model)
    delta.merge()
    assert near(ZOO["bert"].run(model), acting)
    delta.scale = -1.0
    merged = ZOO["bert"].run(model)
    delta.unmerge()
    assert near(ZOO["bert"].run(model), merged)


def test_list_acts_directly_behind_the_linear_map_and_starts_small() -> None:
    model = ZOO["bert"].build(0).train()  # before the dropout, so training shows no other output
    dense = model.bert.encoder.layer[0].attention.output.dense
    x = random(2, 5, 16)
    h = dense(x)
    start = dt.attach(model, "list(width=128)", head=False, seed=0)
    assert abs(float(start.vector().std()) / 2e-4 - 1) < 0.02
    assert distance(dense(x), h) < 1e-4
    start.detach()
    t = at(moved(model, "list(width=3)"), "layer.0.attention")
    assert near(dense(x), h + h @ (t["U"] @ t["D"]).T)


def test_merging_says_where_it_is_no_change_of_weights() -> None:
    for name, text, reason in [
        ("t5", "adapter_bias", "shifts the output of `encoder.*wo`, which has no bias"),
        ("llama", "adapter_bias(reads='output')", "which has no bias"),
        ("mixtral", "list(width=3)", "is not the output of one linear map"),
        ("bert", "list(width=3, where='block')", "is not the output of one linear map"),
        ("bert", "adapter(width=3)", "no change of weights"),
    ]:
        model = ZOO[name].build(0)
        delta = moved(model, text)
        before = Snapshot.of(model)
        with pytest.raises(AttachError, match=reason):
            delta.merge()
        before.check(model)
        assert delta.enabled and not delta.merged


# --- several deltas at one matrix ---------------------------------------------------------------

LAST = "lora(rank=2, where='ffn.down')"


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "torch-encoder"])
def test_changes_of_weights_come_first_in_whatever_order_deltas_are_attached(name: str) -> None:
    case = ZOO[name]
    outputs = []
    for order in ([0, 1, 2], [2, 1, 0]):
        model = case.build(0)
        specs = ["adapter(width=3, where='ffn')", LAST, "norms"]
        for i in order:
            moved(model, specs[i], specs[i])
        outputs.append(case.run(model).detach())
        for spec in specs[1:]:
            dt.deltas(model)[spec].merge()
            assert near(case.run(model), outputs[0])
    assert near(*outputs)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_disabling_and_enabling_keeps_the_order_of_deltas(name: str) -> None:
    case = ZOO[name]
    model = case.build(0)
    first = moved(model, "adapter(width=3)", "first", 1)
    moved(model, "adapter(width=3)", "second", 2)
    both = case.run(model)
    with first.disabled():
        assert not torch.equal(case.run(model), both)
    assert torch.equal(case.run(model), both)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_linear_adapters_merge_one_upon_the_other(name: str) -> None:
    case = ZOO[name]
    model = case.build(0)
    before = Snapshot.of(model)
    for i, text in enumerate(["list(width=3)", LAST, "list(width=2, where='ffn')"]):
        moved(model, text, str(i), i)
    acting = case.run(model)
    for merged in "102":
        dt.deltas(model)[merged].merge()
        assert near(case.run(model), acting)
    for unmerged in "201":
        dt.deltas(model)[unmerged].unmerge()
        assert near(case.run(model), acting)
    assert torch.equal(case.run(model), acting)
    for delta in dt.deltas(model).values():
        delta.detach()
    before.check(model)


def test_effects_that_only_add_up_merge_one_without_the_other() -> None:
    case = ZOO["bert"]
    for alone in ("shift", "lora"):
        model = case.build(0)
        moved(model, "adapter_bias", "shift"), moved(model, LAST, "lora", 1)
        acting = case.run(model)
        dt.deltas(model)[alone].merge()
        assert near(case.run(model), acting)


def test_merging_what_reads_an_unmerged_change_is_refused_and_changes_nothing() -> None:
    case = ZOO["bert"]
    model = case.build(0)
    linear, lora = moved(model, "list(width=3)", "linear"), moved(model, LAST, "lora")
    acting, before = case.run(model), Snapshot.of(model)
    with pytest.raises(AttachError, match="merge `lora` first and unmerge it last, or disable it"):
        linear.merge()
    before.check(model)
    assert torch.equal(case.run(model), acting) and linear.enabled and not linear.merged
    lora.merge(), linear.merge()
    with pytest.raises(AttachError, match="unmerge it last"):
        lora.unmerge()
    assert lora.merged and near(case.run(model), acting)
    lora.detach()  # taking it off asks for no equal outputs
    linear.unmerge()
    fresh = case.build(0)
    moved(fresh, "list(width=3)", "linear")
    assert torch.equal(case.run(model), case.run(fresh))


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "torch-encoder"])
def test_what_is_attached_later_reads_behind_a_merged_delta_as_behind_an_acting_one(
    name: str,
) -> None:
    case = ZOO[name]
    model = case.build(0)
    linear = moved(model, "list(width=3)", "linear")
    moved(model, "adapter(width=3)", "adapter")
    acting = case.run(model)
    linear.merge()
    assert near(case.run(model), acting)
    linear.unmerge()
    assert near(case.run(model), acting)


PAIRS = ["adapter_bias", "adapter_bias(reads='output')", "list(width=3, where='ffn')", LAST]


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])  # maps with and without a dropout behind
@pytest.mark.parametrize("first", PAIRS)
@pytest.mark.parametrize("second", PAIRS)
def test_a_merge_of_one_of_two_is_exact_or_refused_and_of_both_exact(
    name: str, first: str, second: str
) -> None:
    case = ZOO[name]
    for together in (False, True):
        model = case.build(0)
        if together:
            moved(model, f"{first} + {second}", "both")
            order = ["both"]
        else:
            moved(model, first, "0", 1), moved(model, second, "1", 2)
            order = ["0", "1"]
        acting = case.run(model)
        refused = []
        for one in order:
            try:
                dt.deltas(model)[one].merge()
            except AttachError as error:
                assert "in the weights" in str(error)
                refused.append(one)
            assert near(case.run(model), acting)
        for one in refused:
            dt.deltas(model)[one].merge()
        assert near(case.run(model), acting)
        assert len(refused) < 2


# --- norms --------------------------------------------------------------------------------------


def test_norms_tunes_gains_and_biases_of_every_norm_and_nothing_else() -> None:
    for name in ("bert", "t5", "llama", "vit", "qwen3"):
        model = ZOO[name].build(0)
        own = {
            f"{path}.{kind}"
            for path, module in model.named_modules()
            if "norm" in type(module).__name__.lower()
            for kind in ("weight", "bias")
            if getattr(module, kind, None) is not None
        }
        for tune, wanted in {"both": own, "gain": {n for n in own if n.endswith("weight")}}.items():
            found = dt.plan(model, f"norms(tune='{tune}')", head=False).layout
            assert {slot.name.removeprefix("norms.") for slot in found} == wanted, (name, tune)


def test_norms_change_the_gain_and_bias_by_their_differences() -> None:
    model = ZOO["bert"].build(0)
    norm = model.bert.encoder.layer[1].output.LayerNorm
    gain, bias, x = norm.weight.detach().clone(), norm.bias.detach().clone(), random(3, 16)
    t = at(moved(model, "norms"), "layer.1.output")
    expected = F.layer_norm(x, (16,), gain + t["weight"], bias + t["bias"], norm.eps)
    assert near(norm(x), expected)


def test_where_and_within_choose_norms() -> None:
    model = deep()
    everything = {slot.name for slot in dt.plan(model, "norms").layout}
    blocks = {slot.name for slot in dt.plan(model, "norms(where='norm')").layout}
    assert everything - blocks == {f"norms.embeddings.LayerNorm.{n}" for n in ("weight", "bias")}
    assert {slot.name for slot in dt.plan(model, "norms[2:]").layout} == {
        name for name in blocks if ".layer.2." in name or ".layer.3." in name
    }
    with pytest.raises(WhereError, match="no normalisation layers with biases to tune"):
        dt.plan(ZOO["llama"].build(0), "norms(tune='bias')")


# --- MAM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["roberta", "bart"])
def test_mam_is_a_prefix_in_each_attention_and_a_parallel_adapter_beside_each_ffn(
    name: str,
) -> None:
    case = ZOO[name]
    mam = moved(case.build(0), "mam(tokens=2, mlp=4, width=3, scale=3.0)")
    parts = moved(
        case.build(0),
        "prefix(tokens=2, mlp=4) + adapter(width=3, placement='parallel', activation='relu', "
        "init='zero', scale=3.0, dropout=0.1, where='ffn')",
    )
    assert mam.layout == parts.layout and torch.equal(mam.vector(), parts.vector())
    assert torch.equal(case.run(mam.model), case.run(parts.model))
    roles = Counter((s.spec.kind, s.site.role) for s in dt.plan(case.build(0), "mam").steps)
    attentions = 2 if name == "roberta" else 6
    assert roles["prefix", "attn"] == attentions
    assert roles["adapter", "ffn"] == (2 if name == "roberta" else 4)


def test_mam_folds_to_plain_tables_and_keeps_what_it_skips() -> None:
    case = ZOO["roberta"]
    delta = moved(case.build(0), "mam(tokens=2, mlp=4, width=3)").skip([0])
    acting = case.run(delta.model)
    folded = delta.fold()
    assert near(case.run(delta.model), acting)
    assert folded.count() == 2 * (2 * 2 * 16) + 2 * (2 * 16 * 3 + 3 + 16)
    assert not near(case.run(folded.skip(()).model), acting)


def test_folding_keeps_the_scale() -> None:
    case = ZOO["bert"]
    delta = moved(case.build(0), "movement(mode='soft')")
    delta.scale = 0.5
    acting = case.run(delta.model)
    assert near(case.run(delta.fold().model), acting)
    assert delta.scale == 0.5


# --- AdapterDrop --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["adapter(width=3)", "compacter(n=2, width=4)", "lora(rank=2)"])
def test_layers_below_the_lowest_adapter_are_the_backbone_for_every_task(spec: str) -> None:
    k, base = 2, states(deep())
    tasks = []
    for seed in (1, 2):
        model = deep()
        moved(model, f"{spec}[{k}:]", seed=seed)
        tasks.append(states(model))
    for layer, (plain, *others) in enumerate(zip(base, *tasks, strict=True)):
        assert torch.equal(plain, others[0]) == torch.equal(*others) == (layer <= k)


@pytest.mark.parametrize(
    "spec",
    [
        "adapter(width=3)", "adapter(width=3, placement='pfeiffer')", "mam(tokens=2, mlp=4)",
        "lora(rank=2)", "bitfit(where='attn, ffn')", "prefix(tokens=2)", "list(width=3)",
    ],
)  # fmt: skip
def test_skipped_layers_are_the_backbones_and_come_back(spec: str) -> None:
    model = deep()
    base, before = states(model), Snapshot.of(model)
    delta = moved(model, spec)
    whole = states(model)
    for k in range(5):
        delta.skip(range(k))
        for layer, (plain, now) in enumerate(zip(base, states(model), strict=True)):
            assert torch.equal(plain, now) == (layer <= k), (k, layer)
    delta.skip([1, 3])
    some = states(model)
    delta.disable()
    assert torch.equal(states(model)[-1], base[-1])
    delta.enable()
    assert torch.equal(states(model)[-1], some[-1])
    assert not torch.equal(some[-1], whole[-1])
    delta.skip(())
    assert all(map(torch.equal, states(model), whole))
    delta.skip([0]).detach()
    before.check(model)


def test_what_belongs_to_no_layer_is_not_skipped() -> None:
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "prompt(tokens=2) + lora(rank=2)", seed=0)
    alone = dt.attach(ZOO["bert"].build(0), "prompt(tokens=2)", seed=0)
    tensors = delta.tensors()
    alone.load_tensors({n: tensors[n] for n in alone.tensors()})
    delta.load_tensors(tensors | {n: t + 0.1 for n, t in tensors.items() if "lora" in n})
    assert not torch.equal(ZOO["bert"].run(model), ZOO["bert"].run(alone.model))
    assert torch.equal(ZOO["bert"].run(delta.skip([0, 1]).model), ZOO["bert"].run(alone.model))


def test_merging_merges_the_layers_that_act() -> None:
    for spec in ("lora(rank=2)", "list(width=3)"):
        model = deep()
        delta = moved(model, spec).skip([0, 2])
        acting = states(model)
        delta.merge()
        merged = states(model)
        assert torch.equal(merged[1], acting[1]) and near(merged[-1], acting[-1])
        with pytest.raises(AttachError, match="unmerge"):
            delta.skip(())
        delta.unmerge()
        assert all(map(torch.equal, states(model), acting))


def test_skipping_what_is_not_there_is_refused() -> None:
    delta = dt.attach(deep(), "adapter(width=3)[1:3]")
    with pytest.raises(AttachError, match=r"nothing in the layers \[0, 3, 7\] .* in \[1, 2\]"):
        delta.skip([0, 1, 3, 7])
    with pytest.raises(AttachError, match="no layer"):
        dt.attach(ZOO["bert"].build(0), "prompt(tokens=2)", head=False).skip([0])


def lowest(model: Any, base: tuple[Tensor, ...]) -> int:
    """The layer from which on the states are not the backbone's: what enters it still is."""
    same = [torch.equal(*pair) for pair in zip(states(model), base, strict=True)]
    assert same == sorted(same, reverse=True)
    return sum(same) - 1


ROBUST = [
    "adapter(width=3, robust=True)", "compacter(n=2, width=4, robust=True)",
    "list(width=3, robust=True)", "adapter(width=3, placement='pfeiffer', robust=True)",
    "adapter(width=3, placement='parallel', robust=True)", "adapter_bias(robust=True)",
]  # fmt: skip


@pytest.mark.parametrize("spec", ROBUST)
def test_robust_training_leaves_out_the_layers_below_a_random_one(spec: str) -> None:
    model, base = deep(), states(deep())
    moved(model, spec)
    model.train()
    found = []
    for _ in range(2):
        with Course(model, seed=3) as course:
            for step in range(24):
                course.before_step(step, 24)
                found.append(lowest(model, base))
                course.after_step()
    assert set(found) == {0, 1, 2, 3}
    assert found[:24] == found[24:]
    assert lowest(model, base) == 0  # between steps all act


def test_robust_training_draws_every_layer_alike() -> None:
    model = deep()
    units = dt.attach(model, "adapter(width=1, robust=True, where='ffn')", head=False).tree.units
    counts: Counter[int] = Counter()
    with Course(model, seed=0) as course:
        for step in range(1000):
            course.before_step(step, 1000)
            counts[sum(unit.__dict__["dropped"] for unit in units)] += 1
    deviation = (1000 * 0.25 * 0.75) ** 0.5
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 250) < 4 * deviation for count in counts.values())


def test_an_evaluation_between_steps_uses_every_layer() -> None:
    model = deep()
    moved(model, ROBUST[0])
    whole = states(model)
    with Course(model, seed=0) as course:
        for step in range(8):
            course.before_step(step, 8)
            assert all(map(torch.equal, states(model.eval()), whole))
            model.train()


def test_both_stacks_of_an_encoder_decoder_drop_the_same_share_of_layers() -> None:
    model = ZOO["t5"].build(0)
    units = dt.attach(model, "adapter(width=1, robust=True)").tree.units
    with Course(model, seed=1) as course:
        for step in range(10):
            course.before_step(step, 10)
            dropped = {(u.site.stack, u.site.layer) for u in units if u.__dict__["dropped"]}
            stacks = ("encoder", "decoder", "cross")
            assert dropped in (set(), {(stack, 0) for stack in stacks})


def test_robust_training_of_what_is_in_no_layer_is_refused() -> None:
    model = ZOO["bert"].build(0)
    dt.attach(model, "adapter(width=2, where='classifier', robust=True)")
    with Course(model) as course, pytest.raises(AttachError, match="acts in none; choose places"):
        course.before_step(0, 1)


def test_robust_adapters_refuse_a_plain_loop() -> None:
    model = deep().train()
    dt.attach(model, ROBUST[0])
    with pytest.raises(TrainError, match="asks for more"):
        model(**IDS)


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "spec", "count"),
    [
        ("bert-base", Adapter.houlsby(64), 2_379_264),
        ("bert-base", "adapter(width=64) + norms", 2_417_664),
        ("bert-large", "adapter(width=64)", 6_343_680),
        ("bert-large", "adapter(width=8)", 835_968),
        ("bert-large", "adapter(width=256)", 25_227_264),
        ("bert-base", Adapter.pfeiffer(), 894_528),
        ("bert-base", "adapter(reduction=16, placement='pfeiffer', where='ffn')[5:]", 521_808),
        ("bert-base", "norms", 38_400),
        ("t5-base", "adapter(reduction=32, where='attn, ffn, !cross.attn') + norms", 1_855_104),
        ("t5-base", "compacter", 114_112),
        ("t5-base", "compacter(plus=True)", 57_088),
        ("t5-base", "compacter + norms", 161_728),
        ("t5-base", "compacter(plus=True) + norms", 104_704),
        ("t5-base", Compacter.phm() + dt.parse("norms"), 398_976),
        ("bert-base", "adapter_bias", 46_092),
        ("bert-base", f"adapter_bias + norms(where='{SIDE_NORMS}')", 66_060),
        ("bert-large", f"adapter_bias + norms(where='{SIDE_NORMS}')", 174_104),
        ("bert-base", "adapter_bias(reads='output')", 12 * (2 * 768 + 1)),
        ("bert-base", "adapter_bias(share=True)", 12 * 768 + 3072 + 1),
        ("roberta-base", "list", 4_718_592),
        ("bert-large", "list", 12_582_912),  # of the shape of RoBERTa-large
        ("roberta-base", Adapter.parallel(), 304_320),
        ("roberta-base", "mam(mlp=None)", 599_232),
        ("roberta-base", "mam", 599_232 - 294_912 + 15_391_520),
    ],
    ids=str,
)
def test_counts_are_the_published_ones(model: str, spec: dt.Spec | str, count: int) -> None:
    assert dt.plan(meta_model(model), spec, head=False).count() == count


def test_speech_adapters_have_the_published_size() -> None:
    import transformers as hf

    with torch.device("meta"):
        config = hf.Speech2TextConfig(d_model=512, encoder_layers=12, decoder_layers=6)
        plan = dt.plan(hf.Speech2TextForConditionalGeneration(config), Adapter.speech())
    assert {step.scalars for step in plan.steps} == {263_936}
    assert plan.count() == 18 * 263_936 == 4_750_848
    drawn = dt.attach(deep(), Adapter.speech(), head=False, seed=0).tensors()
    weights = torch.cat([t.flatten() for n, t in drawn.items() if n[-1] in "DU"])
    assert abs(float(weights.std()) / 0.01 - 1) < 0.05
    assert all(bool((t == n.endswith("gain")).all()) for n, t in drawn.items() if n[-1] not in "DU")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("compacter(n=0)", r"`compacter\(n=0\)`: `n` must be 1 or more"),
        ("compacter(rank=0)", "`rank` must be 1 or more, or None"),
        ("compacter(plus=True, where='ffn')", "`plus` must be left out where `where` is given"),
        ("compacter(width=8, reduction=2.0)", "left out where `width` is given"),
        ("compacter(reduction=0.5)", "`reduction` must be 1 or more"),
        ("adapter(dropout=1.0)", r"`dropout` must be in \[0, 1\)"),
        ("adapter(init='xavier')", "one of `houlsby`, `bert`, `speech`, `zero`"),
        ("adapter_bias(reads='input')", "one of `inner`, `output`"),
        ("list(width=0)", "`width` must be 1 or more"),
        ("adapter(reduction=1e400)", "`adapter.reduction=inf` is not a finite number"),
        ("adapter(scale=1e400)", "`adapter.scale=inf` is not a finite number"),
        ("mam(tokens=0)", "`tokens` must be 1 or more"),
        ("mam(dropout=2.0)", r"`dropout` must be in \[0, 1\)"),
        ("norms(tune='all')", "one of `both`, `gain`, `bias`"),
    ],
)
def test_values_that_mean_nothing_are_refused(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        dt.parse(text)


@pytest.mark.parametrize(
    ("name", "text", "error", "reason"),
    [
        ("bert", "compacter(n=3)", SpecError, "3 does not divide both the 16 features at"),
        ("bert", "compacter(n=4)", SpecError, "and the bottleneck of 1; use an `n`"),
        (
            "bert",
            "compacter(n=2, width=4, rank=3)",
            SpecError,
            "8 rows and 2 columns; .* at most 2",
        ),
        (
            "bert",
            "adapter(placement='parallel', where='*.intermediate.dense')",
            AttachError,
            "would read 16 features before `.*` and change the 24 features behind it; choose",
        ),
        (
            "gpt2",
            "adapter(placement='parallel', where='transformer.wte')",
            AttachError,
            "would read token ids before `transformer.wte`",
        ),
        (
            "gpt2",
            "adapter(placement='parallel', where='*.mlp.c_fc')",
            AttachError,
            "would read 16 features before",
        ),
        ("t5", "compacter(n=2)[cross]", WhereError, r"`\[cross\]` leaves none"),
        ("bert", "compacter(n=2, where='cross.attn')", WhereError, "matches nothing"),
        ("mixtral", "adapter_bias", AttachError, "or `reads='output'`"),
        ("torch-encoder", "adapter_bias(where='attn')", AttachError, "finds no single linear map"),
        ("bert", "norms(where='attn.q')", WhereError, "matches nothing"),
        ("torch-mlp", "norms", WhereError, "use another `tune`, or another method"),
    ],
)
def test_places_that_cannot_be_served_are_refused(
    name: str, text: str, error: type[Exception], reason: str
) -> None:
    model = ZOO[name].build(0)
    before = Snapshot.of(model)
    with pytest.raises(error, match=reason):
        dt.attach(model, text)
    before.check(model)
