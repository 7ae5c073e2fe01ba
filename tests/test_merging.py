"""Merging of saved deltas. Oracles: dense sums and numpy's SVD, PEFT's `cat` and `svd`, the changes
that `Delta.merge` makes, outputs of deltas side by side."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import MergeError, StoreError
from deltune.merging import Merged, diff, merge
from deltune.sites.site import Site, noted
from deltune.store import native
from methods import METHODS, leaders
from zoo import ZOO


def drawn(model: nn.Module, spec: str, seed: int, by: float = 0.3, **options: Any) -> dt.Delta:
    """A delta of its own, far from its start."""
    delta = dt.attach(model, spec, f"delta {seed}", seed=seed, **options)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(delta.layout.size, generator=draw, dtype=delta.vector().dtype)
    return delta.load_vector(delta.vector() + by * noise)


def saved(model: nn.Module, specs: Sequence[str], at: Path, **options: Any) -> list[Path]:
    """Folders of deltas that are off the model again; the first has the scale 0.5."""
    folders = []
    for seed, spec in enumerate(specs):
        delta = drawn(model, spec, seed, **options)
        if seed == 0 and all(unit.scalable for unit in delta.tree.units):
            delta.scale = 0.5
        folders.append(delta.save(at / f"{seed}"))
        delta.detach()
    return folders


def plain(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(*shape, dtype=dtype))


def changes(model: nn.Module, folder: Path | Merged, at: Path | None = None) -> dict[str, Tensor]:
    """The change of every parameter by a delta, as merging into the model makes it."""
    delta = dt.load(folder.save(at) if isinstance(folder, Merged) else folder, model, "read")  # type: ignore[arg-type]
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    for unit in delta.tree.acting:
        if not unit.spec.owns:
            for owner, name, _, change in unit.weights(model):
                key = f"{paths[id(owner)]}.{name}"
                found[key] = found.get(key, torch.zeros(())) + change.detach().double()
    delta.detach()
    return found


def assert_sum(model: nn.Module, merged: Merged, of: Sequence[Path], weights: Sequence[float],
               at: Path, tolerance: float) -> None:  # fmt: skip
    found, each = changes(model, merged, at), [changes(model, one) for one in of]
    assert set(found) == {key for one in each for key in one}
    for key, change in found.items():
        wanted = sum(w * one[key] for w, one in zip(weights, each, strict=True) if key in one)
        assert isinstance(wanted, Tensor) and wanted.abs().max() > 0
        assert (change - wanted).abs().max() <= tolerance * wanted.abs().max(), key


FORMS = [
    ("bert", ["lora(rank=2, alpha=3)", "lora(rank=3, scaling='root')"], "rank=5"),
    ("gpt2", ["lora(rank=2, where='attn')", "lora(rank=1, where='attn')"], "rank=3"),
    ("mixtral", ["lora(rank=2, where='ffn')", "lora(rank=2, where='ffn', alpha=-4)"], "rank=4"),
    ("t5", ["lora(rank=2, where='embed, ffn')", "lora(rank=2, where='embed, ffn')"], "rank=4"),
    ("bert", ["lora(rank=2, where='attn.q')", "lora(rank=2, where='attn.v, attn.q')"], "rank=4"),
    ("bert", ["lora(rank={'attn.q': 1, 'attn.v': 3})", "lora(rank=2)"], "rank=5"),
]


@pytest.mark.parametrize(("arch", "specs", "rank"), FORMS)
def test_a_sum_of_loras_is_exact_at_the_sum_of_their_ranks(
    arch: str, specs: list[str], rank: str, tmp_path: Path
) -> None:
    """In float64, and the loaded delta does what the two do side by side."""
    model, weights = ZOO[arch].build(0).double(), (1.5, -0.75)
    folders = saved(model, specs, tmp_path, head=False)
    merged = merge(folders, weights=weights)
    assert merged.error == 0.0 and rank in str(merged.spec)
    assert_sum(model, merged, folders, weights, tmp_path / "merged", 1e-14)
    one, two = (dt.load(folder, model, folder.name) for folder in folders)
    one.scale, two.scale = one.scale * weights[0], two.scale * weights[1]
    if arch == "mixtral":  # whose experts know no float64
        return
    with torch.no_grad():
        wanted = ZOO[arch].run(model)
        one.detach(), two.detach()
        backbone = ZOO[arch].run(model)
        dt.load(tmp_path / "merged", model)
        assert (ZOO[arch].run(model) - wanted).abs().max() < 1e-12
    assert (backbone - wanted).abs().max() > 1e-3


def test_a_smaller_rank_is_the_nearest_and_its_error_is_said(tmp_path: Path) -> None:
    model = plain(24, 16)
    folders = saved(model, ["lora(rank=3, where='0')", "lora(rank=4, where='0')"], tmp_path)
    whole = sum(w * changes(model, f)["0.weight"] for w, f in zip((1.0, 2.0), folders, strict=True))
    u, s, vh = np.linalg.svd(np.asarray(whole))
    for rank in (1, 2, 5):
        merged = merge(folders, weights=[1.0, 2.0], rank=rank)
        near = changes(model, merged, tmp_path / f"rank {rank}")["0.weight"].numpy()
        np.testing.assert_allclose(near, (u[:, :rank] * s[:rank]) @ vh[:rank], atol=1e-12)
        assert merged.error == pytest.approx((s[rank:] ** 2).sum() ** 0.5 / (s**2).sum() ** 0.5)
        noted = native.read_about(tmp_path / f"rank {rank}")["merged"]
        assert noted["error"] == merged.error and [one["weight"] for one in noted["of"]] == [1, 2]
    again = merge(folders[:1], rank=2).spec  # with the scale s that it had
    assert isinstance(again, dt.LoRA) and (again.rank, again.alpha) == (2, pytest.approx(32 / 3))


def test_one_rank_must_fit_all_matrices(tmp_path: Path) -> None:
    """A sum of higher rank than a matrix can have is exact at the rank that it can have."""
    model = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 6)).double()
    narrow, both = "lora(rank=2, where='0')", "lora(rank=2, where='0, 1')"
    folders = saved(model, [narrow, narrow, both, both], tmp_path)
    merged = merge(folders[:2], weights=[1.0, 2.0])
    assert "rank=2" in str(merged.spec) and merged.error == 0.0
    assert_sum(model, merged, folders[:2], (1.0, 2.0), tmp_path / "narrow", 1e-13)
    with pytest.raises(MergeError, match=r"rank 4 is above .* `0` \(6 x 2\); give .* at most 2"):
        merge(folders[2:])
    assert merge(folders[2:], rank=2).error > 0.0


def test_nothing_of_the_size_of_a_matrix_is_made(tmp_path: Path) -> None:
    """Of a matrix of 10^6 x 10^6 the change alone would have eight terabytes."""
    n = 10**6
    site = Site("0", kind="linear", shape=(n, n))
    folders = []
    for i, rank in enumerate((1, 2)):
        draw = torch.Generator().manual_seed(i)
        tensors = {"lora.0.A": torch.randn(rank, n, generator=draw),
                   "lora.0.B": torch.randn(n, rank, generator=draw)}  # fmt: skip
        about = {
            "name": "huge", "head": False, "scale": 1.0, "backbone": {"weights": "same"},
            "spec": dt.LoRA(rank=rank, alpha=float(rank), where="0").to_json(),
            "layout": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "sites": noted({"lora.0": site}),
        }  # fmt: skip
        folders.append(tmp_path / str(i))
        native.write(folders[-1], tensors, about)
    merged = merge(folders, weights=[1.0, 1.0], rank=2)
    assert merged.trained["lora.0.A"].shape == (2, n) and 0.3 < merged.error < 0.8
    apart = diff(*folders)
    assert abs(apart.cosine or 0.0) < 0.01 and apart.norms[0] == pytest.approx(n, rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_peft_s_cat_and_svd_are_ours_and_its_linear_is_another_thing(tmp_path: Path) -> None:
    """`linear` sums A and B each by themselves, so that its product has terms of both deltas."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        form = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False}
        made = peft.get_peft_model(ZOO["llama"].build(0), peft.LoraConfig(**form), "one")
        made.add_adapter("two", peft.LoraConfig(**form))
    names, weights, rank = ["one", "two"], [0.7, 0.4], 3
    for how in ("cat", "linear", "svd"):
        made.add_weighted_adapter(names, weights, how, how, svd_rank=rank)
    made.save_pretrained(tmp_path, selected_adapters=names)
    model, folders = ZOO["llama"].build(0), []
    for name in names:
        delta = dt.load_peft(tmp_path / name, model, name=name)
        folders.append(delta.save(tmp_path / f"ours {name}"))
        delta.detach()
    ours = changes(model, merge(folders, weights=weights), tmp_path / "cat of ours")
    small = changes(model, merge(folders, weights=weights, rank=rank), tmp_path / "svd of ours")
    apart = whole = 0.0
    for path, layer in made.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and "cat" in getattr(layer, "lora_A", {}):
            theirs = {n: layer.get_delta_weight(n).double() for n in ("cat", "svd", "linear")}
            torch.testing.assert_close(ours[f"{path}.weight"], theirs["cat"], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(small[f"{path}.weight"], theirs["svd"], atol=1e-6, rtol=1e-5)
            apart += float((theirs["linear"] - ours[f"{path}.weight"]).square().sum())
            whole += float(ours[f"{path}.weight"].square().sum())
    assert whole and 0.5 < (apart / whole) ** 0.5 < 1.5


# What a merged delta is made of, where it is no weighted sum in the method's own tensors.
TO = "vera randlora vblora"
MODEL = "dora dora+lora hra oft boft mpo intrinsic"
REFUSED = {
    "masking": r"`mask\(skip=0\)` cannot hold .* `delta.merge\(\)`",
    "pruned": r"`pruned\(count=\d+\)` cannot hold .* `delta.merge\(\)`",
    "diff": "cannot fold before it is pruned", "fish": "cannot hold|no entries",
    "movement": r"`pruned\(count=\d+\)` cannot hold .* `delta.merge\(\)`",
    "adapter-bias": r"has no sum: .* `start`, or merge each into the model",
}  # fmt: skip


@pytest.mark.parametrize("row", [r for r in METHODS if METHODS[r].merges and r in leaders(False)])
def test_every_method_that_merges_has_a_sum_or_says_why_not(row: str, tmp_path: Path) -> None:
    """Oracle: the changes of weights that the deltas themselves would merge."""
    text, weights = METHODS[row].text, (0.5, -1.25)
    model = ZOO["bert"].build(0)
    folders = saved(model, [text, text], tmp_path)
    options: dict[str, Any] = {"keep_head": 1}
    if row in TO.split():
        with pytest.raises(MergeError, match=r"cannot hold .* as `to`"):
            merge(folders, weights=weights, **options)
        options["to"] = "shira"
    elif row in MODEL.split():
        with pytest.raises(MergeError, match=r"(computed from|needs the pre-).* give the `model`"):
            merge(folders, weights=weights, **options)
        options["model"] = model
    elif row in REFUSED:
        with pytest.raises(dt.DeltuneError, match=REFUSED[row]):
            merge(folders, weights=weights, model=model, **options)
        return
    merged = merge(folders, weights=weights, **options)
    if row != "head":
        assert_sum(model, merged, folders, weights, tmp_path / "merged", 2e-5)
    head = dt.load(folders[1], model, "head").tensors()
    assert {n: t for n, t in merged.tensors.items() if n.startswith("head.")}.keys() > set()
    assert all(torch.equal(t, head[n]) for n, t in merged.tensors.items() if n.startswith("head."))


@pytest.mark.parametrize("variant", ["said", "did"])
def test_random_directions_of_some_modules_have_a_sum(variant: str, tmp_path: Path) -> None:
    """Without scales it is in v itself; with them `full` of the same modules holds it."""
    model = ZOO["bert"].build(0)
    text = f"intrinsic(dimension=20, variant='{variant}', where='attn.q')"
    folders = saved(model, [text, text], tmp_path / "two", head=False)
    merged = merge(folders, weights=(0.5, -1.25), model=model)
    assert (str(merged.spec) == "full(where='attn.q')") == (variant == "said")
    assert_sum(model, merged, folders, (0.5, -1.25), tmp_path / "merged", 2e-5)


def test_a_mask_alone_is_whole_and_a_layout_without_what_is_trained_is_not(tmp_path: Path) -> None:
    """What nothing is trained of loads, and is refused for what it is."""
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "masking(skip=0)", head=False).fold()
    mask = delta.save(tmp_path / "mask")
    delta.detach()
    dt.load(mask, model).detach()
    with pytest.raises(MergeError, match=r"needs the pre-trained `weight` .* give the `model`"):
        merge([mask])
    with pytest.raises(MergeError, match=r"cannot hold .* `delta.merge\(\)`"):
        merge([mask], model=model)
    (lora,) = saved(model, ["lora(rank=2) + bitfit"], tmp_path / "lora", head=False)
    about = json.loads((lora / native.ABOUT).read_text())
    about["layout"] = {n: s for n, s in about["layout"].items() if n.startswith("lora")}
    (lora / native.ABOUT).write_text(json.dumps(about))
    with pytest.raises(StoreError, match=r"lacks trained tensors, such as `bitfit.\*`"):
        merge([lora], model=model)


def test_arithmetic(tmp_path: Path) -> None:
    """Negation, addition, analogy a - b + c; a delta on the shelf or attached, it is the same."""
    model = plain(6, 5)
    folders = saved(model, ["lora(rank=1, where='0')"] * 3, tmp_path)
    a, b, c = (changes(model, folder)["0.weight"] for folder in folders)
    for i, (weights, wanted) in enumerate((([-1], -a), ([1, 1], a + b), ([1, -1, 1], a - b + c))):
        merged = merge(folders[: len(weights)], weights=weights)
        found = changes(model, merged, tmp_path / f"sum {i}")["0.weight"]
        torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)
    attached = [dt.load(folder, model, folder.name) for folder in folders]
    live, read = merge(attached, factor=2.0), merge(folders, factor=2.0)
    assert live.spec == read.spec and live.sites == read.sites
    assert all(torch.equal(t, read.tensors[n]) for n, t in live.tensors.items())


def test_changes_of_several_methods_become_one_delta(tmp_path: Path) -> None:
    """`to` sums all changes of a matrix, of any part of any method; biases stay biases."""
    model, weights = ZOO["bert"].build(0), (1.0, -0.5)
    folders = saved(
        model, ["lora(rank=2) + bitfit", "vera(rank=3) + lora(rank=1)"], tmp_path, head=False
    )
    merged = merge(folders, weights=weights, to="lora(rank=6)")
    assert str(merged.spec) == "bitfit + lora(rank=6)" and merged.error < 1e-7
    assert_sum(model, merged, folders, weights, tmp_path / "one", 1e-5)
    entries = merge(folders, "ties", weights, density=0.1, to="shira")
    near = merge(folders, "ties", weights, density=0.1, to="lora(rank=2)")
    dense, low = (changes(model, m, tmp_path / n) for m, n in ((entries, "all"), (near, "two")))
    lost = size = 0.0
    for key, change in dense.items():
        s = torch.linalg.svdvals(change) if "weight" in key else torch.zeros(3)
        lost, size = lost + float(s[2:].square().sum()), size + float(change.square().sum())
        assert torch.equal(change == 0, change.abs() < 1e-12) and key in low
    assert near.error == pytest.approx((lost / size) ** 0.5, rel=1e-4)


def test_a_start_in_common_gives_parameters_a_mean(tmp_path: Path) -> None:
    model = ZOO["bert"].build(0)
    start = dt.attach(model, "adapter(width=3)", "start", head=False, seed=0)
    first, start_names, folders = start.vector(), start.tensors().keys(), []
    start.save(tmp_path / "start")
    for i in range(2):
        noise = torch.randn(len(first), generator=torch.Generator().manual_seed(i))
        start.load_vector(first + 1e-3 * noise).save(tmp_path / str(i))
        folders.append(tmp_path / str(i))
    start.detach()
    merged = merge(folders, weights=[0.5, 0.5], start=tmp_path / "start")
    ends = [dt.load(folder, model, folder.name) for folder in folders]
    found = dt.load(merged.save(tmp_path / "mean"), model).vector()
    torch.testing.assert_close(found, (ends[0].vector() + ends[1].vector()) / 2)
    moved = [end.vector() - first for end in ends]
    apart = diff(*folders, start=tmp_path / "start")
    wanted = torch.nn.functional.cosine_similarity(*moved, dim=0)
    assert apart.cosine == pytest.approx(float(wanted), rel=1e-4)
    assert apart.norms == pytest.approx([float(one.norm()) for one in moved], rel=1e-4)
    assert len(apart.places) == len(start_names) and apart.places[0].layer == 0
    with pytest.raises(MergeError, match=r"`adapter` has no sum: .* give the delta .* as `start`"):
        merge(folders)
    for seed, spec in enumerate(("prefix(tokens=3)", "adapter(width=3)")):
        other = dt.attach(model, spec, f"other {seed}", head=False, seed=7 + seed)
        with pytest.raises(MergeError, match="did not start from"):
            merge([*folders, other], start=tmp_path / "start")


def test_task_heads_are_chosen_and_never_summed(tmp_path: Path) -> None:
    model = ZOO["bert"].build(0)
    folders = saved(model, ["bitfit", "bitfit"], tmp_path)
    heads = [{n: t for n, t in dt.load(f, model, f.name).tensors().items() if n[:5] == "head."}
             for f in folders]  # fmt: skip
    with pytest.raises(MergeError, match=r"heads of the sources `0`, `1` differ.*keep_head='mean'"):
        merge(folders)
    for head, wanted in ((0, heads[0]), (1, heads[1]), ("none", {})):
        merged = merge(folders, keep_head=head)  # type: ignore[arg-type]
        assert {n for n in merged.tensors if n[:5] == "head."} == set(wanted)
        assert all(torch.equal(merged.tensors[n], t) for n, t in wanted.items())
    mean = merge(folders, weights=[3.0, 1.0], keep_head="mean").tensors
    for name, value in heads[0].items():
        torch.testing.assert_close(mean[name], 0.75 * value + 0.25 * heads[1][name])
    assert merge([folders[0], folders[0]]).head and not merge(folders, keep_head="none").head
    with pytest.raises(MergeError, match="source 5 has no task head"):
        merge(folders, keep_head=5)


def _digest(folder: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())]


def test_what_has_no_meaning_is_refused_and_the_sources_stay(tmp_path: Path) -> None:
    model = ZOO["bert"].build(0)
    specs = ["lora(rank=2)", "lora(rank=2, where='!attn.k, attn')", "lora(rank=2)[1:]", "ia3",
             "ia3(inputs='')", "sparse(count=5)", "sparse(count=5, where='attn')",
             "lora(rank=2, gate=True)", "tokens(ids=(4, 5))", "tokens(ids=(4, 6))"]  # fmt: skip
    lora, rest, upper, ia3, ia3_out, few, fewer, gated, tokens, others = saved(
        model, specs, tmp_path, head=False
    )
    (tmp_path / "other").mkdir()
    (strange,) = saved(ZOO["bert"].build(1), specs[:1], tmp_path / "other", head=False)
    before = [_digest(tmp_path / str(i)) for i in range(len(specs))]
    for sources, options, words in (
        ([], {}, "nothing to merge"),
        ([lora, strange], {}, "(?s)different backbones:\n  Bert.*\n  Bert.*`force=True`"),
        ([lora, lora], {"weights": [1.0]}, "2 deltas and 1 weights"),
        ([lora], {"weights": [float("nan")]}, "finite"),
        ([lora], {"rank": 0}, "1 or more, got 0"),
        ([lora], {"rank": 1.5}, "a whole number, 1 or more, got 1.5"),
        ([lora, lora], {"how": "slerp", "factor": float("inf")}, "`factor` .* finite .* got inf"),
        ([lora], {"how": "ties", "density": 0.0}, "above 0 and at most 1, got 0.0"),
        ([lora, lora], {"how": "regmean", "mixing": 1.5}, "`mixing` must be from 0 to 1, got 1.5"),
        ([lora], {"keep_head": "0"}, "number of a source, 'mean' or 'none', got '0'"),
        ([lora], {"keep_head": True}, "number of a source, 'mean' or 'none', got True"),
        ([lora], {"how": "tise"}, "unknown way `tise`.*did you mean `ties`"),
        ([lora], {"density": 0.5}, "no meaning for `linear`"),
        ([lora], {"how": "ties", "density": 1.5}, "above 0 and at most 1, got 1.5"),
        ([lora], {"how": "slerp"}, "1 were given"),
        ([lora, lora], {"how": "slerp", "weights": [1.0, 1.0]}, "weights 1 - t and t"),
        ([lora, lora], {"how": "fisher"}, "`statistics`, one for each of 2.*none.*fishers"),
        ([lora], {"start": lora, "rank": 2}, "no `rank`, no `to`"),
        ([lora, rest], {}, "no `where` is known"),
        ([lora, upper], {}, "no `where` is known"),
        ([ia3, ia3_out], {}, "acts in another way"),
        ([few, fewer], {}, "acts in another way|merge deltas of one `where`"),
        ([tokens, others], {}, "needs the pre-trained `weight` .* give the `model`"),
        ([gated], {}, "its gate is another one for each example"),
        ([lora], {"to": "vera"}, "`vera` cannot hold"),
        ([lora], {"to": "bitfit"}, "`bitfit` cannot hold"),
        ([lora], {"to": "lora(where='attn.k')"}, "leave `where` out"),
        ([lora], {"to": "shira(rank=3)"}, "leave its options out"),
        ([lora], {"to": "shira", "rank": 3}, "keeps entries and has no rank"),
        ([ia3], {"to": "lora"}, "no part of these deltas changes matrices"),
    ):
        with pytest.raises(MergeError, match=words):
            merge(sources, **options)  # type: ignore[arg-type]
    assert merge([lora, strange], force=True).error == 0.0
    assert merge([tokens, tokens]).tensors.keys() == {"tokens.bert.embeddings.word_embeddings.d"}
    assert before == [_digest(tmp_path / str(i)) for i in range(len(specs))]
    done = merge([lora])
    done.save(tmp_path / "done")
    with pytest.raises(StoreError, match="exists"):
        done.save(tmp_path / "done")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("cut", "truncated"), ("site", "incomplete or damaged"), ("place", "no part of .* has"),
        ("lost", "no places of it"), ("old", "version that did not note its places"),
        ("gone", "no folder"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(harm: str, words: str, tmp_path: Path) -> None:
    model = plain(6, 5)
    whole, broken = saved(model, ["lora(rank=2, where='0')"] * 2, tmp_path)
    file, about = broken / native.TENSORS, json.loads((broken / native.ABOUT).read_text())
    match harm:
        case "cut":
            file.write_bytes(file.read_bytes()[:-9])
        case "site":
            about["sites"]["forms"][0]["colour"] = "red"
        case "place":
            about["sites"]["at"]["bitfit.0"] = about["sites"]["at"]["lora.0"]
        case "lost":
            about["sites"]["at"] = {"lora.1": about["sites"]["at"]["lora.0"]}
        case "old":
            del about["sites"]
        case "gone":
            shutil.rmtree(broken)
    if broken.exists():
        (broken / native.ABOUT).write_text(json.dumps(about))
    with pytest.raises(StoreError, match=words):
        merge([whole, broken])
    if harm == "old":  # the model knows the places
        found = changes(model, merge([whole, broken], model=model), tmp_path / "merged")
        wanted = sum(0.5 * changes(model, one)["0.weight"] for one in (whole, broken))
        torch.testing.assert_close(found["0.weight"], wanted)


def test_how_alike_two_deltas_are(tmp_path: Path) -> None:
    """phi by its definition, from numpy's SVD of the changes; angles and norms of the changes."""
    model = ZOO["gpt2"].build(0).double()
    specs = ["lora(rank=3, where='attn.q, ffn.up')", "lora(rank=4, where='attn.q') + bitfit"]
    folders = saved(model, specs, tmp_path)
    found = diff(*folders, top=3)
    (one,) = [p for p in found.places if p.address == "decoder.attn.q[1]"]
    pair = [changes(model, f)["transformer.h.1.attn.c_attn.weight"].T[:16].numpy() for f in folders]
    norms = [np.linalg.norm(matrix) for matrix in pair]
    assert one.norms == pytest.approx(norms) and one.layer == 1
    assert one.cosine == pytest.approx((pair[0] * pair[1]).sum() / norms[0] / norms[1])
    (u1, _, v1), (u2, _, v2) = (np.linalg.svd(matrix) for matrix in pair)
    assert one.inputs is not None and one.outputs is not None and one.inputs.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            read = np.linalg.norm(v1[: i + 1] @ v2[: j + 1].T) ** 2 / (min(i, j) + 1)
            write = np.linalg.norm(u1[:, : i + 1].T @ u2[:, : j + 1]) ** 2 / (min(i, j) + 1)
            assert one.inputs[i, j] == pytest.approx(read)
            assert one.outputs[i, j] == pytest.approx(write)
    alone = [p for p in found.places if 0.0 in p.norms]
    assert alone and all(p.cosine is None and p.inputs is None for p in alone)
    every = [changes(model, folder) for folder in folders]
    total = sum(float((every[0][k] * every[1][k]).sum()) for k in every[0] if k in every[1])
    assert found.cosine == pytest.approx(total / found.norms[0] / found.norms[1])
    same = diff(folders[0], folders[0])
    assert same.cosine == pytest.approx(1.0)
    assert all(p.inputs is not None and p.inputs.diag().min() > 1 - 1e-9 for p in same.places)
    with pytest.raises(MergeError, match="no place in common"):
        diff(*saved(model, ["lora(where='attn.k')", "lora(where='attn.v')"], tmp_path / "apart"))


def test_rounding_makes_no_cosine_larger_than_1() -> None:
    """Of which there would be no angle; of several places, where the sums round apart."""
    model = nn.Sequential(*(nn.Linear(7, 5) for _ in range(4)))
    for seed in range(30):
        delta = drawn(model, "lora(rank=2, where='0, 1, 2, 3')", seed)
        cosine = diff(delta, delta).cosine
        assert cosine == pytest.approx(1.0) and cosine <= 1.0, seed
        delta.detach()
