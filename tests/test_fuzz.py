"""Damaged files, at random: a load is whole or refused, ends, and touches nothing else.

No oracle but the rules themselves: only `DeltuneError`, no delta left behind, the backbone as it
was, and no file written.
"""

import copy
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
from deltune.errors import DeltuneError
from deltune.exchange.adapterhub.checkpoint import load_adapterhub
from deltune.exchange.opendelta import load_opendelta
from deltune.exchange.peft.checkpoint import load_peft, save_peft
from deltune.merging import merge
from test_exchange_others import (
    BERT,
    BOTTLENECK,
    DYNAMIC,
    bottleneck,
    drawn,
    opened,
    write,
    write_setup,
)
from zoo import HIDDEN, ZOO

CASES = 800
MANY = 12_000
TRICKS = (
    "../../x",
    "/etc/passwd",
    "..",
    "a/../b",
    "\x00",
    "",
    ".",
    "lora_A",
    "é" * 300,
    "a" * 70_000,
)
WEIRD = (None, True, -1, 0, 10**30, 1e400, "", "x", [], [[]], {}, {"": {}}, "\ud800")


def flip(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        at = draw.randrange(min(len(found), draw.choice((8, 200, len(found)))))
        found[at] ^= 1 << draw.randrange(8)
    return bytes(found)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))] + draw.randbytes(draw.choice((0, 0, 9)))


def header(data: bytes, draw: random.Random) -> bytes:
    """A changed header of a safetensors file: its length, or an entry."""
    size = struct.unpack("<Q", data[:8])[0]
    kind = draw.choice(("length", "name", "dtype", "shape", "offsets", "swap"))
    if kind == "length":
        return struct.pack("<Q", draw.choice((0, 1, size * 2, 2**40, 2**63, 2**64 - 1))) + data[8:]
    table = json.loads(data[8 : 8 + size])
    names = [name for name in table if name != "__metadata__"]
    one, two = draw.choice(names), draw.choice(names)
    if kind == "name":
        table[draw.choice(TRICKS)] = table.pop(one)
    elif kind == "dtype":
        table[one]["dtype"] = draw.choice(("F64", "I64", "BOOL", "F8_E5M2", "X", "BF16", "U8"))
    elif kind == "shape":
        table[one]["shape"] = draw.choice(([], [0], [2**62, 2**62], [-1], [1, 1, 1], "x"))
    elif kind == "offsets":
        table[one]["data_offsets"] = draw.choice(
            ([0, 2**63], [9, 1], [0], [-4, 4], table[two]["data_offsets"])
        )
    else:
        table[one], table[two] = table[two], table[one]
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def said(data: bytes, draw: random.Random) -> bytes:
    """A JSON file with another value, key or shape."""
    table: Any = json.loads(data)
    for _ in range(draw.choice((1, 2))):
        where = table
        while isinstance(where, dict) and where:
            key = draw.choice(sorted(where))
            if isinstance(where[key], dict) and where[key] and draw.random() < 0.5:
                where = where[key]
                continue
            kind = draw.random()
            if kind < 0.6:
                where[key] = copy.deepcopy(draw.choice(WEIRD))
            elif kind < 0.8:
                where[draw.choice(TRICKS)] = where.pop(key)
            else:
                del where[key]
            break
    return json.dumps(table).encode()


OWN = {".safetensors": [header], ".json": [said]}


def trial(folder: Path, load: Callable[[Path, Any], Any], count: int, seed: int) -> tuple[int, int]:
    """How many damaged copies of a folder were loaded, and how many refused."""
    draw, model = random.Random(seed), ZOO["bert"].build(0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    loaded = refused = 0
    for _ in range(count):
        path = draw.choice(list(files))
        ways = [flip, cut, *OWN.get(path.suffix, [])]
        path.write_bytes(draw.choice(ways)(files[path], draw))
        try:
            delta = load(folder, model)
        except DeltuneError:
            refused += 1
        else:
            loaded += 1
            assert all(t.isfinite().all() for t in delta.tensors().values())
            delta.detach()
        path.write_bytes(files[path])
        assert not dt.deltas(model) and "deltas" not in model._modules
    assert {path for path in folder.rglob("*") if path.is_file()} == set(files)
    assert len(list(folder.parent.iterdir())) == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    return loaded, refused


def native(folder: Path, model: Any) -> Any:
    return dt.load(folder, model, force=True)


def merged(folder: Path, model: Any) -> Any:
    """The delta, merged with itself without its model, on the model."""
    found = merge([folder, folder], weights=[0.5, 0.5])
    with tempfile.TemporaryDirectory() as aside:
        return dt.load(found.save(Path(aside, "sum")), model, force=True)


def of_adapterhub(folder: Path) -> None:
    places = [f"{BERT.format(layer)}.output" for layer in range(2)]
    tensors = {n: t for at, place in enumerate(places) for n, t in bottleneck(place, at).items()}
    write(folder, BOTTLENECK, tensors)


def of_fusion(folder: Path) -> None:
    folder.mkdir(parents=True)
    write_setup(folder, BOTTLENECK, DYNAMIC, [f"{BERT.format(0)}.output"])


def of_opendelta(folder: Path) -> None:
    place = f"{BERT.format(0)}.attention.self.query.lora.lora_"
    tensors = {f"{place}A": drawn(1, 3, HIDDEN), f"{place}B": drawn(2, HIDDEN, 3)}
    config = {"delta_type": "lora", "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0}
    opened(folder, config, tensors)


def of_ours(folder: Path) -> None:
    dt.attach(ZOO["bert"].build(0), "lora(rank=2, where='attn.q, ffn')").save(folder)


def of_peft(folder: Path) -> None:
    save_peft(dt.attach(ZOO["bert"].build(0), "lora(rank=2, where='attn.q, ffn')"), folder)


KINDS = {
    "native": (of_ours, native), "peft": (of_peft, load_peft), "merged": (of_ours, merged),
    "adapterhub": (of_adapterhub, load_adapterhub), "opendelta": (of_opendelta, load_opendelta),
    "fusion": (of_fusion, load_adapterhub),
}  # fmt: skip


@pytest.mark.parametrize(
    "count", [CASES, pytest.param(MANY, marks=pytest.mark.thorough)], ids=["some", "many"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_loaded_whole_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    folder, (make, load) = tmp_path / "inside" / "folder", KINDS[kind]
    make(folder)
    loaded, refused = trial(folder, load, count, seed=list(KINDS).index(kind) + 1)
    assert loaded > count // 50 and refused > count // 4  # both happen
