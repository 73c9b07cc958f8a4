"""Marks that sort the tests into the fast set (`pytest -m "not slow"`) and the rest."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

#: Families that stay in the fast set where a test runs on all: the reference, one with linear attention between its MLA
#: layers, and one with two attention modules in a layer.
FAST_FAMILIES = ("deepseek_v3", "kimi_linear", "longcat_flash")


def fast_cases(*patterns: str) -> pytest.MarkDecorator:
    """Of a parametrized test only the cases whose id matches one of `patterns` are fast; the others are `slow`.

    An id is what pytest prints in the brackets.  A pattern is a whole id, or its beginning up to a dash, and may hold
    `*`.  One that matches no case is an error of collection, so that a renamed case does not turn slow unseen.
    """
    return pytest.mark.fast_cases(*patterns)


def fast_families() -> pytest.MarkDecorator:
    """`fast_cases` for a test whose first parameter is the name of a family."""
    return fast_cases(*FAST_FAMILIES)


def mark_cases(items: list[pytest.Item], complete: bool) -> None:
    """Mark the cases of `fast_cases` tests that are not fast as `slow`.

    Args:
        items: the collected tests.
        complete: whether all cases of each test are among them; else unmatched patterns are no error.

    Raises:
        pytest.UsageError: a pattern matches no case of its test.
    """
    unmatched: dict[tuple[str, str], bool] = {}
    for item in items:
        marks = list(item.iter_markers("fast_cases"))
        if not marks:
            continue
        test, _, case = item.nodeid.partition("[")
        case = case.removesuffix("]")
        patterns = [str(pattern) for mark in marks for pattern in mark.args]
        matches = [fnmatchcase(case, pattern) or fnmatchcase(case, pattern + "-*") for pattern in patterns]
        for pattern, match in zip(patterns, matches, strict=True):
            unmatched[test, pattern] = unmatched.get((test, pattern), True) and not match
        if not any(matches):
            item.add_marker(pytest.mark.slow)
    wrong = [f"{test}: fast_cases: no case is '{pattern}'" for (test, pattern), bad in unmatched.items() if bad]
    if complete and wrong:
        raise pytest.UsageError("\n".join(wrong))
