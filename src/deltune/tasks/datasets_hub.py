"""Records out of what the library `datasets` reads."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltune.errors import DataError, closest, listing
from deltune.tasks.parsing import Columns, records_of
from deltune.tasks.readers import missing
from deltune.tasks.task import SPLITS, Record

_USUAL = {"train": ("train",), "dev": ("validation", "dev", "valid"), "test": ("test",)}


def hub_splits(
    name: str,
    columns: Columns,
    labels: Sequence[str] | None,
    chosen: Mapping[str, str],
) -> tuple[dict[str, list[Record]], list[str] | None]:
    """Returns the records of each split that there is, and the label names if there are any.

    Labels stored as numbers with names become their names; a negative one counts as no target.
    """
    data = _load(name)
    names = _split_names(name, data, chosen)
    labels = labels or _class_names(data[names["train"]], columns.target)
    parts = {
        ours: records_of(
            _named(data[theirs], columns),
            f"`hf:{name}`, split `{theirs}`",
            columns=columns,
            labels=labels,
        )
        for ours, theirs in names.items()
    }
    return parts, None if labels is None else list(labels)


def _load(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        missing("datasets", f"to read `hf:{name}`")
    dataset, _, config = name.partition(":")
    saved = any(Path(dataset, mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    with _quiet(datasets):
        try:
            data = (
                datasets.load_from_disk(dataset)
                if saved
                else datasets.load_dataset(dataset, config or None)
            )
        except Exception as error:  # the library raises its own, fsspec's and pyarrow's errors
            raise DataError(
                f"`hf:{name}` cannot be loaded ({type(error).__name__}: {_line(error)}); check "
                "the name, the configuration (hf:NAME:CONFIG) and the connection"
            ) from error
    return data if isinstance(data, dict) else {"train": data}


@contextmanager
def _quiet(datasets: Any) -> Generator[None]:
    was = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was:
            datasets.enable_progress_bars()


def _split_names(name: str, data: Mapping[str, Any], chosen: Mapping[str, str]) -> dict[str, str]:
    for ours, theirs in chosen.items():
        if ours not in SPLITS:
            raise DataError(f"unknown split `{ours}`; choose for one of {listing(SPLITS)}")
        if theirs not in data:
            raise DataError(
                f"`hf:{name}` has no split `{theirs}`{closest(theirs, data)}; it has "
                f"{listing(data)}; name one of these"
            )
    names = {
        ours: next((theirs for theirs in usual if theirs in data), None)
        for ours, usual in _USUAL.items()
    }
    found = {ours: theirs for ours, theirs in (names | dict(chosen)).items() if theirs}
    if "train" not in found:
        raise DataError(
            f"`hf:{name}` has no split `train`; it has {listing(data)}; say which one to train "
            'on, like splits={"train": "..."}'
        )
    if len(set(found.values())) < len(found):
        raise DataError(
            f"`hf:{name}`: one split was chosen for two uses ({found!r}); a model must not be "
            "scored on what it was trained or chosen on; choose different ones"
        )
    return found


def _class_names(data: Any, target: str) -> list[str] | None:
    feature = data.features.get(target)
    return list(feature.names) if hasattr(feature, "int2str") else None


def _named(data: Any, columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows with only the columns that are read, class numbers replaced by their names."""
    kept = [name for name in dict.fromkeys(columns.names()) if name in data.column_names]
    names = _class_names(data, columns.target)
    for row in data.select_columns(kept):
        value = row.get(columns.target)
        if names is not None and isinstance(value, int):
            row[columns.target] = names[value] if value >= 0 else None
        yield row


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
