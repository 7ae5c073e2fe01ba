"""Oracle: the schedules of transformers, step by step."""

import pytest
import torch
import transformers

from deltune.training.schedule import factor


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_equals_transformers(kind: str, steps: int, warmup: int) -> None:
    warmup = min(warmup, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    elif kind == "linear":
        theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    else:
        theirs = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for done in range(steps):
        assert factor(kind, done, steps, warmup) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-15
        )
        optimizer.step()
        theirs.step()
