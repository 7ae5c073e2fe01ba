"""Multiple choice with an encoder: pairs, scores and losses against one forward pass an option."""

import pytest
import torch

import deltune as dt
from deltune.errors import DataError
from deltune.tasks.encoding import pair_tokens
from deltune.tasks.objectives import ChoiceHead, objective_for
from deltune.tasks.task import Record, Task
from tasks_toys import model, texts, tokenizer

OPTIONS = ("very good", "no", "maybe the film is bad", "yes")


def choosing(count: int = 6) -> list[Record]:
    """Records with two to four options."""
    sizes = [2 + i % 3 for i in range(count)]
    return [
        Record(text, OPTIONS[i % size], OPTIONS[:size])
        for i, (text, size) in enumerate(zip(texts(count), sizes, strict=True))
    ]


def task(records: list[Record]) -> Task:
    return Task("toy", "multiple_choice", "accuracy", None, records, records, records)


def made(max_length: int | None = None, **options: str) -> tuple[object, object, ChoiceHead]:
    net, tok = model("bert", labels=1), tokenizer("bert")
    for name, value in options.items():
        setattr(tok, name, value)
    head = objective_for(task(choosing()), net, tok, max_length=max_length)
    assert isinstance(head, ChoiceHead)
    return net, tok, head


def by_hand(net, tok, record: Record) -> torch.Tensor:
    """The score of each option in a forward pass of its own."""
    found = []
    for option in record.options:
        a, b = (tok(text, add_special_tokens=False)["input_ids"] for text in (record.input, option))
        with torch.no_grad():
            found.append(net(input_ids=torch.tensor([[1, *a, 2, 2, *b, 2]])).logits[0, 0])
    return torch.stack(found)


def _pairs(tok) -> None:
    """Gives the toy tokenizer a frame for pairs, as RoBERTa has it."""
    from tokenizers.processors import TemplateProcessing

    tok._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _paired(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tokenizer

    def paired(kind: str):
        tok = plain(kind)
        _pairs(tok)
        return tok

    monkeypatch.setitem(globals(), "tokenizer", paired)


def test_scores_are_those_of_each_pair_alone_and_padding_changes_nothing() -> None:
    net, tok, head = made()
    records = choosing()
    examples = head.encode(records)
    batch = head.collate(examples)
    wanted = [by_hand(net, tok, record) for record in records]
    assert head.predict(net, batch) == [
        record.options[int(scores.argmax())] for record, scores in zip(records, wanted, strict=True)
    ]
    losses = [
        -scores.log_softmax(-1)[record.options.index(record.target)]
        for record, scores in zip(records, wanted, strict=True)
    ]
    assert abs(float(head.loss(net, batch).detach() - torch.stack(losses).mean())) < 1e-5
    for example, record, scores in zip(examples, records, wanted, strict=True):
        alone = head.collate([example])
        assert head.predict(net, alone) == [record.options[int(scores.argmax())]]
    assert max(e.length for e in examples) == batch["input_ids"].shape[1]


def test_inputs_are_cut_before_options_and_counted() -> None:
    record = Record("the film is very good " * 20, "yes", ("no", "yes", "maybe " * 40))
    for side in ("right", "left"):
        _, tok, head = made(max_length=24, truncation_side=side)
        (example,) = head.encode([record])
        body = tok(record.input, add_special_tokens=False)["input_ids"]
        long = tok(record.options[2], add_special_tokens=False)["input_ids"]
        assert head.truncated == 1 and max(map(len, example.options)) == 24
        room = 24 - 4 - 10  # the longest option may take half of the room
        kept = body[-room:] if side == "left" else body[:room]
        for row, option in zip(example.options, ("no", "yes"), strict=False):
            ids = tok(option, add_special_tokens=False)["input_ids"]
            assert row == [1, *kept, 2, 2, *ids, 2]
        assert example.options[2] == [1, *kept, 2, 2, *long[:10], 2]


def test_a_head_learns_which_option_is_right() -> None:
    orders = [("good", "bad"), ("bad", "good")]
    records = [Record(text, "good", orders[i % 2]) for i, text in enumerate(texts(24))]
    net, tok = model("bert", labels=1), tokenizer("bert")
    delta = dt.attach(net, "lora(rank=4)", seed=0)
    settings = dt.TrainSettings(
        num_train_epochs=8, learning_rate=3e-2, per_device_train_batch_size=8, max_length=64,
        eval_steps="epoch",
    )  # fmt: skip
    result = dt.train(net, tok, task(records), delta, settings)
    assert result.best_dev == 1.0 and result.losses[-1] < 0.3 < result.losses[0]


def test_what_is_no_choice_is_refused() -> None:
    _, tok, head = made()
    with pytest.raises(DataError, match="has 1 options; multiple choice needs at least two"):
        head.encode([Record("a", "b", ("b",))])
    with pytest.raises(
        DataError, match=r"the target `yes` .* is not among the options `no`, `maybe`"
    ):
        head.encode([Record("a", "yes", ("no", "maybe"))])
    with pytest.raises(DataError, match="has 2 outputs and multiple choice needs one"):
        objective_for(task(choosing()), model("bert"), tok)
    with pytest.raises(DataError, match="max_length is 5 and a pair has 4 special tokens"):
        made(max_length=5)
    assert pair_tokens(tok) == ([1], [2, 2], [2])
