"""Damaged files, at random: a load is whole or refused, ends, and touches nothing else.

No oracle but the rules themselves: only `DeltuneError`, no delta left behind, the backbone as it
was, no file written, within seconds and a bounded memory.
"""

import copy
import json
import random
import resource
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

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
    FORMS,
    STATIC,
    bottleneck,
    compacter,
    drawn,
    low_rank,
    opened,
    write,
    write_setup,
)
from zoo import HIDDEN, ZOO

CASES = 800
MANY = 12_000
SECONDS = 20
"""What a case may take; one takes some hundredths of a second where nothing else runs."""
MORE = 3 * 2**30
"""Bytes that a case may ask for, beyond what there is."""
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
WEIRD = (
    None, True, -1, 0, 10**9, 2**31, 10**12, 2**63, 10**30, 10**400, 1e400, "", "x", "adapters.².0",
    "9" * 5000, [], [[]], [2**31], {}, {"": {}}, "\ud800",
)  # fmt: skip


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
    kind = draw.choice(("length", "name", "dtype", "shape", "flat", "offsets", "swap", "gone"))
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
    elif kind == "flat":  # as many values in another shape, which the reader of the file takes
        total = (table[one]["data_offsets"][1] - table[one]["data_offsets"][0]) // 4
        table[one]["shape"] = draw.choice(([total], [total, 1], [1, total], [1, total, 1]))
    elif kind == "offsets":
        table[one]["data_offsets"] = draw.choice(
            ([0, 2**63], [9, 1], [0], [-4, 4], table[two]["data_offsets"])
        )
    elif kind == "gone":  # the last in the file, with its values
        last = max(names, key=lambda name: table[name]["data_offsets"][1])
        data = data[: 8 + size + table.pop(last)["data_offsets"][0]]
    else:
        table[one], table[two] = table[two], table[one]
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def said(data: bytes, draw: random.Random) -> bytes:
    """A JSON file with another value, key or shape."""
    table: Any = json.loads(data)
    for _ in range(draw.choice((1, 2))):
        where = table
        while isinstance(where, dict | list) and where:
            key: Any = (
                draw.choice(sorted(where))
                if isinstance(where, dict)
                else draw.randrange(len(where))
            )
            if isinstance(where[key], dict | list) and where[key] and draw.random() < 0.7:
                where = where[key]
                continue
            kind = draw.random()
            if kind < 0.6:
                where[key] = copy.deepcopy(draw.choice(WEIRD))
            elif kind < 0.8 and isinstance(where, dict):
                where[draw.choice(TRICKS)] = where.pop(key)
            else:
                del where[key]
            break
    return json.dumps(table).encode()


OWN = {".safetensors": [header, header], ".json": [said, said]}


class Hang(BaseException):
    """A case that does not end; no `except Exception` takes it."""


def _ring(number: int, frame: Any) -> None:
    raise Hang(f"a case took more than {SECONDS} s")


@contextmanager
def bounded() -> Iterator[None]:
    """A bound on the memory that cases may ask for; a case that asks for more fails.

    Seconds are counted anew by `signal.setitimer` in each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if pages.is_file():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        most = now + MORE if hard == resource.RLIM_INFINITY else min(now + MORE, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    before = signal.signal(signal.SIGALRM, _ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tree(root: Path, without: Path) -> dict[Path, bytes | None]:
    """All that lies below a folder, outside of another: files with what they hold."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
        if path != without and without not in path.parents
    }


class Kind(NamedTuple):
    """What is damaged: a folder of each form, how it is loaded, and the model that it is of."""

    make: Callable[[Path], None]
    load: Callable[[Path, Any], Any]
    arch: str = "bert"


def trial(folder: Path, kind: Kind, count: int, seed: str) -> tuple[int, int]:
    """How many damaged copies of a folder were loaded, and how many refused."""
    draw, case = random.Random(seed), ZOO[kind.arch]
    model = case.build(0)
    kind.load(folder, model).detach()
    before = {name: p.clone() for name, p in model.named_parameters()}
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    loaded = refused = 0
    for _ in range(count):
        path = draw.choice(list(files))
        way = draw.choice([flip, cut, *OWN.get(path.suffix, [])])
        path.write_bytes(way(files[path], draw))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            delta = kind.load(folder, model)
        except DeltuneError:
            refused += 1
        else:
            loaded += 1
            assert all(t.isfinite().all() for t in delta.tensors().values())
            if way is said:
                ends(case, model)
            delta.detach()
        signal.setitimer(signal.ITIMER_REAL, 0)
        path.write_bytes(files[path])
        assert not dt.deltas(model) and "deltas" not in model._modules
    assert {path for path in folder.rglob("*") if path.is_file()} == set(files)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    return loaded, refused


def ends(case: Any, model: Any) -> None:
    """A forward, which ends, too; a delta that does not act on this batch may say so."""
    try:
        with torch.no_grad():
            case.run(model)
    except DeltuneError:
        pass


def native(folder: Path, model: Any) -> Any:
    return dt.load(folder, model, force=True)


def merged(folder: Path, model: Any) -> Any:
    """The delta, merged with itself on the shelf, on the model."""
    found = merge([folder, folder], weights=[0.5, 0.5], model=model)
    with tempfile.TemporaryDirectory() as aside:
        return dt.load(found.save(Path(aside, "sum")), model, force=True)


def attached(text: str, arch: str = "bert") -> dt.Delta:
    """A delta without a head, away from its start."""
    delta = dt.attach(ZOO[arch].build(0), text, head=False, seed=0)
    noise = torch.randn(delta.layout.size, generator=torch.Generator().manual_seed(1))
    return delta.load_vector(delta.vector() + 0.1 * noise)


def ours(text: str, folder: Path) -> None:
    attached(text).save(folder)


def of_peft(text: str, arch: str, folder: Path) -> None:
    save_peft(attached(text, arch), folder)


def of_adapterhub(form: str, folder: Path) -> None:
    config, make = FORMS[form]
    write(folder, config, make(), version="adapters.1.3.0")


def of_fusion(fused: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    write_setup(folder, BOTTLENECK, fused, [f"{BERT.format(0)}.output"])


def pickled(make: Callable[[Path], None], name: str, folder: Path) -> None:
    """A folder with its tensors in the other form that its library writes."""
    make(folder)
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / name)
    file.unlink()


def of_opendelta(kind: str, folder: Path) -> None:
    place, out = f"{BERT.format(0)}.attention.self.query", f"{BERT.format(1)}.output.dense"
    names = {
        f"{out}.adapter.modulelist.{ours}": theirs
        for ours, theirs in zip(
            ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"),
            bottleneck(out, 3).values(),
            strict=True,
        )
    }
    config, tensors = {
        "lora": (
            {"lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0},
            {f"{place}.lora.lora_A": drawn(1, 3, HIDDEN),
             f"{place}.lora.lora_B": drawn(2, HIDDEN, 3)},
        ),
        "adapter": ({"bottleneck_dim": 4, "non_linearity": "gelu_new"}, names),
        "bitfit": ({}, {f"{place}.bias": drawn(4, HIDDEN)}),
        "compacter": ({"hypercomplex_division": 2, "reduction_factor": 4},
                      compacter(out, HIDDEN, HIDDEN // 4)),
        "low_rank_adapter": ({"reduction_factor": 4}, low_rank(out, HIDDEN, HIDDEN // 4)),
    }[kind]  # fmt: skip
    opened(folder, {"delta_type": kind, **config}, tensors)


SPECS = {
    "lora": "lora(rank=2, where='attn.q, ffn')", "boft": "boft(block=2, factors=2)",
    "oft": "oft(block=4)", "fuse": "fuse(adapter(width=3), adapter(width=2))",
    "gate": "gate(lora(rank=2), lora(rank=3))", "steps": "adapter(width=3) >> adapter(width=2)",
    "sum": "prefix(tokens=3) + bitfit", "tokens": "tokens(ids=(4, 5))",
    "sparse": "sparse(count=50)", "intrinsic": "intrinsic(dimension=90)",
    "vera": "vera(rank=3)", "fourierft": "fourierft(frequencies=20)", "c3a": "c3a(block=8)",
    "mpo": "mpo(cores=3)", "masking": "masking(skip=0)",
}  # fmt: skip
SUMS = ("lora", "boft", "oft", "tokens", "sparse", "intrinsic")
"""Specs that have sums."""
PEFTS = {
    "lora": "lora(rank=2, where='attn.q, ffn')", "adalora": "adalora(rank=4, target=2)",
    "oft": "oft(block=4)", "boft": "boft(block=4)", "ia3": "ia3", "vera": "vera(rank=3)",
    "randlora": "randlora(rank=3)", "fourierft": "fourierft(frequencies=20)", "c3a": "c3a(block=8)",
    "vblora": "vblora(rank=2, vectors=5, length=8)", "lokr": "lokr(rank=2)", "norms": "norms",
    "tokens": "tokens(ids=(4, 5))", "dora": "dora(rank=2)", "miss": "miss(rank=4)",
}  # fmt: skip
KINDS: dict[str, dict[str, Kind]] = {
    "native": {name: Kind(partial(ours, text), native) for name, text in SPECS.items()},
    "peft": {
        name: Kind(partial(of_peft, text, "bert"), load_peft) for name, text in PEFTS.items()
    } | {
        name: Kind(partial(of_peft, text, "gpt2"), load_peft, "gpt2")
        for name, text in (("prompt", "prompt(tokens=3)"),
                           ("prefix", "prefix(tokens=3, positions='shift')"))
    } | {
        "pickled": Kind(partial(pickled, partial(of_peft, PEFTS["lora"], "bert"),
                                "adapter_model.bin"), load_peft)
    },
    "merged": {name: Kind(partial(ours, SPECS[name]), merged) for name in SUMS},
    "adapterhub": {name: Kind(partial(of_adapterhub, name), load_adapterhub) for name in FORMS}
    | {"pickled": Kind(partial(pickled, partial(of_adapterhub, "plain"), "pytorch_adapter.bin"),
                       load_adapterhub)},
    "opendelta": {
        name: Kind(partial(of_opendelta, name), load_opendelta)
        for name in ("lora", "adapter", "bitfit", "compacter", "low_rank_adapter")
    },
    "fusion": {
        name: Kind(partial(of_fusion, fused), load_adapterhub)
        for name, fused in (("dynamic", DYNAMIC), ("static", STATIC))
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "count", [CASES, pytest.param(MANY, marks=pytest.mark.thorough)], ids=["some", "many"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_loaded_whole_or_refused(
    kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases of a kind are spread over its forms. Paths in files lead out of a folder's folder,
    where others lie, or are taken from where a program runs."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "x").write_text("of another")
    monkeypatch.chdir(here)
    forms, found = KINDS[kind], {}
    for form, one in forms.items():
        folder = tmp_path / "deep" / "inside" / form / "folder"
        one.make(folder)
        (folder.parent / "x").write_text("of another")
        outside = tree(tmp_path, folder)
        with bounded():
            found[form] = trial(folder, one, count // len(forms), f"{kind} {form}")
        assert tree(tmp_path, folder) == outside
    loaded, refused = (sum(counts) for counts in zip(*found.values(), strict=True))
    print({form: dict(zip(("loaded", "refused"), n, strict=True)) for form, n in found.items()})
    assert loaded > count // 50 and refused > count // 4  # both happen
    assert all(min(counts) for counts in found.values()), found


def test_a_hang_and_a_file_outside_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules themselves: a load that never ends fails, and one that writes beside the folder."""
    folder = tmp_path / "deep" / "inside" / "one" / "folder"
    kind = KINDS["opendelta"]["bitfit"]
    kind.make(folder)
    monkeypatch.setattr("test_fuzz.SECONDS", 0.5)
    once: list[bool] = []

    def never(folder: Path, model: Any) -> Any:
        while once:
            pass
        once.append(True)
        return kind.load(folder, model)

    with pytest.raises(Hang), bounded():
        trial(folder, kind._replace(load=never), 1, "hang")
    before = tree(tmp_path, folder)
    (folder / "../../x").write_text("harm")
    assert tree(tmp_path, folder).keys() - before.keys() == {tmp_path / "deep" / "inside" / "x"}
