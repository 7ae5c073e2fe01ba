"""Tuning in a subspace: a code of few numbers is trained, then decoded by every method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import SubspaceError
from deltune.subspace.space import Subspace
from deltune.tasks.task import Task
from deltune.training.evaluation import Objective, default_objective
from deltune.training.events import OnEvent, TrainResult
from deltune.training.loop import evaluate, train
from deltune.training.settings import TrainSettings
from deltune.training.trainables import others_frozen


@dataclass(frozen=True, slots=True)
class Tuned:
    """A code that was trained on a task with one method, and what each method makes of it."""

    method: str
    code: Tensor
    """I* (d): of the best dev evaluation."""
    tests: Mapping[str, float]
    """method -> test metric of theta_t^init + U_t I*; those of other methods are transfers."""
    training: TrainResult


class Called(nn.Module):
    """A model with a vector in place of its delta's tensors.

    Args:
        delta: attached; its tensors are not read.
        vector: gives the vector of a forward pass.
    """

    def __init__(self, delta: Delta, vector: Callable[[], Tensor]) -> None:
        super().__init__()
        self.model = delta.model
        self.__dict__.update(delta=delta, vector=vector)

    def forward(self, **batch: Any) -> Any:
        """The model's outputs with the vector."""
        return self.delta.call(self.vector(), **batch)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class Decoded(Called):
    """A model whose delta is what a code means: its only parameter is the code.

    Args:
        delta: attached, and of the layout of `method`.
        space: decodes.
        method: with which map.
        code: I (d) at first.
    """

    def __init__(self, delta: Delta, space: Subspace, method: str, code: Tensor) -> None:
        super().__init__(delta, lambda: space.decode(method, self.code))
        self.code = nn.Parameter(code.clone())


def tune(
    space: Subspace,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    method: str,
    settings: TrainSettings,
    *,
    decoders: Sequence[str] | None = None,
    std: float = 0.02,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Tuned:
    """Trains the code of a task, the d numbers alone, with one method, and decodes it by all:

        I* = argmin_I L(theta_t^init + U_t I),    I ~ N(0, std^2) at first

    Args:
        space: of the model's backbone, with the deltas of its methods.
        model: without any delta of the space's names; it is left as it was.
        tokenizer: of the model.
        task: trained on, chosen by its dev split, and tested.
        method: t.
        settings: of the training; `seed` draws the first code.
        decoders: methods whose decoding of the code is tested, without training; all if not given.
        std: of the first code.
        objective: made from task, model and tokenizer if not given.
        folder: where checkpoints go; those of another method or space are refused.
        on_event: called with each event of the training.

    Raises:
        SubspaceError: a method that the space does not know, a training without dev metric.

    Source: Yi et al., "Different Tunes Played with Equal Skill", 2022, arXiv:2210.13311.
    """
    objective = objective or default_objective(task, model, tokenizer, settings.max_length)
    draw = torch.Generator().manual_seed(settings.seed)
    first = std * torch.randn(space.dimension, generator=draw)
    delta = space.attach(model, method)
    about = {"method": method, "space": space.digest(method), "std": std} if folder else {}
    try:
        device = next(model.parameters()).device
        decoded = Decoded(delta, space.to(device), method, first.to(device))
        with others_frozen(model, []):
            training = train(
                decoded, tokenizer, task, None, settings, objective=objective, folder=folder,
                on_event=on_event, about=about,
            )  # fmt: skip
    finally:
        delta.detach()
    if training.best_dev is None:
        raise SubspaceError("the code was trained without a dev metric; set `eval_steps`")
    code = decoded.code.detach().cpu()
    chosen = space.methods if decoders is None else decoders
    tests = scores_at(space, model, tokenizer, task, [code], chosen, settings, objective=objective)
    return Tuned(method, code, {name: score for name, (score,) in tests.items()}, training)


def scores_at(
    space: Subspace,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    codes: Sequence[Tensor],
    methods: Sequence[str],
    settings: TrainSettings,
    *,
    split: str = "test",
    objective: Objective | None = None,
    on_point: Callable[[int, int], None] | None = None,
    begun: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """method -> the metric of what it decodes from each code; nothing is trained.

    Args:
        space: of the model's backbone.
        model: without a delta of the methods' names; it is left as it was.
        tokenizer: of the model.
        task: with the split.
        codes: I (d) each.
        methods: that decode.
        settings: batch size, precision and length of the evaluations.
        split: `train`, `dev` or `test`.
        objective: made from task, model and tokenizer if not given.
        on_point: is called with the number of evaluations that are done, and of all.
        begun: what an earlier call had found when it was stopped; it is added to as it goes.
    """
    objective = objective or default_objective(task, model, tokenizer, settings.max_length)
    found: dict[str, list[float]] = {} if begun is None else begun
    for method in methods:
        delta, scores = space.attach(model, method), found.setdefault(method, [])
        try:
            for code in codes[len(scores) :]:
                delta.load_vector(space.decode(method, code))
                scores.append(
                    evaluate(
                        model, tokenizer, task, split, objective=objective,
                        batch_size=settings.per_device_eval_batch_size,
                        precision=settings.precision,
                    ).value
                )  # fmt: skip
                if on_point:
                    on_point(sum(map(len, found.values())), len(codes) * len(methods))
        finally:
            delta.detach()
    return found
