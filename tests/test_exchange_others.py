"""Folders of AdapterHub's `adapters` 1.3 and of OpenDelta 0.3, which no longer run beside this
stack. Oracle: their documented formats and formulas, written out with hooks on the plain model."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import deltune as dt
from deltune.errors import ExchangeError
from deltune.exchange.adapterhub.checkpoint import load_adapterhub
from deltune.exchange.adapterhub.reft import WEIGHT
from deltune.exchange.opendelta import load_opendelta
from test_peft_parity import assert_close
from zoo import HIDDEN, INNER, ZOO

BERT = "bert.encoder.layer.{}"
Tensors = dict[str, Tensor]
Change = Callable[[Tensor, Tensor], Tensor]
BOTTLENECK = {
    "mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu",
    "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "is_parallel": False, "scaling": 1.0, "init_weights": "bert", "init_weights_seed": None,
    "leave_out": [], "phm_layer": False, "phm_dim": 4, "learn_phm": True, "use_gating": False,
    "shared_phm_rule": True, "factorized_phm_W": True, "factorized_phm_rule": False,
}  # fmt: skip
LORA = {
    "architecture": "lora", "r": 2, "alpha": 6, "dropout": 0.0, "attn_matrices": ["q", "v"],
    "composition_mode": "add", "selfattn_lora": True, "intermediate_lora": False,
    "output_lora": False, "use_dora": False, "use_gating": False, "init_weights": "lora",
    "vera_b": None, "dtype": None,
}  # fmt: skip
REFT = {
    "architecture": "reft", "layers": "all", "prefix_positions": 2, "suffix_positions": 1, "r": 3,
    "orthogonality": True, "tied_weights": False, "dropout": 0.0, "output_reft": True,
    "non_linearity": None,
}  # fmt: skip

COMPACTER = BOTTLENECK | {"phm_layer": True, "phm_dim": 2, "non_linearity": "gelu"}
IA3 = LORA | {"composition_mode": "scale", "attn_matrices": ["k", "v"], "r": 1, "alpha": 1}
PREFIX = {
    "architecture": "prefix_tuning", "prefix_length": 3, "flat": False, "dropout": 0.0,
    "non_linearity": "tanh", "bottleneck_size": 5, "encoder_prefix": True, "leave_out": [],
    "cross_prefix": True, "shared_gating": True, "use_gating": False,
}  # fmt: skip


def drawn(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, config: dict[str, Any], tensors: Tensors, **about: Any) -> Path:
    """An adapter called `a`, as `save_adapter(use_safetensors=True)` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"config": config, "name": "a", "hidden_size": HIDDEN, "version": "adapters.1.3.0"}
    (folder / "adapter_config.json").write_text(json.dumps(told | about))
    plain = {n: t.detach().clone().contiguous() for n, t in tensors.items()}
    save_file(plain, folder / "adapter.safetensors")
    return folder


def bottleneck(place: str, seed: int, width: int = 4) -> Tensors:
    start = f"{place}.adapters.a.adapter_"
    return {
        f"{start}down.0.weight": drawn(seed, width, HIDDEN),
        f"{start}down.0.bias": drawn(seed + 1, width),
        f"{start}up.weight": drawn(seed + 2, HIDDEN, width),
        f"{start}up.bias": drawn(seed + 3, HIDDEN),
    }


def scaled(place: str, seed: int) -> Tensors:
    """A bottleneck with a scale for each feature."""
    return bottleneck(place, seed) | {f"{place}.adapters.a.scaling": drawn(3 + seed, HIDDEN)}


def factored(place: str, n: int = 2, m: int = 4) -> Tensors:
    """Compacter's factors of weights of width m, and the rule (n, n, n)."""
    start = f"{place}.adapters.a.adapter_"
    return {
        f"{start}down.0.W_left": drawn(2, n, HIDDEN // n, 1), f"{start}down.0.b": drawn(4, m),
        f"{start}down.0.W_right": drawn(3, n, 1, m // n), f"{start}up.b": drawn(7, HIDDEN),
        f"{start}up.W_left": drawn(5, n, m // n, 1),
        f"{start}up.W_right": drawn(6, n, 1, HIDDEN // n),
        "bert.shared_parameters.a.phm_rule": drawn(1, n, n, n),
    }  # fmt: skip


def network(tokens: int = 3) -> Tensors:
    """What makes the prefixes of two layers."""
    return {
        "wte.weight": drawn(1, tokens, HIDDEN), "control_trans.0.weight": drawn(2, 5, HIDDEN),
        "control_trans.0.bias": drawn(3, 5), "control_trans.2.bias": drawn(5, 4 * HIDDEN),
        "control_trans.2.weight": drawn(4, 4 * HIDDEN, 5),
    }  # fmt: skip


def everywhere(own: Tensors) -> Tensors:
    """A prefix, once in the model and again below an attention."""
    return {
        f"bert.{at}prefix_tunings.a.self_prefix.{name}": value
        for at in ("prefix_tuning.", "encoder.layer.0.attention.self.prefix_tuning.pool.")
        for name, value in own.items()
    }


def intervention(layer: int, unit: int) -> tuple[Tensors, Tensor]:
    """A unit of ReFT and its R, orthonormal as torch makes it."""
    start = f"{BERT.format(layer)}.reft_layer.refts.a.units.{unit}."
    linear = nn.Linear(HIDDEN, 3, bias=False)
    parametrizations.orthogonal(linear)
    tensors = {f"{start}projection.{n}": t for n, t in linear.state_dict().items()}
    tensors[f"{start}learned_source.weight"] = drawn(layer, 3, HIDDEN)
    tensors[f"{start}learned_source.bias"] = drawn(unit, 3)
    return tensors, linear.weight.detach()


def acts(one: Tensors, place: str, x: Tensor, g: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    D, b1, U, b2 = (
        one[f"{place}.adapters.a.adapter_{n}"]
        for n in ("down.0.weight", "down.0.bias", "up.weight", "up.bias")
    )
    return g(x @ D.mT + b1) @ U.mT + b2


def same(
    name: str, delta: dt.Delta, hooks: dict[str, Change], before: tuple[str, ...] = ()
) -> None:
    """The delta's outputs are those of the plain model with `change(input, output)` in the place of
    what a module puts out, or of what it is given."""
    case, model = ZOO[name], ZOO[name].build(0)
    with torch.no_grad():
        plain = case.run(model)
        for path, change in hooks.items():
            module = model.get_submodule(path)
            if path in before:
                module.register_forward_pre_hook(
                    lambda m, args, change=change: (change(args[0], m.forward(args[0])),)
                )
            else:
                module.register_forward_hook(
                    lambda m, args, out, change=change: (
                        change(args[0], out)
                        if isinstance(out, Tensor)
                        else (change(args[0], out[0]), *out[1:])
                    )
                )
        oracle, ours = case.run(model), case.run(delta.model)
    assert (oracle - plain).abs().max() > 1e-3
    assert_close(ours, oracle)


def test_adapters_behind_sub_layers(tmp_path: Path) -> None:
    """`double_seq_bn`: h + f(h), with a scale for each feature that is trained."""
    tensors: Tensors = {}
    hooks: dict[str, Change] = {}
    for layer in range(2):
        for seed, place in enumerate((".attention.output", ".output")):
            where = BERT.format(layer) + place
            own = scaled(where, 10 * layer + 5 * seed)
            scale = own[f"{where}.adapters.a.scaling"]
            tensors |= own
            hooks[f"{where}.dense"] = lambda x, h, own=own, at=where, s=scale: (
                h + s * acts(own, at, h, F.silu)
            )
    config = BOTTLENECK | {"mh_adapter": True, "non_linearity": "swish", "scaling": "channel"}
    delta = load_adapterhub(write(tmp_path, config, tensors), ZOO["bert"].build(0))
    assert str(delta.spec) == "adapter(width=4, activation='silu')" and delta.name == "a"
    same("bert", delta, hooks)
    whole: Any = ZOO["bert"].build(0)
    inner = load_adapterhub(tmp_path, whole.bert)  # named from the root of the model with a head
    assert torch.equal(inner.vector(), delta.vector())
    with torch.no_grad():
        assert_close(ZOO["bert"].run(whole), ZOO["bert"].run(delta.model))


def test_adapters_behind_the_norm_and_where_there_is_none(tmp_path: Path) -> None:
    """`seq_bn`: LN(h + a + f(LN(h + a))) in BERT; h + a + f(h + a), a block's output, in GPT-2."""
    config = BOTTLENECK | {"original_ln_before": True}
    tensors = bottleneck("bert.encoder.layer.1.output", 7)
    delta = load_adapterhub(write(tmp_path / "one", config, tensors), ZOO["bert"].build(0))
    assert "placement='pfeiffer'" in str(delta.spec) and "encoder.ffn[1]" in str(delta.spec)
    norm = "bert.encoder.layer.1.output.LayerNorm"
    place = "bert.encoder.layer.1.output"
    same("bert", delta, {norm: lambda z, y: z + acts(tensors, place, y)}, before=(norm,))
    both = {f"transformer.h.{layer}.output_adapters": layer for layer in range(2)}
    tensors = {n: t for at, seed in both.items() for n, t in bottleneck(at, 9 * seed).items()}
    delta = load_adapterhub(write(tmp_path / "two", config, tensors), ZOO["gpt2"].build(0), "b")
    assert str(delta.spec) == "adapter(where='block', width=4, activation='relu')"
    hooks: dict[str, Change] = {
        at.removesuffix(".output_adapters"): lambda x, h, at=at: h + acts(tensors, at, h)
        for at in both
    }
    same("gpt2", delta, hooks)


def test_a_union_of_parallel_adapters_and_prefixes(tmp_path: Path) -> None:
    """`mam`; the prefix is the network's, and the same below every attention. Its oracle is ours
    with the keys and values of the documented view."""
    config = BOTTLENECK | {"is_parallel": True, "scaling": 4.0, "original_ln_before": True}
    one = network()
    places = [f"{BERT.format(layer)}.output" for layer in range(2)]
    tensors = {n: t for i, at in enumerate(places) for n, t in bottleneck(at, 30 * i).items()}
    tensors |= everywhere(one)
    union = {"architecture": "union", "configs": [PREFIX, config]}
    delta = load_adapterhub(write(tmp_path, union, tensors), ZOO["bert"].build(0))
    hidden = torch.tanh(one["wte.weight"] @ one["control_trans.0.weight"].mT
                        + one["control_trans.0.bias"])  # fmt: skip
    made = hidden @ one["control_trans.2.weight"].mT + one["control_trans.2.bias"]
    views = made.view(3, 2 * 2, 4, HIDDEN // 4).permute(1, 0, 2, 3).flatten(2)
    model = ZOO["bert"].build(0)
    ours = dt.attach(model, "prefix(tokens=3)", head=False)
    ours.load_tensors({
        f"prefix.bert.encoder.layer.{layer}.attention.self.{own}": views[2 * layer + which]
        for layer in range(2) for which, own in enumerate("KV")
    })  # fmt: skip
    seen: list[Tensor] = []
    for at in places:
        inner = model.get_submodule(at.replace("output", "intermediate.dense"))
        inner.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model.get_submodule(f"{at}.dense").register_forward_hook(
            lambda m, args, h, at=at: h + 4.0 * acts(tensors, at, seen.pop())
        )
    with torch.no_grad():
        assert_close(ZOO["bert"].run(delta.model), ZOO["bert"].run(model))


def test_compacter(tmp_path: Path) -> None:
    """x sum_i A_i (x) (u_i v_i) + b, the exact GELU, the rule A shared by all."""
    n, place = 2, "bert.encoder.layer.0.output"
    tensors, start = factored(place, n), f"{place}.adapters.a.adapter_"
    rule = tensors["bert.shared_parameters.a.phm_rule"]
    delta = load_adapterhub(write(tmp_path, COMPACTER, tensors), ZOO["bert"].build(0))

    def linear(x: Tensor, one: str) -> Tensor:
        S = tensors[f"{start}{one}.W_left"] @ tensors[f"{start}{one}.W_right"]
        return x @ sum(torch.kron(rule[i], S[i]) for i in range(n)) + tensors[f"{start}{one}.b"]

    same(
        "bert",
        delta,
        {f"{place}.dense": lambda x, h: h + linear(F.gelu(linear(h, "down.0")), "up")},
    )


@pytest.mark.parametrize(
    ("version", "scale"), [("adapters.1.3.0", 3.0), ("adapters.1.0.1", 1.0), ("0.2.1", 3.0)]
)
def test_lora_of_whole_and_fused_matrices(version: str, scale: float, tmp_path: Path) -> None:
    """Those of q and v of `c_attn` stand one below another; in `adapters` before 1.1 alpha did
    nothing."""
    path, inner = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"
    A, B = drawn(1, 4, HIDDEN), drawn(2, 2 * HIDDEN, 2)
    C, D = drawn(3, 2, HIDDEN), drawn(4, INNER, 2)
    tensors = {
        f"{path}.loras.a.lora_A": A, f"{path}.loras.a.lora_B": B,
        f"{inner}.loras.a.lora_A": C, f"{inner}.loras.a.lora_B": D,
    }  # fmt: skip
    folder = write(tmp_path, LORA, tensors, version=version, model_type="gpt2")
    delta = load_adapterhub(folder, ZOO["gpt2"].build(0))
    W = torch.zeros(3 * HIDDEN, HIDDEN)
    W[:HIDDEN], W[2 * HIDDEN :] = B[:HIDDEN] @ A[:2], B[HIDDEN:] @ A[2:]
    same("gpt2", delta, {
        path: lambda x, y: y + scale * x @ W.mT, inner: lambda x, y: y + scale * x @ (D @ C).mT,
    })  # fmt: skip


def test_ia3_scales_what_maps_give(tmp_path: Path) -> None:
    path, inner = "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"
    both, up = 1 + drawn(1, 2 * HIDDEN, 1), 1 + drawn(2, INNER, 1)
    tensors = {f"{path}.loras.a.lora_B": both, f"{inner}.loras.a.lora_B": up}
    delta = load_adapterhub(write(tmp_path, IA3, tensors), ZOO["gpt2"].build(0))
    wide = torch.cat([torch.ones(HIDDEN), both[:, 0]])
    same("gpt2", delta, {path: lambda x, y: y * wide, inner: lambda x, y: y * up[:, 0]})


def test_loreft_with_torch_s_orthonormal_rows(tmp_path: Path) -> None:
    tensors: Tensors = {}
    units: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    for layer in range(2):
        for unit in range(2):
            own, R = intervention(layer, unit)
            tensors |= own
            units[layer, unit] = R, drawn(layer, 3, HIDDEN), drawn(unit, 3)
    delta = load_adapterhub(write(tmp_path, REFT, tensors), ZOO["bert"].build(0))
    assert str(delta.spec) == "loreft(rank=3, prefix=2, suffix=1)"

    def edit(layer: int, out: Tensor) -> Tensor:
        out = out.clone()
        for row, n in enumerate((7, 5, 3)):
            for token, unit in ((0, 0), (1, 0), (n - 1, 1)):
                (R, W, b), h = units[layer, unit], out[row, token].clone()
                out[row, token] = h + R.mT @ (W @ h + b - R @ h)
        return out

    same("bert", delta, {
        BERT.format(layer): lambda x, out, layer=layer: edit(layer, out) for layer in range(2)
    })  # fmt: skip
    for name in [name for name in tensors if name.endswith(".original")]:
        tensors[name] = 0.5 * tensors[name]  # weight decay, which torch takes for no sign
    delta = load_adapterhub(write(tmp_path, REFT, tensors), ZOO["bert"].build(0))
    assert "orthogonal=False" in str(delta.spec)


@pytest.mark.parametrize(
    ("config", "about", "words"),
    [
        (BOTTLENECK | {"use_gating": True}, {}, "`use_gating = True`"),
        (BOTTLENECK | {"ln_before": True}, {}, "`ln_before = True`"),
        (BOTTLENECK | {"inv_adapter": "nice"}, {}, "`inv_adapter = 'nice'`"),
        (BOTTLENECK | {"residual_before_ln": False, "original_ln_before": True}, {}, "both are Tr"),
        (BOTTLENECK | {"non_linearity": "mish"}, {}, "`non_linearity` is 'mish'"),
        (BOTTLENECK | {"scaling": "odd"}, {}, "`scaling` is 'odd'"),
        (BOTTLENECK | {"architecture": "prompt_tuning"}, {}, "architecture 'prompt_tuning'"),
        (
            BOTTLENECK,
            {"model_type": "roberta"},
            "`model_type` is 'roberta' and this model's 'bert'",
        ),
        (BOTTLENECK, {"hidden_size": 32}, "`hidden_size` is 32"),
        (BOTTLENECK, {"name": ""}, "writes `config` and `name`"),
        (BOTTLENECK, {"name": "b"}, "not understood"),
        (LORA | {"use_dora": True}, {}, "DoRA rescales the bias too"),
        (LORA | {"composition_mode": "mix"}, {}, "`composition_mode` is 'mix'"),
        (LORA, {}, "not understood"),
        (REFT | {"orthogonality": False}, {}, "NoReFT and DiReFT have the same configuration"),
    ],
)
def test_what_is_not_understood_is_refused(
    config: dict[str, Any], about: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = ZOO["bert"].build(0)
    write(tmp_path, config, bottleneck("bert.encoder.layer.0.output", 1), **about)
    with pytest.raises(ExchangeError, match=words):
        load_adapterhub(tmp_path, model)
    assert not dt.deltas(model)


OUT, QUERY = "bert.encoder.layer.0.output", "bert.encoder.layer.0.attention.self.query"
DOWN = f"{OUT}.adapters.a.adapter_"
UNIT = f"{BERT.format(0)}.reft_layer.refts.a.units.0."
FORMS: dict[str, tuple[dict[str, Any], Callable[[], Tensors]]] = {
    "plain": (BOTTLENECK, lambda: bottleneck(OUT, 1)),
    "channel": (BOTTLENECK | {"scaling": "channel"}, lambda: scaled(OUT, 1)),
    "compacter": (COMPACTER, lambda: factored(OUT)),
    "lora": (LORA, lambda: {f"{QUERY}.loras.a.lora_A": drawn(1, 2, HIDDEN),
                            f"{QUERY}.loras.a.lora_B": drawn(2, HIDDEN, 2)}),
    "ia3": (IA3, lambda: {f"{QUERY}.loras.a.lora_B": drawn(2, HIDDEN, 1)}),
    "loreft": (REFT, lambda: intervention(0, 0)[0] | intervention(0, 1)[0]),
    "prefix": (PREFIX, lambda: everywhere(network())),
    "flat": (PREFIX | {"flat": True},
             lambda: everywhere({"control_trans": drawn(1, 3 * 4 * HIDDEN)})),
    "union": ({"architecture": "union", "configs": [PREFIX, BOTTLENECK]},
              lambda: everywhere(network()) | bottleneck(OUT, 1)),
}  # fmt: skip
"""Folders for BERT: the configuration and the tensors."""


@pytest.mark.parametrize(
    ("form", "config", "tensors", "words"),
    [
        ("plain", {"scaling": "channel"}, {}, f"lacks `{OUT}.adapters.a.scaling`"),
        ("plain", {"scaling": 10**400}, {}, "`scaling` is 1000.*expected int or float"),
        ("channel", {}, {f"{DOWN}up.weight": None}, "lacks `.*up.weight`"),
        ("channel", {}, {f"{OUT}.adapters.a.scaling": (3,)}, r"\(3,\); expected \(d\) with m = 4"),
        ("channel", {"scaling": "learned"}, {}, r"\(16,\); expected \(1\)"),
        ("channel", {"scaling": 2.0}, {}, "not understood: `.*scaling`"),
        ("compacter", {}, {f"{DOWN}down.0.W_left": None}, "lacks `.*W_left`"),
        ("compacter", {}, {f"{DOWN}up.W_left": (2, 3, 1)}, r"expected \(n q r\) with n = 2, p = 8"),
        ("compacter", {}, {"bert.shared_parameters.a.phm_rule": None}, "0 times .*phm_rule"),
        ("compacter", {}, {"bert.shared_parameters.a.phm_rule": ()}, r"\(\); expected \(n n n\)"),
        ("lora", {}, {f"{QUERY}.loras.a.lora_A": None}, "lacks `.*lora_A`"),
        ("lora", {"r": 0}, {}, "`r` is 0; expected 1 or more"),
        ("ia3", {"r": 0}, {}, "`r` is 0; expected 1 or more"),
        ("ia3", {}, {f"{QUERY}.loras.a.lora_B": (16, 0)}, r"\(16, 0\); expected \(o 1\)"),
        ("ia3", {}, {f"{QUERY}.loras.a.lora_A": (1, 16)}, "not understood: `.*lora_A`"),
        ("loreft", {}, {f"{UNIT}{WEIGHT}.original": (3,)}, r"\(3,\); expected \(r d\) with r = 3"),
        ("loreft", {}, {f"{UNIT}learned_source.bias": None}, "lacks `.*learned_source.bias`"),
        ("prefix", {"prefix_length": 0}, {}, "`prefix_length` is 0; expected 1 or more"),
        ("flat", {"prefix_length": 0}, {}, "`prefix_length` is 0; expected 1 or more"),
        ("flat", {"prefix_length": 5}, {}, "is not understood"),
    ],
)  # fmt: skip
def test_files_of_other_sizes_are_refused_by_what_is_wrong(
    form: str, config: dict[str, Any], tensors: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, (told, make) = ZOO["bert"].build(0), FORMS[form]
    load_adapterhub(write(tmp_path, told, make()), model).detach()
    changed = make() | {n: drawn(0, *s) for n, s in tensors.items() if s is not None}
    for name in [name for name, shape in tensors.items() if shape is None]:
        del changed[name]
    with pytest.raises(ExchangeError, match=words):
        load_adapterhub(write(tmp_path, told | config, changed), model)
    assert not dt.deltas(model)


@pytest.mark.parametrize("version", ["adapters.\u00b2.0", "adapters." + "1" * 5000, "new", 3])
def test_a_version_that_is_none_is_refused(version: Any, tmp_path: Path) -> None:
    config, make = FORMS["lora"]
    with pytest.raises(ExchangeError, match="`version` is"):
        load_adapterhub(write(tmp_path, config, make(), version=version), ZOO["bert"].build(0))


def test_rows_of_a_fused_matrix_are_its_roles(tmp_path: Path) -> None:
    """One row too few for two roles is no pair for each."""
    path = "transformer.h.0.attn.c_attn.loras.a.lora_"
    tensors = {f"{path}A": drawn(1, 1, HIDDEN), f"{path}B": drawn(2, 2 * HIDDEN, 2)}
    with pytest.raises(ExchangeError, match=r"lora_A \(1, 16\) and a lora_B .* its roles q, v"):
        load_adapterhub(write(tmp_path, LORA, tensors), ZOO["gpt2"].build(0))


def test_another_s_folder_is_told_by_name(tmp_path: Path) -> None:
    write(tmp_path, BOTTLENECK, bottleneck("bert.encoder.layer.0.output", 1))
    with pytest.raises(ExchangeError, match="of AdapterHub's `adapters`; `load_adapterhub`"):
        dt.load_peft(tmp_path, ZOO["bert"].build(0))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ExchangeError, match="is not of AdapterHub's `adapters`"):
        load_adapterhub(tmp_path, ZOO["bert"].build(0))


def test_places_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for tensors, words in (
        (bottleneck("bert.encoder.layer.7.output", 1), "which is no one sub-layer of this model"),
        (
            dict(list(bottleneck("bert.encoder.layer.0.output", 1).items())[:-1]),
            "lacks `.*adapter_up.bias`",
        ),
        ({}, "adapts nothing"),
    ):
        write(tmp_path, BOTTLENECK, tensors)
        with pytest.raises(ExchangeError, match=words):
            load_adapterhub(tmp_path, ZOO["bert"].build(0))
    tensors = bottleneck("transformer.h.0.attention_adapters", 1)
    write(tmp_path, BOTTLENECK | {"original_ln_before": True}, tensors)
    with pytest.raises(ExchangeError, match="read the sum with the residual"):
        load_adapterhub(tmp_path, ZOO["gpt2"].build(0))
    write(tmp_path, BOTTLENECK | {"is_parallel": True}, tensors)
    with pytest.raises(ExchangeError, match="read what is before the norm"):
        load_adapterhub(tmp_path, ZOO["gpt2"].build(0))


DYNAMIC = {
    "key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True,
    "residual_before": False, "temperature": False, "value_before_softmax": True,
    "value_initialized": True, "dropout_prob": None,
}  # fmt: skip
STATIC = DYNAMIC | {"value": False, "regularization": False, "value_initialized": False}


def fusion(place: str, seed: int, value: bool = True) -> Tensors:
    """What `save_adapter_fusion` writes of adapters `a` and `b` at a place."""
    start = f"{place}.adapter_fusion_layer.a,b."
    shapes = {"query.weight": 2, "query.bias": 1, "key.weight": 2, "key.bias": 1}
    shapes |= {"value.weight": 2} if value else {}
    return {
        start + name: drawn(seed + at, *[HIDDEN] * dims)
        for at, (name, dims) in enumerate(shapes.items())
    }


def attends(own: Tensors, place: str, x: Tensor, z: list[Tensor]) -> Tensor:
    """sum_i softmax_i(q(x) . k(z_i)) V z_i."""
    t = {name.removeprefix(f"{place}.adapter_fusion_layer.a,b."): one for name, one in own.items()}
    q = x @ t["query.weight"].mT + t["query.bias"]
    scores = [(q * (one @ t["key.weight"].mT + t["key.bias"])).sum(-1, keepdim=True) for one in z]
    s = torch.stack(scores).softmax(0)
    return (s * torch.stack(z)).sum(0) @ t.get("value.weight", torch.eye(HIDDEN)).mT


def write_setup(
    folder: Path, config: dict[str, Any], fused: dict[str, Any], places: list[str], **about: Any
) -> tuple[Path, Tensors, dict[str, Tensors]]:
    """A folder as `save_adapter_setup(Fuse("a", "b"), use_safetensors=True)` writes it, and its
    tensors: of the fusion, and of each adapter with its name as `a`."""
    adapters = {}
    for at, name in enumerate("ab"):
        tensors = adapters[name] = {
            n: t
            for seed, place in enumerate(places)
            for n, t in bottleneck(place, 100 * at + 10 * seed, width=4 + at).items()
        }
        named = {n.replace(".adapters.a.", f".adapters.{name}."): t for n, t in tensors.items()}
        write(folder / name, config, named, name=name)
    own = {
        n: t
        for seed, place in enumerate(places)
        for n, t in fusion(place, 200 + 10 * seed, fused["value"]).items()
    }
    inside = folder / "a,b"
    inside.mkdir()
    told = {"config": fused, "name": "a,b", "adapter_names": ["a", "b"], "hidden_size": HIDDEN}
    (inside / "adapter_fusion_config.json").write_text(json.dumps(told | about))
    save_file(own, inside / "model_adapter_fusion.safetensors")
    children = [{"type": "single", "children": [name]} for name in "ab"]
    block = {"adapter_setup": {"type": "Fuse", "children": children}, "head_setup": None}
    (folder / "adapter_setup.json").write_text(json.dumps(block))
    return folder, own, adapters


def test_fusion_behind_sub_layers(tmp_path: Path) -> None:
    """`double_seq_bn`: h + sum_i s_i V f_i(h), the query of h."""
    places = [BERT.format(n) + p for n in range(2) for p in (".attention.output", ".output")]
    config = BOTTLENECK | {"mh_adapter": True}
    folder, own, adapters = write_setup(tmp_path, config, DYNAMIC, places)
    delta = load_adapterhub(folder, ZOO["bert"].build(0))
    assert str(delta.spec) == (
        "fuse(adapter(width=4, activation='relu'), adapter(width=5, activation='relu'), "
        "dropout=0.1, frozen=True)"
    )
    assert delta.name == "a,b" and delta.count() == 4 * (3 * HIDDEN**2 + 2 * HIDDEN)
    hooks: dict[str, Change] = {}
    for place in places:
        hooks[f"{place}.dense"] = lambda x, h, at=place: (
            h + attends(own, at, h, [acts(one, at, h) for one in adapters.values()])
        )
    same("bert", delta, hooks)
    assert delta.spec.penalty_weight == 0.01
    alone = load_adapterhub(
        folder / "a,b", ZOO["bert"].build(0), "mine", adapters={n: folder / n for n in "ab"}
    )
    assert torch.equal(alone.vector(), delta.vector()) and alone.name == "mine"
    saved = delta.save(tmp_path / "ours")
    again = dt.load(saved, ZOO["bert"].build(0))
    with torch.no_grad():
        assert torch.equal(ZOO["bert"].run(again.model), ZOO["bert"].run(delta.model))


def test_fusion_behind_the_norm_and_where_there_is_none(tmp_path: Path) -> None:
    """`seq_bn`: LN(z + sum_i s_i f_i(y)) with y = LN(z) in BERT, the query of y; the output of a
    block in GPT-2."""
    config = BOTTLENECK | {"original_ln_before": True}
    place = "bert.encoder.layer.1.output"
    folder, own, adapters = write_setup(tmp_path / "bert", config, STATIC, [place])
    delta = load_adapterhub(folder, ZOO["bert"].build(0))
    norm = f"{place}.LayerNorm"

    def inside(z: Tensor, y: Tensor) -> Tensor:
        return z + attends(own, place, y, [acts(one, place, y) for one in adapters.values()])

    same("bert", delta, {norm: inside}, before=(norm,))
    assert delta.spec.penalty_weight == 0.0
    places = [f"transformer.h.{layer}.output_adapters" for layer in range(2)]
    folder, own, adapters = write_setup(tmp_path / "gpt2", config, DYNAMIC, places)
    delta = load_adapterhub(folder, ZOO["gpt2"].build(0))
    hooks: dict[str, Change] = {}
    for layer, at in enumerate(places):
        hooks[f"transformer.h.{layer}"] = lambda x, h, at=at, own=own, each=adapters: (
            h + attends(own, at, h, [acts(one, at, h) for one in each.values()])
        )
    same("gpt2", delta, hooks)


@pytest.mark.parametrize(
    ("config", "fused", "words"),
    [
        (BOTTLENECK, DYNAMIC | {"temperature": True}, "`?temperature = True"),
        (BOTTLENECK, DYNAMIC | {"residual_before": True}, "residual_before = True"),
        (BOTTLENECK, DYNAMIC | {"query_before_ln": True}, "query_before_ln = True"),
        (BOTTLENECK, DYNAMIC | {"query": False}, "query = False"),
        (BOTTLENECK, DYNAMIC | {"heads": 4}, "`?heads = 4"),
        (BOTTLENECK, DYNAMIC | {"value": "x"}, "`value` is 'x'"),
        (BOTTLENECK, DYNAMIC | {"value": False}, "not understood: `.*value.weight`"),
        (BOTTLENECK | {"is_parallel": True}, DYNAMIC, "is_parallel = True"),
        (LORA, DYNAMIC, "not understood"),
    ],
)
def test_fusions_that_cannot_be_honoured_are_refused(
    config: dict[str, Any], fused: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = ZOO["bert"].build(0)
    place = "bert.encoder.layer.0.output"
    tensors = {**DYNAMIC, "value": fused["value"] or config is BOTTLENECK}
    folder, _, _ = write_setup(tmp_path, config, tensors, [place])
    inside = folder / "a,b" / "adapter_fusion_config.json"
    inside.write_text(json.dumps(json.loads(inside.read_text()) | {"config": fused}))
    with pytest.raises(ExchangeError, match=words):
        load_adapterhub(folder, model)
    assert not dt.deltas(model)


def test_setups_that_are_no_fusion_of_their_own_adapters_are_refused(tmp_path: Path) -> None:
    model = ZOO["bert"].build(0)
    folder, _, _ = write_setup(tmp_path, BOTTLENECK, DYNAMIC, ["bert.encoder.layer.0.output"])
    with pytest.raises(ExchangeError, match="fuses `a`, `b`, and the folder of `b` is not given"):
        load_adapterhub(folder / "a,b", model, adapters={"a": folder / "a"})
    single = [{"type": "single", "children": [name]} for name in ("a", "b")]
    for block, words in (
        ({"type": "Stack", "children": single}, "type 'Stack'.*algebra.compose"),
        ({"type": "Fuse", "children": [{"type": "Fuse", "children": single}]}, "single adapters"),
        ({"type": "Fuse", "children": []}, "single adapters"),
        ([], "type None"),
        ({"type": "Fuse", "children": [{"type": "single", "children": ["../a"]}]}, "no name of a"),
        ({"type": "Fuse", "children": [{"type": "single", "children": ["é" * 128]}]}, "256 bytes"),
    ):
        (folder / "adapter_setup.json").write_text(json.dumps({"adapter_setup": block}))
        with pytest.raises(ExchangeError, match=words):
            load_adapterhub(folder, model)
    assert not dt.deltas(model)


def test_a_head_is_refused_unless_it_is_left_out(tmp_path: Path) -> None:
    """No classifier stays as it was drawn without a word."""
    model, place = ZOO["bert"].build(0), "bert.encoder.layer.0.output"
    folder = write(tmp_path / "one", BOTTLENECK, bottleneck(place, 1))
    plain = load_adapterhub(folder, model)
    vector = plain.vector()
    plain.detach()
    for name in ("head_config.json", "pytorch_model_head.bin", "model_head.safetensors"):
        (folder / name).write_text("{}")
        with pytest.raises(ExchangeError, match=f"has a head, `{name}`, .* `head=False`"):
            load_adapterhub(folder, model)
        again = load_adapterhub(folder, model, head=False)
        assert torch.equal(again.vector(), vector)
        again.detach()
        (folder / name).unlink()
    setup, _, _ = write_setup(tmp_path / "setup", BOTTLENECK, DYNAMIC, [place])
    for name in ("a", "a,b"):  # an adapter's own head is not the fusion's
        (setup / name / "head_config.json").write_text("{}")
        if name == "a":
            load_adapterhub(setup, model).detach()
            continue
        for at in (setup, setup / "a,b"):
            with pytest.raises(ExchangeError, match=r"has a head, `head_config\.json`"):
                load_adapterhub(at, model)
        (setup / name / "head_config.json").unlink()
    file = setup / "adapter_setup.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head_setup": "a"}))
    with pytest.raises(ExchangeError, match="has a head, `head_setup = 'a'`"):
        load_adapterhub(setup, model)
    assert load_adapterhub(setup, model, head=False).name == "a,b"


class Harm:
    """What a pickle could do."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_is_read_for_tensors_and_for_nothing_else(tmp_path: Path) -> None:
    tensors, mark = bottleneck("bert.encoder.layer.0.output", 1), tmp_path / "harmed"
    write(tmp_path, BOTTLENECK, tensors)
    told = load_adapterhub(tmp_path, ZOO["bert"].build(0))
    (tmp_path / "adapter.safetensors").unlink()
    file = tmp_path / "pytorch_adapter.bin"
    torch.save(tensors, file)
    again = load_adapterhub(tmp_path, ZOO["bert"].build(0))
    assert torch.equal(again.vector(), told.vector())
    first = next(iter(tensors))
    for held, words in (
        (tensors | {first: Harm(mark)}, "holds more than tensors"),
        ([1, 2], "holds list; expected tensors by name"),
        (tensors | {first: "text"}, "holds dict; expected tensors by name"),
        (tensors | {first: tensors[first] * float("nan")}, "values that are not finite"),
    ):
        torch.save(held, file)
        with pytest.raises(ExchangeError, match=words):
            load_adapterhub(tmp_path, ZOO["bert"].build(0))
    file.write_bytes(pickle.dumps(Harm(mark)))
    with pytest.raises(ExchangeError, match="is damaged, or holds more than tensors"):
        load_adapterhub(tmp_path, ZOO["bert"].build(0))
    assert not mark.exists()
    file.unlink()
    with pytest.raises(ExchangeError, match=r"has none of `adapter\.safetensors`"):
        load_adapterhub(tmp_path, ZOO["bert"].build(0))


OPEN = {
    "backbone_class": "BertForSequenceClassification", "backbone_hash": "0", "exclude_modules": [],
    "modified_modules": ["x"], "common_structure": None, "backbone_checkpoint_name": "",
    "opendelta_version": "0.3.0", "transformers_version": "4.22.2",
}  # fmt: skip


def opened(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(OPEN | config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def compacter(place: str, d: int, m: int, n: int = 2, rank: int | None = 1) -> Tensors:
    """What OpenDelta's Compacter trains behind a module."""
    found: Tensors = {}
    for at, (side, k, o) in enumerate((("down", d, m), ("up", m, d))):
        start, seed = f"{place}.compactor.{side}_sampler.", 10 * at
        weights = {"W": drawn(seed, n, k // n, o // n)} if rank is None else {
            "W_left": drawn(seed, n, k // n, rank), "W_right": drawn(seed + 1, n, rank, o // n),
        }  # fmt: skip
        own = {"phm_rule": drawn(seed + 2, n, n, n), **weights, "b": drawn(seed + 3, o)}
        found |= {start + name: tensor for name, tensor in own.items()}
    return found


@pytest.mark.parametrize("rank", [1, 2, None])
def test_compacter_of_opendelta(rank: int | None, tmp_path: Path) -> None:
    """Its formula: x times the sum of the Kronecker products of rules and weights."""
    dense, n, m = "bert.encoder.layer.1.output.dense", 2, HIDDEN // 4
    tensors = compacter(dense, HIDDEN, m, n, rank)
    config = {
        "delta_type": "compacter", "bottleneck_dim": 32, "non_linearity": "relu",
        "sequential": True, "reduction_factor": 4, "phm_c_init": "normal",
        "hypercomplex_division": n, "learn_phm": True, "shared_phm_rule": False,
        "hypercomplex_nonlinearity": "glorot-uniform", "factorized_phm": rank is not None,
        "shared_W_phm": False, "factorized_phm_rule": False, "phm_rank": rank or 1,
        "phm_init_range": 0.0001, "kronecker_prod": None, "use_bias_up_sampler": True,
        "use_bias_down_sampler": True,
    }  # fmt: skip
    delta = load_opendelta(opened(tmp_path, config, tensors), ZOO["bert"].build(0))

    def linear(x: Tensor, side: str) -> Tensor:
        own = {k.rpartition(".")[2]: t for k, t in tensors.items() if f".{side}_" in k}
        W = own["W"] if rank is None else own["W_left"] @ own["W_right"]
        return x @ sum(map(torch.kron, own["phm_rule"], W)) + own["b"]

    same("bert", delta, {dense: lambda x, h: h + linear(linear(h, "down").relu(), "up")})
    for field in ("shared_phm_rule", "factorized_phm_rule", "shared_W_phm"):
        with pytest.raises(ExchangeError, match=f"{field} = True"):
            load_opendelta(opened(tmp_path, config | {field: True}, tensors), delta.model)
    for field in ("learn_phm", "use_bias_up_sampler", "use_bias_down_sampler"):
        with pytest.raises(ExchangeError, match=f"`{field}` is false"):
            load_opendelta(opened(tmp_path, config | {field: False}, tensors), delta.model)
    with pytest.raises(ExchangeError, match="does not fit"):
        load_opendelta(opened(tmp_path, config | {"reduction_factor": 2}, tensors), delta.model)


def low_rank(place: str, d: int, m: int) -> Tensors:
    """What OpenDelta's low-rank adapter trains behind a module."""
    start = f"{place}.low_rank_adapter."
    return {
        f"{start}down_sampler.W_left": drawn(1, d, 1),
        f"{start}down_sampler.W_right": drawn(2, 1, m),
        f"{start}down_sampler.b": drawn(3, m),
        f"{start}up_sampler.W_left": drawn(4, m, 1),
        f"{start}up_sampler.W_right": drawn(5, 1, d),
        f"{start}up_sampler.b": drawn(6, d),
    }


def test_low_rank_adapters_of_opendelta(tmp_path: Path) -> None:
    dense, m = "bert.encoder.layer.1.output.dense", HIDDEN // 4
    tensors = low_rank(dense, HIDDEN, m)
    config = {"delta_type": "low_rank_adapter", "reduction_factor": 4, "low_rank_rank": 1,
              "non_linearity": "tanh", "low_rank_w_init": "glorot-uniform"}  # fmt: skip
    delta = load_opendelta(opened(tmp_path, config, tensors), ZOO["bert"].build(0))
    left, right, b1, up, wide, b2 = tensors.values()
    same(
        "bert", delta, {dense: lambda x, h: h + (h @ (left @ right) + b1).tanh() @ (up @ wide) + b2}
    )
    with pytest.raises(ExchangeError, match="`low_rank_rank` is not 1"):
        load_opendelta(opened(tmp_path, config | {"low_rank_rank": 2}, tensors), delta.model)
    broad = tensors | {f"{dense}.low_rank_adapter.up_sampler.W_left": drawn(4, m, 2)}
    with pytest.raises(ExchangeError, match="no column and row"):
        load_opendelta(opened(tmp_path, config, broad), delta.model)


def test_what_opendelta_wrote(tmp_path: Path) -> None:
    query, dense = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"
    A, B = drawn(1, 3, HIDDEN), drawn(2, HIDDEN, 3)
    lora = {f"{query}.lora.lora_A": A, f"{query}.lora.lora_B": B}
    config = {"delta_type": "lora", "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0}
    delta = load_opendelta(opened(tmp_path / "lora", config, lora), ZOO["bert"].build(0))
    same("bert", delta, {query: lambda x, y: y + 2.0 * x @ (B @ A).mT})
    start = f"{dense}.adapter.modulelist."
    adapter = {
        f"{start}down_proj.weight": drawn(1, 5, HIDDEN), f"{start}down_proj.bias": drawn(2, 5),
        f"{start}up_proj.weight": drawn(3, HIDDEN, 5), f"{start}up_proj.bias": drawn(4, HIDDEN),
    }  # fmt: skip
    head = {n: drawn(9, *p.shape) for n, p in ZOO["bert"].build(0).named_parameters()
            if n.startswith("classifier")}  # fmt: skip
    config = {"delta_type": "adapter", "bottleneck_dim": 5, "non_linearity": "gelu_new"}
    folder = opened(tmp_path / "adapter", config, adapter | head)
    delta = load_opendelta(folder, ZOO["bert"].build(0))

    def change(x: Tensor, h: Tensor) -> Tensor:
        D, b1, U, b2 = adapter.values()
        return h + F.gelu(h @ D.mT + b1, approximate="tanh") @ U.mT + b2

    W, b = head["classifier.weight"], head["classifier.bias"]
    same("bert", delta, {dense: change, "classifier": lambda x, y: x @ W.mT + b})
    norm = "bert.encoder.layer.0.output.LayerNorm"
    plain = dict(ZOO["bert"].build(0).named_parameters())
    values = {f"{query}.bias": drawn(5, HIDDEN), f"{norm}.bias": drawn(6, HIDDEN)}
    folder = opened(tmp_path / "bitfit", {"delta_type": "bitfit"}, values)
    delta = load_opendelta(folder, ZOO["bert"].build(0))
    same("bert", delta, {
        path: lambda x, y, name=f"{path}.bias": y + values[name] - plain[name]
        for path in (query, norm)
    })  # fmt: skip


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"delta_type": "prefix"}, "`delta_type` 'prefix'"),
        ({"delta_type": "lorra"}, "did you mean `lora`"),
        ({"delta_type": "lora", "lora_r": 3, "new": 1}, "`new = 1`"),
        ({"delta_type": "lora", "lora_r": 2}, "does not fit BertForSequenceClassification"),
        ({"delta_type": "adapter"}, "adapts nothing of Bert"),
        ({"delta_type": "bitfit"}, "trains no bias"),
    ],
)
def test_what_opendelta_does_beside_is_refused(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    query, model = "bert.encoder.layer.0.attention.self.query", ZOO["bert"].build(0)
    tensors = {
        f"{query}.lora.lora_A": drawn(1, 3, HIDDEN),
        f"{query}.lora.lora_B": drawn(2, HIDDEN, 3),
    }
    with pytest.raises(ExchangeError, match=words):
        load_opendelta(opened(tmp_path, config, tensors), model)
    tensors |= {"classifier.weight": drawn(1, 3, HIDDEN)}
    opened(tmp_path, {"delta_type": "lora", "lora_r": 3}, tensors)
    with pytest.raises(ExchangeError, match="has a part of the head and lacks"):
        load_opendelta(tmp_path, model)
    assert not dt.deltas(model)
