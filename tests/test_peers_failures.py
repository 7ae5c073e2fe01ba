"""What PEFT 0.21.2 does without a word and gets wrong: here each is right, or is refused.

Oracles: PEFT itself, where the failure shows in numbers; the formula; the delta alone. What its
prompts get wrong in batches and caches is in `test_prompts.py` and `test_prefixes.py`.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltune as dt
from deltune.errors import AttachError, ExchangeError, TrainError, WhereError
from test_routing import alone, two
from zoo import ZOO

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
BERT = ZOO["bert"]


def moved(model: nn.Module, spec: str, name: str = "delta") -> dt.Delta:
    """A delta away from its start."""
    delta = dt.attach(model, spec, name=name)
    draw = torch.Generator().manual_seed(len(name))
    return delta.load_vector(delta.vector() + 0.3 * torch.randn(delta.layout.size, generator=draw))


def test_rows_are_routed_for_methods_other_than_lora() -> None:
    """PEFT drops `adapter_names` for 32 of its methods, and takes names that do not exist."""
    model: Any = peft.get_peft_model(BERT.build(0), peft.IA3Config(task_type="SEQ_CLS"))
    rows = {"adapter_names": ["no", "such", "name"]}
    theirs = model.eval()(**BERT.batch(0), **rows).logits
    assert torch.equal(theirs, model(**BERT.batch(0)).logits)
    ours = two(BERT, "ia3")
    with pytest.raises(AttachError, match="row 0 names the delta `no`"), dt.route(ours, ["no"] * 3):
        pass
    names: list[str | None] = ["a", "b", None]
    with dt.route(ours, names), torch.no_grad():
        found = BERT.run(ours)
    assert torch.allclose(found, alone(BERT, ours, names), atol=1e-6)


def test_a_place_that_is_not_there_is_named_though_others_are() -> None:
    """PEFT ignores a wrong entry of `target_modules` if another one matches."""
    targets = {"target_modules": ["query", "valu"]}
    peft.get_peft_model(BERT.build(0), peft.LoraConfig(task_type="SEQ_CLS", **targets))
    with pytest.raises(WhereError, match=r"`attn\.valu`"):
        dt.attach(BERT.build(0), "lora(where='attn.q, attn.valu')")


def test_layers_that_are_not_there_are_named_though_others_are() -> None:
    """PEFT ignores those of `layers_to_transform` that the model has not."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query"], layers_to_transform=[1, 9]
    )
    peft.get_peft_model(BERT.build(0), config)
    with pytest.raises(WhereError, match="reaches to 9, and the model has 2 layers"):
        dt.attach(BERT.build(0), "lora[1:9]")


def test_a_part_to_be_trained_beside_has_to_be_a_module() -> None:
    """PEFT ignores names in `modules_to_save` that match nothing."""
    config = peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["no_such_head"])
    peft.get_peft_model(BERT.build(0), config)
    with pytest.raises(WhereError, match="no_such_head"):
        dt.attach(BERT.build(0), "lora + norms(where='no_such_head')")


class Tops(nn.Module):
    """Two modules of which the name of one ends like the name of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.top, self.desktop = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.top(self.first(x)) + self.desktop(x)


def test_a_name_means_that_module_and_none_that_ends_like_it(tmp_path: Path) -> None:
    """PEFT matches `modules_to_save` by the end of a module's name, and trains all that match."""
    config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["top"])
    made: Any = peft.get_peft_model(Tops(), config)
    assert any("desktop" in name for name, p in made.named_parameters() if p.requires_grad)
    model = Tops()
    delta = dt.attach(model, "lora(rank=2, where='first') + bitfit(where='top')")
    assert {slot.name.rpartition(".")[0] for slot in delta.layout} == {"lora.first", "bitfit.top"}
    delta.detach()
    made.save_pretrained(tmp_path)
    read = dt.load_peft(tmp_path, model)  # of both, since the file has both
    assert str(read.spec).endswith("full(where='top, desktop')")
    with pytest.raises(ExchangeError, match="would take `desktop` for one of `top`"):
        dt.save_peft(
            dt.attach(Tops(), "lora(rank=2, where='first') + full(where='top')"), tmp_path / "no"
        )


def test_keys_that_no_one_knows_are_not_passed_over(tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` says nothing of extra and missing keys."""
    from safetensors.torch import load_file, save_file

    made: Any = peft.get_peft_model(BERT.build(0), peft.LoraConfig(task_type="SEQ_CLS", r=2))
    made.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for changed in (
        tensors | {"base_model.model.more.weight": torch.ones(2)},
        {name: tensor for name, tensor in tensors.items() if "layer.0" not in name or "A" in name},
    ):
        save_file(changed, file)
        peft.PeftModel.from_pretrained(BERT.build(0), tmp_path)
        model = BERT.build(0)
        with pytest.raises(ExchangeError):
            dt.load_peft(tmp_path, model)
        assert not dt.deltas(model)


@pytest.mark.parametrize("name", ["attention", "self", "weight", "query", "0", "lora_A", "v1.5"])
def test_names_are_only_names(name: str, tmp_path: Path) -> None:
    """PEFT writes empty or halved files of `default` beside an adapter of such a name, and takes no
    dots."""
    model = BERT.build(0)
    delta = moved(model, "lora(rank=2)", "default")
    moved(model, "lora(rank=2)", name).disable()
    again = dt.load(delta.save(tmp_path / "one"), BERT.build(0))
    assert torch.equal(again.vector(), delta.vector())
    with torch.no_grad():
        assert torch.equal(BERT.run(again.model), BERT.run(model))


def test_changing_one_delta_leaves_the_one_whose_name_begins_alike() -> None:
    """Hot-swapping `foo` zeroes `foobar` in PEFT."""
    model = BERT.build(0)
    other = moved(model, "lora(rank=2)", "foobar")
    before, delta = other.vector(), moved(model, "lora(rank=2)", "foo")
    delta.load_vector(torch.zeros(delta.layout.size))
    delta.detach()
    assert torch.equal(other.vector(), before)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    """PEFT does not compare the base model on loading."""
    folder = moved(BERT.build(0), "lora(rank=2)").save(tmp_path / "one")
    with pytest.raises(dt.DeltuneError, match="trained on another backbone"):
        dt.load(folder, BERT.build(1))


def test_a_name_that_is_taken_is_refused() -> None:
    """`add_weighted_adapter` to an existing name does nothing in PEFT."""
    model = BERT.build(0)
    dt.attach(model, "lora(rank=2)", name="one")
    with pytest.raises(AttachError, match="`one` is attached already"):
        dt.attach(model, "lora(rank=3)", name="one")


def test_a_model_in_eval_mode_stays_in_it() -> None:
    """PEFT leaves the model in train mode, and the adapter's dropout on."""
    model = BERT.build(0).eval()
    dt.attach(model, "lora(rank=2, dropout=0.5)")
    assert not any(module.training for module in model.modules())


def test_adalora_is_not_trained_as_a_plain_lora() -> None:
    """PEFT trains it at its first rank unless the user calls `update_and_allocate`."""
    model = BERT.build(0)
    dt.attach(model, "adalora(rank=3, target=2)")
    with pytest.raises(TrainError, match="`adalora` asks for more"):
        BERT.run(model.train())


def test_a_merge_into_bfloat16_rounds_the_sum_once_and_comes_off_exactly() -> None:
    """PEFT adds in bfloat16 and subtracts again, which leaves the weights changed."""
    model = BERT.build(0).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    delta = moved(model, "lora(rank=2)")
    query: Any = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    A, B = (delta.tensors()[f"lora.bert.encoder.layer.0.attention.self.query.{n}"] for n in "AB")
    wide = query.weight.float() + 8.0 * B @ A
    delta.merge()
    assert torch.equal(query.weight, wide.to(torch.bfloat16))
    delta.detach()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_tied_embeddings_stay_tied_or_say_that_they_are_not() -> None:
    """In PEFT a merged adapter on one of two tied modules silently breaks the saved model."""
    case = ZOO["gpt2"]
    model: Any = case.build(0)
    moved(model, "sparse(density=0.5, where='embed')")
    head, table = model.lm_head, model.get_input_embeddings()
    dt.deltas(model)["delta"].merge()
    assert head.weight is table.weight and model.config.tie_word_embeddings
    dt.deltas(model)["delta"].detach()
    delta = moved(model, "lora(rank=2, where='embed')")
    with torch.no_grad():
        acting = case.run(model)
        delta.merge()
        assert (case.run(model) - acting).abs().max() < 1e-4
    assert model.config.tie_word_embeddings == (head.weight is table.weight)


class Doubled(nn.Linear):
    """A layer of a third party."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_layers_of_a_third_party_are_served_and_saved(tmp_path: Path) -> None:
    """PEFT 0.21.0 saved empty adapters of wrapped layers."""

    def build() -> nn.Module:
        model: Any = BERT.build(0)
        for layer in model.bert.encoder.layer:
            old = layer.attention.self.query
            layer.attention.self.query = Doubled(old.in_features, old.out_features)
            layer.attention.self.query.load_state_dict(old.state_dict())
        return model.eval()

    delta = moved(build(), "lora(rank=2)")
    again = dt.load(delta.save(tmp_path / "one"), build())
    assert torch.equal(again.vector(), delta.vector()) and again.vector().abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(BERT.run(again.model), BERT.run(delta.model))
        delta.disable()
        assert not torch.equal(BERT.run(again.model), BERT.run(delta.model))
