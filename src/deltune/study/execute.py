"""One run, in the process that was made for it, and its record."""

import contextlib
import datetime
import importlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltune.errors import DeltuneError
from deltune.study.machine import describe_machine
from deltune.study.measure import cost, memory, transfer
from deltune.study.plan import TRAINED, Run, run_from_json
from deltune.study.records import Failure, Record, write_record
from deltune.study.spaces import code, landscape, space, start
from deltune.study.trial import trial
from deltune.tasks.packages import find_model
from deltune.training.events import Evaluated, Event, Step
from deltune.training.memory import keep_pages

Tell = Callable[[dict[str, Any]], None]
MEASURES = {
    "transfer": transfer, "cost": cost, "memory": memory,
    "start": start, "space": space, "code": code, "landscape": landscape,
}  # fmt: skip


WARM = (
    "deltune.attaching", "deltune.families", "deltune.tasks.objectives", "sklearn.metrics",
    "transformers.modeling_utils",
)  # fmt: skip


def warm_up(models: list[str]) -> None:
    """Imports what the runs will import, the models' own modules included; computes nothing."""
    from transformers import AutoConfig

    for module in (*WARM, "transformers.models.auto.modeling_auto"):
        importlib.import_module(module)
    for place in models:
        # What is wrong with a model is told by its runs.
        with contextlib.suppress(Exception):
            files = find_model(place)
            config = AutoConfig.from_pretrained(files.where, **files.options)
            name = type(config).__module__.replace(".configuration_", ".modeling_")
            importlib.import_module(name)


def run_job(job: dict[str, Any], tell: Tell) -> None:
    """Runs a job of the study and writes its record, whatever happens in the run.

    Raises:
        StudyError: the record cannot be written.
    """
    run = run_from_json(job["run"])
    folder, places = Path(job["folder"]), job["places"]
    begun = time.monotonic()
    torch.set_num_threads(job["machine"]["threads"])
    result, measures, failure = None, None, None
    try:
        if run.kind in TRAINED:
            keep_pages()  # of this process, which is the run's alone
            result = trial(run, places, folder, job["keep_delta"], _teller(run, tell))
        else:
            measures = MEASURES[run.kind](run, places, folder, _sharer(run, tell))
    except Exception as error:
        # What a user's model, data or settings make of a run is the run's outcome, not ours.
        text = "" if isinstance(error, DeltuneError) else traceback.format_exc()
        failure = Failure(type(error).__name__, str(error), text)
    record = Record(
        digest=run.digest(),
        run=run.to_json(),
        status="failed" if failure else "finished",
        seconds=time.monotonic() - begun,
        ended=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        result=result,
        failure=failure,
        measures=measures,
        machine=describe_machine() | job["machine"],
    )
    write_record(folder, record)
    tell({"event": "done", "digest": record.digest, "status": record.status})


def _teller(run: Run, tell: Tell) -> Callable[[Event], None]:
    """Tells how far a training has come, and its last dev metric."""
    dev, told = None, _sharer(run, tell)

    def on_event(event: Event) -> None:
        nonlocal dev
        if isinstance(event, Evaluated):
            dev = event.value
        if isinstance(event, Step):
            told(event.step, event.steps, dev)

    return on_event


def _sharer(run: Run, tell: Tell, every: float = 0.5) -> Callable[..., None]:
    """Tells how much of a run is done, twice a second at most."""
    said, digest = 0.0, run.digest()

    def on_share(done: int, total: int, dev: float | None = None) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > every:
            said = now
            tell({"event": "progress", "digest": digest, "share": done / total, "dev": dev})

    return on_share
