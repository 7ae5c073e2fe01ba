"""`pipeline` of transformers on attached models. Oracle: their own outputs, one text at a time."""

from typing import Any

import pytest
import torch
from transformers import pipeline

import deltune as dt
import tasks_toys

TEXTS = ["the film was very good", "no", "maybe yes"]


def attached(kind: str, spec: str) -> tuple[Any, dt.Delta]:
    model = tasks_toys.model(kind, labels=2)
    delta = dt.attach(model, spec, seed=0)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(0))
    return model, delta.load_vector(delta.vector() + 0.3 * noise)


@pytest.mark.parametrize("spec", ["lora(rank=2) + bitfit", "prefix(tokens=3)", "prompt(tokens=3)"])
def test_classes_are_those_of_the_attached_model(spec: str) -> None:
    model, delta = attached("bert", spec)
    tokenizer = tasks_toys.tokenizer("bert")
    made = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    for text, scores in zip(TEXTS, made(TEXTS, batch_size=3), strict=True):
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
            with delta.disabled():
                old = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        found = {one["label"]: one["score"] for one in scores}
        assert [found[f"LABEL_{i}"] for i in range(2)] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert wanted.tolist() != pytest.approx(old.tolist(), abs=1e-3)


@pytest.mark.parametrize("spec", ["lora(rank=2)", "prefix(tokens=3)", "prompt(tokens=3)"])
def test_texts_are_those_of_the_attached_model(spec: str) -> None:
    model, delta = attached("llama", spec)
    tokenizer = tasks_toys.tokenizer("gpt")
    tokenizer.padding_side = "left"
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    asked = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    found = [one[0]["generated_text"] for one in made(TEXTS, batch_size=3, **asked)]
    wanted, old = [], []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for kept in (wanted, old):
            new = ids
            with torch.no_grad():
                for _ in range(5):
                    if new[0, -1] != tokenizer.eos_token_id:
                        step = model(input_ids=new, use_cache=False).logits[:, -1].argmax(-1)
                        new = torch.cat([new, step[None]], 1)
            kept.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
            delta.disable()
        delta.enable()
    assert found == wanted and found != old
