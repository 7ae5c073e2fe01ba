"""The film-review task against the counts of the published file and against made-up archives."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from deltune.errors import DataError
from deltune.tasks import vader
from deltune.tasks.records import load_task
from deltune.tasks.task import Record

LINES = (
    b"1\t2.0\tA joy.\r\n2\t-0.5\tToo  long\r\n3\t0.49\tA film.\r\n4\t1.0\tA joy.\r\n"
    b"5\t-3\tClich\xc3\xa9s"
)


def archive(name: str, data: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as files:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        files.addfile(info, io.BytesIO(data))
    return packed.getvalue()


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive of the same form, accepted by its digest."""
    sentences = b"\r\n".join(b"%d\t%d\tsentence %d" % (i, i % 9 - 4, i) for i in range(90))
    file = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    file.write_bytes(archive(vader._INNER, archive(vader._RATINGS, sentences)))
    monkeypatch.setattr(vader, "SDIST_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(vader, "TEST", 20)
    monkeypatch.setattr(vader, "DEV", 10)
    return file


def test_sentences_become_two_classes() -> None:
    sentences = vader.read_sentences(LINES)
    assert sentences == [
        ("A joy.", 2.0),
        ("Too long", -0.5),
        ("A film.", 0.49),
        ("A joy.", 1.0),
        ("Clichés", -3.0),
    ]
    records = vader.two_classes(sentences)
    assert sorted(records, key=lambda r: r.input) == [
        Record("A joy.", "positive"),
        Record("Clichés", "negative"),
        Record("Too long", "negative"),
    ]
    assert vader.two_classes(reversed(sentences)) == records
    assert vader.two_classes([("so so", 2.0), ("so so", -1.5)]) == []
    with pytest.raises(DataError, match="line 2 of the ratings is '2\\\\tmany"):
        vader.read_sentences(b"1\t2\tgood\n2\tmany\tbad")


def test_the_task_is_made_once_and_atomically(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = vader.vader_movie_reviews(tmp_path / "a", sdist)
    task = load_task(folder)
    assert [len(p) for p in (task.test, task.dev, task.train)] == [20, 10, 50]
    texts = [r.input for part in (task.test, task.dev, task.train) for r in part]
    kept = {f"sentence {i}" for i in range(90) if i % 9 != 4}
    assert len(texts) == len(set(texts)) and set(texts) == kept
    assert all((int(r.input[9:]) % 9 > 4) == (r.target == "positive") for r in task.train)
    assert task.positive == "positive" and "MIT" in task.meta["licence"]
    again = vader.vader_movie_reviews(tmp_path / "b", sdist)
    for file in sorted(folder.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes()
    assert (folder / "train.jsonl.gz").read_bytes()[4:8] == bytes(4)  # no time in the file
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    sdist.unlink()
    monkeypatch.setenv("DELTUNE_CACHE", str(tmp_path / "a"))
    monkeypatch.setattr(subprocess, "run", _never)
    assert vader.vader_movie_reviews() == folder
    assert load_task("vader:movie-reviews") == task
    with pytest.raises(DataError, match=r"no task `vader:movies`.*write `vader:movie-reviews`"):
        load_task("vader:movies")


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("the cached task was not used")


def test_a_failure_leaves_nothing_and_an_incomplete_folder_is_named(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gzip, "compress", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left.*DELTUNE_CACHE"):
        vader.vader_movie_reviews(tmp_path / "c", sdist)
    assert list((tmp_path / "c" / "tasks").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "c" / "tasks" / "vader_movie_reviews-3.3.2").mkdir()
    with pytest.raises(DataError, match=r"is incomplete.*remove the folder"):
        vader.vader_movie_reviews(tmp_path / "c", sdist)


def test_another_process_may_be_first(sdist: Path, tmp_path: Path) -> None:
    folder = vader.vader_movie_reviews(tmp_path / "d", sdist)
    before = folder.stat().st_ino
    late = vader._write(tmp_path / "late", [Record(str(i), "positive") for i in range(40)])
    vader._publish(late, folder)
    assert folder.stat().st_ino == before and not late.exists()


def test_archives_are_not_trusted(
    sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.tar.gz"
    other.write_bytes(archive("x", b"y"))
    with pytest.raises(DataError, match=r"SHA-256 digest .*expected"):
        vader.vader_movie_reviews(tmp_path / "e", other)
    with pytest.raises(DataError, match="there is no source distribution"):
        vader.vader_movie_reviews(tmp_path / "e", tmp_path / "none.tar.gz")
    with pytest.raises(DataError, match="cannot be read from its archive"):
        vader._member(archive("x", b"y"), "z")
    with pytest.raises(DataError, match="cannot be read from its archive"):
        vader._member(sdist.read_bytes()[:300], vader._INNER)
    monkeypatch.setattr(vader, "_LARGEST", 10)
    with pytest.raises(DataError, match="no file of at most 10 bytes"):
        vader._member(archive("x", b"y" * 11), "x")


def test_a_failing_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(DataError, match=r"could not fetch .*No matching distribution.*`sdist`"):
        vader.vader_movie_reviews(tmp_path)


def test_the_published_file_gives_the_known_counts(tmp_path: Path) -> None:
    given = os.environ.get("DELTUNE_VADER_SDIST")
    if not given:
        pytest.skip("DELTUNE_VADER_SDIST names no source distribution of vaderSentiment 3.3.2")
    sentences = vader.read_sentences(vader._inner_file(Path(given)))
    assert len(sentences) == 10_605 and len({text for text, _ in sentences}) == 10_603
    assert sum(abs(mean) < vader.NEUTRAL for _, mean in sentences) == 533
    task = load_task(vader.vader_movie_reviews(tmp_path, Path(given)))
    sizes = {name: len(task.split(name)) for name in ("train", "dev", "test")}
    assert sizes == {"train": 7070, "dev": 1000, "test": 2000}
    means = dict(sentences)
    for record in task.test:
        assert (means[record.input] > 0) == (record.target == "positive")
    assert abs(sum(r.target == "positive" for r in task.train) / 7070 - 0.5) < 0.01
