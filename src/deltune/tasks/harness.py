"""Records out of the tasks of lm-evaluation-harness."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from deltune.errors import DataError, closest, listing
from deltune.tasks.readers import missing
from deltune.tasks.task import Record

_KINDS = {
    "multiple_choice": "multiple_choice",
    "generate_until": "generation",
    "loglikelihood": "generation",
}


def harness_splits(name: str) -> tuple[dict[str, list[Record]], dict[str, Any]]:
    """The records of a task, by its name there or by the path of its YAML file.

    `test` is what the harness evaluates on: its test split, or else its validation split, which is
    then not `dev`. Without training documents `train` and `dev` are empty: a task for evaluation.
    The template is the harness's: the target after its `target_delimiter`, and no examples.

    Args:
        name: e.g. `arc_easy`.

    Returns:
        The records of each split, and kind, metric and template of the task.

    Raises:
        DataError: no such task, a group of several, one whose data cannot be had, or one that asks
            something else than to choose or to write a text.
    """
    with _quiet():
        task = _load(name)
        kind = _KINDS.get(task.OUTPUT_TYPE)
        if kind is None or task.multiple_input:
            what = f"`{task.OUTPUT_TYPE}`" if kind is None else "choices of the input"
            raise DataError(
                f"`lm-eval:{name}` asks for {what}; deltune reads tasks of {listing(_KINDS)} whose "
                "choices follow one input"
            )
        read = _choice if kind == "multiple_choice" else _text
        docs: dict[str, Iterable[Any]] = {"test": task.eval_docs}
        if task.has_training_docs():
            docs["train"] = task.training_docs()
            if task.has_test_docs() and task.has_validation_docs():
                docs["dev"] = task.validation_docs()
        parts = {split: _records(name, task, found, read) for split, found in docs.items()}
    if "train" not in parts:
        parts |= {"train": [], "dev": []}
    metric = "accuracy" if kind == "multiple_choice" else "exact_match"
    delimiter = task.config.target_delimiter
    return parts, {"kind": kind, "metric": metric, "template": f"{{input}}{delimiter}{{target}}"}


def _load(name: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        missing("lm-eval", f"to read `lm-eval:{name}`", "harness")
    own = name.endswith((".yaml", ".yml"))
    manager = TaskManager(include_defaults=not own)  # the index of its thousands takes seconds
    try:
        found = list(manager.load(name)["tasks"].values())
    except KeyError:
        raise DataError(
            f"lm-evaluation-harness has no task `{name}`{closest(name, manager.all_tasks)}; see "
            "`lm_eval ls tasks`, or give the path of a task's YAML file"
        ) from None
    except Exception as error:  # of datasets, the hub, YAML or the task's own code
        line = (str(error).strip().splitlines() or ["no message"])[0]
        raise DataError(
            f"`lm-eval:{name}` cannot be loaded ({type(error).__name__}: {line}); check the name, "
            "the task's YAML and the connection"
        ) from error
    if len(found) != 1:
        names = [str(task.config.task) for task in found]
        raise DataError(
            f"`lm-eval:{name}` is {len(found)} tasks ({listing(names, 8)}); name one of them"
        )
    return found[0]


@contextmanager
def _quiet() -> Generator[None]:
    """The harness tells its steps to loggers; what matters of them is raised."""
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(was)


def _records(
    name: str, task: Any, docs: Iterable[Any], read: Callable[[Any, Mapping[str, Any]], Record]
) -> list[Record]:
    found = []
    for number, doc in enumerate(docs):
        try:
            found.append(read(task, doc))
        except Exception as error:  # of the task's own functions and templates
            raise DataError(
                f"`lm-eval:{name}`, document {number}: {type(error).__name__}: {error}; the task's "
                "definition does not fit its data"
            ) from error
    return found


def _choice(task: Any, doc: Mapping[str, Any]) -> Record:
    options = tuple(str(option) for option in task.doc_to_choice(doc))
    target = task.doc_to_target(doc)
    first = target[0] if isinstance(target, list) else target
    right = options[first] if isinstance(first, int) else str(first)
    return Record(task.doc_to_text(doc), right, options)


def _text(task: Any, doc: Mapping[str, Any]) -> Record:
    target = task.doc_to_target(doc)
    texts = [str(text) for text in (target if isinstance(target, list) else [target])]
    return Record(task.doc_to_text(doc), texts[0], references=tuple(texts[1:]))
