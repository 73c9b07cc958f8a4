"""Every error that mla-tune raises on purpose.

A message says where, what, what was allowed, and what to do.  The library raises; only the command line prints one
and exits, with the class's `exit_code`: 1 the work failed or a check did not hold, 2 the input is wrong.
Each class is also the built-in error that a caller of the library would expect.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MlaTuneError(Exception):
    """Base class of all errors that mla-tune raises on purpose; no other error is caught by `except MlaTuneError`."""

    exit_code = 1


class InputError(MlaTuneError, ValueError):
    """An argument, a recipe or a file of the user can't be used as it is."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe has faults: `problems` holds a line for each of them."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class NotMLAError(InputError):
    """The model has no Multi-head Latent Attention."""


class PlacementError(InputError):
    """An adapter can't be placed as asked on this model."""


class FileError(MlaTuneError, OSError):
    """A file or folder is missing, damaged, or in the way."""

    exit_code = 2


class CheckError(MlaTuneError, RuntimeError):
    """A check did not hold: planned != attached, an adapter without a gradient, a merge that differs."""


class WorkError(MlaTuneError, RuntimeError):
    """The work itself failed: out of memory, a full disk, a loss that is not a number."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'W_UKV'?"` for the allowed name nearest to `word`; an empty text where none is near."""
    names = list(allowed)
    by_lower = {n.lower(): n for n in names}
    near = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""


class Interrupted(MlaTuneError, RuntimeError):
    """The run was stopped by a signal and can be continued from a checkpoint."""

    exit_code = 130
