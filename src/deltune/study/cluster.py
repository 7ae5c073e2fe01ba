"""Ray as the engine of a study: worker processes on the machines of a cluster."""

import io
import shutil
import socket
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.errors import StudyError
from deltune.study import pool
from deltune.study.plan import Run
from deltune.study.records import record_path, write_atomic

Message = dict[str, Any]


class Node:
    """One worker process on a machine of the cluster, in an actor; the same one that runs locally.

    Its runs write into a folder of the machine. What they leave travels with the message that ends
    them, so no folder has to be shared. Models and tasks must be found at the same places.
    """

    def __init__(self, threads: int, models: list[str], arguments: list[str]) -> None:
        pool.COMMAND[1:] = arguments
        self.folder = Path(tempfile.mkdtemp(prefix="deltune-study-"))
        self.pool = pool.Pool(1, threads, models, self.folder)

    def give(self, run: dict[str, Any], job: Message) -> None:
        """Gives the worker a run."""
        from deltune.study.plan import run_from_json

        (worker,) = self.pool.workers
        own = {"folder": str(self.folder)}
        for place, content in job.pop("read").items():
            unpack(content, self.folder / place)
        worker.give(run_from_json(run), {**job, **own})

    def hear(self, timeout: float) -> list[Message]:
        """What the worker said since; what an ended run left is attached to its end."""
        heard = []
        for worker, message in self.pool.hear(timeout):
            if message["event"] == "ready":
                worker.ready = True
            run = worker.run
            over = message["event"] in ("done", "died", "gone")
            if run and over and message.get("digest") in (None, run.digest()):
                message |= self._left(run.digest())
                worker.run = None
            if message["event"] == "gone":
                self.pool.replace(worker)
            heard.append(message)
        return heard

    def close(self) -> None:
        """Ends the worker and sweeps its folder."""
        self.pool.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _left(self, digest: str) -> Message:
        record = record_path(self.folder, digest)
        found: Message = {"made": {}}
        if record.exists():
            found["record"] = record.read_text(encoding="utf-8")
            record.unlink()
        for made in (self.folder / kind / digest for kind in ("deltas", "spaces")):
            if made.exists():
                found["made"][str(made.relative_to(self.folder))] = packed(made)
                shutil.rmtree(made)
        return found


@dataclass(slots=True)
class Remote:
    """The study's side of a node: what `pool.Worker` is of a local process."""

    actor: Any
    number: int
    folder: Path
    run: Run | None = None
    ready: bool = False
    asked: Any = None

    def give(self, run: Run, job: Message) -> None:
        """Gives the node a run, with the folders that it reads."""
        self.run = run
        job = {**job, "read": {place: packed(self.folder / place) for place in run.needs}}
        self.actor.give.remote(run.to_json(), job)


class RayPool:
    """Nodes of a Ray cluster, with the interface of `pool.Pool`.

    Args:
        workers: how many runs at once, over all machines.
        threads: processors that each run asks Ray for, and threads that it uses.
        models: places of the models, for the workers to import their code beforehand.
        folder: of the study, on this machine.
        address: of the cluster; None starts one here, `auto` finds a running one.
    """

    def __init__(
        self, workers: int, threads: int, models: list[str], folder: Path,
        address: str | None = None,
    ) -> None:  # fmt: skip
        self.ray, self.folder = _ray(), folder
        self.own = not self.ray.is_initialized()
        if self.own:
            try:
                _reach(address)
                self.ray.init(address, log_to_driver=False, include_dashboard=False)
            except (OSError, ValueError, RuntimeError) as error:
                raise StudyError(
                    f"no Ray cluster at `{address}`: {str(error).strip().splitlines()[0]}; start "
                    "one with `ray start --head`, or leave the address out"
                ) from None
        node = self.ray.remote(num_cpus=threads)(Node)
        self.workers = [
            Remote(node.remote(threads, models, pool.COMMAND[1:]), number, folder)
            for number in range(workers)
        ]

    def idle(self) -> Remote | None:
        """A node that waits for a run."""
        return next((one for one in self.workers if one.ready and not one.run), None)

    def hear(self, timeout: float) -> list[tuple[Remote, Message]]:
        """What the nodes said; records and deltas that came with it are on disk by then."""
        for one in self.workers:
            one.asked = one.asked or one.actor.hear.remote(timeout)
        asked = {one.asked: one for one in self.workers}
        done, _ = self.ray.wait(list(asked), num_returns=1, timeout=2 * timeout)
        heard: list[tuple[Remote, Message]] = []
        for reference in done:
            one, one_run = asked[reference], asked[reference].run
            one.asked = None
            try:
                messages = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                if not one.ready:
                    raise StudyError(f"a worker could not start: {error}") from None
                messages = [{"event": "gone", "status": -9}]
                one.actor = None
            for message in messages:
                if one_run is not None:
                    self._take(one_run, message)
                heard.append((one, message))
        return heard

    def replace(self, worker: Remote) -> None:
        """Goes on with the node's new process."""
        worker.ready, worker.run = False, None
        if worker.actor is None:
            raise StudyError(
                "a machine of the cluster went away; run the study again to go on with the others"
            )

    def close(self) -> None:
        """Ends every node."""
        actors = [one.actor for one in self.workers if one.actor is not None]
        self.ray.wait([one.close.remote() for one in actors], num_returns=len(actors), timeout=5)
        for one in actors:
            self.ray.kill(one)
        if self.own:
            self.ray.shutdown()

    def _take(self, run: Run, message: Message) -> None:
        for place, content in message.pop("made", {}).items():
            unpack(content, self.folder / place)
        if "record" in message:
            write_atomic(record_path(self.folder, run.digest()), message.pop("record"))


def packed(folder: Path) -> bytes:
    """The files of a folder as one archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, str(path.relative_to(folder)))
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Writes what `packed` gave."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)


def _reach(address: str | None) -> None:
    """Ray itself waits for minutes where nobody listens."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise StudyError(
            "the engine `ray` needs Ray, which is not installed: pip install 'deltune[ray]'"
        ) from None
    return ray
