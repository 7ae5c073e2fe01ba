"""Oracle: PEFT 0.21.2, an independent implementation, with the same tensors on the same model.

Outputs and gradients agree within 1e-5 wherever PEFT itself is right. Where it is not, the test
shows so by PEFT's own result on a single row without padding, and ours agrees with that.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from probes import for_peft
from zoo import HEADS, LAYERS, PAD, ZOO, Case

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Position ids are not supported for parameter efficient tuning:UserWarning",
)

TOLERANCE = 1e-5
TOKENS = 3
T5_INNER = 24
ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "bart")
ONE_STACK = ("bert", "gpt2", "llama")
DECODERS = ("gpt2", "llama")
TWO_STACKS = ("t5", "bart")
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}


def wrapped(case: Case, config: type, **options: Any) -> Any:
    """PEFT's model."""
    task = TASKS.get(case.name, "SEQ_2_SEQ_LM")
    return peft.get_peft_model(for_peft(case.build(0)), config(task_type=task, **options)).eval()


def attached(case: Case, spec: str, spread: float = 0.1) -> dt.Delta:
    """Our delta with random tensors everywhere but in the head."""
    delta = dt.attach(case.build(0), spec)
    generator = torch.Generator().manual_seed(1)
    values = {
        name: t if name.startswith("head.") else spread * torch.randn(t.shape, generator=generator)
        for name, t in delta.tensors().items()
    }
    return delta.load_tensors(values)


def loss(output: Tensor) -> Tensor:
    """A scalar that every element of the output changes differently."""
    generator = torch.Generator().manual_seed(2)
    return (output * torch.randn(output.shape, generator=generator)).sum()


def gradients(delta: dt.Delta) -> dict[str, Tensor]:
    return {name: p.grad for name, p in delta.tree.named().items() if p.grad is not None}


def assert_close(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Within 1e-5 of the largest element, or of one where all are smaller."""
    assert ours is not None and theirs is not None
    bound = TOLERANCE * max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=bound)


def assert_acts(case: Case, delta: dt.Delta) -> None:
    """The comparison is about something: the delta changes the output."""
    with torch.no_grad(), delta.disabled():
        without = case.run(delta.model)
    assert (case.run(delta.model) - without).abs().max() > 1e-3


# --- LoRA ---------------------------------------------------------------------------------------

LORA = {
    "alpha over rank": ("lora(rank=2, alpha=6.0)", {"r": 2, "lora_alpha": 6}),
    "root": (
        "lora(rank=3, alpha=5.0, scaling='root')",
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
    ),
    "every linear": ("lora(rank=2, where='attn, ffn')", {"r": 2, "lora_alpha": 16}),
    "embedding": ("lora(rank=2, alpha=3.0, where='embed')", {"r": 2, "lora_alpha": 3}),
}


def lora_pair(case: Case, spec: str, options: dict[str, Any]) -> tuple[dt.Delta, Any]:
    """Ours and PEFT's LoRA on the same modules, with the same tensors."""
    if case.name == "gpt2" and "where" not in spec:
        spec = spec.removesuffix(")") + ", where='attn.qkv')"  # PEFT sees the fused matrix only
    elif case.name == "gpt2" and "ffn" in spec:
        spec = spec.replace("'attn, ffn'", "'attn.qkv, attn.o, ffn'")
    delta = attached(case, spec)
    if "embed" in spec:
        for name, tensor in delta.tensors().items():
            if name.endswith(".A"):
                tensor[:, PAD] = 0.0  # as in training: it starts there and gets no gradient
    paths = [unit.site.path for unit in delta.tree.units if unit.spec.kind == "lora"]
    theirs = wrapped(
        case, peft.LoraConfig, target_modules=paths, fan_in_fan_out=case.name == "gpt2", **options
    )
    with torch.no_grad():
        for path in paths:
            for name, tensor in zip("AB", lora_tensors(theirs, path), strict=True):
                tensor.copy_(delta.tensors()[f"lora.{path}.{name}"])
    return delta, theirs


def lora_tensors(theirs: Any, path: str) -> tuple[nn.Parameter, nn.Parameter]:
    layer = theirs.base_model.model.get_submodule(path)
    if layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("form", LORA)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora(name: str, form: str) -> None:
    case = ZOO[name]
    delta, theirs = lora_pair(case, *LORA[form])
    assert_acts(case, delta)
    ours, oracle = case.run(delta.model), case.run(theirs)
    assert_close(ours, oracle)
    loss(ours).backward()
    loss(oracle).backward()
    ran = gradients(delta)
    for path in {unit.site.path for unit in delta.tree.units if unit.spec.kind == "lora"}:
        for own, tensor in zip("AB", lora_tensors(theirs, path), strict=True):
            assert_close(ran[f"lora.{path}.{own}"], tensor.grad)


def test_lora_on_slices_of_a_fused_matrix() -> None:
    """Query and value of GPT-2's `c_attn` are a block matrix of twice the rank to PEFT."""
    case, r = ZOO["gpt2"], 2
    delta = attached(case, f"lora(rank={r}, alpha=6.0)")
    theirs = wrapped(
        case, peft.LoraConfig, r=2 * r, lora_alpha=12, target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip
    paths = list(dict.fromkeys(unit.site.path for unit in delta.tree.units))
    own, d = delta.tensors(), case.build(0).config.n_embd
    for path in paths:
        down, up = lora_tensors(theirs, path)
        with torch.no_grad():
            down.copy_(torch.cat([own[f"lora.{path}.{x}.A"] for x in "qv"]))
            up.zero_()
            up[:d, :r], up[2 * d :, r:] = (own[f"lora.{path}.{x}.B"] for x in "qv")
    ours, oracle = case.run(delta.model), case.run(theirs)
    assert_acts(case, delta)
    assert_close(ours, oracle)
    loss(ours).backward()
    loss(oracle).backward()
    ran = gradients(delta)
    for path in paths:
        down, up = (t.grad for t in lora_tensors(theirs, path))
        assert down is not None and up is not None
        assert_close(torch.cat([ran[f"lora.{path}.{x}.A"] for x in "qv"]), down)
        assert_close(ran[f"lora.{path}.q.B"], up[:d, :r])
        assert_close(ran[f"lora.{path}.v.B"], up[2 * d :, r:])


# --- prefix -------------------------------------------------------------------------------------


def prefix_pair(case: Case) -> tuple[dt.Delta, Any]:
    """PEFT delivers the prefix through the cache, so positions shift; of two stacks only the
    decoder's self-attention gets it."""
    within = "[decoder]" if case.name in TWO_STACKS else ""
    delta = attached(case, f"prefix(tokens={TOKENS}, positions='shift'){within}", spread=1.0)
    width = {"token_dim": T5_INNER} if case.name == "t5" else {}  # PEFT takes it for d_model
    theirs = wrapped(case, peft.PrefixTuningConfig, num_virtual_tokens=TOKENS, **width)
    with torch.no_grad():
        prompt_of(theirs).copy_(flat(delta.tensors()))
    return delta, theirs


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """PEFT's layout (tokens, layers * 2 * width): layer by layer the keys, then the values."""
    return torch.cat([t for name, t in tensors.items() if name.startswith("prefix.")], 1)


@pytest.mark.parametrize("name", ONE_STACK)
def test_prefix(name: str) -> None:
    case = ZOO[name]
    delta, theirs = prefix_pair(case)
    assert_acts(case, delta)
    ours, oracle = case.run(delta.model), case.run(theirs)
    assert_close(ours, oracle)
    loss(ours).backward()
    loss(oracle).backward()
    assert_close(flat(gradients(delta)), prompt_of(theirs).grad)


@pytest.mark.parametrize("name", TWO_STACKS)
def test_prefix_of_two_stacks(name: str) -> None:
    """PEFT doubles its tables before it deals them out four to a layer, two of which it drops: of
    two layers both get the first one's, and the second one's have no effect and no gradient."""
    case = ZOO[name]
    delta, theirs = prefix_pair(case)
    own = delta.tensors()
    first, second = list(own)[:2], list(own)[2:4]
    assert_close(case.run(delta.model), by_hand(case, own))
    delta.load_tensors(own | {b: own[a].clone() for a, b in zip(first, second, strict=True)})
    assert_acts(case, delta)
    ours, oracle = case.run(delta.model), case.run(theirs)
    assert_close(ours, oracle)
    loss(ours).backward()
    loss(oracle).backward()
    ran, grad = gradients(delta), prompt_of(theirs).grad
    used, unused = grad.chunk(2, 1)
    assert_close(torch.cat([ran[a] + ran[b] for a, b in zip(first, second, strict=True)], 1), used)
    assert not unused.any()


def by_hand(case: Case, own: dict[str, Tensor]) -> Tensor:
    """The control: transformers alone, its cache filled with every layer's own table."""
    from transformers import DynamicCache, EncoderDecoderCache

    model, batch = case.build(0), case.batch(0)
    cache = EncoderDecoderCache(*(DynamicCache(config=model.config) for _ in range(2)))
    tables = list(own.values())
    for layer in range(LAYERS):
        keys, values = (
            t.unflatten(-1, (HEADS, -1)).transpose(0, 1).expand(len(batch["input_ids"]), -1, -1, -1)
            for t in tables[2 * layer : 2 * layer + 2]
        )
        cache.self_attention_cache.update(keys, values, layer)
    mask = batch.pop("decoder_attention_mask")
    longer = torch.cat([mask.new_ones(len(mask), TOKENS), mask], 1)
    return model(**batch, decoder_attention_mask=longer, past_key_values=cache).logits


@pytest.mark.parametrize("name", DECODERS)
def test_prefix_of_a_left_padded_batch(name: str) -> None:
    case = ZOO[name]
    delta, theirs = prefix_pair(case)
    batch = case.prompt()
    real = batch["attention_mask"].bool()
    assert not real[:, 0].all()
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    ours, oracle = (model(**batch).logits[real] for model in (delta.model, theirs))
    assert_close(ours, oracle)


# --- prompt -------------------------------------------------------------------------------------


def prompt_pair(case: Case) -> tuple[dt.Delta, Any]:
    """Of two stacks PEFT keeps twice the rows; the first half acts, on the encoder."""
    delta = attached(case, f"prompt(tokens={TOKENS})", spread=1.0)
    theirs = wrapped(case, peft.PromptTuningConfig, num_virtual_tokens=TOKENS)
    with torch.no_grad():
        prompt_of(theirs)[:TOKENS].copy_(table(delta.tensors()))
    return delta, theirs


def prompt_of(theirs: Any) -> nn.Parameter:
    return theirs.prompt_encoder["default"].embedding.weight


def table(tensors: dict[str, Tensor]) -> Tensor:
    (found,) = (t for name, t in tensors.items() if name.startswith("prompt."))
    return found


@pytest.mark.parametrize("name", DECODERS + TWO_STACKS)
def test_prompt(name: str) -> None:
    """A decoder's logits have the prompt's positions in front with PEFT, and not with us."""
    case, batch = ZOO[name], ZOO[name].batch(0)
    delta, theirs = prompt_pair(case)
    assert_acts(case, delta)
    extra = TOKENS if name in DECODERS else 0
    ours, oracle = case.run(delta.model), case.run(theirs)[:, extra:]
    assert oracle.shape == ours.shape
    real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    assert_close(ours[real], oracle[real])
    loss(ours[real]).backward()
    loss(oracle[real]).backward()
    grad = prompt_of(theirs).grad
    assert grad is not None
    assert_close(table(gradients(delta)), grad[:TOKENS])
    assert not grad[TOKENS:].any()


def test_prompt_of_an_encoder() -> None:
    """The states of all tokens agree; PEFT's pooler reads the prompt's first, ours still [CLS]."""
    case = ZOO["bert"]
    delta, theirs = prompt_pair(case)
    batch, real = case.batch(0), case.batch(0)["attention_mask"].bool()
    ours = delta.model(**batch, output_hidden_states=True)
    oracle = theirs(**batch, output_hidden_states=True)
    states = oracle.hidden_states[-1]
    tail = states[:, TOKENS:]
    assert_close(ours.hidden_states[-1][real], tail[real])
    model: Any = case.build(0)
    virtual, first = (model.classifier(model.bert.pooler(h)) for h in (states, tail))
    assert_close(oracle.logits, virtual)
    assert_close(ours.logits, first)
    assert (first - virtual).abs().max() > 1e-3
    loss(ours.logits).backward()
    loss(first).backward()
    assert_close(table(gradients(delta)), prompt_of(theirs).grad)


@pytest.mark.parametrize("name", DECODERS)
def test_prompt_of_a_left_padded_batch(name: str) -> None:
    """PEFT puts the prompt before the padding: a row changes with the company it is in. Ours does
    not, and equals PEFT's row alone."""
    case = ZOO[name]
    delta, theirs = prompt_pair(case)
    batch = case.prompt()
    with torch.no_grad():
        ours, oracle = delta.model(**batch).logits[:, -1], theirs(**batch).logits[:, -1]
        for row, mask in enumerate(batch["attention_mask"].bool()):
            alone = {key: value[row : row + 1, mask] for key, value in batch.items()}
            control = theirs(**alone).logits[0, -1]
            assert_close(delta.model(**alone).logits[0, -1], control)
            assert_close(ours[row], control)
            wrong = bool((oracle[row] - control).abs().max() > 1e-2)
            assert wrong == (not mask.all())
