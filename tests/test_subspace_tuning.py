"""Codes trained and decoded. Oracles: training of the delta itself in the space of all directions,
gradients by the chain rule and by differences, scores by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune as dt
from deltune.errors import DeltuneError, StoreError, SubspaceError
from deltune.subspace.learned import fit
from deltune.subspace.linear import drawn, principal
from deltune.subspace.maps import Matrix
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Subspace
from deltune.subspace.store import load, save
from deltune.subspace.tuning import Decoded, tune
from deltune.tasks.objectives import objective_for
from tasks_toys import tokenizer
from test_subspace_learned import small
from test_tasks_matching import backbone, task

pytestmark = pytest.mark.xdist_group("tuning")

SPECS = {"Bits": "bitfit", "LoRA": "lora(rank=2, where='attn.q')"}
SETTINGS = dt.TrainSettings(
    learning_rate=0.05,
    num_train_epochs=3,
    per_device_train_batch_size=2,
    eval_steps="epoch",
    allow_unused=True,  # the pooler is beside the mean
)


def solved(folder: Path, specs: dict[str, str] = SPECS, tasks: int = 4) -> Solutions:
    """Solutions in saved deltas of a tiny backbone, drawn and not trained."""
    model, draw = backbone(), torch.Generator().manual_seed(0)
    starts, folders = {}, {}
    for name, spec in specs.items():
        delta = dt.attach(model, spec, seed=3, head=False)
        starts[name], first = delta.save(folder / name / "start"), delta.vector()
        folders[name] = {}
        for one in range(tasks):
            delta.load_vector(first + 0.3 * torch.randn(len(first), generator=draw))
            folders[name][f"t{one}"] = delta.save(folder / name / f"t{one}")
        delta.detach()
    return Solutions.saved(folders, starts)


@pytest.fixture(scope="module")
def solutions(tmp_path_factory: pytest.TempPathFactory) -> Solutions:
    return solved(tmp_path_factory.mktemp("solutions"))


def every_direction(solutions: Solutions) -> Subspace:
    """The space in which a code is the change of the biases itself."""
    start = solutions.starts["Bits"]
    ups: Any = {"Bits": Matrix(torch.eye(len(start)))}
    deltas = {"Bits": solutions.deltas["Bits"]}
    return Subspace(ups, {"Bits": start}, {}, (), deltas=deltas)


def test_in_the_space_of_all_directions_it_is_the_training_of_the_delta(
    solutions: Solutions,
) -> None:
    toy, tok, model = task(), tokenizer("bert"), backbone()
    found = tune(every_direction(solutions), model, tok, toy, "Bits", SETTINGS, std=0.0)
    delta = dt.load(solutions.deltas["Bits"], model)
    result = dt.train(model, tok, toy, delta, SETTINGS, objective=objective_for(toy, model, tok))
    assert result.curve[-1][0] == 9 and result.losses[-1] < result.losses[0]
    assert found.training.losses == pytest.approx(result.losses, abs=1e-5)
    change = delta.vector() - solutions.starts["Bits"]
    assert change.abs().max() > 0.01
    torch.testing.assert_close(found.code, change, atol=1e-4, rtol=1e-3)
    test = dt.evaluate(model, tok, toy, "test", objective=objective_for(toy, model, tok)).value
    assert found.tests == {"Bits": test}


@pytest.mark.parametrize("method", SPECS)
def test_the_gradient_of_a_code_is_that_of_the_vector_through_the_map(
    solutions: Solutions, method: str
) -> None:
    space = double(principal(solutions, 3))
    model, toy = backbone().double(), task()
    objective, delta = objective_for(toy, model, tokenizer("bert")), space.attach(model, method)
    batch = objective.collate(objective.encode(toy.train))
    decoded = Decoded(delta, space, method, torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))
    loss = objective.loss(decoded, batch)
    (found,) = torch.autograd.grad(loss, decoded.code)
    vector = space.decode(method, decoded.code.detach()).requires_grad_()

    class Called(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return delta.call(vector, **inputs)

    (own,) = torch.autograd.grad(objective.loss(Called(), batch), vector)
    torch.testing.assert_close(found, own @ space.ups[method].weight, atol=1e-12, rtol=1e-9)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def value(code: Tensor) -> Tensor:  # the objective itself is of float32
        out = torch.func.functional_call(decoded, {"code": code}, (), inputs)
        return out.last_hidden_state.sin().mean()

    assert torch.autograd.gradcheck(value, decoded.code.detach().requires_grad_())


def double(space: Subspace) -> Subspace:
    ups: Any = {n: Matrix(up.weight.double()) for n, up in space.ups.items()}  # type: ignore
    starts = {name: start.double() for name, start in space.starts.items()}
    return dataclasses.replace(space, ups=ups, starts=starts)


def test_each_method_is_tested_with_its_own_decoding_and_the_model_stays(
    solutions: Solutions,
) -> None:
    space, model, toy, tok = principal(solutions, 2), backbone(), task(), tokenizer("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = tune(space, model, tok, toy, "LoRA", SETTINGS)
    assert found.code.shape == (2,) and found.method == "LoRA"
    for name, score in found.tests.items():
        delta = space.attach(model, name)
        delta.load_vector(space.starts[name] + space.ups[name].project(found.code))
        by_hand = dt.evaluate(model, tok, toy, "test", objective=objective_for(toy, model, tok))
        assert score == by_hand.value
        delta.detach()
    assert set(found.tests) == set(SPECS) and not dt.deltas(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    alone = tune(space, model, tok, toy, "LoRA", SETTINGS, decoders=["LoRA"])
    assert torch.equal(alone.code, found.code) and set(alone.tests) == {"LoRA"}
    other = dataclasses.replace(SETTINGS, seed=1)
    assert not torch.equal(tune(space, model, tok, toy, "LoRA", other).code, found.code)


def test_transfer_with_the_same_map_is_exact(solutions: Solutions) -> None:
    space = principal(solutions, 2)
    twice = {"one": "Bits", "two": "Bits"}
    same = Subspace(
        {name: space.ups[of] for name, of in twice.items()},
        {name: space.starts[of] for name, of in twice.items()},
        {name: space.codes[of] for name, of in twice.items()},
        space.tasks,
        deltas={name: space.deltas[of] for name, of in twice.items()},
    )
    found = tune(same, backbone(), tokenizer("bert"), task(), "one", SETTINGS)
    assert found.tests["one"] == found.tests["two"]
    assert torch.equal(same.decode("one", found.code), same.decode("two", found.code))


def spaces(solutions: Solutions) -> dict[str, Subspace]:
    return {
        "principal": principal(solutions, 2),
        "dense": drawn(solutions, 2),
        "fastfood": drawn(solutions, 2, seed=5, kind="fastfood"),
        "learned": fit(solutions, FitSettings(dimension=2, steps=3, activation="tanh")),
    }


@pytest.mark.parametrize("found", ["principal", "dense", "fastfood", "learned"])
def test_a_space_comes_back_from_its_folder(
    solutions: Solutions, found: str, tmp_path: Path
) -> None:
    space = spaces(solutions)[found]
    again = load(save(space, tmp_path / "space"))
    assert (again.tasks, again.methods, dict(again.about)) == (
        space.tasks, space.methods, dict(space.about)
    )  # fmt: skip
    code, model = torch.tensor([0.4, -1.0]), backbone()
    for name, rows in solutions.each():
        assert torch.equal(again.decode(name, code), space.decode(name, code))
        assert torch.equal(again.encode(name, rows), space.encode(name, rows))
        assert torch.equal(again.codes[name], space.codes[name])
        delta = again.attach(model, name)
        assert torch.equal(delta.vector(), space.starts[name])
        delta.detach()
    with pytest.raises(StoreError, match="exists"):
        save(space, tmp_path / "space")
    save(space, tmp_path / "space", overwrite=True)


def test_bad_folders_and_spaces_are_refused(solutions: Solutions, tmp_path: Path) -> None:
    space = principal(solutions, 2)
    folder = save(space, tmp_path / "space")
    with pytest.raises(StoreError, match="holds no subspace"):
        load(solutions.deltas["Bits"])
    with pytest.raises(StoreError, match=r"exists and is no subspace"):
        save(space, solutions.deltas["Bits"], overwrite=True)
    with pytest.raises(SubspaceError, match=r"knows no method `lora`; it knows `Bits`, `LoRA`"):
        tune(space, backbone(), tokenizer("bert"), task(), "lora", SETTINGS)
    with pytest.raises(SubspaceError, match="does not know the delta of `lora`, only its vectors"):
        principal(small(), 2).attach(backbone(), "lora")
    tensors = folder / "subspace.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(StoreError, match="truncated"):
        load(folder)
    about = folder / "subspace.json"
    about.write_text(about.read_text().replace('"methods"', '"means"'))
    with pytest.raises(StoreError, match=r"subspace.json` is incomplete or damaged"):
        load(folder)
    other = backbone()
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.add_(1.0)
    with pytest.raises(DeltuneError, match="another backbone"):
        tune(space, other, tokenizer("bert"), task(), "Bits", SETTINGS)
