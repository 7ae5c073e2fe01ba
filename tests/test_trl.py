"""TRL on attached models, which it takes for models of its own. Oracle: DPO's loss written out.

Not installed with deltune: `pip install trl`, then `pytest tests/test_trl.py`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import deltune as dt
import tasks_toys
from deltune.reference import reference
from deltune.training.callback import DeltaCallback
from zoo import ZOO

NAMES = ["llama", "gpt2", "gemma3", "mixtral", "bert", "t5", "vit", "clip", "whisper"]
SPECS = ["lora(rank=2)", "adapter(width=2) + norms", "prefix(tokens=2)"]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_the_model_before_on_the_same_tensors(name: str) -> None:
    case = ZOO[name]
    model = case.build(0)
    before = case.run(model)
    for spec in SPECS:
        delta = dt.attach(model, spec, "mine", seed=0)
        delta.load_vector(delta.vector() + 0.1)
        out = case.run(model.train(False))
        alone = reference(delta)
        mine = {p.data_ptr() for p in model.parameters()}
        assert {p.data_ptr() for p in alone.parameters()} < mine
        torch.testing.assert_close(case.run(alone), before, rtol=0, atol=1e-5)
        assert torch.equal(case.run(model), out) and not dt.deltas(alone)
        model.train()
        assert not alone.training
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(n.startswith("deltas.") for n in trained)
        delta.detach()
        model.eval()
        torch.testing.assert_close(case.run(model), before, rtol=0, atol=1e-5)


def test_a_reference_keeps_the_other_deltas_and_leaves_merged_ones_alone() -> None:
    case = ZOO["llama"]
    model = case.build(0)
    first = dt.attach(model, "lora(rank=2)", "first", seed=0)
    first.load_vector(first.vector() + 0.1)
    wanted = case.run(model)
    second = dt.attach(model, "adapter(width=2)", "second", seed=0)
    second.load_vector(second.vector() + 0.1)
    both = case.run(model)
    alone = reference(second)
    assert torch.equal(case.run(alone), wanted) and list(dt.deltas(alone)) == ["first"]
    first.merge()
    merged = case.run(model)
    torch.testing.assert_close(case.run(reference(second)), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, both, rtol=0, atol=1e-5)
    assert first.merged and torch.equal(case.run(model), merged)
    assert torch.equal(case.run(first.unmerge().model), both)


# --- TRL ------------------------------------------------------------------------------------------

BETA = 0.3
PAIRS = [
    {"prompt": "the film was", "chosen": f" good {word}", "rejected": f" bad {word} film"}
    for word in tasks_toys.WORDS[:6]
]


def dpo(model: Any, before: Any, tokenizer: Any) -> Tensor:
    """-log sigmoid(beta (log r(chosen) - log r(rejected))), r = p_model / p_before, over pairs."""

    def likelihood(of: Any, pair: dict[str, str], name: str) -> Tensor:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(pair[name], add_special_tokens=False)["input_ids"]]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        scores = of(input_ids=ids).logits[0, :-1].log_softmax(-1)
        chosen = scores.gather(-1, ids[0, 1:, None])[:, 0]
        return chosen[len(prompt) - 1 :].sum()

    losses = []
    for pair in PAIRS:
        with torch.no_grad():
            own = {name: likelihood(model, pair, name) for name in ("chosen", "rejected")}
            old = {name: likelihood(before, pair, name) for name in ("chosen", "rejected")}
        margin = own["chosen"] - old["chosen"] - own["rejected"] + old["rejected"]
        losses.append(-F.logsigmoid(BETA * margin))
    return torch.stack(losses).mean()


def settings(kind: Any, out: Path, **changes: Any) -> Any:
    usual: dict[str, Any] = {
        "output_dir": str(out), "max_steps": 2, "save_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": 6, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
        "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    return kind(**(usual | changes))


def attached(spec: str) -> tuple[Any, dt.Delta]:
    model = tasks_toys.model("llama")
    delta = dt.attach(model, spec, "mine", seed=0)
    return model, delta.load_vector(delta.vector() + 0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["reference", "precomputed"])
def test_dpo_compares_with_the_model_before(how: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the package trl is not installed")
    datasets = pytest.importorskip("datasets")
    tokenizer = tasks_toys.tokenizer("gpt")
    model, delta = attached("lora(rank=2)")
    before = tasks_toys.model("llama")
    start, plain = copy.deepcopy(model).eval(), dict(before.named_parameters())
    known: dict[str, Any] = {
        "train_dataset": datasets.Dataset.from_list(PAIRS),
        "processing_class": tokenizer,
        "callbacks": [DeltaCallback(delta)],
    }
    if how == "reference":
        arguments = settings(trl.DPOConfig, tmp_path, beta=BETA)
        trainer = trl.DPOTrainer(model, reference(delta), arguments, **known)
    else:
        arguments = settings(trl.DPOConfig, tmp_path, beta=BETA, precompute_ref_log_probs=True)
        with delta.disabled():
            trainer = trl.DPOTrainer(model, None, arguments, **known)
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert first == pytest.approx(float(dpo(start, before, tokenizer)), rel=1e-4)
    assert first != pytest.approx(float(torch.tensor(2.0).log()), rel=1e-3) and second < first
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in plain.items())
    loaded = dt.load(tmp_path / "checkpoint-2" / "delta", before)
    assert torch.equal(loaded.vector(), delta.vector())


@pytest.mark.filterwarnings("ignore")
def test_sft_trains_the_delta_alone(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the package trl is not installed")
    datasets = pytest.importorskip("datasets")
    tokenizer = tasks_toys.tokenizer("gpt")
    model, delta = attached("lora(rank=2) + prefix(tokens=2)")
    start, before = copy.deepcopy(model).eval(), tasks_toys.model("llama")
    rows = datasets.Dataset.from_list([{"text": pair["prompt"] + pair["chosen"]} for pair in PAIRS])
    trainer = trl.SFTTrainer(
        model, settings(trl.SFTConfig, tmp_path), train_dataset=rows, processing_class=tokenizer,
        callbacks=[DeltaCallback(delta)],
    )  # fmt: skip
    trainer.train()
    first, second = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = start(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(scores.gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert first == pytest.approx(total / count, rel=1e-4) and second < first
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], value) for n, value in before.named_parameters())
    loaded = dt.load(tmp_path / "checkpoint-2" / "delta", before)
    assert torch.equal(loaded.vector(), delta.vector())
