"""The study's side of its worker processes: start, feed, hear, end."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltune.errors import StudyError
from deltune.study.plan import Run

COMMAND = [sys.executable, "-m", "deltune.study.worker"]


@dataclass(slots=True)
class Worker:
    """One worker process."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    run: Run | None = None
    ready: bool = False
    buffer: bytes = field(default=b"")

    def give(self, run: Run, job: dict[str, Any]) -> None:
        """Gives the worker a run."""
        self.run = run
        self.send(job)

    def send(self, message: dict[str, Any]) -> None:
        """Writes a message; that nobody reads it is heard as `gone`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def tail(self) -> str:
        """The last lines that the worker wrote to its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-8:])


class Pool:
    """Worker processes with so many threads each; a worker that dies is replaced."""

    def __init__(self, workers: int, threads: int, models: list[str], folder: Path) -> None:
        self.threads = threads
        self.models = models
        self.folder = folder
        self.selector = selectors.DefaultSelector()
        self.workers = [self._start(number) for number in range(workers)]

    def idle(self) -> Worker | None:
        """A worker that waits for a run."""
        return next((worker for worker in self.workers if worker.ready and not worker.run), None)

    def hear(self, timeout: float) -> list[tuple[Worker, dict[str, Any]]]:
        """What the workers said; `gone` is said for one that died."""
        heard: list[tuple[Worker, dict[str, Any]]] = []
        for key, _ in self.selector.select(timeout):
            worker = key.data
            data = os.read(key.fd, 1 << 16)
            *lines, worker.buffer = (worker.buffer + data).split(b"\n")
            heard.extend((worker, json.loads(line)) for line in lines)
            if not data:
                heard.append((worker, {"event": "gone", "status": self._bury(worker)}))
        return heard

    def replace(self, worker: Worker) -> None:
        """Starts another process in the place of a dead worker."""
        if not worker.ready:
            raise StudyError(f"a worker process could not start:\n{worker.tail()}")
        self.workers[worker.number] = self._start(worker.number)

    def close(self) -> None:
        """Ends every worker, and with it the run it holds."""
        for worker in self.workers:
            if worker.process.stdin:
                worker.process.stdin.close()
            worker.process.kill()
            worker.process.wait()
            if worker.process.stdout:
                worker.process.stdout.close()
        self.selector.close()

    def _start(self, number: int) -> Worker:
        log = self.folder / "logs" / f"worker-{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | _threads(self.threads),
            )
        worker = Worker(number, process, log)
        worker.send({"models": self.models})
        assert process.stdout is not None
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _bury(self, worker: Worker) -> int:
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        worker.process.kill()
        return worker.process.wait()


def _threads(count: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {name: str(count) for name in names} | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
