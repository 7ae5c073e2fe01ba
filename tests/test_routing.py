"""Routing: each row of a batch with its own deltas.

Oracle: the same batch with one of the deltas enabled and all others not, of which the rows are
taken that it was named for.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import AttachError, SpecError, WhereError
from methods import METHODS, Method
from rows import generated
from test_laws import pairs_of_kinds, values
from zoo import ZOO, Case


def two(case: Case, text: str, other: str = "") -> nn.Module:
    """A model with the deltas `a` and `b`, away from their starts."""
    model = case.build(0)
    for seed, name in enumerate("ab"):
        spec = other if other and name == "b" else text
        delta = dt.attach(model, spec, name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed + 5)
        noise = torch.randn(delta.layout.size, generator=draw)
        delta.load_vector(delta.vector() + 0.1 * noise)
    return model


def alone(case: Case, model: nn.Module, names: list[str | None], seed: int = 0) -> Tensor:
    """The rows of the batch, each from a run in which its deltas alone act."""
    found: list[Tensor] = []
    for i, name in enumerate(names):
        for other, delta in dt.deltas(model).items():
            delta.enable() if other == name else delta.disable()
        found.append(values(case, model, seed)[i : i + 1])
    for delta in dt.deltas(model).values():
        delta.enable()
    return torch.cat(found)


def assert_near(ours: Tensor, oracle: Tensor, bound: float = 1e-5) -> None:
    assert ours.shape == oracle.shape
    assert (ours - oracle).abs().max() <= bound * oracle.abs().max().clamp(min=1)


def real(case: Case, found: Tensor, seed: int = 0) -> Tensor:
    """The outputs, 0 where the input is padding: what is computed there means nothing."""
    batch = case.batch(seed)
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is None or found.ndim < 3 or found.shape[:2] != mask.shape:
        return found
    return found * mask[..., None]


UNROUTED = {
    "deberta-v2": "belongs to no row",  # maps relative positions by query and key
    "t5": "belongs to no row",  # the table of relative positions
    "t5-gated": "belongs to no row",
    "clip": "depends on all rows",
    "bart": "one number for all rows",
    "marian": "one number for all rows",
    "opt": "one number for all rows",
}
"""Where a method may change what no row of a batch has of its own."""


def embeds(case: Case) -> Case:
    """Of a model that compares all rows: the rows before they are compared."""
    if case.family != "dual":
        return case
    return replace(case, output=lambda out: torch.stack([out.text_embeds, out.image_embeds], 1))


@pairs_of_kinds
def test_each_row_has_its_own_delta(case: Case, method: Method) -> None:
    case = embeds(case)
    model = two(case, method.text)
    rows: list[str | None] = ["b", None, "a"][: len(next(iter(case.batch(0).values())))]
    try:
        try:
            with dt.route(model, rows):
                found = values(case, model)
        except AttachError as error:
            if "positions by itself" not in str(error):
                raise
            rows = ["b", "a", "a"]  # a row without a prompt would have other positions
            with dt.route(model, rows):
                found = values(case, model)
    except AttachError as error:
        assert case.name in UNROUTED and UNROUTED[case.name] in str(error)
        assert all(unit.lane is None for d in dt.deltas(model).values() for unit in d.tree.units)
        return
    oracle = alone(case, model, rows)
    assert_near(real(case, found), real(case, oracle))
    others = [alone(case, model, [name] * len(rows)) for name in (None, "a", "b")]
    assert torch.equal(others[0], others[1]) or not any(torch.equal(oracle, o) for o in others)


ROWS = 32
MANY = ["bert", "gpt2", "llama", "t5", "mixtral"]


def large(case: Case, tokens: int = 5) -> dict[str, Tensor]:
    """A batch of 32 rows, padded on the right."""
    small = case.batch(0)
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(min(2, tokens), tokens + 1, (ROWS,), generator=draw)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(4, 60, (ROWS, tokens), generator=draw) * mask
    batch = {"input_ids": ids, "attention_mask": mask}
    if "decoder_input_ids" in small:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return batch


def outputs(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return case.output(model(**batch))


@pytest.mark.parametrize("order", ["sorted", "mixed"])
@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize("name", MANY)
def test_thirty_two_rows_over_eight_loras_in_training(name: str, tokens: int, order: str) -> None:
    """Ranks and scales differ; outputs and gradients are those of the deltas one by one."""
    case = ZOO[name]
    model = case.build(0)
    for k in range(8):
        where = "attn.q, attn.v, ffn" if name not in ("mixtral", "gpt2") else "attn"
        delta = dt.attach(model, f"lora(rank={1 + k % 3}, where='{where}')", name=f"{k}", seed=k)
        draw = torch.Generator().manual_seed(k)
        delta.load_vector(0.1 * torch.randn(delta.layout.size, generator=draw))
        delta.scale = 0.5 + k / 8
    batch = large(case, tokens)
    draw = torch.Generator().manual_seed(9)
    rows: list[str | None] = [str(k) for k in range(8) for _ in range(4)]
    if order == "mixed":
        rows = [rows[i] for i in torch.randperm(ROWS, generator=draw)]
        rows[3] = rows[17] = None
    found, oracle = {}, torch.zeros(0)
    for mode in ("routed", "alone"):
        model.zero_grad()
        if mode == "routed":
            with dt.route(model, rows):
                made = outputs(case, model, batch)
                with torch.no_grad():
                    again = outputs(case, model, batch)
                    assert_near(again, made.detach())
                    assert_near(outputs(case, model, batch), again)
            oracle = made.detach()
            made.square().sum().backward()
        else:
            pieces = []
            for i, name_ in enumerate(rows):
                for other, delta in dt.deltas(model).items():
                    delta.enable() if other == name_ else delta.disable()
                row = outputs(case, model, batch)[i : i + 1]
                pieces.append(row.detach())
                if name_ is not None:
                    row.square().sum().backward()
            assert_near(oracle, torch.cat(pieces))
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found[mode] = torch.cat([g.flatten() for g in grads.values() if g is not None])
    assert_near(found["routed"], found["alone"])


def eight(method: Method) -> tuple[Case, nn.Module]:
    """Eight deltas of a method, away from their starts, on the first of the models that takes it
    and can tell its rows apart."""
    for name in MANY:
        case = ZOO[name]
        model = case.build(0)
        try:
            for k in range(8):
                delta = dt.attach(model, method.text, name=f"{k}", seed=k)
                draw = torch.Generator().manual_seed(k + 5)
                delta.load_vector(
                    delta.vector() + 0.1 * torch.randn(delta.layout.size, generator=draw)
                )
            with dt.route(model, ["0"] * ROWS), torch.no_grad():
                outputs(case, model, large(case))
        except (AttachError, SpecError, WhereError) as error:
            refused = error
        else:
            return case, model
    raise refused


@pytest.mark.parametrize("name", METHODS)
def test_thirty_two_rows_over_eight_deltas_of_each_method(name: str) -> None:
    case, model = eight(METHODS[name])
    batch = large(case)
    draw = torch.Generator().manual_seed(9)
    rows: list[str | None] = [str(int(k)) for k in torch.randint(8, (ROWS,), generator=draw)]
    rows[3] = rows[17] = None
    with torch.no_grad():
        try:
            with dt.route(model, rows):
                found = outputs(case, model, batch)
        except AttachError as error:
            assert "positions by itself" in str(error)  # a row without a prompt would have others
            rows[3] = rows[17] = "5"
            with dt.route(model, rows):
                found = outputs(case, model, batch)
        pieces = []
        for i, row in enumerate(rows):
            for other, delta in dt.deltas(model).items():
                delta.enable() if other == row else delta.disable()
            pieces.append(outputs(case, model, batch)[i : i + 1])
    oracle, mask = torch.cat(pieces), torch.ones(())
    if found.ndim == 3:  # states: what stands at padding means nothing
        mask = batch["attention_mask"][..., None]
    assert_near(found * mask, oracle * mask)
    assert len(oracle.flatten(1).unique(dim=0)) > 8


def test_methods_of_all_kinds_in_one_batch() -> None:
    specs = {
        "lora": "lora(rank=2)", "adapter": "adapter(width=3)", "prompt": "prompt(tokens=3)",
        "prefix": "prefix(tokens=2)", "longer": "prefix(tokens=4)", "bitfit": "bitfit",
        "full": "full", "short": "prompt(tokens=1)", "loha": "loha(rank=2)",
        "both": "lora(rank=3, where='ffn') + prefix(tokens=1) + norms",
    }  # fmt: skip
    case = ZOO["bert"]
    model = case.build(0)
    for seed, (name, text) in enumerate(specs.items()):
        delta = dt.attach(model, text, name=name, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        delta.load_vector(delta.vector() + 0.1 * torch.randn(delta.layout.size, generator=draw))
    names = [*specs, None, "lora"]
    batch = {n: t[: len(names)] for n, t in large(case).items()}
    with dt.route(model, names), torch.no_grad():
        found = outputs(case, model, batch)
    for i, name in enumerate(names):
        for other, delta in dt.deltas(model).items():
            delta.enable() if other == name else delta.disable()
        with torch.no_grad():
            assert_near(found[i], outputs(case, model, batch)[i])


def test_a_row_may_have_several_deltas() -> None:
    case = ZOO["bert"]
    model = two(case, "lora(rank=2)", "adapter(width=3)")
    with dt.route(model, [("a", "b"), "a", ()]), torch.no_grad():
        found = case.run(model)
    oracle = values(case, model)
    assert_near(found[0], oracle[0])
    assert_near(found[1:], alone(case, model, [None, "a", None])[1:])


@pytest.mark.parametrize("spec", ["lora(rank=2)", "prompt(tokens=2)", "prefix(tokens=2)", "norms"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generated_tokens_are_those_of_each_row_s_delta(name: str, beams: int, spec: str) -> None:
    case = ZOO[name]
    model = two(case, spec)
    for delta in dt.deltas(model).values():
        delta.load_vector(delta.vector() * 5)
    rows = ["b", None, "a"]
    with dt.route(model, rows):
        found = generated(model, case.prompt(0), num_beams=beams)
    for i, name_ in enumerate(rows):
        for other, delta in dt.deltas(model).items():
            delta.enable() if other == name_ else delta.disable()
        assert torch.equal(found[i], generated(model, case.prompt(0), num_beams=beams)[i])


@pytest.mark.parametrize("spec", ["lora(rank=2)", "vera(rank=4)", "vblora(rank=2, length=4)"])
def test_what_is_written_inside_the_block_acts(spec: str) -> None:
    case = ZOO["bert"]
    model = two(case, spec)
    names: list[str | None] = ["a", "b", "a"]
    written = dt.deltas(model)["b"].parameters()
    found = []
    with dt.route(model, names), torch.no_grad():
        case.run(model)
        for parameter in written:
            parameter.mul_(2)
            found.append(case.run(model))
    with torch.no_grad():
        for parameter in reversed(written):
            assert_near(found.pop(), alone(case, model, names))
            parameter.div_(2)


def test_what_is_written_in_inference_mode_acts() -> None:
    """To deltas made in it too, whose tensors do not count how often they are written."""
    case = ZOO["llama"]
    names: list[str | None] = ["a", "b", None]
    for inside in (False, True):
        with torch.inference_mode(inside):
            model = two(case, "lora(rank=2)")
        with torch.inference_mode():
            for _ in range(2):
                with dt.route(model, names):
                    before = case.run(model)
                    for parameter in dt.deltas(model)["b"].parameters():
                        parameter.mul_(2)
                    after = case.run(model)
                assert (after - before).abs().max() > 1e-3
                assert_near(after, alone(case, model, names))


def test_gradient_checkpointing_inside_the_block_changes_nothing() -> None:
    case = ZOO["llama"]
    model = two(case, "lora(rank=2) + adapter(width=3)").train()
    found = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with dt.route(model, ["a", "b", None]):
            case.run(model).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert_near(found[1], found[0])


def test_what_cannot_be_routed_says_so_and_nothing_is_left() -> None:
    case = ZOO["bert"]
    model = two(case, "lora(rank=2)")
    deltas = dt.deltas(model)
    deltas["b"].disable()
    before = values(case, model)
    for rows, words in (
        (["a", "c", None], "row 1 names the delta `c`"),
        ([], "no row is named"),
        (["a", None], "2 rows were named and 3 come in"),
    ):
        with pytest.raises(AttachError, match=words), dt.route(model, rows):
            values(case, model)
        assert torch.equal(values(case, model), before) and not deltas["b"].enabled
    with dt.route(model, ["a"] * 3):
        with pytest.raises(AttachError, match="routed already"), dt.route(model, ["b"] * 3):
            pass
        dt.attach(model, "norms", name="later")
    assert [d.enabled for d in dt.deltas(model).values()] == [True, False, True]
    dt.deltas(model)["later"].detach()
    deltas["a"].merge()
    with pytest.raises(AttachError, match="`a`, which is merged"), dt.route(model, ["a"] * 3):
        pass
    with pytest.raises(AttachError, match="batch_first=False"):
        plain = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
        dt.attach(plain, "lora(rank=2, where='0.linear1')", name="a")
        with dt.route(plain, ["a"]):
            pass
