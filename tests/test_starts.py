"""Where LoRA starts, and how its halves are trained. Oracles: PEFT 0.21.2's own initialisations and
optimisers; the definitions, written out; the backbone itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import AttachError, SpecError, TrainError
from deltune.training.course import Course
from deltune.training.optim import groups
from test_exchange_peft import both_ways, theirs
from test_peft_parity import assert_close
from zoo import ZOO, Case

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = {
    "bert": ["query", "value", "intermediate.dense"], "gpt2": ["c_attn"], "llama": ["down_proj"],
}  # fmt: skip
ROLES = {"bert": "attn.q, attn.v, ffn.up", "gpt2": "attn.qkv", "llama": "ffn.down"}
TASK = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}


def whole_rows(case: Case) -> dict[str, Tensor]:
    """A batch without padding."""
    ids = torch.randint(4, 60, (6, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def shown(case: Case, model: nn.Module) -> Any:
    """Losses of one batch."""

    def given(most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        yield case.output(model(**whole_rows(case))).square().mean()

    return given


def wrapped(name: str, **options: Any) -> Any:
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    config = peft.LoraConfig(
        task_type=TASK[name], r=3, lora_alpha=5, target_modules=NAMES[name], **fan, **options
    )
    return peft.get_peft_model(ZOO[name].build(0), config)


def compare(made: Any, delta: dt.Delta, bound: float = 1e-5) -> None:
    """What PEFT took from each weight, and what its pair gives back, are ours."""
    plain = dict(delta.model.named_parameters())
    found = {unit.site.path: unit for unit in delta.tree.units if hasattr(unit, "A")}
    layers = dict(made.base_model.model.named_modules())
    assert found.keys() == {path for path, layer in layers.items() if hasattr(layer, "lora_A")}
    for path, unit in found.items():
        layer = layers[path]
        weight = plain[f"{path}.weight"]
        back = unit.spec.update(unit).scale * (unit.B @ unit.A)
        back = back.mT if unit.site.transposed else back
        assert (back - layer.get_delta_weight("default")).abs().max() < bound
        assert (weight - back - layer.base_layer.weight).abs().max() < bound
        assert back.abs().max() > 100 * bound


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("bert", "pissa"),
        ("bert", "olora"),
        ("gpt2", "pissa"),
        ("llama", "pissa"),
        ("llama", "olora"),
    ],
)
def test_starts_from_the_weight_are_peft_s(name: str, init: str) -> None:
    """Not OLoRA on GPT-2: PEFT takes the weight of a `Conv1D` the wrong way round."""
    case = ZOO[name]
    made = wrapped(name, init_lora_weights=init, use_rslora=True)
    text = f"lora(rank=3, alpha=5.0, scaling='root', init='{init}', where='{ROLES[name]}')"
    model = case.build(0)
    before = case.run(model)
    delta = dt.attach(model, text)
    compare(made, delta)
    assert_close(case.run(model), before)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_starts_by_corda_are_peft_s(name: str, method: str) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    case, batch = ZOO[name], whole_rows(ZOO[name])
    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    config = peft.LoraConfig(
        task_type=TASK[name], r=3, lora_alpha=5, target_modules=NAMES[name], **fan,
        init_lora_weights="corda", corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    other: Any = case.build(0)
    # PEFT takes the tokens of one example at a time
    preprocess_corda(other, config, run_model=lambda: other(**{n: t for n, t in flat(batch)}))
    made = peft.get_peft_model(other, config)
    init = "corda" if method == "ipm" else "corda_kpm"
    model = case.build(0)
    text = f"lora(rank=3, alpha=5.0, init='{init}', where='{ROLES[name]}')"
    before, delta = case.run(model), dt.attach(model, text)
    with Course(model) as course:
        course.prepare(flat_losses(case, model))
    compare(made, delta, 1e-4)  # the inverse of C magnifies the roundings of both
    assert_close(case.run(model), before)


def flat(batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The first row alone."""
    return ((name, tensor[:1]) for name, tensor in batch.items())


def flat_losses(case: Case, model: nn.Module) -> Any:
    def given(most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        assert (most, size, training) == (256, 1, False)
        yield case.output(model(**dict(flat(whole_rows(case))))).square().mean()

    return given


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_starts_by_eva_are_peft_s_and_are_made_once(kind: str) -> None:
    """PEFT's directions are the means of random sketches; they span what ours do."""
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    case = ZOO["bert"]
    eva = peft.EvaConfig(rho=1.0)
    made = wrapped("bert", init_lora_weights="eva", eva_config=eva, use_dora=kind == "dora")
    initialize_lora_eva_weights(made, [whole_rows(case)], show_progress_bar=False)
    model = case.build(0)
    before = case.run(model)
    delta = dt.attach(model, f"{kind}(rank=3, alpha=5.0, init='eva', where='{ROLES['bert']}')")
    with pytest.raises(TrainError, match="has seen none"), Course(model) as course:
        course.before_step(0, 1)
    with Course(model) as course:
        course.prepare(shown(case, model))
        first = delta.vector()
        delta.load_vector(2 * first)
        course.prepare(shown(case, model))
        assert torch.equal(delta.vector(), 2 * first)
        delta.load_vector(first)
        course.before_step(0, 1)
    assert_close(case.run(model), before)
    for unit in delta.tree.units:
        if hasattr(unit, "A"):
            layer = made.base_model.model.get_submodule(unit.site.path)
            A = layer.lora_A["default"].weight
            assert_close(unit.A @ unit.A.mT, torch.eye(3))
            spans = torch.linalg.svdvals(A @ unit.A.mT) / torch.linalg.svdvals(A)
            assert (spans - 1).abs().max() < 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_checkpoints_that_start_from_the_weight_both_ways(
    init: str, dora: bool, tmp_path: Path
) -> None:
    """Theirs name the start and are read as such; ours are plain, of twice the rank."""
    case = ZOO["bert"]
    made = theirs(
        case, tmp_path / "theirs", r=3, lora_alpha=5, target_modules=NAMES["bert"],
        init_lora_weights=init, use_dora=dora,
    )  # fmt: skip
    delta = both_ways(case, made, tmp_path)
    assert f"init='{init}'" in str(delta.spec)
    acting = case.run(delta.model)
    loaded = dt.load(delta.save(tmp_path / "native"), case.build(0))
    assert torch.equal(case.run(loaded.model), acting)
    plain = delta.fold()
    assert "init" not in str(plain.spec) and "rank=6" in str(plain.spec)
    assert_close(case.run(plain.model), acting)


def test_eva_checkpoints_are_plain_and_others_that_changed_the_weights_are_refused(
    tmp_path: Path,
) -> None:
    case = ZOO["bert"]
    both_ways(case, theirs(case, tmp_path / "theirs", init_lora_weights="eva"), tmp_path)
    file = tmp_path / "theirs" / "adapter_config.json"
    told = json.loads(file.read_text())
    for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "new"):
        file.write_text(json.dumps(told | {"init_lora_weights": start}))
        with pytest.raises(dt.DeltuneError, match=f"init_lora_weights is '{start}'"):
            dt.load_peft(tmp_path / "theirs", case.build(0))


@pytest.mark.parametrize("rate", [1.0, 8.0])
def test_lora_plus_steps_as_peft_s_optimiser(rate: float) -> None:
    from peft.optimizers import create_loraplus_optimizer

    case = ZOO["llama"]
    made = wrapped("llama").eval()
    model = case.build(0)
    delta = dt.attach(model, f"lora(rank=3, alpha=5.0, rate={rate}, where='ffn.down')")
    pairs = halves(made, delta)
    optimiser = create_loraplus_optimizer(made, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=rate)
    steps(case, made, model, optimiser, delta, rate)
    for ours, other in pairs:
        assert_close(ours, other)


def test_lora_fa_trains_b_alone_and_steps_as_peft_s_optimiser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PEFT's multiplies the gradient by the inverse of A A^T, which Adam does not see if that is a
    multiple of the identity."""
    from peft.optimizers import lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    case = ZOO["llama"]
    made = wrapped("llama").eval()
    model = case.build(0)
    delta = dt.attach(model, "lora(rank=3, alpha=5.0, frozen=True, where='ffn.down')")
    assert all(name.endswith(".B") for name in delta.tree.named())
    for unit in delta.tree.units:
        nn.init.orthogonal_(unit.A)
    kept = {name: t.clone() for name, t in delta.tensors().items() if name.endswith(".A")}
    pairs = halves(made, delta)
    optimiser = lorafa.create_lorafa_optimizer(made, r=3, lora_alpha=5, lr=1e-2)
    for group in optimiser.param_groups:
        group["eps"] = 1e-12
    steps(case, made, model, optimiser, delta, 1.0, eps=1e-12)
    for ours, other in pairs:
        assert (ours - other).abs().max() < 1e-4
    assert all(torch.equal(delta.tensors()[name], value) for name, value in kept.items())


def halves(made: Any, delta: dt.Delta) -> list[tuple[Tensor, Tensor]]:
    """Ours and PEFT's tensors, made equal."""
    found = []
    for unit in delta.tree.units:
        layer = made.base_model.model.get_submodule(unit.site.path)
        for ours, one in ((unit.A, layer.lora_A), (unit.B, layer.lora_B)):
            one["default"].weight.data.copy_(ours)
            found.append((ours, one["default"].weight))
    return found


def steps(
    case: Case, made: Any, model: nn.Module, optimiser: Any, delta: dt.Delta, rate: float,
    eps: float = 1e-8,
) -> None:  # fmt: skip
    """Two steps of both."""
    with Course(model) as course:
        chosen = groups(delta.parameters(), course, 1e-2, 0.0)
        assert {group["factor"] for group in chosen} == {1.0, rate}
        ours = torch.optim.AdamW(chosen, lr=1e-2, eps=eps)
        for step in range(2):
            for one, by in ((made, optimiser), (model, ours)):
                by.zero_grad()
                case.run(one, step).square().mean().backward()
                by.step()


def test_a_start_that_cannot_be_is_refused() -> None:
    def refused(name: str, text: str, words: str) -> None:
        with pytest.raises(dt.DeltuneError, match=words):
            dt.attach(ZOO[name].build(0), text)

    refused("bert", "lora(init='pissa', alpha=0.0)", "needs a scale other than 0")
    refused("mixtral", "lora(rank=2, init='corda', where='ffn')", "looks at what a linear map")
    refused("bert", "lora(rank=2, frozen=True, where='embed')", "A starts at 0")
    refused("bert", "lora(rank=2, init='pisa')", "is not one of")
    refused("bert", "lora(rank=2, rate=0.0)", "`rate` must be above 0")
    model = ZOO["bert"].build(0)
    delta = dt.attach(model, "lora(rank=12, init='pissa')")
    with pytest.raises(SpecError, match="rank 24 is above the matrix"):
        delta.fold()
    assert delta.enabled
    delta.detach()
    dt.attach(model, "lora(rank=2, init='eva')")
    with pytest.raises(TrainError, match="`lora` asks for more"):
        ZOO["bert"].run(model.train())
    dt.attach(ZOO["torch-mlp"].build(0), "lora(rank=2, init='eva', where='0')")
    with pytest.raises(AttachError, match="cannot be merged"):
        dt.attach(ZOO["bert"].build(0), "lora(rank=2, init='pissa', gate=True)").merge()


def test_old_specs_are_what_they_were() -> None:
    assert set(dt.LoRA().to_json()) == {
        "kind", "rank", "alpha", "dropout", "scaling", "gate", "where", "within",
    }  # fmt: skip
    told = dt.LoRA(init="pissa", rate=2.0).to_json()
    assert (told["init"], told["rate"]) == ("pissa", 2.0) and "frozen" not in told
