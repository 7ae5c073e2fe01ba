"""Soft prompts. Oracles: the same tokens fed as ids; each row of a batch alone; decoding one
whole forward at a time, without a cache."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltune as dt
from rows import embedded, generated, leftward, rows, step_by_step
from snapshots import distance
from zoo import ZOO

DECODERS = ["gpt2", "gpt-neox", "opt", "llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe"]
SEQ2SEQ = ["t5", "t5-gated", "bart", "marian"]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert"]
IDS = (9, 31, 17)
MANY = "prompt(tokens=3) + prefix(tokens=2) + lora(rank=2)"


def build(name: str, attention: str = "sdpa") -> nn.Module:
    model = ZOO[name].build(0)
    if name != "deberta-v2":  # has one implementation only
        model.set_attn_implementation(attention)
    return model


def attach(model: nn.Module, spec: str, name: str = "delta", seed: int = 1) -> dt.Delta:
    """A delta away from its start, so that LoRA acts too."""
    delta = dt.attach(model, spec, name, seed=seed)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(seed))
    return delta.load_vector(delta.vector() + 0.1 * noise)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
@pytest.mark.parametrize("spec", ["prompt(tokens=3)", MANY], ids=["prompt", "many"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_left_padded_batch_equals_its_rows(
    name: str, spec: str, positions: bool, attention: str
) -> None:
    model = build(name, attention)
    attach(model, spec)
    batch = leftward(ZOO[name].batch(0), positions)
    with torch.no_grad():
        whole = model(**batch).logits
        for i, row in enumerate(rows(batch)):
            padded = whole[i, batch["attention_mask"][i].bool()]
            assert distance(padded, model(**row).logits[0]) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ENCODERS + SEQ2SEQ)
def test_a_right_padded_batch_equals_its_rows(name: str, attention: str) -> None:
    model = build(name, attention)
    attach(model, "prompt(tokens=3)")
    batch = ZOO[name].batch(0)
    with torch.no_grad():
        whole = model(**batch).logits
        for i, row in enumerate(rows(batch)):
            padded = whole[i, : row["decoder_input_ids"].shape[1]] if name in SEQ2SEQ else whole[i]
            assert distance(padded, model(**row).logits[0]) <= 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_embeddings_of_tokens_equal_these_tokens(name: str) -> None:
    model, case = build(name), ZOO[name]
    ids = case.batch(0)["input_ids"][:1]
    with torch.no_grad():
        expected = model(input_ids=torch.cat([torch.tensor([IDS]), ids], 1)).logits[:, len(IDS) :]
        delta = dt.attach(model, dt.Prompt(tokens=3, init="ids", ids=IDS))
        assert distance(model(input_ids=ids).logits, expected) <= 1e-5
    assert delta.count() == 3 * model.config.hidden_size


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_embeddings_of_tokens_equal_these_tokens_in_the_encoder(name: str) -> None:
    model, batch = build(name), ZOO[name].batch(0)
    first = torch.tensor([IDS]).expand(len(batch["input_ids"]), -1)
    longer = {
        **batch,
        "input_ids": torch.cat([first, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(first), batch["attention_mask"]], 1),
    }
    with torch.no_grad():
        expected = model(**longer).logits
        dt.attach(model, dt.Prompt(tokens=3, init="ids", ids=IDS))
        assert distance(model(**batch).logits, expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_embeddings_of_tokens_equal_these_tokens_in_an_encoder(name: str) -> None:
    model = build(name)
    ids = ZOO[name].batch(0)["input_ids"][:1]
    with torch.no_grad():
        whole = torch.cat([torch.tensor([IDS]), ids], 1)
        expected = model.base_model(input_ids=whole).last_hidden_state[:, len(IDS) :]
        dt.attach(model, dt.Prompt(tokens=3, init="ids", ids=IDS))
        assert distance(model.base_model(input_ids=ids).last_hidden_state, expected) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "t5"])
def test_several_prompts_stand_in_order_the_last_attached_first(name: str) -> None:
    model, case = build(name), ZOO[name]
    batch = next(rows(case.batch(0)))
    longer = dict(batch)
    longer["input_ids"] = torch.cat([torch.tensor([[17, 9, 31]]), batch["input_ids"]], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with torch.no_grad():
        expected = case.output(model(**longer))
        dt.attach(model, dt.Prompt(tokens=2, init="ids", ids=IDS[:2]), "first")
        dt.attach(model, dt.Prompt(tokens=1, init="ids", ids=IDS[2:]), "second")
        found = case.output(model(**batch))
    if name in DECODERS:
        expected = expected[:, 3:]
    assert distance(found, expected) <= 1e-5


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=list(GENERATIONS))
@pytest.mark.parametrize("spec", ["prompt(tokens=3)", MANY], ids=["prompt", "many"])
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_generate_equals_the_loop(name: str, spec: str, options: dict[str, object]) -> None:
    model = build(name)
    attach(model, spec)
    batch = ZOO[name].batch(0)
    batch = leftward(batch, positions=False) if name in DECODERS else batch
    expected = step_by_step(model, batch, int(options.get("num_beams", 1)))  # type: ignore
    assert torch.equal(generated(model, batch, **options), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_from_embeddings_equals_the_loop(name: str) -> None:
    model = build(name)
    attach(model, "prompt(tokens=3)")
    batch = leftward(ZOO[name].batch(0), positions=False)
    expected = step_by_step(model, batch)
    assert torch.equal(generated(model, embedded(model, batch)), expected)


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=list(GENERATIONS))
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "t5"])
def test_generate_with_two_prompts_equals_the_loop(name: str, options: dict[str, object]) -> None:
    model = build(name)
    attach(model, "prompt(tokens=3)", "first", 1)
    attach(model, "prompt(tokens=2)", "second", 2)
    batch = ZOO[name].batch(0)
    batch = leftward(batch, positions=False) if name in DECODERS else batch
    expected = step_by_step(model, batch, int(options.get("num_beams", 1)))  # type: ignore
    assert torch.equal(generated(model, batch, **options), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_from_before_the_prompt_is_refused(name: str) -> None:
    model = build(name)
    ids = ZOO[name].batch(0)["input_ids"][:1]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        attach(model, "prompt(tokens=3)")
        mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long)
        with pytest.raises(dt.DeltuneError, match="cache was filled without this prompt"):
            model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_labels_keep_their_length(name: str) -> None:
    model = build(name)
    attach(model, "prompt(tokens=3)")
    batch = leftward(ZOO[name].batch(0), positions=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        output = model(**batch, labels=labels)
    assert output.logits.shape[:2] == labels.shape
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected, atol=1e-6)
