"""Backbones whose weights are held in few bits. Oracle: the same delta on a backbone of plain
numbers that has the values which those weights mean."""

import copy
import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.conversion.rounding import restore_rounding
from deltune.errors import AttachError, ConversionError, StoreError, TrainError, WhereError
from deltune.mechanisms.modules import pretrained
from zoo import ZOO

SPECS = [
    "lora(rank=4, where='attn, ffn')", "adapter(width=4)", "prefix(tokens=3)", "ia3", "norms",
    "vera(rank=8)", "lora(rank=2, where='attn.q') + adapter_bias",
]  # fmt: skip
READING = ["dora(rank=4)", "loha(rank=2)", "oft", "mpo", "miss"]
"""Methods that read the weights, or change them by a matrix without factors."""
IDS = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


# --- two kinds of weights that need no package ----------------------------------------------------


class Rounded(nn.Parameter):
    """Eight bits behind a face of floating point, as torchao has them."""

    def __new__(cls, data: Tensor) -> "Rounded":
        scale = data.abs().amax(1, keepdim=True) / 127
        made = torch.Tensor._make_subclass(cls, (data / scale).round(), False)
        made.scale = scale
        return made

    def dequantize(self) -> Tensor:
        return self.data * self.scale

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rounded":
        return memo.setdefault(id(self), Rounded(self.dequantize()))


class WithFace(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = Rounded(plain.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.dequantize())


class Bare(nn.Module):
    """No `weight`: codes and scales are buffers, as of GPTQ and AWQ."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        rounded = Rounded(plain.weight.detach())
        self.register_buffer("codes", rounded.data.to(torch.int8))
        self.register_buffer("scales", rounded.scale)

    def dequantize(self) -> Tensor:
        return self.codes * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize())


class Inferring(WithFace):
    """One through which no gradient flows, as of torchao's quantised activations."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


def replaced(kind: Callable[[nn.Linear], nn.Module]) -> tuple[Any, Any]:
    """A model with linear maps of this kind, and one of plain numbers with their values."""
    model, plain = llama(), llama()
    for path, module in list(plain.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, name = path.rpartition(".")
            odd = kind(module)
            setattr(model.get_submodule(parent), name, odd)
            values = odd.dequantize() if isinstance(odd, Bare) else odd.weight.dequantize()
            module.weight.data = values
    return model.train(), plain.train()


# --- the packages ---------------------------------------------------------------------------------


def bitsandbytes(folder: Path, **asked: Any) -> tuple[Any, Any]:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        llama().save_pretrained(folder)
    config = BitsAndBytesConfig(**asked)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    plain = llama()
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        if type(weight).__name__ == "Params4bit":
            plain.get_submodule(path).weight.data = dequantize_4bit(weight, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            values = weight.data * (weight.SCB[:, None] / 127)
            plain.get_submodule(path).weight.data = values
    return model.train(), plain.train()


FOUR = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}  # fmt: skip


def torchao(kind: int | str) -> tuple[Any, Any]:
    from torchao import quantization

    model, plain = llama(), llama()
    configs: dict[int | str, Callable[[], Any]] = {
        8: quantization.Int8WeightOnlyConfig,
        4: partial(quantization.IntxWeightOnlyConfig, weight_dtype=torch.int4),
        "float8": quantization.Float8WeightOnlyConfig,
    }
    quantization.quantize_(model, configs[kind]())
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            plain.get_parameter(name).data = parameter.dequantize()
    return model.train(), plain.train()


def needs(package: str) -> Any:
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"the package {package} is not installed")


KINDS = [
    pytest.param(lambda _: replaced(WithFace), 1e-5, id="face"),
    pytest.param(lambda _: replaced(Bare), 1e-5, id="bare"),
    pytest.param(lambda p: bitsandbytes(p, **FOUR), 1e-5, id="bnb4", marks=needs("bitsandbytes")),
    pytest.param(  # activations are rounded too: 8 bits of them
        lambda p: bitsandbytes(p, load_in_8bit=True), 0.05, id="bnb8", marks=needs("bitsandbytes")
    ),
    pytest.param(lambda _: torchao(8), 1e-5, id="torchao8", marks=needs("torchao")),
    pytest.param(lambda _: torchao(4), 1e-5, id="torchao4", marks=needs("torchao")),
    pytest.param(lambda _: torchao("float8"), 1e-5, id="float8", marks=needs("torchao")),
]
pytestmark = pytest.mark.filterwarnings("ignore")


def moved(model: nn.Module, spec: str) -> dt.Delta:
    delta = dt.attach(model, spec, seed=0)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
    return delta.load_vector(delta.vector() + 0.05 * noise)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def gradients(model: Any, delta: dt.Delta) -> Tensor:
    model.train()
    model(input_ids=IDS).logits.square().sum().backward()
    found = torch.cat([p.grad.reshape(-1) for p in delta.parameters() if p.grad is not None])
    for parameter in delta.parameters():
        parameter.grad = None
    return found


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found - wanted).norm() / wanted.norm()) <= tolerance


@pytest.mark.parametrize(("make", "tolerance"), KINDS)
def test_a_delta_acts_and_learns_as_on_the_values_that_are_meant(
    make: Callable[[Path], tuple[Any, Any]], tolerance: float, tmp_path: Path
) -> None:
    logging.disable()  # bitsandbytes tells of each cast
    model, plain = make(tmp_path / "model")
    first = dt.attach(model, "norms", "first").disable()
    assert near(logits(model), logits(plain), tolerance)
    bare = any(isinstance(module, Bare) for module in model.modules())
    for spec in SPECS if bare else SPECS + READING:
        delta, other = moved(model, spec), moved(plain, spec)
        assert near(delta.vector(), other.vector(), 1e-6), spec
        wanted = gradients(plain, other)
        assert near(gradients(model, delta), wanted, tolerance), spec
        out = logits(model)
        assert near(out, logits(plain), tolerance), spec
        assert torch.equal(logits(copy.deepcopy(model)), out)
        delta.save(tmp_path / "delta", overwrite=True)
        delta.detach()
        other.detach()
        delta = dt.load(tmp_path / "delta", model)
        assert torch.equal(logits(model), out)
        with pytest.raises(StoreError, match="another backbone"):
            dt.load(tmp_path / "delta", llama())
        other = dt.load(tmp_path / "delta", plain, force=tolerance > 1e-3 or bare)
        assert near(logits(plain), out, tolerance)
        delta.detach()
        other.detach()
    first.detach()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", ["bnb4", "torchao4", "fused"])
def test_a_delta_starts_at_what_rounding_lost(kind: str, tmp_path: Path) -> None:
    """Oracle: Eckart and Young. What rank r leaves of W - Q are its other singular values."""
    before: Any = ZOO["gpt2"].build(0) if kind == "fused" else llama()
    if kind == "fused":  # roles of one matrix, which is held as (in, out)
        model = ZOO["gpt2"].build(0)
        for name, parameter in model.named_parameters():
            if name.endswith("c_attn.weight"):
                parameter.data = parameter.data.round(decimals=1)
    else:
        pytest.importorskip("bitsandbytes" if kind == "bnb4" else "torchao")
        model, _ = bitsandbytes(tmp_path / "model", **FOUR) if kind == "bnb4" else torchao(4)
    ids, rank = {"input_ids": IDS}, 12 if kind == "fused" else 24
    where = "attn.q, attn.v" if kind == "fused" else "attn, ffn"
    delta = dt.attach(model, f"lora(rank={rank}, alpha=12, where='{where}')", seed=0)
    delta.scale = 0.5
    with torch.no_grad():  # a LoRA starts at no change
        wanted, rounded = before(**ids).logits, model.eval()(**ids).logits
    left = restore_rounding(delta, before)
    gone = size = 0.0
    for unit in delta.tree.units:
        site = unit.site
        held = pretrained(model.get_submodule(site.path), site.param)
        lost = before.get_parameter(f"{site.path}.{site.param}") - held
        values = torch.linalg.svdvals(site.matrix(lost).double())
        gone, size = gone + float(values[rank:].square().sum()), size + float(values.square().sum())
    assert left == pytest.approx((gone / size) ** 0.5, rel=1e-3, abs=1e-6)
    with torch.no_grad():
        assert (model(**ids).logits - wanted).norm() < 0.9 * (rounded - wanted).norm()


def test_a_delta_starts_nowhere_without_all_that_was_rounded() -> None:
    model = llama()
    delta = dt.attach(model, "lora(rank=2)", seed=0)
    was, plain = delta.vector(), dict(llama(1).named_parameters())
    del plain["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(ConversionError, match=r"v_proj.weight` is .* and not there"):
        restore_rounding(delta, plain)
    assert torch.equal(delta.vector(), was)
    delta.detach()
    other = dt.attach(model, "loha(rank=2)", seed=0)
    start = other.vector()
    with pytest.raises(ConversionError, match="no closed form"):
        restore_rounding(other, llama(1))
    assert torch.equal(other.vector(), start)
    other.detach()
    with pytest.raises(ConversionError, match="is no change of weights"):
        restore_rounding(dt.attach(model, "adapter"), llama(1))


@pytest.mark.parametrize("asked", [FOUR, {"load_in_8bit": True}], ids=["4", "8"])
@needs("bitsandbytes")
def test_merging_says_what_rounding_costs_and_costs_that(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    model, plain = bitsandbytes(tmp_path / "model", **asked)
    path = "model.layers.0.self_attn.q_proj"
    held, delta = model.get_submodule(path), moved(model, "lora(rank=4)").disable()
    untouched, original = logits(model), held.weight
    out = logits(delta.enable().model)
    with pytest.raises(AttachError, match="rounds these again, an error of") as refused:
        delta.merge()
    assert not delta.merged and torch.equal(logits(model), out)
    said = float(str(refused.value).split("an error of ")[1].split("%")[0]) / 100

    (unit, *_) = delta.tree.units
    change = unit.spec.update(unit).dense().detach()
    delta.merge(requantise=True)
    merged, weight = logits(model), held.weight
    if "load_in_4bit" in asked:
        from bitsandbytes.functional import dequantize_4bit

        found = dequantize_4bit(weight, weight.quant_state)
    else:
        found = held.state.CB * (held.state.SCB[:, None] / 127)
    error = found - (plain.get_submodule(path).weight + change)
    assert float(error.norm() / change.norm()) == pytest.approx(said, abs=0.006)
    assert 0.003 < said < 0.2 and weight.dtype in (torch.uint8, torch.int8)
    assert near(merged, out, 0.15) and not near(merged, untouched, 0.15)
    delta.scale = 0.5
    assert not torch.equal(logits(model), merged)
    delta.scale = 1.0
    assert torch.equal(logits(model), merged)
    assert torch.equal(logits(delta.unmerge().model), out)
    assert torch.equal(logits(delta.disable().model), untouched) and held.weight is original


SCHEMES: dict[str, tuple[Callable[[Any], Any], int, int, bool]] = {
    "int8": (lambda q: q.Int8WeightOnlyConfig(), 8, 0, False),
    "int8-groups": (lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)), 8, 32, False),
    "int4": (lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4), 4, 0, False),
    "int4-shifted": (
        lambda q: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=q.PerGroup(16),
            mapping_type=q.MappingType.ASYMMETRIC, scale_dtype=torch.bfloat16,
        ),
        4, 16, True,
    ),
    "float8": (lambda q: q.Float8WeightOnlyConfig(), 0, 0, False),
}  # fmt: skip
"""torchao's configuration, bits (0: floating point), size of a group (0: a row), shifted or not."""


def rounded(values: Tensor, bits: int, group: int, shifted: bool) -> Tensor:
    """torchao's rounding, written out: w = s (q - z) for whole numbers q of so many bits,

        s = max |w| / ((2^b - 1) / 2),  z = 0;  or  s = (max w - min w) / (2^b - 1),  z = -min w / s

    in each group of a row; of eight bits of floating point s = max |w| / 448, the largest of them.
    """
    blocks = values.reshape(-1, group or values.shape[1])
    largest = blocks.abs().amax(1, keepdim=True)
    if not bits:
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(values.shape)
    low, high, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.zeros_like(largest)
    scale = largest / ((high - low) / 2)
    if shifted:
        least, most = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True)
        scale = (most.clamp(min=0) - least) / (high - low)
        zero = (low - (least / scale).round()).clamp(low, high)
        scale = scale.bfloat16()
    codes = ((blocks * (1 / scale)).round() + zero).clamp(low, high)  # ties are torchao's
    return ((codes - zero) * scale).reshape(values.shape)


@pytest.mark.parametrize("scheme", SCHEMES)
@needs("torchao")
def test_merging_into_torchao_s_weights_rounds_as_they_were_rounded(scheme: str) -> None:
    from torchao import quantization

    config, *how = SCHEMES[scheme]
    model, path = llama(), "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(path).weight.detach().clone()
    quantization.quantize_(model, config(quantization))
    held, delta = model.get_submodule(path), moved(model, "lora(rank=4)").disable()
    values = held.weight.dequantize()
    torch.testing.assert_close(values, rounded(before, *how), rtol=1e-5, atol=1e-7)
    untouched, original = logits(model), held.weight
    out = logits(delta.enable().model)
    with pytest.raises(AttachError, match="rounds these again, an error of") as refused:
        delta.merge()
    assert not delta.merged and torch.equal(logits(model), out)
    said = float(str(refused.value).split("an error of ")[1].split("%")[0]) / 100
    (unit, *_) = delta.tree.units
    change = unit.spec.update(unit).dense().detach()
    wanted = rounded(values + change, *how)
    delta.merge(requantise=True)
    assert type(held.weight) is type(original) and not held.weight.requires_grad
    torch.testing.assert_close(held.weight.dequantize(), wanted, rtol=1e-5, atol=1e-7)
    error = (wanted - values - change).norm() / change.norm()
    assert 0.003 < said < 0.9 and said == pytest.approx(float(error), abs=0.006)
    for name in ("scale", "qdata", "zero_point"):
        now, was = getattr(held.weight, name, None), getattr(original, name, None)
        assert now is None or (now.dtype, now.shape) == (was.dtype, was.shape)
    merged = logits(model)
    assert near(merged, out, 0.3) and not torch.equal(merged, untouched)
    assert torch.equal(logits(delta.unmerge().model), out)
    assert torch.equal(logits(delta.disable().model), untouched) and held.weight is original


@needs("torchao")
def test_numbers_that_leave_out_how_inputs_were_scaled_are_not_merged_into() -> None:
    model, _ = torchao(8)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight).__name__ == "Int8Tensor":
            module.weight.act_pre_scale = torch.ones(1)
    with pytest.raises(AttachError, match="Int8Tensor, with its inputs scaled before"):
        moved(model, "lora(rank=4)").merge(requantise=True)


@needs("bitsandbytes")
def test_an_order_that_lets_no_gradient_through_is_noticed(tmp_path: Path) -> None:
    """bitsandbytes 0.50 on processors with AVX512-BF16: after one inference no gradient flows."""
    model, _ = bitsandbytes(tmp_path / "model", **FOUR)
    first = model.model.layers[0].self_attn.q_proj
    if not first.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes rearranges nothing on this processor")
    delta = dt.attach(model, "lora(rank=2)")
    logits(model)
    assert gradients(model, delta).abs().sum() > 0
    delta.detach()
    assert first.support_avx512bf16_for_cpu
    logits(model)
    with pytest.raises(AttachError, match="attach before its first forward in eval mode"):
        dt.attach(model, "lora(rank=2)")
    assert not dt.deltas(model)


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    bare, _ = replaced(Bare)
    faced, _ = replaced(WithFace)
    for model, spec, words in (
        (bare, "dora(rank=2)", "Bare holds its weight in a form of its own"),
        (bare, "oft", "Bare holds its weight in a form of its own"),
        (faced, "full", r"would change `model.layers.0.self_attn.q_proj.weight` itself.*Rounded"),
        (faced, "fish", "held as Rounded; leave it out"),
    ):
        before = logits(model)
        with pytest.raises((AttachError, WhereError), match=words):
            dt.attach(model, spec)
        assert not dt.deltas(model) and torch.equal(logits(model), before)
    classifier: Any = ZOO["bert"].build(0)
    classifier.classifier = WithFace(classifier.classifier)
    with pytest.raises(WhereError, match=r"`head` would change `classifier.weight`.*head=False"):
        dt.attach(classifier, "lora(rank=2)")
    assert dt.attach(classifier, "lora(rank=2)", head=False).count() > 0
    for model, words in ((bare, "leave it unmerged"), (faced, "which says too little of how")):
        for requantise in (False, True):
            delta = moved(model, "lora(rank=2)")
            out = logits(model)
            with pytest.raises(AttachError, match=words):
                delta.merge(requantise=requantise)
            assert torch.equal(logits(model), out)
            delta.detach()


def test_training_through_weights_without_gradients_is_refused() -> None:
    model, _ = replaced(Inferring)
    delta = moved(model, "lora(rank=2, where='attn.q, head')")
    assert logits(model).isfinite().all()
    with pytest.raises(TrainError, match="no gradient flows through the Rounded weights"):
        gradients(model, delta)
    for parameter in delta.parameters():
        parameter.requires_grad_(False)
    model.train()(input_ids=IDS)


@pytest.mark.parametrize("asked", [FOUR, {"load_in_8bit": True}], ids=["4", "8"])
@needs("bitsandbytes")
def test_the_trainer_takes_a_quantised_model_with_the_callback(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    from deltune.training.callback import DeltaCallback

    model, plain = bitsandbytes(tmp_path / "model", **asked)
    delta = moved(model, "lora(rank=2)")
    before = delta.vector()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, learning_rate=1e-2,
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model, arguments, train_dataset=rows, callbacks=[DeltaCallback(delta)]).train()
    assert not torch.equal(delta.vector(), before)
    assert not model._hf_peft_config_loaded
    folder = tmp_path / "run" / "checkpoint-2" / "delta"
    other = dt.load(folder, plain, force=True)
    assert torch.equal(other.vector(), delta.vector())


# --- GGUF -----------------------------------------------------------------------------------------

BLOCK = 32
GGUFS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
    "model.norm.weight": "output_norm.weight",
}  # fmt: skip


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in GGUF's Q8_0, and the values that it means: blocks of 32 codes q of eight bits
    behind a scale d of 16, w = d q, d = max |w| / 127."""
    blocks = weight.reshape(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scale.float()).round().to(torch.int8)
    held = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1)
    return held.reshape(len(weight), -1), (scale.float() * codes).reshape(weight.shape)


def write_gguf(file: Path) -> Any:
    """Writes a tiny Llama with matrices in Q8_0; the model of plain numbers with their values.

    llama.cpp pairs the rows of queries and keys for rotation otherwise than transformers: the two
    halves of a head alternate.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    plain, out = llama(), GGUFWriter(file, "llama")
    config = plain.config
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(["<s>", "</s>", *map(chr, range(33, 94)), '!"'])
    out.add_token_types([3, 3] + [1] * 62)
    out.add_token_merges(['! "'])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    for name, parameter in plain.named_parameters():
        whole = OUTSIDE.get(name)
        if whole is None:
            _, _, layer, rest = name.split(".", 3)
            whole = f"blk.{layer}.{GGUFS[rest.removesuffix('.weight')]}.weight"
        if parameter.ndim == 1 or "embed" in name:
            out.add_tensor(whole, parameter.detach().numpy())
            continue
        held, parameter.data = eight_bits(parameter.detach())
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if count := heads.get(whole.split(".")[-2]):
            held = held.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(held.shape)
        out.add_tensor(whole, held.numpy(), raw_dtype=GGMLQuantizationType.Q8_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return plain


@needs("gguf")
def test_a_gguf_file_is_a_backbone_of_the_values_that_it_means(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = dt.load_model(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")
    assert tokenizer('!"#')["input_ids"][-2:] == [63, 4]  # after the merge of its first two
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert own[name].dtype == torch.float32 and torch.equal(own[name], parameter), name
    vectors = []
    for one in (model, plain):
        delta = moved(one, "lora(rank=4, where='attn, ffn, head') + norms")
        before, optimizer = delta.vector(), torch.optim.SGD(delta.parameters(), 0.1)
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        vectors.append(delta.vector())
        assert (delta.vector() - before).abs().max() > 1e-5
    assert torch.equal(*vectors)
    out = logits(model)
    assert torch.equal(out, logits(plain))
    delta = dt.deltas(model)["delta"]
    delta.save(tmp_path / "delta")
    assert near(logits(delta.merge().model), out, 1e-6)
    assert not torch.equal(own["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(logits(delta.unmerge().model), out)
    again, _ = dt.load_model(str(tmp_path / "tiny.gguf"))
    dt.load(tmp_path / "delta", again)
    assert torch.equal(logits(again), out)
