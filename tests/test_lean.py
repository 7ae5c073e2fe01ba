"""Lean training: the gradients of plain training, with less kept.

Oracles: the same step without it; `F.cross_entropy` of all logits; what autograd keeps, counted.
"""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltune as dt
from deltune.errors import AttachError
from deltune.mechanisms.output import LinearCrossEntropy
from deltune.tasks.language import language_of
from deltune.tasks.records import Record
from deltune.tasks.task import Task
from snapshots import Snapshot
from tasks_toys import model as toy
from tasks_toys import texts, tokenizer
from zoo import ZOO, Case

SERVED = {
    "llama": "lora(rank=2, where='attn, ffn', dropout=0.1)",
    "qwen3": "dora(rank=2, where='ffn') + norms",
    "gemma3": "ia3 + lora(rank=2, where='ffn')",
    "phi3": "lora(rank=2, where='ffn') + adapter(width=3, placement='parallel')",
    "gpt2": "full",
    "gpt-neox": "lora(rank=2, where='ffn') + bitfit",
    "t5": "loha(rank=2, where='ffn') + adapter(width=3)",
    "t5-gated": "lora(rank=2, where='ffn', dropout=0.1)",
    "distilbert": "lora(rank=2, where='ffn') + adapter(width=3)",
    "modernbert": "lora(rank=2, where='ffn')",
    "vit": "last(layers=1)",
    "clip": "lora(rank=2, where='ffn')",
}
"""An architecture each, with deltas on and around its feed-forward parts."""
REFUSED = {
    "bert": "`bert.encoder.layer.0.output.dense`.*those of one module",
    "bart": "`model.encoder.layers.0`.*it holds BartAttention",
    "mixtral": "`model.layers.0.mlp`.*those of one module",
    "torch-mlp": "no feed-forward part was found in Sequential",
}


def step(case: Case, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and all gradients of a step, dropout and all."""
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**batch)
    loss = out.loss if "labels" in batch else case.output(out).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: Any, oracle: Any, bound: float = 1e-6) -> None:
    assert (ours[0] - oracle[0]).abs() <= bound * oracle[0].abs()
    assert ours[1].keys() == oracle[1].keys() and oracle[1]
    most = max(grad.abs().max() for grad in oracle[1].values())
    for name, grad in oracle[1].items():
        assert (ours[1][name] - grad).abs().max() <= bound * most, name


def moved(model: nn.Module, text: str) -> dt.Delta:
    delta = dt.attach(model, text, seed=0)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
    return delta.load_vector(delta.vector() + 0.05 * noise)


@pytest.mark.parametrize("name", SERVED)
def test_gradients_are_those_of_plain_training_and_nothing_stays(name: str) -> None:
    case = ZOO[name]
    model = case.build(0).train()
    if name.startswith("t5"):
        model.eval()  # its dropout is inside of the feed-forward part
    moved(model, SERVED[name])
    before, batch = Snapshot.of(model), case.batch(0)
    oracle = step(case, model, batch)
    with dt.lean(model) as parts:
        assert len(parts.feed_forward) in (2, 4)
        ours = step(case, model, batch)
        twin = copy.deepcopy(model) if name == "llama" else pickle.loads(pickle.dumps(model))
    assert_same(ours, oracle)
    assert_same(step(case, twin, batch), oracle)
    assert_same(step(case, model, batch), oracle, 0.0)
    before.check(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_narrow_types_and_a_graph_that_is_gone_through_twice(name: str, autocast: bool) -> None:
    """The very gradients in bfloat16, of the backbone or under autocast."""
    case, found = ZOO[name], []
    model = case.build(0).train()
    model = model if autocast else model.bfloat16()
    moved(model, "lora(rank=2, where='attn, ffn', dropout=0.1)")
    for lean in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        with dt.lean(model, head=False) if lean else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = case.run(model).float().square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    assert_same(found[1], found[0], 0.0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_recognised_is_refused_by_name(name: str) -> None:
    model = ZOO[name].build(0)
    before = Snapshot.of(model)
    with pytest.raises(AttachError, match=REFUSED[name]), dt.lean(model):
        pass
    before.check(model)


@pytest.mark.parametrize("most", [40, 2**24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_loss_of_a_linear_layer_in_parts(
    most: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltune.mechanisms.output.MOST", most)
    monkeypatch.setattr("deltune.mechanisms.output.FEWEST", 3)
    draw = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(*shape, generator=draw).to(dtype) for shape in ((11, 6), (13, 6), (13,))
    )
    labels = torch.randint(0, 13, (11,), generator=draw)
    labels[[2, 3, 4, 10]] = -7
    found = []
    for ours in (True, False):
        x = states.clone().requires_grad_()
        if ours:
            losses = LinearCrossEntropy.apply(x, labels, weight, bias, -7)
        else:
            logits = F.linear(x, weight, bias).to(torch.promote_types(dtype, torch.float32))
            losses = F.cross_entropy(logits, labels, ignore_index=-7, reduction="none")
        (losses * torch.arange(11)).sum().backward()
        found.append((losses.detach(), x.grad))
    bound = 1e-12 if dtype == torch.float64 else 3e-2
    for ours, oracle in zip(*found, strict=True):
        assert (ours - oracle).abs().max() <= bound * oracle.abs().max()


def labelled(case: Case) -> dict[str, Any]:
    batch: dict[str, Any] = dict(case.batch(0))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("form", ["plain", "counted", "shifted", "checkpointed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_model_with_labels_gives_the_same_loss_and_no_logits(name: str, form: str) -> None:
    case = ZOO[name]
    model, batch = case.build(0).train(), labelled(case)
    moved(model, "lora(rank=2, where='attn, ffn', dropout=0.1) + adapter(width=2)")
    if form == "counted":
        batch["num_items_in_batch"] = torch.tensor(5)
    if form == "shifted":
        batch["shift_labels"] = batch["labels"].roll(-1, 1)
    if form == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    oracle = step(case, model, batch)
    with dt.lean(model):
        assert_same(step(case, model, batch), oracle)
        assert model.eval()(**batch).logits is None
        with torch.no_grad():
            inside = model(**batch)
    outside = model(**batch)
    assert torch.equal(inside.logits, outside.logits) and torch.equal(inside.loss, outside.loss)


def test_an_output_layer_that_is_trained_or_changed_is_refused() -> None:
    for name, text, words in (
        ("llama", "lora(rank=2, where='head')", "`lm_head` is changed or trained"),
        ("gpt2", "full", "`lm_head` is changed or trained"),
        ("gemma3", "lora(rank=2)", "changes its logits before the loss"),
        ("t5", "lora(rank=2)", "computes the loss of labels in a way of its own"),
    ):
        case = ZOO[name]
        model = case.build(0).eval()
        if name == "gemma3":
            model.config.final_logit_softcapping = 2.0
        moved(model, text)
        batch = dict(case.batch(0))
        batch["labels"] = batch.get("decoder_input_ids", batch["input_ids"]).clone()
        batch.pop("decoder_input_ids", None), batch.pop("decoder_attention_mask", None)
        oracle = step(case, model, batch)
        with pytest.raises(AttachError, match=words), dt.lean(model):
            model(**batch)
        with dt.lean(model, head=False):
            assert_same(step(case, model, batch), oracle)
        assert_same(step(case, model, batch), oracle, 0.0)


def test_dropout_inside_of_a_feed_forward_part_is_refused() -> None:
    model = ZOO["t5"].build(0).train()
    with pytest.raises(AttachError, match="does not give the last map"), dt.lean(model):
        pass
    with dt.lean(model.eval()):
        ZOO["t5"].run(model)
        with pytest.raises(AttachError, match=r"drops values .*TrainSettings"):
            ZOO["t5"].run(model.train())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_lean_run_of_training_ends_where_a_plain_one_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Record(text, text.split()[0]) for text in texts(24)]
    task = Task("toy", "generation", "exact_match", None, rows, rows[:4], rows)
    made, seen, start = [], [], torch.zeros(0)
    plain = LinearCrossEntropy.forward
    counted = lambda ctx, states, *rest: (seen.append(len(states)), plain(ctx, states, *rest))[1]  # noqa: E731
    monkeypatch.setattr(LinearCrossEntropy, "forward", staticmethod(counted))
    for lean in (False, True):
        net, words = toy(kind), tokenizer(kind)
        delta = dt.attach(net, "lora(rank=2, where='attn, ffn', dropout=0.1)", seed=0)
        start = delta.vector()
        settings = dt.TrainSettings(
            max_steps=3,
            per_device_train_batch_size=8,
            backbone_dropout=kind != "t5",
            lean=lean,
            eps=1e-3,
        )
        losses: list[float] = []
        note = lambda event, out=losses: out.append(getattr(event, "loss", 0.0))  # noqa: E731
        dt.train(net, words, task, delta, settings, on_event=note)
        made.append((delta.vector(), torch.tensor(losses)))
    assert torch.allclose(made[0][1], made[1][1], rtol=1e-5)
    assert (made[0][0] - made[1][0]).norm() <= 1e-4 * (made[0][0] - start).norm() != 0.0
    targets = [len(ids) for ids in language_of(toy(kind), tokenizer(kind)).targets(
        [row.target for row in rows], "")]  # fmt: skip
    assert sum(seen) == sum(targets), "the loss looked at more than the targets"


def kept(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that live after a forward beside the parameters, whoever holds them."""
    storages: dict[int, Any] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, Tensor):
                    storages[x.untyped_storage()._cdata] = x.untyped_storage()._weak_ref()
            return out

    with Watch():
        loss = model(**batch).loss
    alive = {p.untyped_storage()._cdata for p in model.parameters()}
    total = 0
    for known, weak in storages.items():
        storage = torch.UntypedStorage._new_with_weak_ptr(weak)
        if storage is not None and known not in alive:
            total += storage.nbytes()
    loss.backward()
    return total


def test_what_is_kept_of_a_feed_forward_part_and_of_the_loss() -> None:
    """Of the inside of each part two tensors instead of four, and states instead of logits."""
    case = ZOO["llama"]
    model, batch = case.build(0).train(), labelled(case)
    moved(model, "lora(rank=2, where='attn, ffn')")
    tokens, sizes = batch["labels"].numel(), model.config
    kept(model, batch)
    plain = kept(model, batch)
    with dt.lean(model, norms=False, head=False):
        parts = plain - kept(model, batch)
    with dt.lean(model, feed_forward=False, norms=False):
        head = plain - kept(model, batch)
    assert parts == 4 * tokens * 2 * sizes.intermediate_size * sizes.num_hidden_layers
    assert head >= 4 * tokens * (sizes.vocab_size - sizes.hidden_size)
