"""The folder of a study: one immutable JSON record per run, written atomically."""

import fcntl
import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltune.errors import StudyError
from deltune.study.codec import decode
from deltune.study.plan import Run, run_from_json

PROGRESS = "progress.json"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run measured. Times in seconds, sizes in bytes, metrics as their task defines them."""

    dev: float
    test: float | None
    best_step: int
    steps: int
    epochs: float
    stopped: str
    curve: list[list[float]]
    losses: list[float]
    trainable: int
    trainable_without_head: int
    total: int
    saved_bytes: int | None
    peak_memory_bytes: int | None
    start_memory_bytes: int | None
    train_seconds: float
    eval_seconds: float
    load_seconds: float
    train: float | None = None
    """Metric on the training examples, where the study asks for it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run has no result."""

    type: str
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A run that ended: its spec, and its result or its failure."""

    digest: str
    run: dict[str, Any]
    status: Literal["finished", "failed"]
    seconds: float
    ended: str
    result: Result | None = None
    failure: Failure | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    measures: list[dict[str, Any]] | None = None
    """Rows of what a run that trains nothing has measured."""

    @property
    def spec(self) -> Run:
        """The run that this is the record of."""
        return run_from_json(self.run)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all; a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise StudyError(
            f"cannot write `{path}`: {error.strerror}; make room and run again"
        ) from None


def record_path(folder: Path, digest: str) -> Path:
    """Where the record of a run lies."""
    return folder / "runs" / f"{digest}.json"


def write_record(folder: Path, record: Record) -> None:
    """Writes the record of a run."""
    write_atomic(record_path(folder, record.digest), json.dumps(asdict(record), indent=1) + "\n")


def read_record(folder: Path, run: Run) -> Record | None:
    """The record of a run, or None if it has not ended.

    Raises:
        StudyError: the file is damaged, or is another run's.
    """
    digest = run.digest()
    path = record_path(folder, digest)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"`{path}` cannot be read ({error}); delete it to run it again") from None
    record = decode(Record, data, f"{path.name}:")
    if record.digest != digest or run_from_json(record.run).digest() != digest:
        raise StudyError(f"`{path}` is the record of another run; delete it to run this one again")
    return record


def set_aside(folder: Path, record: Record) -> None:
    """Moves a failed record to `retried/`, so that its run is run again and its failure kept."""
    target = folder / "retried"
    target.mkdir(exist_ok=True)
    number = len(list(target.glob(f"{record.digest}.*.json"))) + 1
    os.replace(record_path(folder, record.digest), target / f"{record.digest}.{number}.json")


def write_progress(folder: Path, workers: int, running: dict[str, float]) -> None:
    """Notes the runs in progress and the share of each that is done, for whoever watches."""
    write_atomic(folder / PROGRESS, json.dumps({"workers": workers, "running": running}))


def read_progress(folder: Path) -> tuple[int, dict[str, float]]:
    """The number of workers, and the runs in progress with their shares; 1 and none where no study
    is running in the folder."""
    try:
        with locked(folder):
            return 1, {}
    except StudyError:
        pass
    try:
        data = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return int(data["workers"]), {str(k): float(v) for k, v in data["running"].items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return 1, {}


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds the folder for one study; the lock goes with the process, however it ends.

    Raises:
        StudyError: another process runs a study in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise StudyError(
                f"a study is already running in `{folder}` (process {file.read().strip() or '?'}); "
                "wait for it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
