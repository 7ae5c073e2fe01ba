"""Tasks of lm-evaluation-harness. Oracle: the harness itself, on the same model and documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
import tasks_toys
from deltune.errors import DataError
from deltune.tasks.objectives import objective_for

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{home}/train.json", test: "{home}/test.json"}}}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_target: "{{{{right}}}}"
doc_to_choice: "{{{{options}}}}"
metric_list: [{{metric: acc}}]
"""
WRITTEN = """
task: toy_written
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{home}/test.json"}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[right]}}}}"
target_delimiter: "; "
generation_kwargs: {{until: ["."]}}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two tasks and their data."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    words = tasks_toys.texts(48)
    rows = [
        {"question": words[i], "options": [words[i + 1], words[i + 2], "no"], "right": i % 3}
        for i in range(40)
    ]
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows[:15])))
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, rows[15:])))
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("wrong", WRITTEN)):
        (tmp_path / f"{name}.yaml").write_text(text.format(home=tmp_path))
    wrong = (tmp_path / "wrong.yaml").read_text().replace("generate_until", "loglikelihood_rolling")
    (tmp_path / "wrong.yaml").write_text(wrong)
    (tmp_path / "lost.yaml").write_text(wrong.replace("test.json", "lost.json"))
    return tmp_path


def test_choices_are_the_harness_s_and_score_as_it_scores_them(home: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    task = dt.load_task(f"lm-eval:{home / 'choice.yaml'}")
    assert (task.kind, task.metric, task.name) == ("multiple_choice", "accuracy", "choice")
    assert len(task.test) == 25 and len(task.train) + len(task.dev) == 15 and task.dev
    row = json.loads((home / "test.json").read_text().splitlines()[0])
    first = task.test[0]
    assert first.input == f"Question: {row['question']} Answer:"
    assert first.options == tuple(row["options"]) and first.target == row["options"][row["right"]]

    model, tokenizer = tasks_toys.model("gpt"), tasks_toys.tokenizer("gpt")
    objective = objective_for(task, model, tokenizer, normalise=False)
    ours = dt.evaluate(model, tokenizer, task, "test", objective=objective)
    harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    theirs = lm_eval.simple_evaluate(
        harness, tasks=[str(home / "choice.yaml")], log_samples=True, bootstrap_iters=0
    )
    (found,) = theirs["results"].values()
    assert ours.value == pytest.approx(found["acc,none"])
    (samples,) = theirs["samples"].values()
    picked = [
        max(range(3), key=lambda at: one["filtered_resps"][at][0])
        for one in sorted(samples, key=lambda one: one["doc_id"])
    ]
    assert [r.options[at] for r, at in zip(task.test, picked, strict=True)] == [*ours.predictions]
    assert 0 < ours.value < 1


def test_a_task_without_training_documents_is_for_evaluation(home: Path) -> None:
    task = dt.load_task(f"lm-eval:{home / 'written.yaml'}")
    assert (task.kind, task.metric) == ("generation", "exact_match")
    assert (len(task.train), len(task.dev), len(task.test)) == (0, 0, 25)
    assert task.meta["template"] == "{input}; {target}"
    model, tokenizer = tasks_toys.model("gpt"), tasks_toys.tokenizer("gpt")
    objective: Any = objective_for(task, model, tokenizer)
    example = objective.encode(task.test[:1])[0]
    assert tokenizer.decode(example.prompt).strip().endswith(";")
    with pytest.raises(DataError, match=r"the split `train` .* has no records"):
        dt.train(model, tokenizer, task, dt.attach(model, "lora(rank=2)"))


def test_what_cannot_be_read_is_named(home: Path) -> None:
    for name, words in (
        ("arc_eazy", "has no task `arc_eazy` .did you mean `arc_easy`"),
        (str(home / "wrong.yaml"), "asks for `loglikelihood_rolling`"),
        (str(home / "none.yaml"), "has no task"),
        (str(home / "lost.yaml"), "cannot be loaded .* check the name"),
    ):
        with pytest.raises(DataError, match=words):
            dt.load_task(f"lm-eval:{name}")
    (home / "test.json").write_text('{"question": "a b", "options": ["a"], "right": 4}')
    with pytest.raises(DataError, match=r"document 0: .*does not fit its data|cannot be loaded"):
        dt.load_task(f"lm-eval:{home / 'choice.yaml'}")


@pytest.mark.parametrize("spec", ["lora(rank=2)", "prefix(tokens=3)", "prompt(tokens=3)"])
def test_the_harness_scores_the_attached_model(spec: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tasks_toys.model("llama"), tasks_toys.tokenizer("gpt")
    harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    pairs = [("the film was", " good"), ("no", " maybe yes no"), ("yes yes very", " bad film")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    before = [score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    delta = dt.attach(model, spec, seed=0)
    delta.load_vector(delta.vector() + 0.3 * torch.randn(delta.layout.size))
    found = harness.loglikelihood(asked, disable_tqdm=True)
    for (context, answer), (score, greedy), old in zip(pairs, found, before, strict=True):
        ids, end = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *end]])).logits[0].log_softmax(-1)
        own = logits[len(ids) - 1 : -1]
        assert score == pytest.approx(float(own.gather(1, torch.tensor(end)[:, None]).sum()), 1e-4)
        assert greedy == (own.argmax(1).tolist() == end) and score != pytest.approx(old, 1e-3)
    with delta.disabled():
        again = [score for score, _ in harness.loglikelihood(asked, disable_tqdm=True)]
    assert again == pytest.approx(before, 1e-5)
