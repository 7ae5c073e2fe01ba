"""Oracle: `train`, run by run, of the same deltas from the same tensors on the same model."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltune as dt
from deltune.errors import AttachError, DeltuneError, TrainError
from deltune.mechanisms import factors
from deltune.training.events import Event, Noted, OnEvent, Started, Step, TrainResult
from deltune.training.joining import Call, Joiner
from deltune.training.joint_step import Group
from deltune.training.many import Job, train_many
from many_toys import Numbers, dropping, number_task
from train_toy import Squares, network, toy_task
from zoo import ZOO

CLOSE = 1e-4
COMMON = {"eps": 1e-4, "eval_steps": 5, "lr_scheduler_type": "cosine"}
"""With a small eps Adam makes whole steps of the rounding of gradients that are 0."""


def jobs_on(model: Any, specs: Sequence[str], steps: int, **changes: Any) -> list[Job]:
    """Runs that differ in all that runs may differ in; the second stops early, the last late."""
    jobs = []
    for k, spec in enumerate(specs):
        own: dict[str, Any] = {"max_steps": steps + 3 * k, "early_stopping_patience": None}
        if k == 1:
            own = {"max_steps": steps, "early_stopping_patience": 2}
        own |= {"per_device_train_batch_size": 2 + k % 2, "learning_rate": 3e-3 * (1 + k)}
        own |= {"gradient_accumulation_steps": 1 + (k == 2), "seed": k}
        settings = dt.TrainSettings(**(COMMON | own | changes))
        labels = 2 + (k % 2)
        task = number_task(k, longest=8 + 4 * (k % 3), labels=labels)
        delta = dt.attach(model, spec, name=f"d{k}", seed=k)
        jobs.append(Job(task, delta, settings, Numbers(labels)))
    return jobs


def alone(model: Any, job: Job, on_event: OnEvent | None = None) -> Any:
    """The run by itself."""
    for delta in dt.deltas(model).values():
        delta.enable() if delta.name == job.delta.name else delta.disable()
    return dt.train(
        model, None, job.task, job.delta, job.settings, objective=job.objective,
        folder=job.folder, on_event=on_event,
    )  # fmt: skip


def assert_as_alone(model: Any, jobs: Sequence[Job]) -> None:
    """Trains at once, then one by one from the same tensors."""
    starts = [job.delta.vector().clone() for job in jobs]
    results = train_many(model, None, jobs)
    ends = [job.delta.vector().clone() for job in jobs]
    for job, start, end, result in zip(jobs, starts, ends, results, strict=True):
        assert isinstance(result, TrainResult), result
        job.delta.load_vector(start)
        oracle = alone(model, job)
        assert result.losses == pytest.approx(oracle.losses, abs=CLOSE), job.delta.spec
        assert (result.steps, result.stopped) == (oracle.steps, oracle.stopped)
        assert (result.best_step, result.best_dev) == (oracle.best_step, oracle.best_dev)
        torch.testing.assert_close(end, job.delta.vector(), rtol=1e-3, atol=CLOSE)
        assert not torch.equal(end, start)


def batches(model: Any) -> list[int]:
    """The rows of each forward in train mode, to come."""
    found: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            found.append(len(kwargs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return found


FORMS = {
    "bert": ["lora(rank=2)", "lora(rank=4, alpha=4.0)", "adapter(width=4)", "prefix(tokens=3)",
             "bitfit"],
    "llama": ["lora(rank=2)", "lora(rank=4)", "adapter(width=4)", "prefix(tokens=3)", "norms"],
}  # fmt: skip
DROPS = {
    "bert": ["lora(rank=2, dropout=0.2)", "lora(rank=2, dropout=0.1)",
             "adapter(width=4, dropout=0.3)", "prefix(tokens=3, dropout=0.2)", "bitfit"],
    "gpt2": ["lora(rank=2, dropout=0.2, where='attn.qkv')", "bitfit", "ia3",
             "prompt(tokens=2)", "prompt(tokens=2)"],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_runs_alone(name: str) -> None:
    """Other methods, ranks, rates, seeds, tasks, lengths, batch sizes, accumulation, ends."""
    model = dropping(ZOO[name].build(0), 0.0)
    jobs = jobs_on(model, FORMS[name], 50 if name == "llama" else 10)
    rows = batches(model)
    assert_as_alone(model, jobs)
    assert rows[0] == 2 + 3 + 2 + 3 + 2


@pytest.mark.parametrize("name", DROPS)
def test_equals_the_runs_alone_with_dropout(name: str) -> None:
    """Of the deltas and of the backbone: each run drops what it drops alone, at its own length."""
    model = dropping(ZOO[name].build(0), 0.2)
    jobs = jobs_on(model, DROPS[name], 14)
    rows = batches(model)
    assert_as_alone(model, jobs)
    assert rows[0] == (2 + 3 + 2 + 2 if name == "bert" else 2 + 3 + 2)
    assert alone_differs(model, jobs[0])


def alone_differs(model: Any, job: Job) -> bool:
    """Whether a run has another loss without dropout, so that the comparison was about it."""
    with_it = alone(model, job)
    return alone(dropping(model, 0.0), job).losses[0] != with_it.losses[0]


@pytest.mark.parametrize("kept", [factors.KEPT, 0], ids=["few", "many"])
def test_dropout_beside_loras_of_one_batch_size(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of each are equally many, so all act by batched products; lengths differ. Of many
    elements nothing that is dropped is kept for backward."""
    monkeypatch.setattr(factors, "KEPT", kept)
    model = dropping(ZOO["bert"].build(0), 0.0)
    specs = ["lora(rank=2, dropout=0.5)", "lora(rank=4, dropout=0.1)", "lora(rank=2)"]
    jobs = jobs_on(model, specs, 12, per_device_train_batch_size=3)
    assert_as_alone(model, jobs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loras_of_one_shape_lie_in_one_memory_while_they_are_trained(dropout: float) -> None:
    """Of other scales and ends; the first layer's matrices are trained by two deltas of three."""
    model = dropping(ZOO["bert"].build(0), 0.0)
    lora = f"lora(rank=2, dropout={dropout}"
    specs = [f"{lora})", f"{lora}, alpha=1.0)", f"{lora}, where='attn.q[1:]')"]
    jobs = jobs_on(model, specs, 12, per_device_train_batch_size=3)
    held: list[int] = []

    def look(module: nn.Module, args: Any) -> None:
        for tensors in zip(*(list(job.delta.parameters()) for job in jobs[:2]), strict=True):
            held.append(len({t.untyped_storage().data_ptr() for t in tensors}))

    hook = model.register_forward_pre_hook(look)
    assert_as_alone(model, jobs)
    hook.remove()
    assert {1, 2} == set(held)  # 2: evaluations, and the oracle
    for job in jobs:
        for tensor in job.delta.parameters():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


class Power(Exception):
    """It went off."""


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs took each joint step."""
    found, step = [], Group._step

    def noted(self: Group, *args: Any) -> None:
        found.append(len(self.runs))
        step(self, *args)

    monkeypatch.setattr(Group, "_step", noted)
    return found


def alike(model: Any, count: int, steps: int, **changes: Any) -> list[Job]:
    """LoRAs of one shape and size of batch, whose steps are joint."""
    common: dict[str, Any] = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}
    common |= {"max_grad_norm": 0.5, "early_stopping_patience": None}
    jobs = jobs_on(model, ["lora(rank=2, dropout=0.1)"] * count, steps, **(common | changes))
    return [_changed(job, weight_decay=0.2 * k) for k, job in enumerate(jobs)]


def test_runs_of_one_shape_step_as_one(joint: list[int]) -> None:
    """Of other rates, decays and ends; the gradient is clipped."""
    model = dropping(ZOO["bert"].build(0), 0.0)
    assert_as_alone(model, alike(model, 4, 12))
    assert {2, 4} == set(joint)  # two end earlier


class Breaks(Numbers):
    """Its fifth loss is not a number."""

    batches = 0

    def collate(self, examples: Any) -> Any:
        self.batches += 1
        return super().collate(examples)

    def loss(self, model: Any, batch: Any) -> Any:
        return super().loss(model, batch) * (float("nan") if self.batches == 5 else 1.0)


def test_a_joint_step_that_is_not_finite_is_of_one_run(joint: list[int]) -> None:
    """It fails with the error of the run by itself, and the others go on together."""
    model = dropping(ZOO["bert"].build(0), 0.0)
    jobs = alike(model, 3, 12, eval_steps="no")
    starts = [job.delta.vector().clone() for job in jobs]
    jobs[1] = jobs[1]._replace(objective=Breaks())
    results = train_many(model, None, jobs)
    ends = [job.delta.vector().clone() for job in jobs]
    assert {2, 3} == set(joint)
    for k, (job, start, end) in enumerate(zip(jobs, starts, ends, strict=True)):
        job.delta.load_vector(start)
        if k == 1:
            with pytest.raises(TrainError, match=re.escape(str(results[1]))):
                alone(model, job._replace(objective=Breaks()))
        else:
            result = results[k]
            assert isinstance(result, TrainResult)
            assert alone(model, job).losses == pytest.approx(result.losses, abs=CLOSE)
            torch.testing.assert_close(end, job.delta.vector(), rtol=1e-3, atol=CLOSE)


class Chases(Numbers):
    """Toward outputs of its own that take no gradient."""

    def loss(self, model: Any, batch: Any) -> Any:
        with torch.no_grad():
            aim = self._logits(model, batch)
        out = self._logits(model, batch)
        return super().loss(model, batch) + (out - aim - 1.0).square().mean()


def test_what_takes_no_gradient_alone_takes_none_at_once() -> None:
    """Oracle: the runs alone; beside runs whose only call takes gradients."""
    model = dropping(ZOO["bert"].build(0), 0.1)
    jobs = alike(model, 4, 8, eval_steps="no")
    assert_as_alone(model, [job._replace(objective=Chases()) for job in jobs[:3]] + jobs[3:])


class Against(Numbers):
    """What the model makes without what its delta adds, or with another amount of it."""

    def __init__(self, switch: Any) -> None:
        super().__init__()
        self.switch = switch

    def loss(self, model: Any, batch: Any) -> Any:
        with torch.no_grad(), self.switch():
            before = self._logits(model, batch).log_softmax(-1)
        return super().loss(model, batch) - 0.1 * before.mean()


def test_an_objective_that_switches_its_delta_is_told() -> None:
    """Rows of a shared forward have their deltas as they are, and no loss is made of other ones;
    at the start, where a LoRA adds nothing, losses are the same."""
    model = dropping(ZOO["bert"].build(0), 0.0)
    jobs = alike(model, 4, 6, eval_steps="no")
    own = [job.delta for job in jobs]

    @contextmanager
    def scaled() -> Iterator[None]:
        own[1].scale = 0.0
        try:
            yield
        finally:
            own[1].scale = 1.0

    switches = [own[0].disabled, scaled, lambda: dt.route(model, [None] * 3)]
    jobs = [
        job._replace(objective=Against(switch)) for job, switch in zip(jobs, switches, strict=False)
    ] + jobs[3:]
    results = train_many(model, None, jobs)
    assert isinstance(results[3], TrainResult)
    for result in results[:3]:
        assert isinstance(result, DeltuneError)
        assert re.search("calls the model with its delta disabled|routed", str(result))


@pytest.mark.parametrize("begun", ["alone", "at once"])
def test_goes_on_from_a_joint_step(begun: str, tmp_path: Path, joint: list[int]) -> None:
    """A run begun alone ends beside others that are at other steps, and the other way round."""
    model = dropping(ZOO["bert"].build(0), 0.1)
    jobs = alike(model, 3, 12, eval_steps="no", save_steps=5)
    jobs = [job._replace(folder=tmp_path / str(k)) for k, job in enumerate(jobs)]
    starts = [job.delta.vector().clone() for job in jobs]
    oracles = []
    for job, start in zip(jobs, starts, strict=True):
        alone(model, job._replace(folder=None))
        oracles.append(job.delta.vector().clone())
        job.delta.load_vector(start)

    def fail(event: Event) -> None:
        if isinstance(event, Step) and event.step == 8:
            raise Power

    started: list[int] = []
    with pytest.raises(Power):
        if begun == "alone":
            alone(model, jobs[1], fail)
        else:
            _enabled(jobs)
            train_many(model, None, jobs, on_event=lambda k, event: fail(event))
    for job, start in zip(jobs, starts, strict=True):
        job.delta.load_vector(start)  # as in a new process
    if begun == "alone":
        _enabled(jobs)
        train_many(model, None, jobs, on_event=lambda k, event: started.append(_at(event)))
        assert [at for at in started if at >= 0] == [0, 5, 0]
    else:
        for job in jobs:
            alone(model, job, lambda event: started.append(_at(event)))
        assert [at for at in started if at >= 0] == [5, 5, 5]
    assert 3 in joint
    for job, oracle in zip(jobs, oracles, strict=True):
        torch.testing.assert_close(job.delta.vector(), oracle, rtol=0.0, atol=1e-5)


def _enabled(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.delta.enable()


def _at(event: Event) -> int:
    return event.resumed_at if isinstance(event, Started) else -1


def test_what_methods_ask_of_training() -> None:
    """Looks at the data, schedules and rests are each run's own."""
    model = ZOO["bert"].build(0)
    specs = ["fish(density=0.01)", "adapter(width=4, robust=True)", "child(share=0.5)"]
    assert_as_alone(model, jobs_on(model, specs, 12, early_stopping_patience=None))


def test_a_plain_network_with_dropout() -> None:
    """Arguments by position, float64, a head of one output, an objective that is not ours."""
    model = network()
    jobs = [
        Job(toy_task(seed=k), dt.attach(model, "lora(rank=2, where='0')", f"d{k}", seed=k),
            dt.TrainSettings(1e-2 * (k + 1), seed=k, max_steps=8), Squares())
        for k in range(3)
    ]  # fmt: skip
    assert_as_alone(model, jobs)


def test_no_run_changes_another() -> None:
    """What one run becomes is the same bit for bit beside other data, and beside one that fails."""
    found = []
    for other, rate in ((1, 1e-2), (2, 1e-2), (1, 1e20)):
        model = ZOO["bert"].build(0)
        pair = [dt.attach(model, "lora(rank=2)", name=n, seed=k) for k, n in enumerate("ab")]
        tasks = [number_task(0, longest=9), number_task(other, longest=9)]
        same = dt.TrainSettings(
            1e-2, max_steps=8, per_device_train_batch_size=12, max_grad_norm=0.0
        )
        settings = [same, dt.TrainSettings.from_json(same.to_json() | {"learning_rate": rate})]
        results = train_many(
            model, None,
            [Job(*one, Numbers()) for one in zip(tasks, pair, settings, strict=True)],
        )  # fmt: skip
        found.append(pair[0].vector().clone())
        assert isinstance(results[1], TrainError) == (rate > 1)
        assert not isinstance(results[0], DeltuneError)
        assert all(p.grad is None for p in model.parameters())
        assert all(delta.enabled for delta in pair)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0.0, atol=1e-6)


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """At once, or one by one, from the checkpoints of runs at once."""
    ends, started = [], []
    for cut in (False, True):
        model = dropping(ZOO["bert"].build(0), 0.1)
        jobs = jobs_on(model, ["lora(rank=2, dropout=0.1)"] * 3, 12, early_stopping_patience=None)
        jobs = [job._replace(folder=tmp_path / f"{cut} {k}") for k, job in enumerate(jobs)]

        starts = [job.delta.vector().clone() for job in jobs]

        def fail(number: int, event: Event, cut: bool = cut) -> None:
            if cut and isinstance(event, Step) and event.step == 8:
                raise Power

        if cut:
            with pytest.raises(Power):
                train_many(model, None, jobs, on_event=fail)
            for job, start in zip(jobs, starts, strict=True):
                job.delta.load_vector(start)  # as in a new process
            jobs[2].delta.disable()
            train_many(model, None, jobs[:2], on_event=lambda k, event: started.append(event))
            assert [event.resumed_at for event in started if isinstance(event, Started)] == [5, 5]
            alone(model, jobs[2])
        else:
            train_many(model, None, jobs)
        ends.append([job.delta.vector().clone() for job in jobs])
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0.0, atol=1e-5)


def test_what_cannot_share_a_forward_is_told() -> None:
    """With dropout a prefix has rows of its own, since its masks have a length of their own."""
    model, told = dropping(ZOO["bert"].build(0), 0.1), []
    jobs = jobs_on(model, ["lora(rank=2)", "lora(rank=2)", "prefix(tokens=2)"], 3)
    train_many(model, None, jobs, on_event=lambda k, event: told.append((k, event)))
    assert [k for k, event in told if isinstance(event, Noted)] == [2]


def _pair(name: str) -> list[Job]:
    return jobs_on(ZOO[name].build(0), ["lora(rank=2)"] * 2, 3, early_stopping_patience=None)


def _changed(job: Job, **changes: Any) -> Job:
    return job._replace(settings=dt.TrainSettings.from_json(job.settings.to_json() | changes))


def test_refuses_what_is_no_crowd() -> None:
    first, second = _pair("bert")
    model = first.delta.model
    wrong: dict[str, list[Job]] = {
        "no jobs": [],
        "of two jobs": [first, first],
        "`d1` would act beside": [first],
        "precision `fp32`, `bf16`": [first, _changed(second, precision="bf16")],
        "cache_frozen": [first, _changed(second, cache_frozen=True)],
        "not attached": [first, _pair("bert")[1]],
        "the folder of several jobs": [
            first._replace(folder="runs/one"),
            second._replace(folder=Path("runs/../runs/one")),
        ],
    }
    for words, jobs in wrong.items():
        with pytest.raises(TrainError, match=words):
            train_many(model, None, jobs)
    model.gradient_checkpointing_enable()
    with pytest.raises(TrainError, match="gradient checkpointing"):
        train_many(model, None, [first, second])


def test_refuses_random_numbers_that_are_of_no_row() -> None:
    """BART draws for each layer whether it is left out."""
    jobs = _pair("bart")
    jobs[0].delta.model.model.encoder.layerdrop = 0.5
    with pytest.raises(TrainError, match="draws random numbers"):
        train_many(jobs[0].delta.model, None, [_headless(job) for job in jobs])
    calm = [_headless(_changed(job, backbone_dropout=False)) for job in jobs]
    assert_as_alone(calm[0].delta.model, calm)


class Pooled(Numbers):
    """The mean of the states stands for the logits."""

    def _logits(self, model: Any, batch: Any) -> Any:
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model(**given, decoder_input_ids=batch["input_ids"]).logits[:, 0]


def _headless(job: Job) -> Job:
    return job._replace(objective=Pooled(3))


def test_refuses_rows_that_see_each_other() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    jobs = [
        (toy_task(seed=k), dt.attach(model, "lora(rank=2, where='0')", f"d{k}"),
         dt.TrainSettings(max_steps=2), Squares())
        for k in range(2)
    ]  # fmt: skip
    with pytest.raises(TrainError, match="see each other"):
        train_many(model, None, jobs)


def test_refuses_what_does_not_act_row_by_row() -> None:
    model = ZOO["t5"].build(0)
    jobs = jobs_on(model, ["lora(rank=2, where='*relative*')"] * 2, 2)
    with pytest.raises(AttachError, match="belongs to no row"):
        train_many(model, None, [_headless(job) for job in jobs])


def test_padding_is_to_a_length_that_is_no_other_size() -> None:
    """Its own length is found again in whatever the model computes."""
    model = ZOO["bert"].build(0)
    joiner = Joiner(model)
    calls = [
        Call((), {"input_ids": torch.ones(2, n, dtype=torch.long),
                  "attention_mask": torch.ones(2, n, dtype=torch.long)})
        for n in (3, 4)
    ]  # fmt: skip
    assert joiner.groups(calls, [None, None]) == [[0, 1]]
    joined = joiner.join(calls)
    (length,) = joined.sizes[0]  # 4 is the number of heads, and the width of each
    assert length not in {3, 4, 16, 24} and joined.sizes == [{length: 3}, {length: 4}]
    assert joined.call.kwargs["attention_mask"].sum(1).tolist() == [3, 3, 4, 4]
    hidden = torch.arange(4 * length).view(4, length, 1).expand(4, length, 16)
    first, second = joined.split((hidden, None))
    assert torch.equal(first[0], hidden[:2, :3]) and torch.equal(second[0], hidden[2:, :4])
    apart = [Call((), {"input_ids": call.kwargs["input_ids"]}) for call in calls]
    assert joiner.groups(apart, [None, None]) == [[0], [1]]  # nothing would say what is padding
    assert joiner.groups(calls, ["exact", "exact"]) == [[0], [1]]
