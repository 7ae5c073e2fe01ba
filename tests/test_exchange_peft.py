"""Checkpoints of PEFT both ways. Oracle: PEFT 0.21.2's own outputs, from its own files."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune as dt
from deltune.errors import ExchangeError, StoreError, WhereError
from deltune.exchange.peft.checkpoint import load_peft, save_peft
from deltune.training.course import Course
from probes import for_peft
from test_exchange_others import Harm
from test_peft_parity import TASKS, assert_acts, assert_close, gradients, loss
from zoo import ZOO, Case

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ARCHITECTURES = ("bert", "gpt2", "llama", "t5")
NAMES = {
    "bert": ("query", "value", "intermediate.dense"),
    "gpt2": ("c_attn", "c_fc"),
    "llama": ("q_proj", "v_proj", "down_proj"),
    "t5": ("q", "v", "wo"),
}
WRITERS = ("theirs", "ours")
EMBED = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens", "t5": "shared"}


def theirs(case: Case, folder: Path, kind: Any = peft.LoraConfig, **options: Any) -> Any:
    """PEFT's model with random tensors, saved."""
    options.setdefault("task_type", TASKS.get(case.name, "SEQ_2_SEQ_LM"))
    made: Any = peft.get_peft_model(for_peft(case.build(0)), kind(**options))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    made.save_pretrained(folder)
    return made.eval()


def both_ways(case: Case, made: Any, at: Path, real: Any = ..., extra: int = 0) -> dt.Delta:
    """Our delta of the checkpoint in `at/theirs`: its outputs are PEFT's, here and, written by us,
    again there; of the `real` positions, `extra` ones of PEFT's in front left out."""
    oracle = case.run(made)[:, extra:][real]
    delta = load_peft(at / "theirs", case.build(0))
    assert_acts(case, delta)
    assert_close(case.run(delta.model)[real], oracle)
    save_peft(delta, at / "ours")
    again: Any = peft.PeftModel.from_pretrained(for_peft(case.build(0)), at / "ours")
    assert_close(case.run(again.eval())[:, extra:][real], oracle)
    return delta


def forms(name: str) -> dict[str, dict[str, Any]]:
    one, two, *_ = names = NAMES[name]
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    return {
        "plain": {"r": 2, "lora_alpha": 6, "target_modules": list(names), **fan},
        "rank-stabilised": {
            "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": list(names), **fan,
        },
        "patterns": {
            "r": 2, "lora_alpha": 6, "target_modules": list(names), **fan,
            "rank_pattern": {one: 3}, "alpha_pattern": {two: 10, f"0.*{one}": 7},
        },
        "one layer": {
            "r": 2, "lora_alpha": 4, "target_modules": list(names), "lora_dropout": 0.5, **fan,
            "layers_to_transform": [1], "layers_pattern": {"bert": "layer", "gpt2": "h",
            "llama": "layers", "t5": "block"}[name],
        },
    }  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "rank-stabilised", "patterns", "one layer"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_lora_of_peft_gives_peft_s_outputs_here_and_again_there(
    name: str, form: str, tmp_path: Path
) -> None:
    case = ZOO[name]
    both_ways(case, theirs(case, tmp_path / "theirs", **forms(name)[form]), tmp_path)
    saved = (load_file(tmp_path / at / "adapter_model.safetensors") for at in ("theirs", "ours"))
    assert len({frozenset((n, t.shape) for n, t in one.items()) for one in saved}) == 1


@pytest.mark.parametrize("name", ["whisper", "clip", "vit", "torch-mlp"])
def test_models_of_other_inputs_than_tokens_both_ways(name: str, tmp_path: Path) -> None:
    """PEFT's classes for a use hand models `input_ids` and `inputs_embeds`, which these refuse."""
    case = ZOO[name]
    targets = ["0"] if name == "torch-mlp" else ["q_proj", "fc1"]
    options = {"r": 2, "target_modules": targets, "task_type": None}
    made = theirs(case, tmp_path / "theirs", **options)
    both_ways(case, made, tmp_path)
    configs = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in WRITERS)
    assert len({str((one["task_type"], one["auto_mapping"])) for one in configs}) == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dora_both_ways_with_its_gradients(name: str, tmp_path: Path) -> None:
    case, options = ZOO[name], forms(name)["patterns"]
    made = theirs(case, tmp_path / "theirs", use_dora=True, **options)
    delta = both_ways(case, made, tmp_path)
    (case.run(made) ** 2).sum().backward()
    (case.run(delta.model) ** 2).sum().backward()
    ran, compared = gradients(delta), 0
    for path, layer in made.base_model.model.named_modules():
        if hasattr(layer, "lora_magnitude_vector"):
            for own, part in (("A", "lora_A"), ("B", "lora_B"), ("m", "lora_magnitude_vector")):
                (ours,) = (g for n, g in ran.items() if n.split(".", 1)[1] == f"{path}.{own}")
                assert_close(ours, getattr(layer, part)["default"].weight.grad)
                compared += 1
    assert compared == 3 * len({n.rsplit(".", 1)[0] for n in ran if n.startswith("dora")})
    oracle = case.run(made)
    delta.merge()
    assert_close(case.run(delta.model), oracle)


def test_dora_on_slices_of_a_fused_matrix_becomes_one(tmp_path: Path) -> None:
    case = ZOO["gpt2"]
    delta = dt.attach(case.build(0), "dora(rank=2, alpha=6.0, where='attn.q, attn.v, ffn.up')")
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(delta.vector() + 0.3 * torch.randn(delta.vector().shape, generator=draw))
    save_peft(delta, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "ours")
    assert_close(case.run(again.eval()), case.run(delta.model))
    back = load_peft(tmp_path / "ours", case.build(0))
    assert_close(case.run(back.model), case.run(delta.model))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_embeddings_both_ways(name: str, dora: bool, tmp_path: Path) -> None:
    case = ZOO[name]
    options = {"r": 2, "lora_alpha": 6, "target_modules": [EMBED[name], NAMES[name][0]]}
    options["use_dora"] = dora
    made = theirs(case, tmp_path / "theirs", **options)
    both_ways(case, made, tmp_path)


def test_slices_of_a_fused_matrix_become_one_pair(tmp_path: Path) -> None:
    case = ZOO["gpt2"]
    delta = dt.attach(case.build(0), "lora(rank=2, alpha=6.0, where='attn.q, attn.v, ffn.up')")
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(0.3 * torch.randn(delta.vector().shape, generator=draw))
    delta.scale = 0.7
    save_peft(delta, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 4 and set(config["rank_pattern"].values()) == {2}
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "ours")
    assert_close(case.run(again.eval()), case.run(delta.model))
    back = load_peft(tmp_path / "ours", case.build(0))
    assert_close(case.run(back.model), case.run(delta.model))


IA3 = {
    "bert": (["key", "value", "layer.0.output.dense"], ["layer.0.output.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wi"], []),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ia3_both_ways(name: str, tmp_path: Path) -> None:
    case, (targets, inputs) = ZOO[name], IA3[name]
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    made = theirs(
        case, tmp_path / "theirs", peft.IA3Config, target_modules=targets,
        feedforward_modules=inputs, **fan,
    )  # fmt: skip
    oracle, delta = case.run(made), both_ways(case, made, tmp_path)
    loss(case.run(delta.model)).backward()
    loss(oracle).backward()
    ran = gradients(delta)
    for path, layer in made.base_model.model.named_modules():
        if hasattr(layer, "ia3_l"):
            (ours,) = (g for n, g in ran.items() if n in (f"ia3.{path}.d",))
            assert_close(ours, layer.ia3_l["default"].grad.flatten())
    delta.merge()
    assert_close(case.run(delta.model), oracle)


WEIGHTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adalora": (
        peft.AdaLoraConfig, {"init_r": 5, "target_r": 2, "lora_alpha": 3, "total_step": 10},
    ),
    "loha": (peft.LoHaConfig, {"r": 2, "alpha": 3}),
    "loha-patterns": (
        peft.LoHaConfig, {"r": 2, "rank_pattern": {"0.*": 3}, "alpha_pattern": {"1.*": 5}},
    ),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 3}),
    "lokr-full": (peft.LoKrConfig, {"r": 9}),
    "lokr-both": (
        peft.LoKrConfig, {"r": 1, "decompose_both": True, "decompose_factor": 8},
    ),
    "lokr-odd": (peft.LoKrConfig, {"r": 1, "decompose_factor": 5}),
    "vera": (peft.VeraConfig, {"r": 5, "vera_dropout": 0.5}),
    "vera-drawn": (
        peft.VeraConfig, {"r": 40, "projection_prng_key": 7, "save_projection": False},
    ),
    "randlora": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 3, "randlora_dropout": 0.5}),
    "randlora-sparse": (peft.RandLoraConfig, {"r": 4, "sparse": True, "randlora_alpha": 2}),
    "randlora-drawn": (
        peft.RandLoraConfig,
        {"r": 20, "randlora_alpha": 9, "projection_prng_key": 7, "save_projection": False},
    ),
    "randlora-very-sparse-drawn": (
        peft.RandLoraConfig,
        {"r": 3, "randlora_alpha": 2, "very_sparse": True, "save_projection": False},
    ),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 20, "scaling": 30.0}),
    "fourierft-patterns": (
        peft.FourierFTConfig,
        {
            "n_frequency": 20, "random_loc_seed": 5, "init_weights": True,
            "n_frequency_pattern": {"0.*": 30},
        },
    ),
    "c3a": (peft.C3AConfig, {"block_size": 8}),
    "c3a-patterns": (
        peft.C3AConfig,
        {"block_size": 4, "block_size_pattern": {"0.*": 2}, "init_weights": True},
    ),
    "shira": (peft.ShiraConfig, {"r": 2}),
    "shira-seeded": (peft.ShiraConfig, {"r": 1, "random_seed": 3, "init_weights": False}),
    "vblora": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 5, "vector_length": 8}),
    "vblora-three": (
        peft.VBLoRAConfig,
        {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "vblora_dropout": 0.2},
    ),
    "hra": (peft.HRAConfig, {"r": 4}),
    "hra-odd": (peft.HRAConfig, {"r": 3, "init_weights": False}),
    "hra-orthogonal": (peft.HRAConfig, {"r": 3, "apply_GS": True}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4}),
    "oft-terms": (peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 7}),
    "oft-three": (peft.OFTConfig, {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft-exact": (peft.OFTConfig, {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False}),
    "oft-shared": (
        peft.OFTConfig, {"oft_block_size": 8, "block_share": True, "use_cayley_neumann": False},
    ),
    "oft-limited": (peft.OFTConfig, {"oft_block_size": 8, "coft": True, "eps": 0.3}),
    "oft-limited-shared": (
        peft.OFTConfig, {"oft_block_size": 4, "coft": True, "eps": 0.3, "block_share": True},
    ),
    "boft": (peft.BOFTConfig, {}),
    "boft-count": (peft.BOFTConfig, {"boft_block_size": 0, "boft_block_num": 2}),
    "boft-one-factor": (peft.BOFTConfig, {"boft_n_butterfly_factor": 2}),  # without its kernel
    "miss": (peft.MissConfig, {"r": 4, "miss_dropout": 0.2}),
    "miss-odd": (peft.MissConfig, {"r": 5, "init_weights": False}),
    "miss-mini": (peft.MissConfig, {"r": 3, "mini_r": 4, "init_weights": "mini"}),
    "miss-bat": (peft.MissConfig, {"r": 8, "init_weights": "bat"}),
}  # fmt: skip
NO_CONV1D = ("loha", "lokr", "c3a", "shira", "hra", "oft", "boft", "miss")
"""Methods that PEFT has for `nn.Linear` and not for GPT-2's `Conv1D`."""
SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B")
"""Tensors of the whole checkpoint, which we write once."""


PAIRS = [(name, form) for name in ARCHITECTURES for form in WEIGHTS
         if name != "gpt2" or not form.startswith(NO_CONV1D)]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), PAIRS)
def test_changes_of_matrices_both_ways(name: str, form: str, tmp_path: Path) -> None:
    (config, options), case = WEIGHTS[form], ZOO[name]
    made = theirs(case, tmp_path / "theirs", config, target_modules=list(NAMES[name]), **options)
    both_ways(case, made, tmp_path)
    saved = [load_file(tmp_path / at / "adapter_model.safetensors") for at in ("theirs", "ours")]
    own = [{(n, t.shape) for n, t in one.items() if not n.endswith(SHARED)} for one in saved]
    assert own[0] == own[1]
    shared = [{n: t.shape for n, t in one.items() if n.endswith(SHARED)} for one in saved]
    if shared[0]:
        assert {n: shared[0].get(n) for n in shared[1]} == shared[1]


@pytest.mark.parametrize("form", ["loha", "lokr", "vera", "randlora"])
def test_the_scale_of_a_delta_is_written(form: str, tmp_path: Path) -> None:
    (config, options), case = WEIGHTS[form], ZOO["bert"]
    theirs(case, tmp_path / "theirs", config, target_modules=list(NAMES["bert"]), **options)
    delta = load_peft(tmp_path / "theirs", case.build(0))
    whole = case.run(delta.model)
    delta.scale = -0.7
    save_peft(delta, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "ours")
    assert_close(case.run(again.eval()), case.run(delta.model))
    assert (case.run(delta.model) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["vera", "randlora", "randlora-sparse"])
def test_shared_matrices_are_the_file_s_or_drawn_as_peft_draws_them(
    form: str, tmp_path: Path
) -> None:
    """Oracle: PEFT's own draw. A file that should have them and has not is refused, as is one that
    should not."""
    (config, options), case = WEIGHTS[form], ZOO["bert"]
    at, kind = tmp_path / "theirs", form.partition("-")[0]
    theirs(case, at, config, target_modules=list(NAMES["bert"]), **options)
    file, about = at / "adapter_model.safetensors", at / "adapter_config.json"
    tensors, told = load_file(file), json.loads(about.read_text())
    shared = {f"base_model.{kind}_{own}": tensors[f"base_model.{kind}_{own}"] for own in "AB"}
    delta = load_peft(at, case.build(0))
    drawn = dt.attach(case.build(0), delta.spec, head=True)
    for own, values in zip("AB", shared.values(), strict=True):
        assert torch.equal(delta.tensors()[f"{kind}.shared:all.{own}"], values)
        assert torch.equal(drawn.tensors()[f"{kind}.shared:all.{own}"], values)
    other = {n: 2 * t if n.endswith(SHARED) else t for n, t in tensors.items()}
    save_file(other, file, {"format": "pt"})
    twice = load_peft(at, case.build(0)).tensors()
    for own, values in zip("AB", shared.values(), strict=True):
        assert torch.equal(twice[f"{kind}.shared:all.{own}"], 2 * values)
    about.write_text(json.dumps(told | {"save_projection": False}))
    with pytest.raises(ExchangeError, match=rf"not understood: .*\.{kind}_A`"):
        load_peft(at, case.build(0))
    about.write_text(json.dumps(told))
    save_file({n: t for n, t in tensors.items() if n not in shared}, file, {"format": "pt"})
    with pytest.raises(ExchangeError, match=rf"lacks `base_model.{kind}_A`"):
        load_peft(at, case.build(0))
    again = {n: 2 * t if n in shared else t for n, t in tensors.items()}
    save_file(again, file, {"format": "pt"})
    if kind == "randlora":  # PEFT writes them again for each module
        with pytest.raises(ExchangeError, match=r"randlora_A` is not `base_model\.randlora_A`"):
            load_peft(at, case.build(0))


@pytest.mark.parametrize(("name", "factors"), [("bert", 2), ("llama", 3)])
def test_butterflies_both_ways(
    name: str, factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own rotations; its CUDA kernel puts blocks on a diagonal, and torch plays it."""
    from peft.tuners.boft import layer

    class Kernel:
        @staticmethod
        def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
            return [torch.stack([torch.block_diag(*one) for one in blocks])]

    monkeypatch.setattr(layer, "get_fbd_cuda", Kernel)
    case = ZOO[name]
    made = theirs(
        case, tmp_path / "theirs", peft.BOFTConfig, target_modules=list(NAMES[name]),
        boft_block_size=2, boft_n_butterfly_factor=factors,
    )  # fmt: skip
    delta = both_ways(case, made, tmp_path)
    assert all(unit.K.shape[0] == factors for unit in delta.tree.units if hasattr(unit, "K"))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rotated_embeddings_both_ways(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    made = theirs(
        case, tmp_path / "theirs", peft.OFTConfig, oft_block_size=4,
        target_modules=[EMBED[name], NAMES[name][0]],
    )  # fmt: skip
    both_ways(case, made, tmp_path)


def test_a_scale_is_in_the_shards_or_refused(tmp_path: Path) -> None:
    case = ZOO["bert"]
    for text in ("miss(rank=4)", "miss(rank=4, mini=2)", "miss(rank=4, bat=True)"):
        delta = dt.attach(case.build(0), text)
        draw = torch.Generator().manual_seed(1)
        delta.load_vector(0.3 * torch.randn(delta.vector().shape, generator=draw))
        delta.scale = 0.7
        save_peft(delta, tmp_path / text)
        again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / text)
        assert_close(case.run(again.eval()), case.run(delta.model))
    for text in ("hra(rank=2)", "oft(block=4)", "boft"):
        delta = dt.attach(case.build(0), text)
        delta.scale = 0.7
        with pytest.raises(ExchangeError, match=r"scaled by 0\.7, which PEFT has no word for"):
            save_peft(delta, tmp_path / text)


@pytest.mark.parametrize(
    ("config", "options", "changes", "words"),
    [
        (peft.HRAConfig, {"r": 2}, {"bias": "hra_only"}, "`bias = 'hra_only'`"),
        (peft.HRAConfig, {"r": 2}, {"r": 3}, r"is \(16, 2\), and `hra.* has \(16, 3\)"),
        (peft.OFTConfig, {"oft_block_size": 4}, {"module_dropout": 0.1}, "`module_dropout = 0.1`"),
        (peft.OFTConfig, {"oft_block_size": 4}, {"peft_version": "0.17.1"}, "of PEFT 0.17.1, w"),
        (peft.OFTConfig, {"oft_block_size": 4}, {"peft_version": None}, "of PEFT before 0.18"),
        (peft.OFTConfig, {"oft_block_size": 4}, {"peft_version": "9" * 5000 + ".0"}, "of PEFT 999"),
        (
            peft.OFTConfig, {"oft_block_size": 4}, {"num_cayley_neumann_terms": 2},
            "is 2, too few for a rotation",
        ),
        (peft.BOFTConfig, {}, {"boft_dropout": 0.1}, "`boft_dropout = 0.1`"),
        (peft.MissConfig, {"r": 4}, {"init_weights": "bad"}, "`init_weights` is 'bad'"),
        (peft.MissConfig, {"r": 4}, {"init_weights": "bat"}, "is .4, 16., and `miss"),
    ],
)  # fmt: skip
def test_what_a_rotation_or_shard_asks_for_is_done_or_refused(
    config: Any, options: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    case = ZOO["bert"]
    theirs(case, tmp_path, config, target_modules=["query"], **options)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = case.build(0)
    with pytest.raises(ExchangeError, match=words):
        load_peft(tmp_path, model)
    assert not dt.deltas(model)


def test_a_checkpoint_without_its_rotation_is_refused(tmp_path: Path) -> None:
    case = ZOO["bert"]
    theirs(case, tmp_path, peft.BOFTConfig, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    for tensors in (
        {n: t for n, t in whole.items() if "boft_R" not in n},
        {n: t.flatten() for n, t in whole.items()},
    ):
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ExchangeError, match=r"has (no rotation|one of the shape .*) at `bert"):
            load_peft(tmp_path, case.build(0))


def test_places_that_peft_has_no_layer_for_are_not_written(tmp_path: Path) -> None:
    for name, text, words in (
        ("gpt2", "hra(rank=2, where='attn.o')", r"is transformers' `Conv1D`, and a HRA"),
        ("bert", "boft(where='embed')", r"is `nn\.Embedding`, and a BOFT .* `nn\.Linear` alone"),
        ("bert", "loha(rank=2, where='embed')", r"is `nn\.Embedding`, and a LOHA"),
    ):
        with pytest.raises(ExchangeError, match=words):
            save_peft(dt.attach(ZOO[name].build(0), text), tmp_path / "ours")


def test_a_pruned_adalora_of_peft(tmp_path: Path) -> None:
    """Its file has the triplets that are left alone. The choice is ours too."""
    case = ZOO["bert"]
    options = {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}
    made = theirs(
        case, tmp_path / "theirs", peft.AdaLoraConfig, target_modules=list(NAMES["bert"]), **options
    )
    delta = load_peft(tmp_path / "theirs", case.build(0))
    with Course(delta.model) as course:
        for step in range(12):
            made.zero_grad()
            delta.model.zero_grad()
            course.before_step(step, 12)
            for model in (made, delta.model):
                out = model(**case.batch(step), labels=torch.tensor([0, 1, 2]))
                out.loss.backward()
            course.after_backward()  # PEFT adds the penalty to the loss
            ours = {n: p.grad for n, p in delta.tree.named().items()}
            for path, layer in made.base_model.model.named_modules():
                for own in ("A", "B", "E") if hasattr(layer, "lora_E") else ():
                    grad = getattr(layer, f"lora_{own}")["default"].grad
                    assert_close(
                        ours[f"adalora.{path}.{own}"], grad.view_as(ours[f"adalora.{path}.{own}"])
                    )
            course.after_step()
            made.base_model.update_and_allocate(step + 1)
    made.save_pretrained(tmp_path / "pruned")
    oracle = case.run(made.eval())
    assert_close(case.run(delta.model), oracle)
    again = load_peft(tmp_path / "pruned", case.build(0))
    assert_close(case.run(again.model), oracle)
    kept = load_file(tmp_path / "pruned" / "adapter_model.safetensors")
    assert sum(len(t) for n, t in kept.items() if n.endswith("lora_E")) == 2 * 3 * 2
    assert_close(case.run(delta.fold().model), oracle)


def test_an_adalora_of_more_triplets_than_its_matrix_can_have_is_refused(tmp_path: Path) -> None:
    """Before anything of that size is made."""
    folder = save_peft(
        dt.attach(ZOO["bert"].build(0), "adalora(rank=4, target=2)"), tmp_path / "ours"
    )
    file, wide = folder / "adapter_config.json", r"`init_r` is 1000000000, .*\(16, 16\): .* most 16"
    told, model = json.loads(file.read_text()), ZOO["bert"].build(0)
    for rank, words in ((10**9, wide), (17, "is 17, "), (3, "has 4 triplets .* `init_r`, 3")):
        file.write_text(json.dumps(told | {"init_r": rank}))
        with pytest.raises(ExchangeError, match=words):
            load_peft(folder, model)
    file.write_text(json.dumps(told | {"init_r": 16}))
    E = load_peft(folder, model).tensors()["adalora.bert.encoder.layer.0.attention.self.query.E"]
    assert E.shape == (16,) and not E[4:].any()


def test_an_input_that_is_not_there_is_named() -> None:
    with pytest.raises(WhereError, match=r"`ffn\.dwn`"):
        dt.attach(ZOO["bert"].build(0), "ia3(inputs='ffn.dwn')")
    with pytest.raises(WhereError, match=r"`nothing\.here`"):
        dt.attach(ZOO["bert"].build(0), "ia3(inputs='ffn.down, nothing.here')")
    both = dt.attach(ZOO["bert"].build(0), "ia3(where='ffn', inputs='ffn')")
    assert all(unit.site.entry for unit in both.tree.units if unit.spec.kind == "ia3")
    plain = dt.attach(ZOO["torch-mlp"].build(0), "ia3(where='0')")  # has no role `ffn.down`
    assert not any(unit.site.entry for unit in plain.tree.units)


def test_ia3_on_the_roles_of_a_fused_matrix(tmp_path: Path) -> None:
    case = ZOO["gpt2"]
    delta = dt.attach(case.build(0), "ia3")
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(0.3 * torch.randn(delta.vector().shape, generator=draw))
    delta.scale = 0.5
    save_peft(delta, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "ours")
    assert_acts(case, delta)
    assert_close(case.run(again.eval()), case.run(delta.model))


NORMS = {
    "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"], "llama": ["input_layernorm"],
    "t5": ["layer_norm", "final_layer_norm"],
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_both_ways(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    made = theirs(case, tmp_path / "theirs", peft.LNTuningConfig, target_modules=NORMS[name])
    both_ways(case, made, tmp_path)


IDS = [9, 4, 17, 30, 41, 25]


def names(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """The tensors of a checkpoint, with their shapes."""
    return {(n, tuple(t.shape)) for n, t in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_tokens_both_ways(name: str, tmp_path: Path) -> None:
    """The output layers of GPT-2 and T5 are tied to the table; Llama's is not."""
    case = ZOO[name]
    made = theirs(case, tmp_path / "theirs", peft.TrainableTokensConfig, token_indices=IDS)
    delta = both_ways(case, made, tmp_path)
    assert [part for part in str(delta.spec).split(" + ") if part.startswith("tokens")]
    assert names(tmp_path / "theirs") == names(tmp_path / "ours")
    delta.scale = -0.7
    save_peft(delta, tmp_path / "scaled")
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "scaled")
    assert_close(case.run(again.eval()), case.run(delta.model))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("form", ["lora", "adalora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_tokens_beside_lora_both_ways(
    name: str, form: str, listed: bool, tmp_path: Path
) -> None:
    case = ZOO[name]
    config, options = {
        "lora": (peft.LoraConfig, {"r": 2, "lora_alpha": 6}), "adalora": WEIGHTS["adalora"],
    }[form]  # fmt: skip
    made = theirs(
        case, tmp_path / "theirs", config, target_modules=list(NAMES[name]), **options,
        trainable_token_indices=IDS if listed else {EMBED[name]: IDS},
    )  # fmt: skip
    delta = both_ways(case, made, tmp_path)
    assert {unit.spec.kind for unit in delta.tree.units} >= {form, "tokens"}
    assert names(tmp_path / "theirs") == names(tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_indices": [9, 4, 17]}, r"has the shape \(6, 16\) and this model wants \(3, 16\)"),
        ({"token_indices": [9, 4, 17, 30, 41, 64]}, "token 64 of .*, which has 64 rows"),
        ({"token_indices": [9, 4, 17, 30, 41, -1]}, "are no tokens; expected a list of numbers"),
        ({"token_indices": [9, 4, 17, 30, 41, True]}, "are no tokens"),
        ({"token_indices": "all"}, "expected list"),
        ({"something_new": 3}, "`something_new = 3`"),
    ],
)
def test_tokens_that_a_model_has_not_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    case = ZOO["gpt2"]
    theirs(case, tmp_path, peft.TrainableTokensConfig, token_indices=IDS)
    file, model = tmp_path / "adapter_config.json", case.build(0)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ExchangeError, match=words):
        load_peft(tmp_path, model)
    assert not dt.deltas(model)


def test_rows_of_tokens_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    case = ZOO["gpt2"]
    theirs(case, tmp_path, peft.TrainableTokensConfig, token_indices=IDS)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    head = next(name for name in whole if "lm_head" in name)
    for tensors, words in (
        (whole | {head: 2 * whole[head]}, "has other rows for `(lm_head|transformer.wte)` than"),
        ({n.replace("wte", "wpf"): t for n, t in whole.items()}, "`transformer.wpf`, which is no"),
        ({n.replace("wte", "h.0.ln_1"): t for n, t in whole.items()}, "which is no table"),
        ({"base_model.model.lm_head.x": whole[head]}, "trains no token"),
    ):
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ExchangeError, match=words):
            load_peft(tmp_path, case.build(0))


def test_a_table_that_peft_would_change_in_part_is_refused_both_ways(tmp_path: Path) -> None:
    """A model that says that it ties nothing, and one whose tied output layer has a bias."""
    import transformers as hf

    case = ZOO["gpt2"]
    theirs(case, tmp_path / "theirs", peft.TrainableTokensConfig, token_indices=IDS)
    model: Any = case.build(0)
    model.config.tie_word_embeddings = False
    words = "`transformer.wte`, `lm_head` share one table, and PEFT would change a part"
    with pytest.raises(ExchangeError, match=words):
        load_peft(tmp_path / "theirs", model)
    delta = dt.attach(model, f"tokens(ids={tuple(IDS)})")
    with pytest.raises(ExchangeError, match=words):
        save_peft(delta, tmp_path / "ours")
    config = hf.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1,
                           num_attention_heads=2, intermediate_size=8)  # fmt: skip
    masked = dt.attach(hf.BertForMaskedLM(config), f"tokens(ids={tuple(IDS)})")
    with pytest.raises(ExchangeError, match=r"`cls.predictions.decoder` is tied .* has a bias"):
        save_peft(masked, tmp_path / "ours")


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_prompts_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    """A decoder's logits have the prompt's positions in front with PEFT, and not with us."""
    case = ZOO[name]
    config = peft.PromptTuningConfig if kind == "prompt" else peft.PromptEncoderConfig
    wide = {"encoder_hidden_size": 8} if kind == "p-tuning" else {}
    made = theirs(case, tmp_path / "theirs", config, num_virtual_tokens=3, **wide)
    extra = 0 if name == "t5" else 3
    batch = case.batch(0)
    real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    both_ways(case, made, tmp_path, real, extra)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_prefixes_both_ways(name: str, tmp_path: Path) -> None:
    """Of two stacks PEFT mixes up the layers: read as it acts, and not written."""
    case = ZOO[name]
    width = {"token_dim": 24} if name == "t5" else {}
    made = theirs(case, tmp_path / "theirs", peft.PrefixTuningConfig, num_virtual_tokens=3, **width)
    if name == "t5":
        delta = load_peft(tmp_path / "theirs", case.build(0))
        assert_acts(case, delta)
        assert_close(case.run(delta.model), case.run(made))
        with pytest.raises(ExchangeError, match="two stacks, where PEFT mixes up the layers"):
            save_peft(delta, tmp_path / "ours")
        return
    both_ways(case, made, tmp_path)


def test_a_prompt_of_an_encoder_with_a_head_is_refused_both_ways(tmp_path: Path) -> None:
    case = ZOO["bert"]
    theirs(case, tmp_path / "theirs", peft.PromptTuningConfig, num_virtual_tokens=3)
    with pytest.raises(ExchangeError, match="PEFT's pooler reads the prompt's first state"):
        load_peft(tmp_path / "theirs", case.build(0))
    with pytest.raises(ExchangeError, match="PEFT would give other outputs"):
        save_peft(dt.attach(case.build(0), "prompt(tokens=3)"), tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "has not the two matrices .* and the vector lora_magnitude_vector"),
        ({"bias": "all"}, "lacks .*key.bias`.*, which `bias = 'all'` of .* means"),
        ({"bias": "some"}, "`bias` is 'some'; expected one of none, lora_only, all"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication ="),
        ({"something_new": 3}, "`something_new = 3`"),
        ({"init_lora_weights": "corda"}, "'corda', which changed the backbone's weights"),
        ({"r": 3}, "has rank 2 and the configuration says 3"),
        ({"r": "two"}, "`r` is 'two'; expected int"),
        ({"r": True}, "`r` is True; expected int"),
        ({"lora_alpha": float("inf")}, "`lora_alpha` is inf"),
        ({"rank_pattern": {"(a+)+b": 2}}, "is not one for the name of a module"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
        ({"rank_pattern": {"query": "x"}}, "stands for 'x'; expected a number"),
        ({"alpha_pattern": {"query": 10**400}}, "stands for 1000.*; expected a number"),
        ({"peft_type": "LORRA"}, "of the type 'LORRA' .did you mean `LORA`"),
        ({"peft_type": ["LORA"]}, "this version reads"),
        ({"modules_to_save": ["pooler"]}, "lacks .*pooler.dense.weight`.*, which `modules_to_save"),
        ({"modules_to_save": [3]}, "`modules_to_save` is .3.; expected names"),
        ({"modules_to_save": ["nothing"]}, None),
    ],
)
def test_what_a_configuration_asks_for_is_done_or_refused(
    changes: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    case = ZOO["bert"]
    theirs(case, tmp_path, r=2, lora_alpha=4, target_modules=["query"])
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = case.build(0)
    if words is None:  # a name that no tensor of the file belongs to
        assert load_peft(tmp_path, model).count() > 0
        return
    with pytest.raises(ExchangeError, match=words):
        load_peft(tmp_path, model)
    assert not dt.deltas(model)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    case = ZOO["bert"]
    theirs(case, tmp_path, r=2, lora_alpha=4, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    whole, model = load_file(file), case.build(0)
    first = next(name for name in whole if "lora_A" in name)

    def refused(tensors: dict[str, Any], words: str) -> None:
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ExchangeError, match=words):
            load_peft(tmp_path, model)
        assert not dt.deltas(model)

    refused({n: t for n, t in whole.items() if n != first}, "has not the two matrices")
    refused(
        whole | {"base_model.model.extra.weight": whole[first].clone()},
        "not understood: `extra.weight`",
    )
    refused({n.replace("query", "quary"): t for n, t in whole.items()}, "has no matrices at")
    refused(whole | {first: whole[first][:, :-1].contiguous()}, "has the shape .* wants")
    refused(whole | {first: whole[first] * float("nan")}, "values that are not finite")
    refused(whole | {first: whole[first].to(torch.int8)}, "is torch.int8; expected floating point")
    refused({n: t for n, t in whole.items() if "classifier.bias" not in n}, "a part of the head")
    save_file(whole, file, {"format": "pt"})
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ExchangeError, match="damaged or no safetensors file"):
        load_peft(tmp_path, model)
    file.unlink()
    with pytest.raises(ExchangeError, match=r"has none of `.*safetensors`, `.*bin`; it holds"):
        load_peft(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ExchangeError, match="holds list; expected a JSON object"):
        load_peft(tmp_path, model)
    with pytest.raises(ExchangeError, match="cannot be read: No such file"):
        load_peft(tmp_path / "nowhere", model)


def test_a_pickle_of_peft_is_read_for_tensors_and_for_nothing_else(tmp_path: Path) -> None:
    """Written by PEFT itself; of a method with indices too, which are whole numbers."""
    case, mark = ZOO["bert"], tmp_path / "harmed"
    for at, kind in (("lora", peft.LoraConfig), ("shira", peft.ShiraConfig)):
        made = theirs(case, tmp_path / at, kind, r=2, target_modules=["query"])
        told = load_peft(tmp_path / at, case.build(0))
        pickled = tmp_path / f"{at} pickled"
        made.save_pretrained(pickled, safe_serialization=False)
        assert (pickled / "adapter_model.bin").is_file()
        again = load_peft(pickled, case.build(0))
        assert again.spec == told.spec and torch.equal(again.vector(), told.vector())
        assert_close(case.run(again.model), case.run(made.eval()))
    file, model = pickled / "adapter_model.bin", case.build(0)
    tensors = torch.load(file, weights_only=True)
    first = next(iter(tensors))
    for held, words in (
        (tensors | {first: Harm(mark)}, "holds more than tensors"),
        ([1, 2], "holds list; expected tensors by name"),
        (tensors | {first: "text"}, "holds dict; expected tensors by name"),
    ):
        torch.save(held, file)
        with pytest.raises(ExchangeError, match=words):
            load_peft(pickled, model)
    file.write_bytes(pickle.dumps(Harm(mark)))
    with pytest.raises(ExchangeError, match="is damaged, or holds more than tensors"):
        load_peft(pickled, model)
    assert not mark.exists() and not dt.deltas(model)
    (tmp_path / "shira" / "adapter_model.safetensors").rename(pickled / "adapter_model.safetensors")
    assert torch.equal(load_peft(pickled, model).vector(), told.vector())  # read instead


def test_what_peft_has_no_words_for_is_not_written(tmp_path: Path) -> None:
    for spec, words in (
        ("adapter(width=2)", "is of `adapter`; PEFT keeps one method"),
        ("ia3 + bitfit", "is of `ia3`, `bitfit`"),
        ("dora(rank=2) + lora(rank=2, where='ffn')", "PEFT can write neither beside DoRA"),
        ("lora(rank=2, gate=True)", "has a gate"),
        ("prefix(tokens=2)", "keeps the tokens' positions"),
        ("prefix(tokens=2, mlp=4, positions='shift')", "is made by a network; fold it first"),
        ("lora(rank=2, dropout=0.1) + lora(rank=2, where='ffn')", "has the dropouts"),
        (
            "tokens(ids=(5,)) + tokens(ids=(6,), where='*.position_embeddings')",
            r"other tokens of one table than of another \(`\(5,\)`, `\(6,\)`\)",
        ),
        ("tokens(ids=(5,)) + tokens(ids=(5,), where='embed')", "word_embeddings` twice; PEFT has"),
        ("lora(rank=2) + tokens(ids=(5,)) + tokens(ids=(6,))", "word_embeddings` twice; PEFT has"),
        ("lora(rank=2, where='embed') + tokens(ids=(5,))", "has pairs and trained tokens at"),
        ("bitfit + tokens(ids=(5,))", "is of `bitfit`, `tokens`"),
        ("vera(rank=2, where='embed')", "a VERA checkpoint is exchanged for `nn.Linear` or"),
        ("vera(rank=2) + vera(rank=2, where='ffn')", "has 2 sets of `A`, `B`; PEFT has one"),
    ):
        with pytest.raises(ExchangeError, match=words):
            save_peft(dt.attach(ZOO["bert"].build(0), spec), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_of_another_model_of_the_hub_is_refused(tmp_path: Path) -> None:
    """PEFT loads it without a word: huggingface/peft 1932."""
    case = ZOO["bert"]
    theirs(case, tmp_path, r=2, lora_alpha=4, target_modules=["query"])
    file = tmp_path / "adapter_config.json"
    for name, told, good in (
        ("org/one", "org/two", False), ("org/one", "org/one", True), ("/home/a/b", "org/two", True),
    ):  # fmt: skip
        told_of = json.loads(file.read_text()) | {"base_model_name_or_path": told}
        file.write_text(json.dumps(told_of))
        model: Any = case.build(0)
        model.name_or_path = name
        if good:
            load_peft(tmp_path, model)
            continue
        with pytest.raises(ExchangeError, match="trained on `org/two` and this model is `org/one`"):
            load_peft(tmp_path, model)
        assert load_peft(tmp_path, model, force=True).count()


@pytest.mark.parametrize("name", ["query", "self", "lora_A", "0", "v1.5", "org/name", "lora", "a"])
def test_names_of_deltas_mean_nothing_to_a_file(name: str, tmp_path: Path) -> None:
    """PEFT writes none or half of the tensors under the first four, and refuses the fifth."""
    case = ZOO["bert"]
    model = case.build(0)
    other = dt.attach(model, "lora(rank=3)", name="other")
    delta = dt.attach(model, "lora(rank=2)", name=name)
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(torch.randn(delta.vector().shape, generator=draw))
    save_peft(delta, tmp_path / "saved")
    other.detach()
    again = load_peft(tmp_path / "saved", case.build(0), name=name)
    assert torch.equal(again.vector(), delta.vector()) and again.name == name
    assert_close(case.run(again.model), case.run(model))


def test_a_plain_load_says_who_reads_it(tmp_path: Path) -> None:
    theirs(ZOO["bert"], tmp_path, r=2, lora_alpha=4, target_modules=["query"])
    with pytest.raises(StoreError, match=r"a checkpoint of PEFT; `deltune\.load_peft` reads it"):
        dt.load(tmp_path, ZOO["bert"].build(0))


BIASES = {
    "lora_only": {"bias": "lora_only"},
    "all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "both": {"bias": "all", "lora_bias": True, "use_rslora": True},
}


@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_biases_beside_lora_both_ways(name: str, form: str, tmp_path: Path) -> None:
    case = ZOO[name]
    made = theirs(case, tmp_path / "theirs", **forms(name)["patterns"], **BIASES[form])
    delta = both_ways(case, made, tmp_path)
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {unit.spec.kind for unit in delta.tree.units} >= {"lora", "bitfit"}
    assert told["bias"] == ("all" if form in ("all", "both") else "lora_only")
    if form in ("lora_only", "all"):
        heads = ("classifier.modules_to_save.bias", "classifier.original_module.bias")
        there = names(tmp_path / "theirs")
        assert {one for one in there if not one[0].endswith(heads)} == names(tmp_path / "ours")
    delta.scale = -0.7
    save_peft(delta, tmp_path / "scaled")
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "scaled")
    assert_close(case.run(again.eval()), case.run(delta.model))


def test_biases_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    theirs(ZOO["llama"], tmp_path / "a", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ExchangeError, match=r"q_proj\.bias`, and LlamaForCausalLM has no bias"):
        load_peft(tmp_path / "a", ZOO["llama"].build(0))
    case = ZOO["bert"]
    theirs(case, tmp_path / "b", target_modules=["query"], bias="all")
    file = tmp_path / "b" / "adapter_model.safetensors"
    whole = load_file(file)
    again = next(name for name in whole if name.endswith("modules_to_save.bias"))
    save_file(whole | {again: 2 * whole[again]}, file, {"format": "pt"})
    with pytest.raises(ExchangeError, match=r"two values for `classifier\.bias`"):
        load_peft(tmp_path / "b", case.build(0))
    delta = dt.attach(ZOO["torch-encoder"].build(0), "lora(where='ffn') + bitfit")
    with pytest.raises(ExchangeError, match=r"in_proj_bias`, which PEFT counts among no biases"):
        save_peft(delta, tmp_path / "c")


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_stored_experts_both_ways(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    made = theirs(
        case, tmp_path / "theirs", r=2, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=[*EXPERTS, "mlp.gate.weight"], rank_pattern={"experts.down_proj": 3},
        alpha_pattern={r"mlp\.gate\.weight": 7}, task_type="CAUSAL_LM",
    )  # fmt: skip
    delta = both_ways(case, made, tmp_path)
    assert names(tmp_path / "theirs") == names(tmp_path / "ours")
    assert {tuple(u.A.shape) for u in delta.tree.units if "expert" in u.site.key} >= {(4, 2, 16)}


def test_roles_of_stored_experts_become_one_pair(tmp_path: Path) -> None:
    case = ZOO["mixtral"]
    delta = dt.attach(case.build(0), "lora(rank=2, alpha=6.0, where='attn.q, ffn')")
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(0.3 * torch.randn(delta.vector().shape, generator=draw))
    delta.scale = 0.7
    save_peft(delta, tmp_path / "ours")
    again: Any = peft.PeftModel.from_pretrained(case.build(0), tmp_path / "ours")
    assert_close(case.run(again.eval()), case.run(delta.model))
    back = load_peft(tmp_path / "ours", case.build(0))
    assert_close(case.run(back.model), case.run(delta.model))
    for text in ("lora(where='ffn.down') + lora(dropout=0.1)", "dora(where='ffn.down')"):
        with pytest.raises(ExchangeError, match=r"has the dropouts|has magnitudes for its `down_"):
            save_peft(dt.attach(case.build(0), text), tmp_path / "no")


def test_experts_of_an_older_peft_read_what_is_given(tmp_path: Path) -> None:
    """Before 0.19.1 A reads the stored parameter's second dimension: its formula, written out."""
    case = ZOO["mixtral"]
    task = {"task_type": "CAUSAL_LM"}
    theirs(case, tmp_path, r=2, target_modules=[], target_parameters=EXPERTS[1:], **task)
    file, about = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    draw, tensors = torch.Generator().manual_seed(3), dict[str, torch.Tensor]()
    for layer in range(2):
        start = f"base_model.model.model.layers.{layer}.mlp.experts.lora_"
        tensors[f"{start}A.weight"] = torch.randn(4 * 2, 16, generator=draw)
        tensors[f"{start}B.weight"] = torch.randn(24, 2 * 4, generator=draw)
    save_file(tensors, file, {"format": "pt"})
    about.write_text(json.dumps(json.loads(about.read_text()) | {"peft_version": "0.18.1"}))
    delta = load_peft(tmp_path, case.build(0)).merge()
    model, plain = dict(delta.model.named_parameters()), dict(case.build(0).named_parameters())
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        A, B = (tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
        change = torch.einsum("ore,eri->eio", B.view(24, 2, 4), A.view(4, 2, 16)) * 8 / 2
        assert_close(model[f"{name}.down_proj"] - plain[f"{name}.down_proj"], change)
    save_file({n: t[:-1].contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ExchangeError, match=r"down_proj` holds 4 experts \(16, 24\)"):
        load_peft(tmp_path, case.build(0))
    save_file({n: t for n, t in tensors.items() if "layers.0" in n}, file, {"format": "pt"})
    with pytest.raises(ExchangeError, match=r"lacks the pair `model\.layers\.1\.mlp\.experts`"):
        load_peft(tmp_path, case.build(0))


BESIDE = {
    "bert": ["pooler", "word_embeddings"], "gpt2": ["ln_f", "wpe"],
    "llama": ["embed_tokens", "lm_head", "norm"], "t5": ["relative_attention_bias", "layer_norm"],
}  # fmt: skip


def stored(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")[f"base_model.model.{name}"]


@pytest.mark.parametrize("form", ["lora", "ia3", "vera"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_modules_beside_a_method_both_ways(name: str, form: str, tmp_path: Path) -> None:
    """`norm` is the end of the names of three norms of a layer of Llama, and PEFT takes all."""
    config, options = {
        "lora": (peft.LoraConfig, forms(name)["patterns"]),
        "ia3": (peft.IA3Config, {"target_modules": IA3[name][0], "feedforward_modules": []}),
        "vera": (peft.VeraConfig, {"r": 5, "target_modules": list(NAMES[name][:1])}),
    }[form]
    case = ZOO[name]
    if name == "gpt2":
        options["fan_in_fan_out"] = True
    made = theirs(case, tmp_path / "theirs", config, modules_to_save=BESIDE[name], **options)
    delta = both_ways(case, made, tmp_path)
    own = [{n for n in names(tmp_path / at) if "vera_A" not in n[0] and "vera_B" not in n[0]}
           for at in ("theirs", "ours")]  # fmt: skip
    assert own[0] == own[1]
    saved = {unit.site.path for unit in delta.tree.units if unit.spec.kind == "full"}
    whole = {n for n, m in made.base_model.model.named_modules() if hasattr(m, "modules_to_save")}
    assert all(any(p == n or p.startswith(f"{n}.") for n in whole) for p in saved) and saved
    delta.scale = 0.7 if form != "ia3" else 1.0
    save_peft(delta, tmp_path / "scaled")
    again: Any = peft.PeftModel.from_pretrained(for_peft(case.build(0)), tmp_path / "scaled")
    assert_close(case.run(again.eval()), case.run(delta.model))
    oracle = case.run(delta.model)
    assert_close(case.run(delta.merge().model), oracle)


def test_one_weight_in_several_modules_beside_lora(tmp_path: Path) -> None:
    """PEFT's `ensure_weight_tying` keeps it one; without, each module has its own, which a model
    has that no longer ties them."""
    case, tied = ZOO["gpt2"], ["wte", "lm_head"]
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    made = theirs(
        case, tmp_path / "theirs", modules_to_save=list(tied), ensure_weight_tying=True, **options
    )
    delta = both_ways(case, made, tmp_path)
    assert sum(unit.spec.kind == "full" for unit in delta.tree.units) == 1
    assert names(tmp_path / "theirs") == names(tmp_path / "ours")
    for at, several in (("parted", list(tied)), ("part", ["wte"])):
        parted = theirs(case, tmp_path / at, modules_to_save=several, **options)
        words = r"a part of `transformer\.wte\.weight`, `lm_head\.weight` alone, or several ones"
        with pytest.raises(ExchangeError, match=words):
            load_peft(tmp_path / at, case.build(0))
        model: Any = case.build(0)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        assert_close(case.run(load_peft(tmp_path / at, model).model), case.run(parted))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_embeddings_are_written_at_each_place(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    delta = dt.attach(case.build(0), "lora(rank=2, where='attn.o') + full(where='embed')")
    draw = torch.Generator().manual_seed(1)
    delta.load_vector(0.3 * torch.randn(delta.vector().shape, generator=draw))
    save_peft(delta, tmp_path / "ours")
    assert_acts(case, delta)
    again: Any = peft.PeftModel.from_pretrained(for_peft(case.build(0)), tmp_path / "ours")
    assert_close(case.run(again.eval()), case.run(delta.model))
    back = load_peft(tmp_path / "ours", case.build(0))
    assert_close(case.run(back.model), case.run(delta.model))


def test_embeddings_of_more_tokens_are_there_three_times(tmp_path: Path) -> None:
    """Of a model with another vocabulary than its folder's PEFT writes the tables with all their
    names: what was before, and each value twice."""
    import transformers as hf

    case, folder = ZOO["llama"], tmp_path / "base"
    case.build(0).save_pretrained(folder)  # type: ignore
    plain: Any = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.resize_token_embeddings(70)
    plain.save_pretrained(tmp_path / "larger")
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    made: Any = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.1))
    made.save_pretrained(tmp_path / "theirs")
    there = {n.partition("lm_head")[2] for n, _ in names(tmp_path / "theirs") if "lm_head" in n}
    assert there == {".weight", ".modules_to_save.weight", ".original_module.weight"}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "larger").eval()
    delta = load_peft(tmp_path / "theirs", model, force=True)
    assert_close(case.run(delta.model), case.run(made.eval()))


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("bert", "lora + full(where='attn.q')", "`.*query` as a whole and has `.*query.lora_A"),
        ("bert", "lora + bitfit + full(where='norm')", "LayerNorm` as a whole and has `.*bias`"),
        ("bert", "full(where='norm')", "is of `full`; PEFT keeps one method"),
        ("llama", "prompt(tokens=2) + full(where='norm')", "whole beside `prompt`, where PEFT"),
        ("llama", "tokens(ids=(5,)) + full(where='head')", "whole beside `tokens`, where PEFT"),
    ],
)
def test_modules_that_peft_would_not_find_back_are_not_written(
    name: str, spec: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ExchangeError, match=words):
        save_peft(dt.attach(ZOO[name].build(0), spec), tmp_path / "ours")


def test_a_name_that_is_the_end_of_others_is_not_written(tmp_path: Path) -> None:
    import transformers as hf

    case = ZOO["llama"]
    plain: Any = case.build(0)
    delta = dt.attach(plain.model, "lora + full(where='re:norm')")
    assert isinstance(plain.model, hf.LlamaModel)
    with pytest.raises(ExchangeError, match=r"would take `layers\.0\.input_layernorm`, .* for one"):
        save_peft(delta, tmp_path / "ours")


def test_biases_by_two_words_are_refused(tmp_path: Path) -> None:
    options = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]}
    theirs(ZOO["bert"], tmp_path, **options)
    with pytest.raises(ExchangeError, match=r"the biases of `bert\.pooler` twice"):
        load_peft(tmp_path, ZOO["bert"].build(0))
