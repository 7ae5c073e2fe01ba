"""Oracle: a buffer of known size that is written to and freed."""

import platform
import subprocess
import sys

import pytest
import torch

from deltune.training import memory
from deltune.training.memory import PeakMemory

MIB = 2**20


def test_peak_sees_a_freed_buffer_and_starts_anew() -> None:
    if not memory._CLEAR.exists():
        pytest.skip("this system does not let a process reset its peak")
    first = PeakMemory(torch.device("cpu"))
    before = first.read() or 0
    buffer = torch.ones(200 * MIB, dtype=torch.uint8)
    del buffer
    peak = first.read() or 0
    assert 150 * MIB < peak - before < 260 * MIB
    again = PeakMemory(torch.device("cpu")).read() or 0
    assert again < peak - 150 * MIB


def test_without_proc_the_process_peak_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    there = PeakMemory(torch.device("cpu")).read() or 0
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none" / "status")
    lifetime = PeakMemory(torch.device("cpu")).read()
    assert lifetime is not None and lifetime >= there * 0.9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="pages are kept with glibc")
def test_kept_pages_are_not_asked_for_again() -> None:
    """Oracle: the kernel's count of pages that were touched for the first time."""
    program = (
        "import resource, torch\n"
        "from deltune.training.memory import keep_pages\n"
        "def touched():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(8): torch.ones(1 << 24)\n"  # 64 MiB each: 16,384 pages
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(touched()); keep_pages(); touched(); print(touched())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 100  # 256 if the pages are huge, else 512 times as many
    assert kept < fresh // 4  # a block may be found a new place once
