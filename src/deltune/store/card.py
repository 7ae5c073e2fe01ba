"""What a saved delta says of itself to people and to the hub: its README.md."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

CARD = "README.md"


TABLES = {
    "text-generation": "CAUSAL_LM",
    "text2text-generation": "SEQ_TO_SEQ_CAUSAL_LM",
    "fill-mask": "MASKED_LM",
    "text-classification": "SEQUENCE_CLASSIFICATION",
    "token-classification": "TOKEN_CLASSIFICATION",
    "question-answering": "QUESTION_ANSWERING",
    "multiple-choice": "MULTIPLE_CHOICE",
    "image-classification": "IMAGE_CLASSIFICATION",
}
"""What the hub calls a task -> transformers' table of the models for it."""


def card(
    about: Mapping[str, Any], kinds: Iterable[str], place: str = "",
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> str:  # fmt: skip
    """The model card of a delta.

    Args:
        about: what `delta.json` holds.
        kinds: of its methods.
        place: where it can be loaded from; a folder of a name that is made up, if not known.
        results: task -> metric -> value; the hub shows them.
    """
    from huggingface_hub import EvalResult, ModelCardData

    backbone, scalars = about["backbone"], sum(map(prod, about["layout"].values()))
    name = str(backbone.get("name", ""))
    known = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if known else {}
    tags = ["delta-tuning", "peft", *dict.fromkeys(kinds)]
    title = re.sub(r"[^\w .,+-]", " ", str(about["name"]))
    task, scores = pipeline(str(backbone.get("class", ""))), _scores(results or {})
    found = [
        EvalResult(task or "other", _id(of), _plain(of), metric, value)
        for of, metric, value in scores
    ]
    index: dict[str, Any] = {"model_name": title, "eval_results": found} if found else {}
    data = ModelCardData(
        base_model=known, library_name="deltune", tags=tags, pipeline_tag=task, **relation, **index
    )
    rows = {
        "what": _code(about["text"]),
        "of": _code(f"{backbone.get('class', '?')} {name}".strip()),
        "trained numbers": f"{scalars:,} in {len(about['layout'])} tensors",
        "task head": "saved with it" if any(n.startswith("head.") for n in about["layout"])
        else "none",
        "scale": f"{about['scale']:g}",
        "weights of the backbone": _code(str(backbone.get("weights", ""))[:16] or "unknown"),
        "configuration of the backbone": _code(str(backbone.get("config", ""))[:16] or "unknown"),
        "written by": str(about["library"]),
        **{_code(f"{metric} on {of}"): f"{value:.4f}" for of, metric, value in scores},
    }  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nA delta for a frozen pre-trained model.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Load it\n\n```python\nimport deltune as dt\n\n"
        f"# model: {_plain(backbone.get('class', '?'))} {_plain(name)}, with these weights\n"
        f'delta = dt.load("{place or "path/to/this/folder"}", model)\n```\n'
    )


def pipeline(model: str) -> str | None:
    """What the hub calls the task that a model of this class is for; None if transformers has no
    such class, or for no single task."""
    from transformers.models.auto import modeling_auto

    for task, table in TABLES.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            if model == names or (not isinstance(names, str) and model in names):
                return task
    return None


def _scores(results: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, float]]:
    return [
        (of, metric, float(value)) for of, one in results.items() for metric, value in one.items()
    ]


def _id(text: str) -> str:
    """A name as the hub takes one of a data set."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-") or "unnamed"


def _plain(text: str) -> str:
    return re.sub(r"[\r\n`]", " ", text)


def _code(text: str) -> str:
    return f"`{_plain(text).replace('|', ' ')}`"
