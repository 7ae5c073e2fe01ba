"""Tasks out of folders, single files and Hugging Face data sets."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltune.errors import DataError, closest, listing
from deltune.tasks.datasets_hub import hub_splits
from deltune.tasks.harness import harness_splits
from deltune.tasks.parsing import Columns, read_records, records_of
from deltune.tasks.readers import SUFFIXES, suffix_of
from deltune.tasks.task import DEFAULT_METRIC, SPLITS, Record, Task
from deltune.tasks.vader import MOVIE_REVIEWS, vader_movie_reviews

__all__ = ["Columns", "Record", "Task", "load_task", "read_records", "records_of"]

Splits = dict[str, list[Record]]
FRACTIONS = (0.8, 0.1, 0.1)


def load_task(
    path: Path | str,
    *,
    columns: Columns | None = None,
    kind: str | None = None,
    metric: str | None = None,
    labels: Sequence[str] | None = None,
    fractions: tuple[float, float, float] = FRACTIONS,
    splits: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Task:
    """Loads a task.

    Five sources are known:

    - a folder with `meta.json` (at least `kind` and `metric`; for classes also `labels`, which are
      otherwise those of the training records; keys beyond these are kept as `Task.meta`) and one
      file `train`, `dev` and `test` each, ending in .jsonl.gz, .jsonl, .csv or .parquet;
    - one such file, which is shuffled by `seed` and cut by `fractions`;
    - `hf:NAME` or `hf:NAME:CONFIG`, a data set of the Hugging Face hub or a local folder that the
      library `datasets` reads; a split that it lacks is cut from its training records;
    - `lm-eval:NAME`, a task of lm-evaluation-harness with its template (NAME may be the path of a
      YAML file); its test split is what the harness evaluates on, and where it has no training
      documents it is a task for `evaluate` alone;
    - `vader:movie-reviews`, the film-review sentences of Hutto and Gilbert (2014), which pip
      fetches once.

    Without `kind`, a file or data set is `multiple_choice` when every record has options,
    `classification` when labels are given or there are at most a fifth as many different targets
    as records, and `generation` otherwise; the metric is then accuracy or exact match.

    Args:
        path: The folder, the file or the name.
        columns: Where the fields of a record stand.
        kind: The kind of task, in place of what the source says.
        metric: The metric, in place of what the source says.
        labels: The label set, in place of what the source says.
        fractions: The shares of train, dev and test of a single file.
        splits: For `hf:`, which of its splits is `train`, `dev` and `test`.
        seed: The seed of the shuffle of a single file.

    Raises:
        DataError: If anything is wrong, with the file and line.

    Example:
        >>> import deltune as dt, tempfile
        >>> file = Path(tempfile.mkdtemp(), "toy.csv")
        >>> _ = file.write_text("input,target\\n" + "fine,good\\ndull,bad\\n" * 5)
        >>> task = dt.load_task(file)
        >>> task.kind, task.labels, len(task.train), len(task.dev), len(task.test)
        ('classification', ('bad', 'good'), 8, 1, 1)
    """
    given = {"kind": kind, "metric": metric, "labels": None if labels is None else list(labels)}
    given = {key: value for key, value in given.items() if value is not None}
    columns = columns or Columns()
    if str(path).startswith("hf:"):
        name = str(path)[3:]
        parts, names = hub_splits(name, columns, labels, splits or {})
        _fill(parts, fractions, seed, f"`hf:{name}`")
        about = {"labels": names} | given
        return _task(name, about, parts, {"source": f"hf:{name}", "seed": seed})
    if str(path).startswith("lm-eval:"):
        name = str(path).removeprefix("lm-eval:")
        parts, about = harness_splits(name)
        _fill(parts, fractions, seed, f"`{path}`")
        meta = {"source": str(path), "seed": seed, "template": about["template"]}
        return _task(Path(name).stem, about | given, parts, meta)
    if str(path).startswith("vader:"):
        path = _vader(str(path))
    path = Path(path)
    if path.is_dir():
        return _folder_task(path, columns, given)
    if not path.exists():
        raise DataError(
            f"there is no task at `{path}`; expected a folder with meta.json, a file ending in "
            f"{listing(SUFFIXES)}, hf:NAME, lm-eval:NAME or {MOVIE_REVIEWS}; check the path"
        )
    found = read_records(path, columns=columns, labels=labels)
    parts = _cut(found, fractions, seed, f"`{path}`")
    name = path.name.removesuffix(suffix_of(path))
    return _task(name, given, parts, {"source": str(path), "seed": seed})


def _vader(name: str) -> Path:
    if name != MOVIE_REVIEWS:
        raise DataError(
            f"there is no task `{name}`{closest(name, [MOVIE_REVIEWS])}; write `{MOVIE_REVIEWS}`"
        )
    return vader_movie_reviews()


def _folder_task(folder: Path, columns: Columns, given: dict[str, Any]) -> Task:
    meta = _meta(folder / "meta.json") | given
    labels = meta.get("labels")
    if labels is None and meta["kind"] in ("classification", "regression-as-classes"):
        train = read_records(_split_file(folder, "train"), columns=columns)
        labels = meta["labels"] = _labels(train)
    parts = {
        name: read_records(_split_file(folder, name), columns=columns, labels=labels)
        for name in SPLITS
    }
    for name, records in parts.items():
        stated = meta.get(f"n_{name}", len(records))
        if stated != len(records):
            raise DataError(
                f"`{folder}`: the split `{name}` has {len(records)} records and meta.json says "
                f"{stated}; the file may be cut off; get it again or correct `n_{name}`"
            )
    return _task(str(meta.get("name") or folder.name), meta, parts, meta)


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"`{path.parent}` has no meta.json; a task folder has one with at least `kind` and "
            "`metric`; add it, or give one data file"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` is unreadable as JSON ({error}); correct or remove it") from None
    if not isinstance(meta, dict) or not all(isinstance(meta.get(k), str) for k in _NEEDED):
        raise DataError(
            f"`{path}` lacks one of {listing(_NEEDED)}; expected a JSON object with these as "
            'texts, like {"kind": "classification", "metric": "accuracy"}; add them'
        )
    labels = meta.get("labels")
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    ):
        raise DataError(f"`{path}`: `labels` is {labels!r}; expected a list of texts; correct it")
    return meta


_NEEDED = ("kind", "metric")


def _split_file(folder: Path, split: str) -> Path:
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    names = [path.name for path in found] or ["none"]
    raise DataError(
        f"`{folder}` has {len(found)} files for the split `{split}` ({listing(names)}); expected "
        f"exactly one, `{split}` with one of the endings {listing(SUFFIXES)}; add or remove one"
    )


def _task(name: str, about: dict[str, Any], parts: Splits, meta: dict[str, Any]) -> Task:
    kind = about.get("kind") or _guess(parts, about.get("labels"))
    labels = about.get("labels")
    if labels is None and kind in ("classification", "regression-as-classes"):
        labels = _labels([record for records in parts.values() for record in records])
    metric = about.get("metric") or DEFAULT_METRIC.get(kind, "")
    task = Task(name, kind, metric, tuple(labels) if labels else None, **parts, meta=meta)
    without = next((r for split in SPLITS for r in parts[split] if not r.options), None)
    if kind == "multiple_choice" and without is not None:
        raise DataError(
            f"task `{name}` is multiple choice and the record `{without.input[:60]}` has no "
            "options; add them or change the kind"
        )
    return task


def _labels(records: list[Record]) -> list[str]:
    return sorted({record.target for record in records})


def _guess(parts: Splits, labels: list[str] | None) -> str:
    records = [record for part in parts.values() for record in part]
    if all(record.options for record in records):
        return "multiple_choice"
    few = len({record.target for record in records}) * 5 <= len(records)
    return "classification" if labels or few else "generation"


def _fill(parts: Splits, fractions: tuple[float, float, float], seed: int, place: str) -> None:
    """Cuts the splits that are not there from the training records."""
    lacking = [name for name in SPLITS if name not in parts]
    if lacking:
        cut = _cut(parts["train"], fractions, seed, place)
        rest = [record for name in ("dev", "test") if name in parts for record in cut[name]]
        parts["train"] = cut["train"] + rest
        parts.update({name: cut[name] for name in lacking})


def _cut(
    records: list[Record], fractions: tuple[float, float, float], seed: int, place: str
) -> Splits:
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(
            f"the fractions {fractions!r} do not cut {place} in three; give three positive "
            "numbers that add up to 1, like (0.8, 0.1, 0.1)"
        )
    dev, test = (max(1, round(share * len(records))) for share in fractions[1:])
    if len(records) - dev - test < 1:
        raise DataError(
            f"{place} has {len(records)} records, too few to cut into train, dev and test; "
            "give at least three, or other fractions"
        )
    records = list(records)
    random.Random(seed).shuffle(records)
    cut = len(records) - dev - test
    return {"train": records[:cut], "dev": records[cut : cut + dev], "test": records[cut + dev :]}
