"""Soft prompts. Oracles: the same tokens fed as ids; each row of a batch alone; decoding one
whole forward at a time, without a cache."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.errors import AttachError
from rows import embedded, generated, leftward, rows, step_by_step
from shapes import meta_model
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


def start(text: str | dt.Spec, name: str = "t5", seed: int = 1) -> tuple[Tensor, Tensor]:
    """A prompt as it starts, and the model's table of embeddings."""
    model = build(name)
    (found,) = dt.attach(model, text, head=False, seed=seed).tensors().values()
    return found, model.get_input_embeddings().weight.detach()


def test_a_prompt_starts_uniform_on_both_sides_of_zero_or_above_it() -> None:
    for text, low, high in [
        ("prompt(tokens=400)", -0.5, 0.5),
        ("prompt(tokens=400, bound=2.0)", -2.0, 2.0),
        ("prompt(tokens=400, init='positive')", 0.0, 0.5),
    ]:
        found, width = start(text)[0], high - low
        assert low <= float(found.min()) < low + 0.01 * width
        assert high - 0.01 * width < float(found.max()) <= high
        assert abs(float(found.std()) * 12**0.5 / width - 1) < 0.05
        assert abs(float(found.mean()) - (low + high) / 2) < 0.05 * width


def test_a_prompt_starts_at_different_rows_of_the_most_frequent_tokens() -> None:
    drawn = set()
    for seed in range(4):
        found, table = start("prompt(tokens=6, init='vocabulary', vocabulary=8)", seed=seed)
        same = (found[:, None] == table).all(-1)
        assert same.sum(1).eq(1).all() and same[:, :8].sum() == 6 and int(same.sum(0).max()) == 1
        drawn |= {tuple(same.int().argmax(1).tolist())}
    assert len(drawn) == 4
    assert start("prompt(tokens=64, init='vocabulary')")[0].shape[0] == 64  # 5,000 or all there are


def test_a_prompt_starts_at_the_tokens_of_a_text_repeated_or_cut() -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    for tokens, ids in [(None, [1, 3, 5]), (5, [1, 3, 5, 1, 3]), (2, [1, 3])]:
        found, table = start(dt.Prompt.from_text("a big world", Words(), tokens))
        assert torch.equal(found, table[ids])


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_mask_grows_by_the_prompt_and_hides_no_more(name: str) -> None:
    model, batch = build(name), ZOO[name].batch(0)
    attach(model, "prompt(tokens=3)")
    stack: Any = model.base_model.encoder if name == "t5" else model.base_model
    masks: list[Tensor] = []
    note = lambda module, args, kwargs: masks.append(kwargs["attention_mask"])  # noqa: E731
    stack.register_forward_pre_hook(note, with_kwargs=True)
    if name == "t5":
        model.base_model.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["encoder_attention_mask"]),
            with_kwargs=True,
        )
    model(**batch)
    expected = F.pad(batch["attention_mask"], (3, 0), value=1)
    assert len(masks) == 1 + (name == "t5")
    assert all(torch.equal(mask, expected) for mask in masks)


def test_prompts_have_the_published_sizes() -> None:
    import transformers as hf

    with torch.device("meta"):
        wide = hf.T5Model(hf.T5Config(d_model=4096, num_layers=1, num_heads=64))  # T5-XXL's width
    assert dt.plan(meta_model("t5-base"), "prompt(tokens=100)").count() == 76_800
    assert dt.plan(wide, "prompt(tokens=100)").count() == 409_600


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt(tokens=0)", "`tokens` must be 1 or more"),
        ("prompt(bound=-0.5)", r"`prompt\(bound=-0.5\)`: `bound` must be 0 or more"),
        ("prompt(bound=1e400)", "`prompt.bound=inf` is not a finite number"),
        ("prompt(vocabulary=0)", "`vocabulary` must be 1 or more, or None"),
        ("residual_prompt(bound=-1.0)", "`bound` must be 0 or more"),
        ("prompt(init='words')", "one of `uniform`, `positive`, `vocabulary`, `ids`"),
    ],
)
def test_a_prompt_that_means_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(dt.DeltuneError, match=reason):
        dt.parse(text)


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
    for _ in range(2):  # the model keeps a static cache and fills it again
        assert torch.equal(generated(model, batch, **options), expected)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generate_with_a_prompt_in_the_decoder_equals_the_loop(name: str) -> None:
    model, batch = build(name), ZOO[name].batch(0)
    attach(model, "prompt(tokens=3)[decoder] + prompt(tokens=2)")
    expected = step_by_step(model, batch)
    for options in GENERATIONS.values():
        if "num_beams" not in options:
            assert torch.equal(generated(model, batch, **options), expected)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gemma3"])
def test_a_prefill_in_chunks_equals_the_loop(name: str) -> None:
    model = build(name)  # chunks of 2: the first of the shortest row is padding only
    attach(model, MANY)
    batch = leftward(ZOO[name].batch(0), positions=False)
    assert torch.equal(generated(model, batch, prefill_chunk_size=2), step_by_step(model, batch))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_assisted_generation_equals_the_loop(name: str) -> None:
    model, row = build(name), next(rows(ZOO[name].batch(0)))
    attach(model, "prompt(tokens=3)")
    for options in ({"assistant_model": build(name)}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(generated(model, row, **options), step_by_step(model, row))


def cached(
    model: nn.Module, name: str, ids: Tensor, masked: bool, cache: Any = None, held: int = 0
) -> tuple[Tensor, Any]:
    """Logits behind the first `held` tokens of a row, which are in the cache, and the cache."""
    given = {"input_ids": ids[:, held:]}
    if name in SEQ2SEQ:
        given = {"input_ids": ids[:, :3], "decoder_input_ids": ids[:, held:]}
    if masked:
        given["attention_mask"] = torch.ones_like(ids[:, :3] if name in SEQ2SEQ else ids)
    with torch.no_grad():
        output = model(**given, past_key_values=cache, use_cache=True)
    return output.logits, output.past_key_values


COPIES = {
    "itself": lambda cache: cache,
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
}
masked_or_not = pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])


@masked_or_not
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=list(COPIES))
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_a_cache_goes_on_where_it_stopped(name: str, duplicate: Any, masked: bool) -> None:
    model, ids = build(name), ZOO[name].batch(0)["input_ids"][:1]
    first = attach(model, "prompt(tokens=3)", "first", 1)
    attach(model, "prompt(tokens=2)", "second", 2)
    expected, _ = cached(model, name, ids, masked)
    _, cache = cached(model, name, ids[:, :4], masked)
    found, cache = cached(model, name, ids[:, :6], masked, duplicate(cache), 4)
    assert distance(found, expected[:, 4:6]) <= 1e-5
    first.disable()
    second = dt.deltas(model)["second"].disable()
    first.enable(), second.enable()
    found, _ = cached(model, name, ids, masked, cache, 6)
    assert distance(found, expected[:, 6:]) <= 1e-5


@masked_or_not
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_a_cache_with_other_prompts_is_refused(name: str, masked: bool) -> None:
    model, ids = build(name), ZOO[name].batch(0)["input_ids"][:1]

    def filled() -> Any:
        return cached(model, name, ids[:, :5], masked)[1]

    def refused(cache: Any, held: str, acting: str) -> None:
        for given in (cache, copy.deepcopy(cache)):
            with pytest.raises(AttachError, match=rf"\({held}\) are not .* \({acting}\); begin"):
                cached(model, name, ids, masked, given, 5)

    plain = filled()
    first = attach(model, "prompt(tokens=3)", "first", 1)
    refused(plain, "none", "3 tokens")
    with first.disabled():
        plain = filled()
    refused(plain, "none", "3 tokens")
    alone = filled()
    second = attach(model, "prompt(tokens=2)", "second", 2)
    refused(alone, "3 tokens", r"3 \+ 2 tokens")
    both = filled()
    with first.disabled():
        refused(both, r"3 \+ 2 tokens", "2 tokens")
    cached(model, name, ids, masked, copy.deepcopy(both), 5)  # enabled again in the same order
    second.detach()
    refused(both, r"3 \+ 2 tokens", "3 tokens")
    cached(model, name, ids, masked, alone, 5)
    first.detach()
    attach(model, "prompt(tokens=3)", "first", 1)
    refused(alone, "3 tokens", "3 tokens")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_cache_with_other_prompts_in_the_decoder_is_refused(name: str) -> None:
    model, ids = build(name), ZOO[name].batch(0)["input_ids"][:1]
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    plain = model(**batch, use_cache=True).past_key_values
    attach(model, "prompt(tokens=3)[decoder]")
    with pytest.raises(AttachError, match=r"none.* are not those that act now .3 tokens"):
        model(**batch, past_key_values=plain)
    static = model.generate(
        input_ids=ids, max_new_tokens=4, cache_implementation="static",
        return_dict_in_generate=True,
    ).past_key_values  # fmt: skip
    attach(model, "prompt(tokens=3)", "other")
    with pytest.raises(AttachError, match=r"none.* are not those that act now .3 tokens"):
        model(**batch, past_key_values=static)


@masked_or_not
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_cache_without_tokens_may_hold_the_encoders_states(name: str, masked: bool) -> None:
    model, ids = build(name), ZOO[name].batch(0)["input_ids"][:1]
    _, plain = cached(model, name, ids, masked)
    attach(model, "prompt(tokens=3)")
    expected, cache = cached(model, name, ids, masked)
    for filled in (plain, cache):
        filled.crop(-ids.shape[1])
    found, _ = cached(model, name, ids, masked, cache)
    assert distance(found, expected) <= 1e-5
    with pytest.raises(AttachError, match=r"none.* are not those that act now .3 tokens"):
        cached(model, name, ids, masked, plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_compiled_model_knows_the_prompts_in_a_cache(name: str) -> None:
    model, ids = build(name), ZOO[name].batch(0)["input_ids"][:1]
    _, plain = cached(model, name, ids[:, :5], False)
    attach(model, "prompt(tokens=3)")
    expected, _ = cached(model, name, ids, False)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        key = "decoder_input_ids" if name in SEQ2SEQ else "input_ids"
        source = {"input_ids": ids[:, :3]} if name in SEQ2SEQ else {}
        cache = compiled(**source | {key: ids[:, :5]}, use_cache=True).past_key_values
        found = compiled(**source | {key: ids[:, 5:]}, past_key_values=cache).logits
        assert distance(found[:, -1], expected[:, -1]) <= 1e-5
        with pytest.raises(Exception, match=r"none.* are not those that act now .3 tokens"):
            compiled(**source | {key: ids[:, 5:]}, past_key_values=plain)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_goes_on_with_the_tokens_that_a_cache_lacks(name: str, padded: bool) -> None:
    model = build(name)
    attach(model, MANY)
    batch = leftward(ZOO[name].batch(0), positions=False)
    batch = batch if padded else next(rows(batch))
    options = {"do_sample": False, "return_dict_in_generate": True}
    longest = model.generate(
        **batch, **options, use_cache=False, max_new_tokens=7, min_new_tokens=7
    ).sequences
    part = model.generate(**batch, **options, max_new_tokens=4, min_new_tokens=4)
    ids = longest[:, : part.sequences.shape[1] + 1]
    mask = F.pad(batch["attention_mask"], (0, 5), value=1)
    lacking = {"input_ids": ids[:, -2:], "attention_mask": mask}
    for duplicate in COPIES.values():
        cache = duplicate(copy.deepcopy(part.past_key_values))
        more = model.generate(
            **lacking, **options, past_key_values=cache, max_new_tokens=2, min_new_tokens=2
        )
        assert torch.equal(more.sequences[:, -2:], longest[:, -2:])
    with pytest.raises(AttachError, match="only the tokens that the cache lacks"):
        model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=part.past_key_values,
            max_new_tokens=2,
        )  # fmt: skip


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
