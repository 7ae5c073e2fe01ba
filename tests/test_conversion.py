"""Conversion. Oracles: numpy's SVD, equal outputs where the algebra is exact, likeness by hand."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deltune as dt
from deltune.conversion import convert as module
from deltune.conversion.convert import convert
from deltune.conversion.likeness import WRITTEN, Texts, likeness
from deltune.errors import ConversionError, TrainError
from deltune.subspace.linear import principal
from deltune.subspace.solutions import Solutions
from tasks_toys import model as toy_model
from tasks_toys import texts, tokenizer
from test_tasks_matching import backbone
from zoo import ZOO

QUICK = dt.TrainSettings(
    learning_rate=1e-2, num_train_epochs=12, per_device_train_batch_size=8, eval_steps="no"
)


def moved(model: Any, spec: str, by: float = 0.3, name: str = "delta") -> dt.Delta:
    """A delta whose tensors are drawn."""
    delta, draw = dt.attach(model, spec, name, seed=0), torch.Generator().manual_seed(4)
    return delta.load_vector(delta.vector() + by * torch.randn(delta.layout.size, generator=draw))


def outputs(arch: str, model: Any) -> Tensor:
    with torch.no_grad():
        return ZOO[arch].run(model)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("lora(rank=2)", "lora(rank=3)"),
        ("lora(rank=2, alpha=-4)", "lora(rank=2, scaling='root', alpha=7)"),
        ("lora(rank=1) + lora(rank=2, where='attn.k')", "lora(rank=3, where='attn')"),
    ],
)  # fmt: skip
def test_changes_of_low_rank_are_converted_exactly(arch: str, source: str, target: str) -> None:
    model = ZOO[arch].build(0)
    plain = outputs(arch, model)
    delta = moved(model, source)
    wanted = outputs(arch, model)
    made = convert(delta, target, "weights")
    assert made.error is not None and made.error < 1e-5 and made.how == "weights"
    assert not delta.enabled and made.delta.enabled
    assert (outputs(arch, model) - wanted).abs().max() < 1e-4 * (wanted - plain).abs().max()


def test_a_smaller_rank_leaves_the_tail_of_the_singular_values() -> None:
    model = ZOO["bert"].build(0)
    delta = moved(model, "lora(rank=6)")
    delta.scale = 0.5
    made = convert(delta, "lora(rank=2)", "weights")
    tensors, tail, whole = delta.tensors(), 0.0, 0.0
    for name in tensors:
        if not name.endswith(".A"):
            continue
        change = 0.5 * 16 / 6 * tensors[name[:-1] + "B"].double() @ tensors[name].double()
        values = np.linalg.svd(change.numpy(), compute_uv=False)
        tail, whole = tail + (values[2:] ** 2).sum(), whole + (values**2).sum()
    assert made.error == pytest.approx((tail / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("target", "rank"),
    [
        ("lora(rank=2) + lora(rank=2)", 4),
        ("lora(rank=1) + lora(rank=1, alpha=-4) + lora(rank=1)", 3),
        ("lora(rank=3) + lora(rank=4)", 6),
    ],
)
@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_units_of_one_matrix_share_its_change(arch: str, target: str, rank: int) -> None:
    """Eckart and Young: each takes the largest directions that are left, so together they leave
    what the sum of their ranks must. gpt2's matrices are parts of a fused one."""
    delta = moved(ZOO[arch].build(0), "lora(rank=6)")
    tensors, tail, whole = delta.tensors(), 0.0, 0.0
    for name in (name for name in tensors if name.endswith(".A")):
        factors = [tensors[name[:-1] + own].double().numpy() for own in "BA"]
        values = np.linalg.svd(factors[0] @ factors[1], compute_uv=False)
        tail, whole = tail + (values[rank:6] ** 2).sum(), whole + (values**2).sum()
    made = convert(delta, target, "weights")
    assert made.error == pytest.approx((tail / whole) ** 0.5, rel=1e-4, abs=1e-5)


def test_what_the_target_cannot_reach_is_in_the_error() -> None:
    model = ZOO["bert"].build(0)
    delta = moved(model, "lora(rank=2, where='attn.q, attn.v')")
    half = convert(delta, "lora(rank=2, where='attn.q')", "weights")
    tensors = delta.tensors()
    sizes = {"query": 0.0, "value": 0.0}
    for name in tensors:
        if name.endswith(".A"):
            change = tensors[name[:-1] + "B"] @ tensors[name]
            sizes[name.split(".")[-2]] += float(change.square().sum())
    expected = (sizes["value"] / sum(sizes.values())) ** 0.5
    assert half.error == pytest.approx(expected, rel=1e-4)


def test_a_linear_adapter_becomes_lora_where_it_acts() -> None:
    """LiST: y + U D y after a linear map W is W + U D W, of the rank of D; the biases of the map,
    which move too, are out of LoRA's reach, so there are none here."""
    model = ZOO["llama"].build(0)
    delta = moved(model, "list(width=2)", by=0.05)
    wanted = outputs("llama", model)
    made = convert(delta, "lora(rank=2, where='attn.o, ffn.down')", "weights")
    assert made.error is not None and made.error < 1e-5
    assert (outputs("llama", model) - wanted).abs().max() < 1e-4


def classifier() -> Any:
    return toy_model("bert", 3).requires_grad_(False)


def test_likeness_is_the_share_of_equal_decisions_and_the_divergence() -> None:
    model, tok = classifier(), tokenizer("bert")
    one, two = moved(model, "bitfit", name="one"), moved(model, "lora", by=0.8, name="two")
    some = Texts(tok, texts(40), 128)
    found = likeness(one, two.disable(), some)
    logits = []
    for on, off in ((one, two), (two, one)):
        off.disable()
        on.enable()
        with torch.no_grad():
            each = [model(input_ids=torch.tensor([row])).logits[0] for row in some.rows]
        logits.append(torch.stack(each))
    p, q = (rows.softmax(-1).double() for rows in logits)
    assert found.same == float((p.argmax(-1) == q.argmax(-1)).double().mean()) and found.same < 1
    by_hand = float((p * (p / q).log()).sum(-1).mean())
    assert found.divergence == pytest.approx(by_hand, rel=1e-3)
    assert two.enabled and not one.enabled  # as before
    assert likeness(one, one, some).divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("arch", "ends"), [("t5", True), ("bart", True), ("t5", False)])
def test_a_text_to_text_model_is_compared_along_what_the_source_writes(
    arch: str, ends: bool
) -> None:
    """The source writes greedily, a token at a time; each text alone, without a cache."""
    model, tok = toy_model(arch).requires_grad_(False), tokenizer("t5")
    source, target = moved(model, "lora(rank=4)"), "lora(rank=2)"
    every = texts(12)
    ids = tok(every[0], return_tensors="pt").input_ids
    often = int(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, 4])
    stop = model.generation_config.eos_token_id = often if ends else None
    made = convert(source, target, "weights", tokenizer=tok, probe=every)

    def says(ids: Tensor, written: list[int]) -> Tensor:
        return model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits[0]

    equal, apart = [], []
    for text in every:
        ids, written = tok(text, return_tensors="pt").input_ids, [0]
        written[0] = model.config.decoder_start_token_id
        with torch.no_grad():
            made.delta.disable(), source.enable()
            while len(written) <= WRITTEN and stop not in written[1:]:
                wanted = says(ids, written)
                written.append(int(wanted[-1].argmax()))
            source.disable(), made.delta.enable()
            found = says(ids, written[:-1])
        p, q = wanted.softmax(-1).double(), found.softmax(-1).double()
        equal.append(p.argmax(-1) == q.argmax(-1))
        apart.append((p * (p / q).log()).sum(-1))
    assert made.after is not None and (len({len(one) for one in apart}) > 1) == ends
    assert made.after.same == pytest.approx(float(torch.cat(equal).double().mean()))
    assert made.after.divergence == pytest.approx(float(torch.cat(apart).mean()), rel=1e-3)


def test_a_text_to_text_model_imitates_what_the_source_writes() -> None:
    model, tok, every = toy_model("t5").requires_grad_(False), tokenizer("t5"), texts(80)
    made = convert(moved(model, "adapter(width=4)"), "lora(rank=4, where='attn, ffn')", "distil",
                   tokenizer=tok, texts=every[:60], probe=every[60:], settings=QUICK)  # fmt: skip
    assert made.before is not None and made.after is not None
    assert made.after.divergence < 0.8 * made.before.divergence


def test_the_likeness_of_hidden_states_is_relative_to_their_spread() -> None:
    model, tok = backbone(), tokenizer("bert")
    delta = moved(model, "bitfit")
    some = Texts(tok, texts(40), 128)
    found = likeness(delta, None, some)
    rows: dict[bool, list[Tensor]] = {True: [], False: []}
    for on in rows:
        delta.enable() if on else delta.disable()
        for ids in some.rows:
            with torch.no_grad():
                rows[on].append(model(input_ids=torch.tensor([ids])).last_hidden_state[0])
    wanted, other = torch.cat(rows[True]), torch.cat(rows[False])
    spread = (wanted - wanted.mean(dim=0)).square().sum()
    expected = float((wanted - other).square().sum() / spread)
    assert found.same is None and found.divergence == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("source", ["bitfit", "prefix(tokens=3)", "adapter(width=4)"])
def test_distillation_comes_nearer_and_takes_the_head_along(source: str) -> None:
    model, tok = classifier(), tokenizer("bert")
    delta = moved(model, source, by=0.3)
    every = texts(120)
    made = convert(delta, "lora(rank=4, where='attn, ffn')", "distil", tokenizer=tok,
                   texts=every[:80], probe=every[80:], settings=QUICK)  # fmt: skip
    assert made.how == "distil" and made.error is None
    assert made.before is not None and made.after is not None
    assert made.after.divergence < 0.3 * made.before.divergence
    assert made.after.same is not None and made.after.same >= (made.before.same or 0)
    again = likeness(made.delta, delta, Texts(tok, every[80:], 128))
    assert again.same == made.after.same and not delta.enabled


def test_auto_takes_what_is_exact_and_takes_the_head_along() -> None:
    model, tok, every = classifier(), tokenizer("bert"), texts(60)
    delta = moved(model, "lora(rank=2)")
    exact = convert(delta, "lora(rank=2)", tokenizer=tok, texts=every[:20], probe=every[20:],
                    settings=dataclasses.replace(QUICK, num_train_epochs=1))  # fmt: skip
    assert exact.how == "weights" and exact.after is not None
    assert exact.after.divergence < 1e-6 and exact.after.same == 1.0
    assert set(dt.deltas(model)) == {"delta", "converted"}
    heads = [{n: t for n, t in d.tensors().items() if n.startswith("head.")}
             for d in (delta, exact.delta)]  # fmt: skip
    assert heads[0] and all(torch.equal(heads[0][n], heads[1][n]) for n in heads[0])
    exact.delta.detach()
    other = convert(delta.enable(), "bitfit", tokenizer=tok, texts=every[:20], probe=every[20:],
                    settings=QUICK)  # fmt: skip
    assert other.how == "distil"


@pytest.mark.parametrize(
    ("nearest", "rank", "rate"), [("weights", 3, 1e-9), ("space", 1, 1e-9), ("distil", 1, 1e-2)]
)
def test_auto_takes_the_way_with_the_least_divergence(nearest: str, rank: int, rate: float) -> None:
    """All three ways can be gone, and each is the nearest once: a truncation keeps three ranks of
    four or one, an imitation learns or hardly moves, and a space that was found from two solutions
    of both methods decodes the source to what a long imitation has found, or to noise."""
    model, tok, every = classifier(), tokenizer("bert"), texts(120)
    delta = moved(model, "lora(rank=4)")
    target, more = f"lora(rank={rank})", {"tokenizer": tok, "texts": every[:80]}

    def gone(how: Any, **more: Any) -> tuple[str, float, Tensor]:
        made = convert(delta.enable(), target, how, probe=every[80:], **more)
        assert made.after is not None and set(dt.deltas(model)) == {"delta", made.delta.name}
        found = made.how, made.after.divergence, made.delta.vector()
        made.delta.detach()
        return found

    _, _, best = gone("distil", settings=QUICK, **more)
    noise = torch.randn(2, len(best), generator=torch.Generator().manual_seed(0))
    own, wanted = delta.vector(), best if nearest == "space" else noise[0]
    pairs = {"delta": (own, torch.ones_like(own)), "small": (wanted, noise[1])}
    rows = {name: torch.stack(pair) for name, pair in pairs.items()}
    more |= {"space": principal(Solutions.of(("this", "other"), rows), 2)}
    more |= {"settings": dataclasses.replace(QUICK, learning_rate=rate)}
    apart = {how: gone(how, **more)[1] for how in ("weights", "space", "distil")}
    assert min(apart, key=lambda how: apart[how]) == nearest
    assert sorted(apart.values())[1] > 1.2 * apart[nearest]
    assert gone("auto", **more)[:2] == (nearest, pytest.approx(apart[nearest], rel=1e-3))


def test_through_a_subspace_it_is_the_other_decoding(tmp_path: Any) -> None:
    """Of methods with equally long vectors it is the one of the target's spec."""
    model, draw = backbone(), torch.Generator().manual_seed(0)
    specs = {
        "Keys": "lora(rank=2, where='attn.k')",
        "Queries": "lora(rank=2, where='attn.q')",
        "Values": "lora(rank=2, where='attn.v')",
    }
    starts, folders, rows = {}, {name: {} for name in specs}, {}
    codes = torch.randn(5, 2, generator=draw)
    for name, spec in specs.items():
        delta = dt.attach(model, spec, seed=0)
        first = delta.vector()
        starts[name] = delta.save(tmp_path / name)
        rows[name] = codes @ torch.randn(2, delta.layout.size, generator=draw)
        for i, row in enumerate(rows[name]):
            delta.load_vector(first + row)
            folders[name][f"t{i}"] = delta.save(tmp_path / f"{name} {i}")
        delta.detach()
    space = principal(Solutions.saved(folders, starts), 2)
    source = dt.load(folders["Keys"]["t3"], model, "Keys")
    made = convert(source, specs["Values"], "space", space=space)
    expected = dt.load(folders["Values"]["t3"], model, "expected").vector()
    torch.testing.assert_close(made.delta.vector(), expected, atol=1e-4, rtol=1e-4)
    made.delta.detach()
    source.enable().scale = 0.5
    blind = dataclasses.replace(space, deltas={})
    short = {**space.starts, "Keys": space.starts["Keys"][:-1]}
    for given, words in (
        (space, "at the scale 1 in the space and the source .* at 0.5"),
        (dataclasses.replace(space, starts=short), "`Keys` has .* in the space and the source"),
        (blind, "2 methods of the space"),
        (
            dataclasses.replace(space, starts={}, ups={"Bits": space.ups["Keys"]}),
            "is called `Keys`",
        ),
    ):
        with pytest.raises(ConversionError, match=words):
            convert(source.enable(), specs["Values"], "space", space=given)


def test_what_cannot_be_converted_says_why_and_changes_nothing() -> None:
    model, tok = classifier(), tokenizer("bert")
    delta = moved(model, "prefix(tokens=2)")
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        before = model(**ids).logits
    for how, more, words in (
        ("weights", {}, "weights: .*prefix"),
        ("space", {}, "no space was given"),
        ("distil", {}, "no texts to learn from"),
        ("auto", {}, "chooses by a probe and there is none"),
        ("distil", {"texts": ["a"]}, "need the model's tokenizer"),
        (
            "auto",
            {"probe": ["a"], "tokenizer": tok},
            "cannot be converted to .*weights: .*distil: ",
        ),
    ):
        with pytest.raises(ConversionError, match=words):
            convert(delta, "lora", how, **more)  # type: ignore[arg-type]
    bits = moved(model, "bitfit", name="bits")
    for target, words in (("phm", "has no closed form"), ("bitfit", "is no change of weights")):
        with pytest.raises(ConversionError, match=words):
            convert(bits, target, "weights")
    bits.detach()
    delta.enable()
    assert set(dt.deltas(model)) == {"delta"} and delta.enabled
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, before)


def test_auto_goes_on_where_one_way_cannot_be_gone_and_leaves_nothing_where_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tok, every = classifier(), tokenizer("bert"), texts(20)
    delta = moved(model, "lora(rank=4)")
    more: dict[str, Any] = {"tokenizer": tok, "texts": every[:10], "probe": every[10:]}

    def raising(error: BaseException) -> None:
        def train(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(module, "train", train)

    raising(TrainError("the loss is NaN"))
    made = convert(delta, "lora(rank=2)", **more)
    assert made.how == "weights" and set(dt.deltas(model)) == {"delta", "converted"}
    made.delta.detach()
    raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(delta.enable(), "lora(rank=2)", **more)
    assert set(dt.deltas(model)) == {"delta"} and delta.enabled
