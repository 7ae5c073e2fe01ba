"""The film-review sentences of Hutto and Gilbert (2014) as a task of two classes.

The source distribution of the package vaderSentiment 3.3.2 (MIT licence) holds 10,605 sentences
of film reviews, each rated from -4 to 4 by about fifteen people. The class is the sign of the mean
rating. Sentences whose mean is nearer to zero than `NEUTRAL` are left out: of these 533 (5 %), only
35 have a mean two standard errors away from zero, so the raters did not settle the sign; of the
next quarter of a point, 71 % have. The classes stay balanced.

Source: C. J. Hutto and E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text, ICWSM 2014.
"""

import gzip
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from deltune.errors import DataError
from deltune.tasks.task import SPLITS, Record

MOVIE_REVIEWS = "vader:movie-reviews"
VERSION = "3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
NEUTRAL = 0.5
DEV, TEST = 1000, 2000
_INNER = f"vaderSentiment-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_LARGEST = 16 * 2**20


def vader_movie_reviews(cache: Path | None = None, sdist: Path | None = None) -> Path:
    """Returns the folder of the task, made on the first call and reused later.

    The first call lets pip fetch the source distribution, whose digest is checked before anything
    of it is used. The split is the same on every machine.

    Args:
        cache: The folder for cached files; `$DELTUNE_CACHE` or `~/.cache/deltune` by default.
        sdist: The source distribution, if it is already there; then pip is not called.

    Raises:
        DataError: If pip fails, or the file is not the expected one.
    """
    folder = (cache or cache_folder()) / "tasks" / f"vader_movie_reviews-{VERSION}"
    if _complete(folder):
        return folder
    if folder.exists():
        raise DataError(
            f"`{folder}` is incomplete; expected meta.json and three splits; remove the folder, "
            "then it is made again"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".vader-") as work:
            archive = sdist or _download(Path(work))
            sentences = read_sentences(_inner_file(archive))
            _publish(_write(Path(work, "task"), two_classes(sentences)), folder)
    except OSError as error:
        raise DataError(
            f"`{folder}` cannot be written ({error}); make room or set DELTUNE_CACHE to a folder "
            "that can be written"
        ) from None
    return folder


def cache_folder() -> Path:
    """Returns the folder for cached files: `$DELTUNE_CACHE` or `~/.cache/deltune`."""
    chosen = os.environ.get("DELTUNE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "deltune"


def read_sentences(text: bytes) -> list[tuple[str, float]]:
    """Returns the sentences and mean ratings of the file of ratings: id, mean, text a line."""
    sentences = []
    for number, line in enumerate(text.decode("utf-8").splitlines(), start=1):
        cells = line.split("\t")
        try:
            _, mean, sentence = cells
            sentences.append((" ".join(sentence.split()), float(mean)))
        except ValueError:
            raise DataError(
                f"line {number} of the ratings is {line[:80]!r}; expected id, mean rating and "
                "sentence with tabs between; get the source distribution again"
            ) from None
    return sentences


def two_classes(sentences: Iterable[tuple[str, float]]) -> list[Record]:
    """Returns the records of both classes in an order that depends on the texts only.

    Equal sentences become one with the mean of their ratings; near-neutral ones are left out.
    """
    ratings: dict[str, list[float]] = {}
    for sentence, rating in sentences:
        ratings.setdefault(sentence, []).append(rating)
    means = {text: math.fsum(found) / len(found) for text, found in ratings.items()}
    records = [
        Record(text, "positive" if mean > 0 else "negative")
        for text, mean in means.items()
        if abs(mean) >= NEUTRAL
    ]
    return sorted(records, key=lambda record: hashlib.sha256(record.input.encode()).digest())


def _download(work: Path) -> Path:
    """Lets pip fetch the file; pip checks the digest before it runs the package's set-up."""
    wanted = work / "requirements.txt"
    wanted.write_text(f"vaderSentiment=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary"]
    command += ["vaderSentiment", "--disable-pip-version-check", "--quiet", "--require-hashes"]
    command += ["--requirement", str(wanted), "--dest", str(work)]
    # Without isolation nothing else is fetched, but the environment then needs setuptools.
    for extra in (["--no-build-isolation"], []):
        try:
            done = subprocess.run(
                [*command, *extra], capture_output=True, text=True, timeout=600, check=False
            )
        except subprocess.TimeoutExpired:
            reason = "no answer within 600 s"
            break
        found = sorted(work.glob("*.tar.gz"))
        if done.returncode == 0 and found:
            return found[0]
        reason = " / ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
    raise DataError(
        f"pip could not fetch the source distribution of vaderSentiment {VERSION} ({reason}); "
        "check the connection to the package index, or fetch the file elsewhere and give its path "
        "as `sdist`"
    )


def _inner_file(archive: Path) -> bytes:
    """The file of ratings out of the archive in the archive, read in memory only."""
    if not archive.is_file():
        raise DataError(f"there is no source distribution `{archive}`; check the path")
    data = archive.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != SDIST_SHA256:
        raise DataError(
            f"`{archive}` has the SHA-256 digest {digest}; expected {SDIST_SHA256}, that of "
            f"vaderSentiment-{VERSION}.tar.gz; get the file again"
        )
    return _member(_member(data, _INNER), _RATINGS)


def _member(archive: bytes, name: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
            info = files.getmember(name)
            handle = files.extractfile(info) if info.size <= _LARGEST else None
            if handle is None:
                raise DataError(
                    f"`{name}` is no file of at most {_LARGEST} bytes; get the source "
                    "distribution again"
                )
            return handle.read()
    except (tarfile.TarError, KeyError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(
            f"`{name}` cannot be read from its archive ({error}); get the source distribution again"
        ) from None


def _write(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    cut = {"test": records[:TEST], "dev": records[TEST : TEST + DEV]}
    cut["train"] = records[TEST + DEV :]
    for split in SPLITS:
        lines = (json.dumps({"input": r.input, "target": r.target}) + "\n" for r in cut[split])
        packed = gzip.compress("".join(lines).encode(), mtime=0)
        (folder / f"{split}.jsonl.gz").write_bytes(packed)
    sizes = {f"n_{split}": len(cut[split]) for split in SPLITS}
    (folder / "meta.json").write_text(json.dumps(_ABOUT | sizes, indent=1) + "\n")
    return folder


_ABOUT = {
    "name": "vader_movie_reviews",
    "description": "film-review sentence: sign of the mean rating by about fifteen people",
    "kind": "classification",
    "metric": "accuracy",
    "labels": ["negative", "positive"],
    "positive": "positive",
    "licence": "MIT (Hutto & Gilbert 2014)",
    "source": f"pypi:vaderSentiment=={VERSION} (sdist), additional_resources",
    "splits": "made by deltune: ordered by the SHA-256 digest of the sentence",
    "note": f"mean ratings within {NEUTRAL} of zero left out; equal sentences joined",
}


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process may have been first; its folder is the same as ours.
        if not _complete(folder):
            raise
        shutil.rmtree(made)


def _complete(folder: Path) -> bool:
    names = ["meta.json", *(f"{split}.jsonl.gz" for split in SPLITS)]
    return all((folder / name).is_file() for name in names)
