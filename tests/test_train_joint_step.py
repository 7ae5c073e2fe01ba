"""Oracle: torch's unfused AdamW and clipping, run by run."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from deltune.mechanisms.piles import Piles
from deltune.training.joint_step import JointSteps
from deltune.training.run import Outcome, Run
from deltune.training.settings import TrainSettings

SHAPES = [(4, 3), (3, 2), (5,), ()]
RATES, DECAYS, BEGUN, MOST = (0.1, 0.02, 0.3), (0.0, 0.5, 0.1), (1, 4, 2), (0.5, 0.0, 50.0)
COMMON = {"betas": (0.7, 0.9), "eps": 1e-3}


class Small:
    """What a step of the optimiser needs of a run."""

    def __init__(self, number: int, dtype: torch.dtype, fused: bool) -> None:
        draw = torch.Generator().manual_seed(number)
        parameters = [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in SHAPES]
        count = sum(p.numel() for p in parameters)
        self.trainables = SimpleNamespace(parameters=parameters, count=count)
        self.course = SimpleNamespace(idle=True)
        self.settings = TrainSettings(max_grad_norm=MOST[number])
        groups = [
            {"params": parameters[:2], "lr": RATES[number], "weight_decay": DECAYS[number]},
            {"params": parameters[2:], "lr": 2 * RATES[number], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=fused, **COMMON)
        self.by_itself = 0

    def update(self, loss: Tensor) -> Outcome:
        self.by_itself += 1
        return Run.update(self, loss)  # type: ignore[arg-type]

    def oracle(self, loss: Tensor) -> Outcome:
        """A step of it alone, as torch has it."""
        parameters = self.trainables.parameters
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        outcome = Outcome(loss.item(), norm.item())
        if outcome.finite:
            if self.settings.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
            self.optimizer.step()
        return outcome

    def clear(self) -> None:
        for p in self.trainables.parameters:
            p.grad = None

    def tensors(self) -> list[Tensor]:
        """Parameters and states."""
        parameters = self.trainables.parameters
        return [
            *(p.detach() for p in parameters),
            *(t for p in parameters for t in self.optimizer.state[p].values()),
        ]


def loss(tensors: Sequence[Tensor], turn: int, number: int) -> Tensor:
    """One whose gradient is drawn."""
    draw = torch.Generator().manual_seed(100 * turn + number)
    return sum(
        ((t * torch.randn(t.shape, generator=draw).to(t.dtype)).sum() for t in tensors),
        torch.zeros((), dtype=tensors[0].dtype),
    )


class Both:
    """Three runs whose steps may be joint, and their oracles."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.runs = [Small(k, dtype, fused=True) for k in range(3)]
        self.oracles = [Small(k, dtype, fused=False) for k in range(3)]
        self.piles = Piles()
        self.joint = JointSteps(self.piles)
        for number, begun in enumerate(BEGUN):
            for turn in range(-begun, 0):
                for one in (self.runs[number], self.oracles[number]):
                    value = loss(one.trainables.parameters, turn, number)
                    value.backward()
                    one.oracle(value.detach())
                    one.clear()

    def turn(self, turn: int, due: Sequence[int] = (0, 1, 2), wrong: float = 1.0) -> list[Outcome]:
        """A turn of those that are due; the others keep their gradients. The loss of the second
        run is multiplied by `wrong`."""
        factors = [1.0, wrong, 1.0]
        parameters = [run.trainables.parameters for run in self.runs]
        first = self.piles.whole([own[0] for own in parameters])  # the others as they are
        assert first is not None
        rows = [[row, *own[1:]] for row, own in zip(first, parameters, strict=True)]
        losses = [loss(own, turn, k) * factors[k] for k, own in enumerate(rows)]
        sum(losses, torch.zeros(())).backward()
        given = {self.runs[k]: losses[k].detach() for k in due}
        found = self.joint.update(self.runs, given)  # type: ignore[arg-type]
        expected = []
        for k, one in enumerate(self.oracles):
            value = loss(one.trainables.parameters, turn, k) * factors[k]
            value.backward()
            if k in due:
                expected.append(one.oracle(value.detach()))
                one.clear()
                self.runs[k].clear()
        outcomes = [found[self.runs[k]] for k in due]  # type: ignore[index]
        for outcome, other in zip(outcomes, expected, strict=True):
            assert outcome == pytest.approx(other, rel=1e-5, nan_ok=True)
        return outcomes

    def assert_same(self) -> None:
        for run, oracle in zip(self.runs, self.oracles, strict=True):
            torch.testing.assert_close(run.tensors(), oracle.tensors(), rtol=1e-5, atol=1e-6)

    @property
    def by_itself(self) -> list[int]:
        """Steps that were not joint."""
        return [run.by_itself for run in self.runs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_adamw_of_its_run(dtype: torch.dtype) -> None:
    """Of other rates, decays, clippings and counts of steps."""
    both = Both(dtype)
    for turn in range(6):
        both.turn(turn)
        both.assert_same()
    assert both.by_itself == [1, 1, 1]  # the first turn
    both.joint.end()
    both.piles.end()
    both.assert_same()
    for tensor in (tensor for run in both.runs for tensor in run.tensors()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_is_not_finite_leaves_the_others_as_they_were() -> None:
    both = Both()
    both.turn(0)
    both.turn(1)
    before = [tensor.clone() for tensor in both.runs[1].tensors()]
    for turn, wrong in ((2, float("nan")), (3, float("inf"))):
        outcomes = both.turn(turn, wrong=wrong)
        assert [outcome.finite for outcome in outcomes] == [True, False, True]
        both.assert_same()
    torch.testing.assert_close(both.runs[1].tensors(), before, rtol=0.0, atol=0.0)


def test_runs_that_step_in_other_turns_step_by_themselves() -> None:
    """One does not step in a turn, and has gradients of two in the next, which is joint."""
    both = Both()
    for turn in range(2):
        both.turn(turn)
    for due in ((0, 2), (0, 1, 2), (0, 1, 2), (0, 1, 2)):
        turn += 1
        both.turn(turn, due)
        both.assert_same()
    assert both.by_itself == [2, 1, 2]


@pytest.mark.parametrize("what", ["betas", "more than steps", "no gradient", "half precision"])
def test_what_is_not_alike_steps_by_itself(what: str) -> None:
    """Half precision, in all three, would be rounded more often."""
    both = Both(torch.bfloat16 if what == "half precision" else torch.float64)
    third = both.runs[2]
    third.course.idle = what != "more than steps"
    if what == "betas":
        for group in third.optimizer.param_groups:
            group["betas"] = (0.8, 0.9)
    for turn in range(4):
        due = {}
        for k, run in enumerate(both.runs):
            run.clear()
            due[run] = loss(run.trainables.parameters, turn, k)
            due[run].backward()
        if what == "no gradient":
            third.trainables.parameters[1].grad = None
        both.joint.update(both.runs, due)  # type: ignore[arg-type]
    expected = {"half precision": [4, 4, 4], "no gradient": [4, 4, 4]}
    assert both.by_itself == expected.get(what, [1, 1, 4])


def test_what_a_joint_step_writes_counts_as_written() -> None:
    """Routing keeps what it made of parameters until their versions say that they were written."""
    both = Both()
    both.turn(0)
    parameters = [p for run in both.runs for p in run.trainables.parameters]
    before = [p._version for p in parameters]
    alone = [run.by_itself for run in both.runs]
    both.turn(1)
    assert alone == [run.by_itself for run in both.runs]
    assert all(p._version > old for p, old in zip(parameters, before, strict=True))
