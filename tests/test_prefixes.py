"""Prefixes. Oracles: transformers' own cache holding the prefix; the gated closed form of
attention; `torch.nn` modules with the same tensors; each row of a batch alone; decoding one whole
forward at a time, without a cache; published counts."""

import pytest
import torch
from torch import nn

import deltune as dt
from rows import embedded, generated, leftward, rows, step_by_step
from shapes import meta_model
from snapshots import distance
from zoo import HEADS, HIDDEN, LAYERS, ZOO

DECODERS = ["gpt2", "gpt-neox", "opt", "llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe"]
SEQ2SEQ = ["t5", "t5-gated", "bart", "marian"]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "albert", "modernbert"]
FORMS = {
    "keep": "prefix(tokens=3)",
    "shift": "prefix(tokens=3, positions='shift')",
    "mlp": "prefix(tokens=3, mlp=4)",
}
GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
}


def build(name: str, attention: str = "sdpa") -> nn.Module:
    model = ZOO[name].build(0)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("name", DECODERS)
def test_a_left_padded_batch_equals_its_rows(name: str, spec: str, attention: str) -> None:
    model = build(name, attention)
    dt.attach(model, spec, seed=1)
    batch = leftward(ZOO[name].batch(0))
    with torch.no_grad():
        whole = model(**batch).logits
        for i, row in enumerate(rows(batch)):
            padded = whole[i, batch["attention_mask"][i].bool()]
            assert distance(padded, model(**row).logits[0]) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("name", ENCODERS + SEQ2SEQ)
def test_a_right_padded_batch_equals_its_rows(name: str, spec: str, attention: str) -> None:
    model = build(name, attention)
    dt.attach(model, spec, seed=1)
    batch = ZOO[name].batch(0)
    with torch.no_grad():
        whole = model(**batch).logits
        for i, row in enumerate(rows(batch)):
            padded = whole[i, : row["decoder_input_ids"].shape[1]] if name in SEQ2SEQ else whole[i]
            assert distance(padded, model(**row).logits[0]) <= 1e-5


@pytest.mark.parametrize("spec", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *SEQ2SEQ, "vit", "whisper"])
def test_eager_and_sdpa_agree(name: str, spec: str) -> None:
    if name in ("vit", "whisper") and "shift" in spec:
        spec += "[decoder]"
        if name == "vit":
            pytest.skip("no positions to shift")
    found = []
    for attention in ("eager", "sdpa"):
        model = build(name, attention)
        dt.attach(model, spec, seed=1)
        with torch.no_grad():
            found.append(ZOO[name].run(model))
    assert distance(found[0], found[1]) <= 1e-5


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=list(GENERATIONS))
@pytest.mark.parametrize("positions", ["keep", "shift"])
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_generate_equals_the_loop(name: str, positions: str, options: dict[str, object]) -> None:
    model = build(name)
    dt.attach(model, dt.Prefix(tokens=3, positions=positions), seed=1)
    batch = ZOO[name].batch(0)
    batch = leftward(batch, positions=False) if name in DECODERS else batch
    expected = step_by_step(model, batch, int(options.get("num_beams", 1)))  # type: ignore
    assert torch.equal(generated(model, batch, **options), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_from_embeddings_equals_the_loop(name: str) -> None:
    model = build(name)
    dt.attach(model, "prefix(tokens=3)", seed=1)
    batch = leftward(ZOO[name].batch(0), positions=False)
    expected = step_by_step(model, batch)
    assert torch.equal(generated(model, embedded(model, batch)), expected)


@pytest.mark.parametrize("positions", ["keep", "shift"])
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "llama", "qwen3", "phi3", "mixtral"])
def test_a_prefix_equals_one_in_the_cache_of_transformers(name: str, positions: str) -> None:
    from transformers import DynamicCache

    model, batch = build(name), ZOO[name].batch(0)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        delta = dt.attach(model, dt.Prefix(tokens=3, positions=positions), seed=1)
        found = model(input_ids=ids).logits
        tensors = delta.tensors()
        delta.detach()
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        cache = DynamicCache(config=config)
        names = list(tensors)
        for layer in range(config.num_hidden_layers):
            pair = [tensors[n].unflatten(-1, (heads, -1)).transpose(0, 1)[None] for n in
                    names[2 * layer : 2 * layer + 2]]  # fmt: skip
            cache.update(*pair, layer)
        at = torch.arange(ids.shape[1])[None] + (3 if positions == "shift" else 0)
        expected = model(input_ids=ids, past_key_values=cache, position_ids=at).logits
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_a_shifted_decoder_prefix_equals_one_in_the_cache_of_t5(name: str) -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    model, case = build(name), ZOO[name]
    batch = next(rows(case.batch(0)))
    del batch["decoder_attention_mask"]
    with torch.no_grad():
        spec = dt.Prefix(tokens=3, positions="shift", where="decoder.attn")
        delta = dt.attach(model, spec, seed=1)
        found = case.output(model(**batch))
        tensors = list(delta.tensors().values())
        delta.detach()
        cache = DynamicCache()
        for layer in range(model.config.num_decoder_layers):
            pair = [
                t.unflatten(-1, (HEADS, -1)).transpose(0, 1)[None]
                for t in tensors[2 * layer : 2 * layer + 2]
            ]
            cache.update(*pair, layer)
        past = EncoderDecoderCache(cache, DynamicCache())
        expected = case.output(model(**batch, past_key_values=past))
    assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_attention_follows_the_gated_formula(attention: str) -> None:
    model = build("bert", attention)
    layer = model.bert.encoder.layer[0].attention.self
    delta = dt.attach(model, "prefix(tokens=3)[0]", seed=1)
    keys, values = (t.unflatten(-1, (HEADS, -1)).transpose(0, 1) for t in _pair(delta))
    x = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0))

    def heads(linear: nn.Module) -> torch.Tensor:
        return linear(x)[0].unflatten(-1, (HEADS, -1)).transpose(0, 1)

    with torch.no_grad():
        found = layer(x)[0][0]
        query = heads(layer.query) / (HIDDEN // HEADS) ** 0.5
        own, learned = query @ heads(layer.key).mT, query @ keys.mT
        gate = learned.exp().sum(-1, True) / (learned.exp().sum(-1, True) + own.exp().sum(-1, True))
        plain, prefix = own.softmax(-1) @ heads(layer.value), learned.softmax(-1) @ values
        expected = ((1 - gate) * plain + gate * prefix).transpose(0, 1).flatten(1)
    assert distance(found, expected) <= 1e-5


def _pair(delta: dt.Delta) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = delta.tensors()
    (key,) = (t for name, t in tensors.items() if name.endswith(".K"))
    (value,) = (t for name, t in tensors.items() if name.endswith(".V"))
    return key, value


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_the_order_of_the_slots_does_not_matter(name: str) -> None:
    model, case = build(name), ZOO[name]
    delta = dt.attach(model, "prefix(tokens=4)", seed=1)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        expected = case.run(model)
        tensors = {
            n: t[order] if n.endswith((".K", ".V")) else t.clone()
            for n, t in delta.tensors().items()
        }
        assert distance(case.run(delta.load_tensors(tensors).model), expected) <= 1e-5
        tensors = {n: t[order] if n.endswith(".K") else t for n, t in tensors.items()}
        assert distance(case.run(delta.load_tensors(tensors).model), expected) > 1e-3


@pytest.mark.parametrize("bias", [True, False])
def test_the_tables_of_a_stack_are_those_of_torchs_network(bias: bool) -> None:
    delta = dt.attach(build("bert"), f"prefix(tokens=3, mlp=4, dropout=0.5, bias={bias})", seed=1)
    units = [unit for unit in delta.tree.units if unit.spec.kind == "prefix"]
    shared = units[0].shared
    ends = nn.Linear(HIDDEN, 4, bias), nn.Linear(4, 2 * LAYERS * HIDDEN, bias)
    network = nn.Sequential(ends[0], nn.Tanh(), ends[1])
    values = [shared.W1, torch.cat([unit.W2 for unit in units])]
    if bias:
        values = [values[0], shared.b1, values[1], torch.cat([unit.b2 for unit in units])]
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.copy_(value)
        tables = network(shared.E).split(HIDDEN, 1)  # keys and values, layer by layer
        found = [table for unit in units for table in unit.spec.keys_values(unit)]
        assert all(distance(*pair) <= 1e-6 for pair in zip(found, tables, strict=True))
        for unit, pair in zip(units, zip(tables[::2], tables[1::2], strict=True), strict=True):
            unit.train()
            for drawn, table in zip(unit.spec.keys_values(unit), pair, strict=True):
                kept = drawn != 0
                assert 0 < int(kept.sum()) < kept.numel()
                assert distance(drawn[kept], 2 * table[kept]) <= 1e-6


@pytest.mark.parametrize("spec", [dt.Prefix(tokens=200), dt.Prefix(tokens=200, mlp=64)])
def test_a_prefix_starts_as_torchs_modules_do(spec: dt.Prefix) -> None:
    delta = dt.attach(build("bert"), spec, head=False, seed=1)
    for name, tensor in delta.tensors().items():
        last = name.rpartition(".")[2]
        if last in ("K", "V", "E"):
            assert abs(float(tensor.std()) - 1) < 0.05 and abs(float(tensor.mean())) < 0.1, name
        else:
            bound = (HIDDEN if last in ("W1", "b1") else 64) ** -0.5
            assert 0.85 * bound < float(tensor.abs().max()) <= bound, name


def test_prefixes_have_the_published_sizes() -> None:
    import transformers as hf

    with torch.device("meta"):
        medium = hf.GPT2Model(hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        bart = hf.BartModel(hf.BartConfig())  # the large one
    for model, text, count in [
        (medium, "prefix(tokens=5)", 245_760),
        (medium, "prefix(tokens=5, mlp=512)", 25_744_896),
        (bart, "prefix(tokens=200)", 14_745_600),
        (meta_model("bert-base"), "prefix(tokens=10)", 184_320),
        (meta_model("roberta-base"), "prefix(tokens=16)", 294_912),
    ]:
        assert dt.plan(model, text).count() == count, text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prefix(std=-1.0)", r"`prefix\(std=-1.0\)`: `std` must be 0 or more"),
        ("p_tuning_v2(std=-0.5)", "`std` must be 0 or more"),
        ("apt(std=1e400)", "`apt.std=inf` is not a finite number"),
        ("prefix(bias=False)", "`bias` must be True where there is no `mlp`"),
        ("prefix(dropout=1.0)", r"`dropout` must be in \[0, 1\)"),
        ("prefix(positions='rotate')", "is not one of `keep`, `shift`"),
    ],
)
def test_a_prefix_that_means_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(dt.DeltuneError, match=reason):
        dt.parse(text)


@pytest.mark.parametrize("spec", ["prefix(tokens=3, mlp=4)", "prefix(tokens=3, mlp=4) + lora"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart", "whisper"])
def test_a_folded_prefix_is_the_same_and_plain(name: str, spec: str) -> None:
    model, case = build(name), ZOO[name]
    delta = dt.attach(model, spec, seed=1)
    with torch.no_grad():
        expected = case.run(model)
        folded = delta.fold()
        assert distance(case.run(model), expected) <= 1e-6
    assert str(folded.spec) == spec.replace(", mlp=4", "")
    assert folded.layout == dt.plan(case.build(0), folded.spec).layout
