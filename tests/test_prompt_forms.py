"""P-tuning, P-tuning v2 and residual prompt tuning.

Oracles: the same tokens written into the text by hand, each row alone; `torch.nn.LSTM`,
`torch.nn.Linear` and `torch.nn.LayerNorm` with the same tensors; PEFT 0.21.2 where it is right;
decoding one whole forward at a time; parameter counts worked out from the sizes of the models.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.errors import AttachError, SpecError
from deltune.families.addition.p_tuning import PTuning
from deltune.families.addition.prefix import Prefix
from deltune.families.addition.residual_prompt import ResidualPrompt
from deltune.mechanisms.prompt import embed
from probes import for_peft
from rows import generated, leftward, rows, step_by_step
from shapes import meta_model
from snapshots import distance
from zoo import HIDDEN, LABELS, LAYERS, VOCAB, ZOO, Batch

DECODERS = ["gpt2", "gpt-neox", "opt", "llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe"]
SEQ2SEQ = ["t5", "t5-gated", "bart", "marian"]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "modernbert"]
MARK = 63  # no batch of the zoo has it by itself
IDS = (9, 31, 17, 22, 40)
FRONT = {
    "behind the first token": ((2,), (1,)),
    "before a token": ((2,), (f"before {MARK}",)),
    "behind a token": ((2,), (f"after {MARK}",)),
    "around a token": ((1, 2), (f"before {MARK}", f"after {MARK}")),
    "not in order": ((1, 2, 1), (f"after {MARK}", 0, 1)),
    "at one place": ((2, 1), (1, 1)),
}
ANYWHERE = FRONT | {
    "at the end": ((2,), ("end",)),
    "before the last token": ((2,), (-1,)),
    "the template of the paper": ((2, 1, 2), (1, f"after {MARK}", -1)),
}


def build(name: str) -> nn.Module:
    return ZOO[name].build(0)


def marked(name: str) -> Batch:
    """The batch of an architecture, with the marked token in another place of each row."""
    batch = ZOO[name].batch(0)
    for row, column in enumerate((3, 4, 1)):  # in the second row it is the last token
        batch["input_ids"][row, column] = MARK
    return batch


def plain(model: nn.Module, slots: tuple[int, ...], at: Any, **options: Any) -> dt.Delta:
    """A delta whose prompt rows are the embeddings of the first of `IDS`."""
    delta = dt.attach(model, PTuning(slots, at, encoder="none"), **options)
    (site,) = (unit.site for unit in delta.tree.units if unit.spec.kind == "p_tuning")
    ids = torch.tensor(IDS[: sum(slots)])
    with torch.no_grad():
        name = f"p_tuning.{site.path}.P" if site.path else "p_tuning.P"
        own = {name: embed(model.get_submodule(site.path), ids)}
    heads = {n: t for n, t in delta.tensors().items() if n.startswith("head.")}
    return delta.load_tensors(heads | own)


def written(text: list[int], slots: tuple[int, ...], at: Any) -> tuple[list[int], list[int]]:
    """A text with the first of `IDS` written into it, and where its own tokens are then."""
    gaps = []
    for place in at:
        if isinstance(place, int):
            gaps.append(place % len(text))
        elif place == "end":
            gaps.append(len(text))
        else:
            side, token = place.split()
            gaps.append(text.index(int(token)) + (side == "after"))
    ids, own = list(IDS), []
    pieces = [[ids.pop(0) for _ in range(length)] for length in slots]
    found: list[int] = []
    for i in range(len(text) + 1):
        for gap, piece in zip(gaps, pieces, strict=True):
            found += piece if gap == i else []
        if i < len(text):
            own.append(len(found))
            found.append(text[i])
    return found, own


# --- slots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", ANYWHERE.values(), ids=list(ANYWHERE))
@pytest.mark.parametrize("name", ENCODERS)
def test_a_slot_of_an_encoder_equals_tokens_written_there(name: str, slots: Any) -> None:
    model, batch = build(name), marked(name)
    texts = [row["input_ids"][0].tolist() for row in rows(batch)]
    with torch.no_grad():
        expected = []
        for text in texts:
            ids, own = written(text, *slots)
            states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
            expected.append(states[0, own])
        plain(model, *slots)
        for padded in (batch, leftward(batch, positions=False)):
            padding = padded["attention_mask"] == 0
            padded["input_ids"] = padded["input_ids"].masked_fill(padding, MARK)
            found = model.base_model(**padded).last_hidden_state
            for row, mask, states in zip(found, padded["attention_mask"], expected, strict=True):
                assert distance(row[mask.bool()], states) <= 1e-5


@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no-positions"])
@pytest.mark.parametrize("slots", FRONT.values(), ids=list(FRONT))
@pytest.mark.parametrize("name", DECODERS)
def test_a_slot_of_a_decoder_predicts_as_tokens_written_there(
    name: str, slots: Any, positions: bool
) -> None:
    """The logits of a token are those of the end of the slot behind it: of the next token."""
    model, batch = build(name), marked(name)
    with torch.no_grad():
        expected = []
        for row in rows(batch):
            ids, own = written(row["input_ids"][0].tolist(), *slots)
            before_next = [column - 1 for column in [*own[1:], len(ids)]]
            expected.append(model(input_ids=torch.tensor([ids])).logits[0, before_next])
        plain(model, *slots)
        for padded in (batch, leftward(batch, positions)):
            found = model(**padded).logits
            for row, mask, logits in zip(found, padded["attention_mask"], expected, strict=True):
                assert distance(row[mask.bool()], logits) <= 1e-5


@pytest.mark.parametrize("slots", ANYWHERE.values(), ids=list(ANYWHERE))
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_slot_before_a_decoder_equals_tokens_written_there(name: str, slots: Any) -> None:
    model, batch = build(name), marked(name)
    with torch.no_grad():
        expected = []
        for row in rows(batch):
            ids, _ = written(row["input_ids"][0].tolist(), *slots)
            longer = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
            expected.append(model(**row | longer).logits[0])
        plain(model, *slots)
        found = model(**batch).logits
    for row, mask, logits in zip(found, batch["decoder_attention_mask"], expected, strict=True):
        assert distance(row[mask.bool()], logits) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["greedy", "beams", "static", "uncached"],
)
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_generate_with_slots_equals_the_loop(name: str, options: dict[str, Any]) -> None:
    model, batch = build(name), marked(name)
    batch = leftward(batch, positions=False) if name in DECODERS else batch
    last = 0 if name in DECODERS else "end"
    spec = PTuning((1, 2, 1), (f"after {MARK}", 1, last))
    dt.attach(model, spec, seed=1)
    expected = step_by_step(model, batch, options.get("num_beams", 1))
    assert torch.equal(generated(model, batch, **options), expected)


def test_slots_count_the_text_and_not_other_prompts() -> None:
    model, text = build("llama"), [20, 21, 22, MARK]
    with torch.no_grad():
        ids = [IDS[1], IDS[0], 20, IDS[0], 21, 22, MARK, IDS[1], IDS[2]]
        expected = model(input_ids=torch.tensor([ids])).logits[0, [3, 4, 5, 8]]
        dt.attach(model, dt.Prompt(tokens=1, init="ids", ids=IDS[:1]), "below")
        plain(model, (1, 2), (1, f"after {MARK}"))
        dt.attach(model, dt.Prompt(tokens=1, init="ids", ids=IDS[1:2]), "above")
        found = model(input_ids=torch.tensor([text])).logits[0]
    assert distance(found, expected) <= 1e-5


def test_slots_have_the_type_of_the_token_beside_them() -> None:
    model = build("bert")
    ids, types = torch.tensor([[20, 21, 22, 23]]), torch.tensor([[0, 0, 1, 1]])
    slots = ((1, 1, 1), (2, "end", "after 21"))
    with torch.no_grad():
        longer, own = written(ids[0].tolist(), *slots)
        states = model.bert(
            input_ids=torch.tensor([longer]), token_type_ids=torch.tensor([[0, 0, 1, 0, 1, 1, 1]])
        ).last_hidden_state[:, own]
        plain(model, *slots)
        found = model.bert(input_ids=ids, token_type_ids=types).last_hidden_state
    assert longer == [20, 21, IDS[0], IDS[2], 22, 23, IDS[1]]
    assert distance(found, states) <= 1e-5


def test_only_the_rows_of_the_slots_are_not_embeddings_of_the_text() -> None:
    model, batch = build("bert"), marked("bert")
    seen: list[Tensor] = []
    model.bert.embeddings.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    delta = dt.attach(model, PTuning((2, 1, 1), (1, f"after {MARK}", -1)), seed=1)
    table = model.bert.embeddings.word_embeddings
    prompts = []
    for texts in (batch, {**batch, "input_ids": batch["input_ids"].roll(1, 0)}):
        texts["attention_mask"] = torch.ones_like(texts["input_ids"])
        with torch.no_grad():
            model(**texts)
        for ids, embeds in zip(texts["input_ids"].tolist(), seen.pop(), strict=True):
            _, own = written(ids, (2, 1, 1), (1, f"after {MARK}", -1))
            assert torch.equal(embeds[own], table(torch.tensor(ids)))
            prompts.append(embeds[[i for i in range(len(embeds)) if i not in own]])
    # Every text gets the same rows: they are made without looking at it.
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)
    (unit,) = (unit for unit in delta.tree.units if unit.spec.kind == "p_tuning")
    assert torch.equal(prompts[0], unit.spec.embeddings(unit))


def test_slots_beside_tokens_act_in_a_compiled_model() -> None:
    model, batch = build("gpt2"), marked("gpt2")
    dt.attach(model, PTuning((1, 2), (1, f"after {MARK}")), seed=1)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert distance(compiled(**batch).logits, model(**batch).logits) <= 1e-6


def test_an_input_without_the_place_of_a_slot_is_refused_and_the_next_one_served() -> None:
    model, batch = build("bert"), marked("bert")
    plain(model, (1, 1), (2, f"before {MARK}"))
    with torch.no_grad():
        expected = model(**batch).logits
        without = batch["input_ids"].clone()
        without[1, 4] = 5
        for given, reason in (
            ({"input_ids": without}, f"before the token with id {MARK}, and row 1 has no such"),
            ({"inputs_embeds": torch.randn(3, 7, HIDDEN)}, "input was given as embeddings"),
            ({"attention_mask": batch["attention_mask"].index_fill(1, torch.tensor(2), 0)},
             "row 0 hides tokens between real ones"),
            ({"attention_mask": torch.arange(7) < torch.tensor([[7], [5], [2]])},
             "before token 2, and row 2 has no such token among its 2 real ones"),
        ):  # fmt: skip
            changed = {k: v for k, v in batch.items() if "inputs_embeds" not in given} | given
            with pytest.raises(AttachError, match=reason):
                model(**changed)
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("place", [-1, "end"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_slot_at_the_end_of_a_growing_text_is_refused(name: str, place: int | str) -> None:
    with pytest.raises(AttachError, match="the end moves with every generated token"):
        dt.plan(build(name), PTuning((2,), (place,)))
    with pytest.raises(AttachError, match="causal model T5ForConditionalGeneration"):
        dt.plan(build("t5"), PTuning((2,), (place,), within="decoder"))
    dt.plan(build("t5"), PTuning((2,), (place,)))


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_prompt_and_input_fill_the_positions_and_no_more(name: str) -> None:
    model = build(name)
    room = 32 - (name == "roberta")  # whose first position is behind that of the padding
    dt.attach(model, PTuning((20, 3), (0, 1), encoder="mlp"), seed=1)
    ids = torch.arange(4, 4 + room)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids[:, 23:]).logits).all()
        with pytest.raises(AttachError, match=rf"are {room + 1} tokens, .* has {room} positions"):
            model(input_ids=ids[:, 22:])


# --- P-tuning -----------------------------------------------------------------------------------


def rows_of(delta: dt.Delta) -> Tensor:
    """The prompt rows that a delta makes."""
    (unit,) = (unit for unit in delta.tree.units if unit.spec.mechanism == "prompt")
    return unit.spec.embeddings(unit)


def own_tensors(delta: dt.Delta) -> dict[str, nn.Parameter]:
    """The tensors of the one prompt of a delta, by their last name."""
    named = delta.tree.named()
    return {n.rpartition(".")[2]: p for n, p in named.items() if not n.startswith("head.")}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("state", ["half", "full"])
def test_rows_are_those_of_torchs_lstm_and_mlp(state: Any, train: bool) -> None:
    spec = PTuning((2, 3), (0, 1), state=state, dropout=0.4)
    delta = dt.attach(build("gpt2").train(train), spec, seed=1)
    own, h = own_tensors(delta), HIDDEN // 2 if state == "half" else HIDDEN
    lstm = nn.LSTM(HIDDEN, h, 2, dropout=0.4, bidirectional=True).train(train)
    mlp = nn.Sequential(nn.Linear(2 * h, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            parameter.copy_(own[name])
        for name, parameter in zip(("W1", "b1", "W2", "b2"), mlp.parameters(), strict=True):
            parameter.copy_(own[name])
    table = own["E"].detach().clone().requires_grad_()
    torch.manual_seed(5)
    expected = mlp(lstm(table)[0])
    torch.manual_seed(5)
    found = rows_of(delta)
    assert distance(found, expected) <= 1e-5
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    theirs = dict(lstm.named_parameters()) | {"E": table}
    theirs |= dict(zip(("W1", "b1", "W2", "b2"), mlp.parameters(), strict=True))
    assert theirs.keys() == own.keys()
    for name, parameter in theirs.items():
        assert distance(own[name].grad, parameter.grad) <= 1e-5, name


def test_rows_of_the_mlp_alone() -> None:
    delta = dt.attach(build("gpt2"), PTuning((5,), encoder="mlp"), seed=1)
    own = own_tensors(delta)
    hidden = torch.relu(own["E"] @ own["W1"].T + own["b1"])
    assert distance(rows_of(delta), hidden @ own["W2"].T + own["b2"]) <= 1e-6


def test_the_network_starts_as_torchs_modules_do() -> None:
    delta = dt.attach(build("gpt2"), PTuning((400,), state="full"), seed=1)
    own = {name: p.detach() for name, p in own_tensors(delta).items()}
    assert abs(float(own["E"].std()) - 1) < 0.05 and abs(float(own["E"].mean())) < 0.05
    bounds = {name: HIDDEN**-0.5 for name in own if name.startswith(("weight", "bias"))}
    bounds |= {"W1": (2 * HIDDEN) ** -0.5, "b1": (2 * HIDDEN) ** -0.5}
    bounds |= {"W2": HIDDEN**-0.5, "b2": HIDDEN**-0.5}
    for name, bound in bounds.items():
        assert 0.7 * bound < float(own[name].abs().max()) <= bound, name


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_p_tuning_equals_pefts(name: str) -> None:
    """PEFT keeps the logits of the prompt in front, and is right where no row is padded left."""
    peft = pytest.importorskip("peft")
    case, k = ZOO[name], 4
    delta = dt.attach(case.build(0), PTuning((k,)), seed=1)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=k, encoder_reparameterization_type="LSTM",
        encoder_hidden_size=HIDDEN // 2, encoder_num_layers=2, encoder_dropout=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(for_peft(case.build(0)), config).eval()
    encoder, own = theirs.prompt_encoder["default"], own_tensors(delta)
    pairs = [(own[n], p) for n, p in encoder.lstm_head.named_parameters()]
    pairs += zip((own[n] for n in ("W1", "b1", "W2", "b2")), encoder.mlp_head.parameters())  # noqa: B905
    pairs.append((own["E"], encoder.embedding.weight))
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    ours, oracle = case.run(delta.model), case.run(theirs)[:, k:]
    real = case.batch(0)["attention_mask"].bool()
    assert distance(ours[real], oracle[real]) <= 1e-5
    ours[real].square().mean().backward()
    oracle[real].square().mean().backward()
    assert len(pairs) == len(own)
    for mine, other in pairs:
        assert distance(mine.grad, other.grad) <= 1e-5


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "tuned"])
def test_the_language_model_is_frozen_unless_it_is_asked_for(joint: bool) -> None:
    model, batch = build("bert"), marked("bert")
    spec = PTuning((2,), (f"before {MARK}",))
    delta = dt.attach(model, spec + dt.FullTuning() if joint else spec, seed=1)
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None for p in own_tensors_of(delta, "p_tuning"))
    backbone = [p for n, p in model.named_parameters() if not n.startswith("deltas.")]
    assert all(p.grad is None and not p.requires_grad for p in backbone)
    assert bool(own_tensors_of(delta, "full")) == joint
    assert all(p.grad is not None for p in own_tensors_of(delta, "full"))


def own_tensors_of(delta: dt.Delta, kind: str) -> list[nn.Parameter]:
    return [p for n, p in delta.tree.named().items() if n.startswith(f"{kind}.")]


FOLDS = {
    "p_tuning(slots=(2, 1), at=(0, 1))": "p_tuning(slots=(2, 1), at=(0, 1), encoder='none')",
    "p_tuning(slots=(2, 1), at=(0, 1), state='full', dropout=0.1)":
        "p_tuning(slots=(2, 1), at=(0, 1), encoder='none')",
    "p_tuning(slots=(3,), encoder='mlp') + lora(rank=2)":
        "p_tuning(slots=(3,), encoder='none') + lora(rank=2)",
    "residual_prompt(tokens=3, width=4)": "prompt(tokens=3, init='vocabulary', vocabulary=None)",
    "residual_prompt(tokens=3, width=4, separate=True, init='ids', ids=(9, 31))":
        "prompt(tokens=3, init='ids', vocabulary=None, ids=(9, 31))",
    "p_tuning_v2(tokens=3, mlp=4)": "p_tuning_v2(tokens=3)",
}  # fmt: skip


@pytest.mark.parametrize(("text", "folded"), FOLDS.items(), ids=list(FOLDS))
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_a_folded_form_is_the_same_and_plain(name: str, text: str, folded: str) -> None:
    model, case = build(name), ZOO[name]
    delta = dt.attach(model, text, seed=1)
    generator = torch.Generator().manual_seed(1)
    delta.load_vector(delta.vector() + 0.1 * torch.randn(delta.layout.size, generator=generator))
    with torch.no_grad():
        expected = case.run(model)
        delta = delta.fold()
        assert distance(case.run(model), expected) <= 1e-6
    assert str(delta.spec) == folded
    assert delta.layout == dt.plan(case.build(0), folded).layout
    with pytest.raises(AttachError, match=r"nothing in .* folds"):
        delta.fold()


# --- residual prompt tuning ---------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_a_residual_prompt_is_torchs_network_around_a_skip(separate: bool) -> None:
    model = build("t5")
    delta = dt.attach(model, ResidualPrompt(3, width=5, separate=separate), seed=1)
    generator = torch.Generator().manual_seed(1)
    delta.load_vector(delta.vector() + torch.randn(delta.layout.size, generator=generator))
    own, expected = own_tensors(delta), []
    for row in range(3):
        norm = nn.LayerNorm(HIDDEN)
        network = nn.Sequential(nn.Linear(HIDDEN, 5), nn.ReLU(), nn.Linear(5, HIDDEN), norm)
        values = [own[n][row] if separate else own[n] for n in ("W1", "b1", "W2", "b2")]
        values += [own[n][row] if separate else own[n] for n in ("gain", "bias")]
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), values, strict=True):
                parameter.copy_(value)
        expected.append(own["P"][row] + network(own["P"][row]))
    assert distance(rows_of(delta), torch.stack(expected)) <= 1e-5


def test_a_residual_prompt_starts_at_words_with_a_term_of_unit_variance() -> None:
    model = build("t5")
    delta = dt.attach(model, ResidualPrompt(60, width=5), seed=1)
    own, table = own_tensors(delta), model.get_input_embeddings().weight
    drawn = (own["P"][:, None] == table).all(-1)
    assert (drawn.sum(1) == 1).all() and drawn.sum(0).max() == 1  # different ones, of all
    added = (rows_of(delta) - own["P"]).detach()
    assert float(added.mean(1).abs().max()) <= 1e-5
    assert distance(added.var(1, correction=0), torch.ones(60)) <= 1e-2
    assert own["gain"].eq(1).all() and own["bias"].eq(0).all()
    own = own_tensors(dt.attach(model, ResidualPrompt(60, width=64), "other", seed=1))
    for name, bound in (("W1", 1 / 4), ("b1", 1 / 4), ("W2", 1 / 8), ("b2", 1 / 8)):
        assert 0.7 * bound < float(own[name].detach().abs().max()) <= bound, name


def test_a_residual_prompt_with_an_empty_norm_is_the_plain_prompt() -> None:
    case = ZOO["t5"]
    delta = dt.attach(case.build(0), ResidualPrompt(3, width=5), seed=1)
    own = own_tensors(delta)
    with torch.no_grad():
        acting = case.run(delta.model)
        own["gain"].zero_(), own["bias"].zero_()
        other = dt.attach(case.build(0), dt.Prompt(3))
        own_tensors(other)["P"].copy_(own["P"])
        expected = case.run(other.model)
        assert torch.equal(case.run(delta.model), expected)
    assert distance(acting, expected) > 1e-3


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_one_network_treats_all_rows_alike_and_several_do_not(separate: bool) -> None:
    delta = dt.attach(build("t5"), ResidualPrompt(4, width=5, separate=separate), seed=1)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        expected = rows_of(delta)[order]
        own_tensors(delta)["P"].copy_(own_tensors(delta)["P"][order])
        assert (distance(rows_of(delta), expected) <= 1e-6) != separate


# --- P-tuning v2 --------------------------------------------------------------------------------


def test_p_tuning_v2_trains_its_tables_and_the_head() -> None:
    model = build("bert")
    delta = dt.attach(model, "p_tuning_v2(tokens=5)")
    head = HIDDEN * LABELS + LABELS
    assert delta.count() == 2 * 5 * LAYERS * HIDDEN + head
    assert delta.count(head=False) == 2 * 5 * LAYERS * HIDDEN
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith("deltas.") for n in trained)


def test_p_tuning_v2_labels_every_token_and_no_slot() -> None:
    import transformers as hf

    config = ZOO["bert"].build(0).config
    model = hf.BertForTokenClassification(config).eval()
    delta = dt.attach(model, "p_tuning_v2(tokens=5)", seed=1)
    batch = ZOO["bert"].batch(0)
    labels = batch["input_ids"] % LABELS
    with torch.no_grad():
        output = model(**batch, labels=labels)
    assert output.logits.shape == (*labels.shape, LABELS)
    expected = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(output.loss, expected, atol=1e-6)
    assert delta.count() == 2 * 5 * LAYERS * HIDDEN + HIDDEN * LABELS + LABELS


def test_p_tuning_v2_starts_small_and_drops_parts_of_the_prefix_in_training() -> None:
    delta = dt.attach(build("bert"), "p_tuning_v2(tokens=600)", seed=1)
    unit = delta.tree.units[0]
    assert all(abs(float(t.detach().std()) - 0.02) < 1e-3 for t in (unit.K, unit.V))
    assert all(torch.equal(a, b) for a, b in zip(unit.spec.keys_values(unit), (unit.K, unit.V)))  # noqa: B905
    unit.train()
    for found, table in zip(unit.spec.keys_values(unit), (unit.K, unit.V), strict=True):
        dropped = found == 0
        assert abs(float(dropped.float().mean()) - 0.1) < 0.02
        assert distance(found[~dropped], table[~dropped] / 0.9) <= 1e-6


@pytest.mark.parametrize("form", [{}, {"mlp": 4}], ids=["plain", "mlp"])
@pytest.mark.parametrize("positions", ["shift", "keep"])
def test_p_tuning_v2_is_a_prefix(positions: Any, form: dict[str, int]) -> None:
    case, written_out = ZOO["roberta"], {} if positions == "shift" else {"positions": positions}
    text = ", ".join(f"{k}={v!r}" for k, v in {"tokens": 3, **form, **written_out}.items())
    ours = dt.attach(case.build(0), f"p_tuning_v2({text})", seed=1)
    prefix = dt.attach(case.build(0), Prefix(tokens=3, positions=positions, **form))
    prefix.load_vector(ours.vector())
    with torch.no_grad():
        assert torch.equal(case.run(ours.model), case.run(prefix.model))


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_p_tuning_v2_equals_a_prefix_in_pefts_cache() -> None:
    peft = pytest.importorskip("peft")
    case = ZOO["bert"]
    delta = dt.attach(case.build(0), "p_tuning_v2(tokens=4)", seed=1)
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = peft.get_peft_model(for_peft(case.build(0)), config).eval()
    delta.load_vector(30 * delta.vector())
    tables = [t for n, t in delta.tensors().items() if not n.startswith("head.")]
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(torch.cat(tables, 1))
        head = {n.rpartition(".")[2]: t for n, t in delta.tensors().items() if "head." in n}
        copied = theirs.base_model.classifier.modules_to_save["default"]
        for name, parameter in copied.named_parameters():
            parameter.copy_(head[name])
    ours, oracle = case.run(delta.model), case.run(theirs)
    assert distance(ours, oracle) <= 1e-5
    ours.square().mean().backward()
    oracle.square().mean().backward()
    found = [p.grad for n, p in delta.tree.named().items() if not n.startswith("head.")]
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    assert distance(torch.cat(found, 1), expected) <= 1e-5  # type: ignore[arg-type]


def test_p_tuning_v2_with_shifted_positions_needs_room_for_them() -> None:
    model = build("bert")
    delta = dt.attach(model, "p_tuning_v2(tokens=30)")
    ids = torch.arange(4, 7)[None]
    with torch.no_grad():
        model(input_ids=ids[:, :2])
        with pytest.raises(AttachError, match=r"too long for a prefix of 30 .* has 32 positions"):
            model(input_ids=ids)
        delta.detach()
        dt.attach(model, "p_tuning_v2(tokens=30, positions='keep')")
        model(input_ids=ids)


# --- counts and bad input -----------------------------------------------------------------------

TEMPLATE = "slots=(3, 3, 3), at=(1, 'after 103', -1)"
COUNTS = [
    ("bert-base", f"p_tuning({TEMPLATE})", 8_278_272),
    ("bert-base", f"p_tuning({TEMPLATE}, encoder='none')", 6_912),
    ("bert-base", f"p_tuning({TEMPLATE}, encoder='mlp')", 6_912 + 2 * 768**2 + 2 * 768),
    ("bert-base", f"p_tuning({TEMPLATE}, state='full')", 6_912 + 43 * 768**2 + 34 * 768),
    ("t5-base", "residual_prompt", 1_239_584),
    ("t5-base", "residual_prompt(separate=True)", 7_680 + 10 * (1_239_584 - 7_680)),
    ("t5-base", "prompt(tokens=10)", 7_680),
    ("bert-base", "p_tuning_v2(tokens=20)", 368_640),
    ("bert-large", "p_tuning_v2(tokens=20)", 983_040),
]


@pytest.mark.parametrize(("name", "text", "count"), COUNTS)
def test_as_many_scalars_train_as_the_sizes_say(name: str, text: str, count: int) -> None:
    assert dt.plan(meta_model(name), text).count() == count


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("p_tuning(slots=())", r"`slots` must be 1 or more rows each"),
        ("p_tuning(slots=(3, 0), at=(0, 1))", r"slots=\(3, 0\).* must be 1 or more rows each"),
        ("p_tuning(slots=(3, 3))", r"`at` must be one place for each of the 2 slots"),
        ("p_tuning(at=('mask',))", "`mask` is no place .* `before 103`"),
        ("p_tuning(at=('before -1',))", "`before -1` is no place"),
        ("p_tuning(at=(0.5,))", r"at=0.5` is not a whole number or a string"),
        ("p_tuning(encoder='gru')", "is not one of `lstm`, `mlp`, `none`"),
        ("p_tuning(encoder='mlp', state='full')", "`state` must be left out without an LSTM"),
        ("p_tuning(encoder='none', dropout=0.1)", "`dropout` must be left out without an LSTM"),
        ("p_tuning(dropout=1.0)", r"`dropout` must be in \[0, 1\)"),
        ("p_tuning(tokens=20)", "has no field `tokens`"),
        ("residual_prompt(width=0)", "`width` must be 1 or more"),
        ("residual_prompt(tokens=0)", "`tokens` must be 1 or more"),
        ("p_tuning_v2(tokens=0)", "`tokens` must be 1 or more"),
        ("p_tuning_v2(mlp=0)", "`mlp` must be 1 or more"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        dt.parse(text)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("residual_prompt(init='ids', ids=(9, 64))", r"residual_prompt\(ids=.*token 64 is not in"),
        ("residual_prompt(tokens=65)", r"residual_prompt\(tokens=65.* cannot be sampled from 64"),
    ],
)
def test_a_start_outside_the_vocabulary_is_refused(spec: str, reason: str) -> None:
    assert VOCAB == 64
    with pytest.raises(SpecError, match=reason):
        dt.plan(build("t5"), spec)
