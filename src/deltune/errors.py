"""Errors of the library: what happened with the value, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class DeltuneError(ValueError):
    """Any condition that deltune itself refuses."""


class SpecError(DeltuneError):
    """A spec, or the text or JSON of one, that does not mean anything."""


class WhereError(DeltuneError):
    """A `where` that does not match the model."""


class AttachError(DeltuneError):
    """A delta that cannot be attached to, merged into or found on this model."""


class StoreError(DeltuneError):
    """A file that cannot be written, read or trusted."""


class DataError(DeltuneError):
    """A task, record or label that cannot be used."""


class TrainError(DeltuneError):
    """Training that cannot start or go on."""


class StudyError(DeltuneError):
    """A study file or folder that cannot be used."""


class ConversionError(DeltuneError):
    """A delta that cannot be made into the other method in the way that was asked for."""


class ExchangeError(DeltuneError):
    """A checkpoint of another library, or a delta for one, that cannot be honoured as it is."""


class MergeError(DeltuneError):
    """Deltas that have no sum in the sense that was asked for, or not on one backbone."""


class SubspaceError(DeltuneError):
    """Solutions that span no common space, or a space that cannot be used so."""


def closest(word: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for the nearest of `known`, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f" (did you mean `{match[0]}`?)" if match else ""


def listing(words: Iterable[str], most: int = 24) -> str:
    """Words in backticks, cut after `most`."""
    words = list(words)
    text = ", ".join(f"`{word}`" for word in words[:most])
    return text + (f" and {len(words) - most} more" if len(words) > most else "")
