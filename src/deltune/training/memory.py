"""Peak memory of a stretch of work, and memory that is kept for the next step."""

import ctypes
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The highest memory in use between `PeakMemory(device)` and `read()`, in bytes.

    On a CUDA device it is the most memory that tensors held there. Elsewhere it is the largest
    resident set of the whole process (interpreter, libraries and model included): on Linux since
    the start of the measurement where the kernel lets a process reset its mark, else since the
    start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def read(self) -> int | None:
        """Bytes; None on a system that does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak()


def _reset_resident_peak() -> None:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the whole process


def _resident_peak() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_pages() -> None:
    """Lets this process keep what its tensors free, where the C library is glibc.

    By default glibc maps each large tensor from the system and gives it back at once, so that every
    step touches fresh pages: a fifth of the time of full fine-tuning of a small encoder. The peak
    of the process is somewhat higher then, since free blocks do not fit every tensor.
    """
    if sys.platform != "linux":
        return
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)):
            tune(option, value)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Options of `mallopt` in glibc's malloc.h."""
