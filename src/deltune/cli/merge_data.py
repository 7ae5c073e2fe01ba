"""What of `deltune merge` depends on data: statistics, and weights that are found by trying."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltune.cli.learn import opened
from deltune.cli.shelf import Shelf, delta_folder, read_result
from deltune.errors import DataError

MEASURED, TRIED = ("regmean", "fisher"), ("soup", "lorahub")


def measured(how: str, folders: Sequence[Path], given: dict[str, Any], most: int) -> list[Any]:
    """The statistics of each delta, on training examples of its own task."""
    import deltune as dt
    from deltune.merging import fishers, grams
    from deltune.training.evaluation import in_mode

    found = []
    for folder in folders:
        shelf = read_result(folder).replaced(**given)
        task, model, tokenizer = opened(shelf.need("task"), shelf.need("model"), shelf.head, 0)
        delta = dt.load(delta_folder(folder), model)
        with in_mode(model, training=False):
            losses = _losses(model, tokenizer, task, shelf, most)
            found.append(fishers(delta, losses) if how == "fisher" else grams(delta, losses))
    return found


def tried(
    how: str, folders: Sequence[Path], given: dict[str, Any], most: int, seed: int, head: Any
) -> tuple[list[Path], list[float], str]:
    """Which deltas with which weights, and how well they did in words, on the task of the first; a
    search goes by the head of the delta that has this number."""
    import deltune as dt
    from deltune.merging import greedy_soup, search_weights
    from deltune.training.evaluation import in_mode
    from deltune.training.loop import evaluate

    shelf = read_result(folders[0]).replaced(**given)
    task, model, tokenizer = opened(shelf.need("task"), shelf.need("model"), shelf.head, 0)
    deltas = [dt.load(delta_folder(path), model, f"{i}") for i, path in enumerate(folders)]
    if isinstance(head, int) and head < len(deltas):  # that of the last delta is the model's
        deltas[head].detach()
        deltas[head] = dt.load(delta_folder(folders[head]), model, f"{head}")
    if how == "soup":
        soup = greedy_soup(
            deltas,
            lambda: evaluate(model, tokenizer, task, "dev", max_length=shelf.max_length).value,
        )
        alone = ", ".join(f"{score:.4f}" for score in soup.scores)
        note = f"dev {task.metric} {soup.score:.4f}; of each alone: {alone}"
        members = soup.members
        return [folders[i] for i in members], [1 / len(members)] * len(members), note

    def loss() -> float:
        found = [float(one) for one in _losses(model, tokenizer, task, shelf, most)]
        return sum(found) / len(found)

    with in_mode(model, training=False):
        best = search_weights(deltas, loss, seed=seed)
    return list(folders), list(best.weights), f"loss {best.value:.4f} after {best.tried} tries"


def _losses(model: Any, tokenizer: Any, task: Any, shelf: Shelf, most: int) -> Iterator[Any]:
    """The loss of one training example after another, so that none is padded."""
    from deltune.training.evaluation import default_objective, device_of, to_device

    if not task.train[:most]:
        raise DataError(f"task `{task.name}` has no training examples to measure on")
    objective, device = (
        default_objective(task, model, tokenizer, shelf.max_length),
        device_of(model),
    )
    for example in objective.encode(task.train[:most]):
        yield objective.loss(model, to_device(objective.collate([example]), device))
