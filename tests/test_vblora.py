"""VB-LoRA, and tensors that all modules of a checkpoint share.

Oracles: the mixtures written out one by one, and PEFT with files of both kinds.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune as dt
from deltune.errors import ExchangeError, SpecError
from deltune.exchange.peft.checkpoint import load_peft, save_peft
from test_exchange_peft import both_ways, theirs
from test_reparameterization import changes, moved, network
from zoo import ZOO

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"r": 2, "num_vectors": 5, "vector_length": 4, "target_modules": ["query", "value"]}
ONLY = {**SMALL, "topk": 3, "save_only_topk_weights": True}


def test_pieces_are_mixtures_of_the_nearest_vectors_of_one_bank() -> None:
    delta = moved(network(), "vblora(rank=2, vectors=5, length=4, top=3, where='*')")
    tensors = {name: tensor.detach() for name, tensor in delta.tensors().items()}
    bank = tensors.pop("vblora.shared:bank.v")
    assert bank.shape == (5, 4) and len(tensors) == 4
    assert delta.count() == 20 + 2 * 5 * ((8 + 12) + (12 + 16)) // 4

    def mixture(p: torch.Tensor) -> torch.Tensor:
        order = sorted(range(5), key=lambda j: -float(p[j]))[:3]
        weights = [float(p[j].exp()) for j in order]
        whole = sum(weights)
        return sum((w / whole * bank[j] for w, j in zip(weights, order, strict=True)), 0 * bank[0])

    for place, change in zip("02", changes(delta).items(), strict=False):
        P, Q = (tensors[f"vblora.{place}.{own}"] for own in "PQ")
        A = torch.stack([torch.cat([mixture(p) for p in row]) for row in P])
        B = torch.cat([torch.stack([mixture(q) for q in tile], dim=1) for tile in Q])
        assert torch.allclose(changes(delta)[f"{place}.weight"], B @ A), change[0]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_file_of_the_largest_alone_acts_the_same(name: str, tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ONLY["target_modules"]
    options = {**ONLY, "target_modules": targets}
    made = theirs(ZOO[name], tmp_path / "theirs", peft.VBLoRAConfig, **options)
    delta = both_ways(ZOO[name], made, tmp_path)
    assert delta.vector().isfinite().all()


def test_places_and_weights_that_make_no_mixture_are_refused(tmp_path: Path) -> None:
    case, file = ZOO["bert"], tmp_path / "adapter_model.safetensors"
    theirs(case, tmp_path, peft.VBLoRAConfig, **ONLY)
    whole = load_file(file)
    places = next(name for name in whole if name.endswith("A_topk_indices"))
    weights = places.replace("indices", "weights")

    def refused(changed: dict[str, torch.Tensor], words: str, without: str = "") -> None:
        kept = {name: tensor for name, tensor in (whole | changed).items() if name != without}
        save_file(kept, file, {"format": "pt"})
        model = case.build(0)
        with pytest.raises(ExchangeError, match=words):
            load_peft(tmp_path, model)
        assert not dt.deltas(model)

    words = "no 3 different places below 5 and the weights of 2 at `bert"
    refused({places: whole[places] + 3}, words)
    refused({places: 0 * whole[places]}, words)
    refused({places: whole[places][..., :2].contiguous()}, words)
    refused({weights: whole[weights][..., :1].contiguous()}, words)
    refused({}, "vblora_logits_A` of the checkpoint is nothing", without=weights)
    refused({}, "lacks `base_model.vblora_vector_bank`", without="base_model.vblora_vector_bank")
    refused({"base_model.vblora_vector_bank": torch.zeros(6, 4)}, r"is \(6, 4\), and .*\(5, 4\)")


def test_weights_of_zero_stay_finite_and_below_no_other(tmp_path: Path) -> None:
    """PEFT makes -inf of them; so a mixture can hold fewer vectors than k."""
    case, file = ZOO["bert"], tmp_path / "theirs" / "adapter_model.safetensors"
    theirs(case, tmp_path / "theirs", peft.VBLoRAConfig, **ONLY)
    whole = load_file(file)
    for name, tensor in whole.items():
        if name.endswith("weights"):
            tensor.copy_(torch.tensor([1.0, 0.0]))
    save_file(whole, file, {"format": "pt"})
    made = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "theirs").eval()
    assert both_ways(case, made, tmp_path).vector().isfinite().all()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("vblora(vectors=0)", "`vectors` must be 1 or more"),
        ("vblora(vectors=3, top=4)", "`top` must be 1 or more, at most `vectors`"),
        ("vblora(dropout=1.0)", r"`dropout` must be in \[0, 1\)"),
        ("vblora(rank=9, length=4, where='0')", "rank 9 is above the matrix at `0`"),
        ("vblora(length=8, where='0')", "8 does not divide both sides of the 12 x 8 matrix at `0`"),
    ],
)
def test_bad_specs_say_what_to_do(text: str, what: str) -> None:
    model = network()
    with pytest.raises(SpecError, match=what):
        dt.attach(model, text)
    assert not dt.deltas(model)


@pytest.mark.parametrize(
    ("text", "scale", "words"),
    [
        ("vblora(length=4)", 0.5, "scaled by 0.5, which PEFT has no word for in VBLORA"),
        ("vblora(length=4, where='attn.q') + vblora(length=4, rank=2, where='attn.v')", 1.0,
         "has 2 sets of `v`"),
        ("vblora(length=4, where='embed')", 1.0, "a VBLORA checkpoint is exchanged for"),
        ("c3a(block=4, where='embed')", 1.0, "a C3A checkpoint is exchanged for"),
        ("shira(rank=1, where='embed')", 1.0, "a SHIRA checkpoint is exchanged for"),
        ("fourierft(frequencies=4, where='embed')", 1.0, "a FOURIERFT checkpoint is exchanged for"),
    ],
)  # fmt: skip
def test_what_the_format_has_no_place_for_is_refused(
    text: str, scale: float, words: str, tmp_path: Path
) -> None:
    delta = dt.attach(ZOO["bert"].build(0), text)
    delta.scale = scale
    with pytest.raises(ExchangeError, match=words):
        save_peft(delta, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
