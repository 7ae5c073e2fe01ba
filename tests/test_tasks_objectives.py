"""Objectives against transformers' own losses and a token-by-token loop of log-softmax."""

import math

import pytest
import torch

from deltune.errors import DataError
from deltune.tasks.encoding import Template, continuations, special_tokens
from deltune.tasks.generation import Generation
from deltune.tasks.objectives import ClassHead, OptionScoring, objective_for
from deltune.tasks.task import Record, Task
from tasks_toys import model, texts, tokenizer

KINDS = {"llama": "llama", "gpt": "gpt", "t5": "t5", "bart": "bert"}
"""Every language model with the frame of its tokenizer."""
CHOICES = ("very good", "very bad", "very", "no", "maybe the film", "yes")


def task(kind: str, records: list[Record], labels: tuple[str, ...] | None = None) -> Task:
    metric = "exact_match" if kind == "generation" else "accuracy"
    return Task("toy", kind, metric, labels, records, records, records)


def choosing(count: int = 5) -> list[Record]:
    return [
        Record(text, CHOICES[i % 3], CHOICES[: 3 + i % 4]) for i, text in enumerate(texts(count))
    ]


def writing(count: int = 5) -> list[Record]:
    return [Record(text, CHOICES[i % 6]) for i, text in enumerate(texts(count))]


def log_likelihood(net, tok, record: Record, target: str, end: bool) -> list[float]:
    """By hand: one forward pass a token, the way a decoder would write."""
    if net.config.is_encoder_decoder:
        prompt = tok(record.input)["input_ids"]
        wanted = [i for i in tok(target)["input_ids"] if end or i != 2]
        read = [net.config.decoder_start_token_id]
    else:
        between = " " if record.options else "\nanswer: "
        wanted = tok(between + target, add_special_tokens=False)["input_ids"]
        prompt = tok(record.input)["input_ids"]
        shared = tok(between.rstrip(" "), add_special_tokens=False)["input_ids"]
        prompt, wanted = prompt + wanted[: len(shared)], wanted[len(shared) :] + [2] * end
        read = []
    found = []
    for token in wanted:
        with torch.no_grad():
            if net.config.is_encoder_decoder:
                out = net(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([read]))
            else:
                out = net(input_ids=torch.tensor([prompt + read]))
        found.append(out.logits[0, -1].log_softmax(-1)[token].item())
        read.append(token)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalise", [False, True])
def test_option_scores_equal_a_loop_over_tokens(kind: str, normalise: bool) -> None:
    net, tok, records = model(kind), tokenizer(KINDS[kind]), choosing()
    objective = objective_for(task("multiple_choice", records), net, tok, normalise=normalise)
    assert isinstance(objective, OptionScoring)
    batch = objective.collate(objective.encode(records))
    with torch.no_grad():
        scores = objective.scores(net, batch)
    predictions = objective.predict(net, batch)
    for record, ours, predicted in zip(records, scores, predictions, strict=True):
        expected = []
        for option in record.options:
            found = log_likelihood(net, tok, record, option, end=False)
            expected.append(math.fsum(found) / (len(found) if normalise else 1))
        assert ours.tolist() == pytest.approx(expected, rel=1e-5, abs=2e-5)
        assert predicted == record.options[max(range(len(expected)), key=expected.__getitem__)]


@pytest.mark.parametrize("kind", KINDS)
def test_label_options_need_few_rows_and_small_chunks_change_nothing(kind: str) -> None:
    net, tok, records = model(kind), tokenizer(KINDS[kind]), writing()
    objective = objective_for(task("classification", records, CHOICES), net, tok)
    assert isinstance(objective, OptionScoring)
    batch = objective.collate(objective.encode(records))
    rows = []
    handle = net.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        whole = objective.scores(net, batch)
        assert sum(rows) < len(records) * len(CHOICES)
        objective._row_tokens = 1
        single = objective.scores(net, batch)
    handle.remove()
    assert set(rows[1:]) == {1}
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective_kind", ["generation", "multiple_choice"])
def test_language_loss_is_the_mean_of_transformers_own_over_single_rows(
    kind: str, objective_kind: str
) -> None:
    net, tok = model(kind), tokenizer(KINDS[kind])
    records = writing() if objective_kind == "generation" else choosing()
    objective = objective_for(task(objective_kind, records), net, tok, multiple_of=8)
    examples = objective.encode(records)
    batch = objective.collate(examples)
    own = []
    for example in examples:
        row = objective.collate([example])
        row.pop("examples", None)
        row.pop("decoder_input_ids", None)  # transformers derives them from the labels
        own.append(net(**row).loss)
    torch.testing.assert_close(objective.loss(net, batch), torch.stack(own).mean())
    by_hand = [
        -math.fsum(found) / len(found)
        for record in records
        if (
            found := log_likelihood(
                net, tok, record, record.target, end=objective_kind == "generation"
            )
        )
    ]
    assert objective.loss(net, batch).item() == pytest.approx(sum(by_hand) / len(by_hand), abs=2e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_loss_on_options_is_the_cross_entropy_of_the_scores(kind: str) -> None:
    net, tok, records = model(kind), tokenizer(KINDS[kind]), choosing()
    objective = objective_for(
        task("multiple_choice", records), net, tok, loss_on="options", normalise=False
    )
    batch = objective.collate(objective.encode(records))
    expected = []
    for record in records:
        totals = torch.tensor(
            [math.fsum(log_likelihood(net, tok, record, o, end=False)) for o in record.options]
        )
        expected.append(-totals.log_softmax(0)[record.options.index(record.target)])
    loss = objective.loss(net, batch)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=2e-5, rtol=0)
    loss.backward()
    assert net.get_input_embeddings().weight.grad.abs().sum() > 0


def test_an_option_without_tokens_is_never_chosen() -> None:
    net, tok = model("llama"), tokenizer("llama")
    records = [Record("the film was", "good", ("good", " "))]
    objective = objective_for(task("multiple_choice", records), net, tok)
    batch = objective.collate(objective.encode(records))
    assert isinstance(objective, OptionScoring)
    assert objective.scores(net, batch)[0][1] == -math.inf
    assert objective.predict(net, batch) == ["good"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_writes_what_each_row_writes_alone_without_cache(kind: str) -> None:
    net, tok, records = model(kind), tokenizer(KINDS[kind]), writing()
    objective = objective_for(task("generation", records), net, tok, max_new_tokens=6)
    assert isinstance(objective, Generation)
    examples = objective.encode(records)
    together = objective.predict(net, objective.collate(examples))
    for example, text in zip(examples, together, strict=True):
        assert text == _greedy(net, tok, example.prompt, 6)


def _greedy(net, tok, prompt: list[int], steps: int) -> str:
    seq2seq = net.config.is_encoder_decoder
    read = [net.config.decoder_start_token_id] if seq2seq else list(prompt)
    first = len(read)
    for _ in range(steps):
        ids = torch.tensor([read])
        with torch.no_grad():
            out = (
                net(input_ids=torch.tensor([prompt]), decoder_input_ids=ids)
                if seq2seq
                else net(input_ids=ids)
            )
        read.append(int(out.logits[0, -1].argmax()))
        if read[-1] == 2:
            break
    return tok.decode(read[first:], skip_special_tokens=True).strip()


def test_generation_learns_to_write_and_stop() -> None:
    net, tok = model("llama"), tokenizer("llama")
    records = [Record("the film", "very good"), Record("the answer is", "no")]
    objective = objective_for(task("generation", records), net, tok)
    batch = objective.collate(objective.encode(records))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(net, batch).backward()
        optimizer.step()
    assert objective.predict(net, batch) == ["very good", "no"]


@pytest.mark.parametrize("kind", ["bert", "llama-classes"])
def test_class_head_loss_and_predictions_equal_transformers(kind: str) -> None:
    labels = ("bad", "good", "very")
    net, tok = model(kind, len(labels)), tokenizer(kind.split("-")[0])
    records = [Record(text, labels[i % 3]) for i, text in enumerate(texts(7))]
    objective = objective_for(task("classification", records, labels), net, tok)
    assert isinstance(objective, ClassHead)
    batch = objective.collate(objective.encode(records))
    expected = tok([r.input for r in records], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    ours, own = objective.loss(net, batch), net(**batch)
    torch.testing.assert_close(ours, own.loss)
    alone = [net(**tok(r.input, return_tensors="pt")).logits.argmax().item() for r in records]
    assert objective.predict(net, batch) == [labels[index] for index in alone]


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_the_input_is_cut_and_the_cuts_are_counted(side: str) -> None:
    net, tok = model("llama"), tokenizer("llama")
    tok.truncation_side = side
    long, short = Record(" ".join(texts(30)), "very good"), Record("film", "no")
    objective = objective_for(task("generation", [long, short]), net, tok, max_length=20)
    cut, whole = objective.encode([long, short])
    body = tok(long.input, add_special_tokens=False)["input_ids"]
    after = continuations(tok, ["\nanswer:"])[0]
    room = 20 - 1 - len(after)
    assert cut.prompt == [1, *(body[:room] if side == "right" else body[-room:]), *after]
    assert tok.decode(cut.target) == " very good</s>" and cut.length == 20 + len(cut.target)
    assert tok.decode(whole.prompt) == "<s>film\nanswer:"
    assert objective.truncated == 1


def test_prompt_and_target_together_stay_within_the_positions() -> None:
    net, tok = model("gpt"), tokenizer("gpt")
    record = Record(" ".join(texts(60)), " ".join(texts(6)))
    objective = objective_for(task("generation", [record]), net, tok)
    (example,) = objective.encode([record])
    assert example.length == 128 and objective.truncated == 1
    objective.loss(net, objective.collate([example]))
    with pytest.raises(DataError, match=r"no token of the input .* fits"):
        objective.encode([Record("film", " ".join(texts(60)))])


@pytest.mark.parametrize("kind", ["gpt", "llama", "t5", "bert"])
def test_special_tokens_are_those_around_a_text(kind: str) -> None:
    expected = {"gpt": ([], []), "llama": ([1], []), "t5": ([], [2]), "bert": ([1], [2])}
    assert special_tokens(tokenizer(kind)) == expected[kind]


def test_template_parses_and_refuses() -> None:
    assert Template.parse("Q: {input} A:\n{target}") == Template("Q: ", " A:", "\n")
    for wrong in ("{input}", "{target}", "{input}{target}.", "{input}{input}{target}"):
        with pytest.raises(DataError, match="does not have the form"):
            Template.parse(wrong)


def test_records_without_target_can_be_predicted() -> None:
    net, tok, labels = model("bert", 2), tokenizer("bert"), ("bad", "good")
    known = [Record("film", "bad")]
    head = objective_for(task("classification", known, labels), net, tok)
    assert head.predict(net, head.collate(head.encode([Record("film", "")])))[0] in labels
    net, tok = model("llama"), tokenizer("llama")
    scoring = objective_for(task("classification", known, labels), net, tok)
    batches = [scoring.collate(scoring.encode([r])) for r in (known[0], Record("film", ""))]
    assert scoring.predict(net, batches[0]) == scoring.predict(net, batches[1])
    writer = objective_for(task("generation", known), net, tok)
    batches = [writer.collate(writer.encode([r])) for r in (known[0], Record("film", ""))]
    assert writer.predict(net, batches[0]) == writer.predict(net, batches[1])


def test_option_batches_can_be_ready_for_the_trainer() -> None:
    net, tok, records = model("llama"), tokenizer("llama"), choosing()
    objective = objective_for(task("multiple_choice", records), net, tok)
    assert isinstance(objective, OptionScoring)
    batch = objective.collate(objective.encode(records), choices=False)
    torch.testing.assert_close(objective.loss(net, batch), objective.loss(net, batch))
    assert net(**batch).loss > 0


def test_wrong_pairs_are_refused() -> None:
    records, labels = writing(), CHOICES
    with pytest.raises(DataError, match="without labels; load a model with the head `causal`"):
        objective_for(task("generation", records), model("bert"), tokenizer("bert"))
    with pytest.raises(DataError, match="expected the same in the same order"):
        objective_for(task("classification", records, labels), model("bert"), tokenizer("bert"))
    named = model("bert", 2)
    named.config.id2label = {0: "good", 1: "bad"}
    with pytest.raises(DataError, match="expected the same in the same order"):
        objective_for(task("classification", records, ("bad", "good")), named, tokenizer("bert"))
    with pytest.raises(DataError, match=r"`BertModel` has no head"):
        objective_for(task("generation", records), model("bert").bert, tokenizer("bert"))
    with pytest.raises(DataError, match="did you mean `target`"):
        objective_for(
            task("multiple_choice", choosing()), model("llama"), tokenizer("llama"), loss_on="targt"
        )
    head = objective_for(
        task("classification", records, ("bad", "good")), model("bert"), tokenizer("bert")
    )
    with pytest.raises(DataError, match=r"label `goood` .* not in the label set .*`good`"):
        head.encode([Record("film", "goood")])
    scoring = objective_for(task("multiple_choice", choosing()), model("llama"), tokenizer("llama"))
    with pytest.raises(DataError, match="not among the options"):
        scoring.encode([Record("film", "god", ("good", "bad"))])
    with pytest.raises(DataError, match="has no options and the task no labels"):
        scoring.encode([Record("film", "good")])
