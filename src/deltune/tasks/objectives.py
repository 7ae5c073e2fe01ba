"""How a task is put to a model: a class head, options scored by likelihood, or generation.

Each objective encodes records once (`encode`), makes batches (`collate`), and gives the loss and
the predictions of a batch. Inputs too long are cut and counted (`truncated`), targets never.
"""

from typing import TYPE_CHECKING, Any, Literal

from deltune.errors import DataError
from deltune.tasks.choices import ChoiceHead
from deltune.tasks.classes import ClassHead, check_head
from deltune.tasks.encoding import Example, Prompts, Template
from deltune.tasks.generation import Generation
from deltune.tasks.language import language_of
from deltune.tasks.matching import LabelMatch
from deltune.tasks.options import OptionScoring
from deltune.tasks.task import SPLITS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ChoiceHead",
    "ClassHead",
    "Example",
    "Generation",
    "LabelMatch",
    "OptionScoring",
    "Template",
    "objective_for",
]

CONTINUE = Template.parse("{input} {target}")
"""The default of multiple choice with a decoder: each option goes on with the input."""
ANSWER = Template.parse("{input}\nanswer: {target}")
"""The default of all else with a decoder."""
PLAIN = Template()
"""The default with an encoder: the input as it is."""
_ENDLESS = 10**9


def objective_for(
    task: Task,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    template: Template | str | None = None,
    normalise: bool | None = None,
    loss_on: Literal["target", "options"] = "target",
    max_new_tokens: int | None = None,
    multiple_of: int = 1,
) -> ChoiceHead | ClassHead | LabelMatch | OptionScoring | Generation:
    """Returns the objective that fits the task and the model.

    A model with a classification head gets `ClassHead`, or `ChoiceHead` for multiple choice; one
    without any head gets `LabelMatch`; a language model gets `Generation` for a generation task and
    `OptionScoring` otherwise.

    Args:
        task: The task; of its records only the training targets are looked at.
        model: The model, as `load_model` gives it, with or without deltas.
        tokenizer: Its tokenizer.
        max_length: The most tokens that a model reads before the target; the model's limit by
            default. Only the record's input is cut to it.
        template: Texts around input and target, as in `"{input}\\nanswer: {target}"`; by default
            that of the task's metadata, if it has one.
        normalise: Whether options are scored by the mean over their tokens instead of the sum. By
            default so for multiple choice, where lengths differ, and not for labels.
        loss_on: What option scoring trains on.
        max_new_tokens: The most tokens that generation writes; by default as many as the longest
            training target has (test target, where there are no training records).
        multiple_of: Batches are padded to a multiple of this length.

    Raises:
        DataError: If the task does not fit the model.
    """
    template = template or task.meta.get("template")
    template = Template.parse(template) if isinstance(template, str) else template
    if type(model).__name__.endswith("ForSequenceClassification"):
        if task.kind == "multiple_choice":
            return _choice_head(model, tokenizer, max_length, template or PLAIN, multiple_of)
        return _class_head(task, model, tokenizer, max_length, template or PLAIN, multiple_of)
    if not model.can_generate() and type(model).__name__.endswith("Model"):
        return _label_match(task, model, tokenizer, max_length, template or PLAIN, multiple_of)
    if not model.can_generate():
        raise DataError(
            f"`{type(model).__name__}` has no head for task `{task.name}` of kind `{task.kind}`; "
            "load the model with `load_model` and the head `classification`, `causal` or `seq2seq`"
        )
    language = language_of(model, tokenizer, multiple_of)
    usual = CONTINUE if task.kind == "multiple_choice" else ANSWER
    template = template or (usual if language.decoder else PLAIN)
    prompts = _prompts(model, tokenizer, max_length, template, decoder=language.decoder)
    if task.kind == "generation":
        if max_new_tokens is None:
            found = language.targets(
                [record.target for record in task.train or task.test], template.lead
            )
            max_new_tokens = max(map(len, found))
        return Generation(language, prompts, max_new_tokens=max_new_tokens)
    if normalise is None:
        normalise = task.kind == "multiple_choice"
    return OptionScoring(
        language, prompts, labels=task.labels, normalise=normalise, loss_on=loss_on
    )


def _choice_head(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    template: Template,
    multiple: int,
) -> ChoiceHead:
    if model.config.num_labels != 1:
        raise DataError(
            f"the head of `{type(model).__name__}` has {model.config.num_labels} outputs and "
            "multiple choice needs one, the score of an option; load the model with the head "
            "`choice`"
        )
    _check_padding(model, tokenizer)
    limit = min(length for length in (max_length, _positions(model, tokenizer)) if length)
    return ChoiceHead(tokenizer, template, max_length=limit, multiple=multiple)


def _label_match(
    task: Task,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    template: Template,
    multiple: int,
) -> LabelMatch:
    records = [record for split in SPLITS for record in task.split(split)]
    texts = [*(task.labels or ()), *(text for record in records for text in record.options)]
    if task.kind not in ("classification", "multiple_choice"):
        raise DataError(
            f"task `{task.name}` is of kind `{task.kind}` and `{type(model).__name__}` has no "
            "head: it matches texts with the names of labels or options; load it with another head"
        )
    prompts = _prompts(model, tokenizer, max_length, template, decoder=False)
    names = _prompts(model, tokenizer, max_length, PLAIN, decoder=False)
    return LabelMatch(
        model, texts, prompts, names, labels=task.labels,
        pad_id=_check_padding(model, tokenizer), multiple=multiple,
    )  # fmt: skip


def _class_head(
    task: Task,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    template: Template,
    multiple: int,
) -> ClassHead:
    if task.labels is None:
        raise DataError(
            f"`{type(model).__name__}` has a classification head and task `{task.name}` is of kind "
            f"`{task.kind}`, without labels; load a model with the head `causal` or `seq2seq`"
        )
    check_head(model, task.labels)
    pad_id = _check_padding(model, tokenizer)
    prompts = _prompts(model, tokenizer, max_length, template, decoder=False)
    return ClassHead(task.labels, prompts, pad_id=pad_id, multiple=multiple)


def _prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    template: Template,
    *,
    decoder: bool,
) -> Prompts:
    positions = _positions(model, tokenizer)
    return Prompts(
        tokenizer,
        template,
        max_length=max_length,
        positions=None if positions >= _ENDLESS else positions,
        decoder=decoder,
    )


def _positions(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    own = getattr(model.config, "max_position_embeddings", None) or _ENDLESS
    return min(own, tokenizer.model_max_length)


def _check_padding(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    pad_id: Any = tokenizer.pad_token_id
    if pad_id is None or model.config.pad_token_id is None:
        raise DataError(
            f"the tokenizer pads with {pad_id} and the model's config says "
            f"{model.config.pad_token_id}; both need a padding token; load them with `load_model`"
        )
    return pad_id
