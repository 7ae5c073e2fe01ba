"""Banks: members that come and go, each row of a batch with its own.

Oracle: the same member attached alone with `attach`, and the model without deltas.
"""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import deltune as dt
from deltune.errors import AttachError, StoreError
from rows import generated
from snapshots import distance
from zoo import ZOO, Case

MECHANISMS = [
    ("llama", "lora(rank=2, where='attn, ffn')"),
    ("bert", "loha(rank=2)"),
    ("bert", "adapter(width=3)"),
    ("llama", "prefix(tokens=2)"),
    ("bert", "prompt(tokens=2)"),
    ("llama", "ia3"),
    ("bert", "norms + bitfit"),
    ("llama", "fish(density=0.05)"),
    ("bert", "ladder(reduction=4, heads=2)"),
    ("bert", "gate(adapter(width=2) >> ia3, average(lora(rank=2), adapter(width=1)))"),
]
"""One of each mechanism, of those without factors, of operators; all of BERT's hold a head too."""
LLAMA = ZOO["llama"]


def saved(case: Case, text: str, folder: Path, count: int, scale: float = 0.1) -> dict[str, Path]:
    """Deltas away from their starts, saved; the scale of every second one is not 1."""
    model, found = case.build(0), {}
    for k in range(count):
        delta = dt.attach(model, text, name=f"m{k}", seed=k)
        draw = torch.Generator().manual_seed(k)
        delta.load_vector(delta.vector() + scale * torch.randn(delta.layout.size, generator=draw))
        for name, owner, own in delta.tree.kept:
            chosen = torch.randperm(5000, generator=draw)[: delta.tensors()[name].numel()]
            owner._buffers[own].copy_(chosen.sort().values)
        if k % 2 and all(unit.scalable for unit in delta.tree.units):
            delta.scale = 0.5 + k
        found[f"m{k}"] = delta.save(folder / f"m{k}")
        delta.detach()
    return found


@torch.no_grad()
def alone(case: Case, model: nn.Module, path: Path | None) -> Tensor:
    """The batch with one saved delta, or none."""
    delta = dt.load(path, model) if path else None
    found = case.run(model)
    if delta:
        delta.detach()
    return found


@torch.no_grad()
def routed(case: Case, model: nn.Module, rows: list[str | None]) -> Tensor:
    with dt.route(model, rows):
        return case.run(model)


def assert_rows(found: Tensor, rows: list[str | None], oracle: dict[str | None, Tensor]) -> None:
    expected = torch.stack([oracle[name][i] for i, name in enumerate(rows)])
    assert distance(found, expected) <= 1e-5
    assert not any(torch.equal(found[0], oracle[name][0]) for name in oracle if name != rows[0])


@pytest.mark.parametrize(("name", "text"), MECHANISMS)
def test_batches_over_more_members_than_slots_are_the_members_one_by_one(
    name: str, text: str, tmp_path: Path
) -> None:
    case = ZOO[name]
    paths = saved(case, text, tmp_path, 5)
    model = case.build(0)
    oracle = {None: alone(case, model, None)} | {n: alone(case, model, p) for n, p in paths.items()}
    keys = list(model.state_dict())
    bank = dt.Bank(model, text, capacity=4, folder=tmp_path)
    assert list(bank) == list(paths) and not bank.resident
    batches: list[list[str | None]] = [
        ["m0", "m2", None], ["m4", "m0", None], ["m1", "m3", "m0"], ["m2", "m2", "m1"],
    ]  # fmt: skip
    for rows in batches:
        assert_rows(routed(case, model, rows), rows, oracle)
        assert torch.equal(routed(case, model, [None] * 3), oracle[None])
    assert torch.equal(alone(case, model, None), oracle[None])
    bank.close()
    assert list(model.state_dict()) == keys and not hasattr(model, "deltas")


@pytest.mark.parametrize(("name", "text"), MECHANISMS)
def test_members_serve_in_inference_mode_and_out_of_it(
    name: str, text: str, tmp_path: Path
) -> None:
    case = ZOO[name]
    paths = saved(case, text, tmp_path, 3)
    model = case.build(0)
    oracle = {None: alone(case, model, None)} | {n: alone(case, model, p) for n, p in paths.items()}
    bank = dt.Bank(model, text, capacity=2, folder=tmp_path)
    for rows in (["m0", "m1", None], ["m2", "m1", "m2"], [None, "m2", "m0"]):
        with torch.inference_mode():
            assert_rows(routed(case, model, rows), rows, oracle)
        assert_rows(routed(case, model, rows), rows, oracle)
        with bank.route(rows):
            assert_rows(case.run(model).detach(), rows, oracle)


def vectors(bank: dt.Bank, count: int) -> list[Tensor]:
    size = dt.plan(bank.model, bank.spec).layout.size
    return [torch.randn(size, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def test_a_compiled_model_is_not_compiled_again_for_other_members() -> None:
    """Nor between blocks in which nothing acts, which a compiler would not notice by itself."""
    case = ZOO["torch-encoder"]
    model = case.build(0)
    bank = dt.Bank(model, "lora(rank=2, where='ffn') + adapter(width=3) + norms", capacity=3)
    for k, vector in enumerate(vectors(bank, 6)):
        bank.add(f"m{k}", 0.1 * vector)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, counts = torch.compile(model, backend=counter, fullgraph=True), []
    blocks = [["m0", None, "m1"], ["m2", None, "m3"], ["m1", None, "m5"], ["m4", None, "m0"]]
    for rows in blocks:
        with torch.no_grad():
            plain = case.run(model)
            assert torch.equal(case.run(compiled), plain)
            with bank.route(rows):
                expected = case.run(model)
                assert distance(case.run(compiled), expected) <= 1e-6
        assert distance(expected, plain) > 1e-4
        counts.append(counter.frame_count)
    assert counts == counts[:1] * len(blocks)


def test_the_least_recently_used_members_make_room_on_the_device_and_in_memory(
    tmp_path: Path,
) -> None:
    saved(LLAMA, "lora(rank=2)", tmp_path, 6)
    model = LLAMA.build(0)
    bank = dt.Bank(model, "lora(rank=2)", capacity=3, folder=tmp_path)
    one = bank.nbytes["member"]
    bank._library.memory = 2 * one
    for rows, resident, reads in (
        (["m0", "m1", "m2"], "m0 m1 m2", 3),
        (["m1", "m0", None], "m2 m1 m0", 3),  # on the device: not even read again
        (["m3", "m1", "m1"], "m0 m3 m1", 4),
        (["m4", "m5", None], "m1 m4 m5", 6),
        (["m4", None, "m2"], "m5 m4 m2", 7),
    ):
        routed(LLAMA, model, rows)
        assert bank.resident == resident.split() and bank._library.reads == reads
        assert bank.nbytes == {"device": 3 * one, "memory": 2 * one, "member": one}
    for rows, words in (
        (["m0", "m1", "m2", "m3"], "4 members of the bank, which has room for 3"),
        (["m0", "other", None], "`other`.*in a bank are `m0`"),
    ):
        with pytest.raises(AttachError, match=words), bank.route(rows):
            pass
        assert bank.resident == ["m5", "m4", "m2"]


def test_a_member_that_is_replaced_while_it_is_read_is_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = saved(LLAMA, "lora(rank=2)", tmp_path, 2)
    model = LLAMA.build(0)
    bank = dt.Bank(model, "lora(rank=2)")
    read = bank._form.from_folder

    def meanwhile(path: Path) -> Any:
        if path == paths["m0"]:
            bank.add("x", paths["m1"], replace=True)
        return read(path)

    monkeypatch.setattr(bank._form, "from_folder", meanwhile)
    bank.add("x", paths["m0"])
    assert distance(routed(LLAMA, model, ["x"] * 3), alone(LLAMA, model, paths["m1"])) <= 1e-5
    saved(LLAMA, "lora(rank=2)", tmp_path / "again", 2, scale=0.3)
    for file in ("delta.json", "delta.safetensors"):
        (paths["m1"] / file).write_bytes((tmp_path / "again" / "m1" / file).read_bytes())
    bank.add("x", paths["m1"], replace=True)
    assert distance(routed(LLAMA, model, ["x"] * 3), alone(LLAMA, model, paths["m1"])) <= 1e-5


def test_a_damaged_member_fails_alone_and_the_others_serve_on(tmp_path: Path) -> None:
    paths = saved(LLAMA, "lora(rank=2)", tmp_path, 6)
    model = LLAMA.build(0)
    oracle = {None: alone(LLAMA, model, None)}
    oracle |= {n: alone(LLAMA, model, p) for n, p in paths.items()}
    bank = dt.Bank(model, "lora(rank=2)", capacity=2, folder=tmp_path)
    whole = (paths["m1"] / "delta.safetensors").read_bytes()
    (paths["m1"] / "delta.safetensors").write_bytes(whole[:-5])
    about = json.loads((paths["m3"] / "delta.json").read_text())
    for name, change in (
        ("m3", {"backbone": about["backbone"] | {"weights": "of another"}}),
        ("m4", {"spec": dt.parse("lora(rank=3)").to_json()}),
        ("m5", {"head": False, "scale": "much"}),
    ):
        (paths[name] / "delta.json").write_text(json.dumps(about | change))
    first: list[str | None] = ["m0", "m2", None]
    assert_rows(routed(LLAMA, model, first), first, oracle)
    for name, words in (
        ("m1", "truncated"), ("m3", "another backbone"), ("m4", "the layout"), ("m5", "damaged"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=f"(?s)`{name}` cannot be used.*{words}"):
            routed(LLAMA, model, ["m0", name, None])
        assert bank.resident == ["m0", "m2"]
        assert_rows(routed(LLAMA, model, first), first, oracle)
    (paths["m1"] / "delta.safetensors").write_bytes(whole)
    again: list[str | None] = ["m1", "m2", "m1"]
    assert_rows(routed(LLAMA, model, again), again, oracle)


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ("lora(rank=2, alpha=6)", "lora(rank=5)"),
        ("lora(rank=2, scaling='root') + adapter(width=2)", "lora(rank=3) + adapter(width=4)"),
        ("dora(rank=2)", "dora(rank=4, alpha=4)"),
    ],
)
def test_smaller_forms_are_filled_up_and_others_are_refused(
    smaller: str, larger: str, tmp_path: Path
) -> None:
    paths = saved(LLAMA, smaller, tmp_path, 2)
    model = LLAMA.build(0)
    oracle = {None: alone(LLAMA, model, None)}
    oracle |= {n: alone(LLAMA, model, p) for n, p in paths.items()}
    bank = dt.Bank(model, larger, capacity=2, folder=tmp_path)
    rows: list[str | None] = ["m1", None, "m0"]
    assert_rows(routed(LLAMA, model, rows), rows, oracle)
    bank.close()
    other = dt.Bank(model, smaller.replace("rank=2", "rank=1"), capacity=2)
    other.add("large", paths["m0"])
    with pytest.raises(StoreError, match=r"`large` cannot be used.*members fit whose effect"):
        routed(LLAMA, model, ["large", None, None])


def test_a_bank_changes_while_it_serves_other_threads_too() -> None:
    """Rows go on with what they began with; the next block has what is new."""
    model = LLAMA.build(0)
    delta = dt.attach(model, "lora(rank=2)", name="attached", seed=0)
    bank = dt.Bank(model, "lora(rank=2)", capacity=2)
    given = [0.1 * vector for vector in vectors(bank, 12)]
    oracle = []
    for vector in given:
        delta.load_vector(vector)
        with torch.no_grad():
            oracle.append(LLAMA.run(model))
    bank.add("a", given[0])
    with pytest.raises(AttachError, match="has a member `a`"):
        bank.add("a", given[1])
    with bank.route(["a", "attached", None]), torch.no_grad():
        before = LLAMA.run(model)
        assert distance(before[0], oracle[0][0]) <= 1e-5
        assert distance(before[1], oracle[-1][1]) <= 1e-5
        bank.add("a", given[1], replace=True)
        assert torch.equal(LLAMA.run(model), before)
        with pytest.raises(AttachError, match="serve a batch"):
            bank.close()
    assert distance(routed(LLAMA, model, ["a", None, None])[0], oracle[1][0]) <= 1e-5
    bank.remove("a")
    with pytest.raises(AttachError, match="names the delta `a`"):
        routed(LLAMA, model, ["a", None, None])

    def write() -> None:
        for turn in range(200):
            k = turn % 12
            bank.add(f"w{k}", given[k], replace=True)
            bank.fetch(f"w{k}")
            if turn > 100 and k % 2:
                bank.remove(f"w{k}")

    bank.add("b", delta)
    writers = [threading.Thread(target=write, daemon=True)]
    writers[0].start()
    for turn in range(12):
        bank.add("c", given[turn % 12], replace=True)
        found = routed(LLAMA, model, ["c", None, "b"])
        assert distance(found[0], oracle[turn % 12][0]) <= 1e-5
        assert distance(found[2], oracle[-1][2]) <= 1e-5
    writers[0].join()
    assert sorted(bank) == ["b", "c", *sorted(f"w{k}" for k in range(0, 12, 2))]
    bank.add("attached", given[0])
    with pytest.raises(AttachError, match="`attached`, which is the name of 2"):
        routed(LLAMA, model, ["attached", None, None])


def test_a_moved_or_copied_model_and_generation(tmp_path: Path) -> None:
    paths = saved(LLAMA, "prefix(tokens=2)", tmp_path, 3, scale=2.0)
    model = LLAMA.build(0)
    bank = dt.Bank(model, "prefix(tokens=2)", capacity=2, folder=tmp_path)
    routed(LLAMA, model, ["m0", "m1", "m0"])
    bank.add("extra", vectors(bank, 1)[0])
    model.double()
    other = copy.deepcopy(model)
    rows: list[str | None] = ["m2", "m0", "m2"]
    with bank.route(rows):
        made = generated(model, LLAMA.prompt(0))
    for i, name in enumerate(rows):
        delta = dt.load(paths[str(name)], other)
        assert torch.equal(made[i], generated(other, LLAMA.prompt(0))[i])
        delta.detach()
    assert routed(LLAMA, model, ["extra", None, None]).dtype == torch.float64
    with pytest.raises(AttachError, match="names the delta `extra`"):
        routed(LLAMA, other, ["extra", None, None])


def test_a_prompt_in_a_cache_is_that_of_its_member() -> None:
    model = LLAMA.build(0)
    bank = dt.Bank(model, "prompt(tokens=2)", capacity=1)
    for k, vector in enumerate(vectors(bank, 2)):
        bank.add(f"m{k}", vector)
    known = [bank.seat([name])[0].units[0].identity for name in ("m0", "m1", "m0")]
    bank.rise()
    assert known[0] == known[2] != known[1]


def test_what_is_no_member_is_refused_by_name(tmp_path: Path) -> None:
    model = LLAMA.build(0)
    bank = dt.Bank(model, "fish(density=0.05)", head=True)
    (size,) = (dt.plan(model, bank.spec).layout.size,)
    for source, kind, words in (
        (torch.zeros(size), AttachError, "no part of its vector"),
        ({"x": torch.zeros(2)}, AttachError, "`.*` has shape"),
        (tmp_path / "none", StoreError, "there is no folder"),
        (tmp_path, StoreError, "holds no delta"),
        (3, AttachError, "`m` is a int; a member is"),
    ):
        with pytest.raises(kind, match=words):
            bank.add("m", source)
    with pytest.raises(AttachError, match="capacity is 0"):
        dt.Bank(model, "lora", capacity=0)
    with pytest.raises(StoreError, match="there is no folder"):
        dt.Bank(model, "lora", folder=tmp_path / "none")
    lora = dt.Bank(model, "lora(rank=2)")
    with pytest.raises(AttachError, match="the vector has shape"):
        lora.add("m", torch.zeros(5))
    with pytest.raises(AttachError, match="no member `m`"):
        lora.remove("m")
    assert not len(bank) and not len(lora)
