"""A worker process: imports everything once, then forks one fresh process per run.

A run in its own process has its own peak memory and its own random state, and cannot harm the next
one; the fork saves it the seconds of importing torch. Nothing here may compute with torch before
the fork: thread pools do not survive it.

The models to expect and then jobs come as JSON lines on standard input, events leave as JSON lines
on standard output. When the input closes, because the study ended or was killed, worker and run
die at once.
"""

import contextlib
import json
import os
import select
import signal
import sys
import threading
from typing import Any, TextIO

Message = dict[str, Any]


def main() -> None:
    """Serves jobs until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    inbox = _Inbox()
    from deltune.study.execute import warm_up

    warm_up(inbox.next()["models"])
    _send(channel, {"event": "ready"})
    while True:
        job = inbox.next()
        status = _fork(job, inbox, channel)
        if status:
            _send(channel, {"event": "died", "digest": job["digest"], "status": status})


class _Inbox:
    """The messages of standard input; at its end the process ends, and with it its child."""

    def __init__(self) -> None:
        self._buffer = b""

    def next(self) -> Message:
        """The next message, waited for."""
        while b"\n" not in self._buffer:
            self.fill()
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def fill(self) -> None:
        """Takes in what has arrived."""
        data = os.read(0, 1 << 16)
        if not data:
            os._exit(0)
        self._buffer += data


def _fork(job: Message, inbox: _Inbox, channel: TextIO) -> int:
    """Runs a job in a child; its exit status, negative for a signal."""
    life_read, life_write = os.pipe()
    over_read, over_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(life_write)
        os.close(over_read)
        _die_with(life_read)
        _run_and_exit(job, channel)
    os.close(life_read)
    os.close(over_write)
    # The child holds the only other end of `over`, so its end, however it comes, closes the pipe.
    while over_read not in select.select([0, over_read], [], [])[0]:
        # The next job may come between the word of this one's end and the end itself.
        inbox.fill()
    _, status = os.waitpid(child, 0)
    os.close(life_write)
    os.close(over_read)
    return os.waitstatus_to_exitcode(status)


def _run_and_exit(job: Message, channel: TextIO) -> None:
    status = 1
    try:
        from deltune.study.execute import run_job

        run_job(job, lambda message: _send(channel, message))
        status = 0
    except BaseException as error:
        with contextlib.suppress(OSError):
            _send(channel, {"event": "fatal", "digest": job["digest"], "message": str(error)})
            status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _die_with(pipe: int) -> None:
    def watch() -> None:
        os.read(pipe, 1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _send(channel: TextIO, message: Message) -> None:
    """Tells the study; where it has ended this ends too, so that a run does not fail of that."""
    try:
        channel.write(json.dumps(message) + "\n")
        channel.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
