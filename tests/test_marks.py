"""The order of the tests themselves: what is fast, and who imports whom."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.marks import fast_cases, mark_cases

TESTS = Path(__file__).parent


def items_of(cases: list[str], *patterns: str) -> list[Any]:
    """Stand-ins for the collected cases of one test with `fast_cases(*patterns)`."""

    def item(case: str) -> Any:
        added: list[Any] = []
        return SimpleNamespace(
            nodeid=f"tests/test_x.py::test_it[{case}]",
            iter_markers=lambda name: [fast_cases(*patterns).mark],
            add_marker=added.append,
            added=added,
        )

    return [item(case) for case in cases]


def test_cases_that_are_not_named_are_slow() -> None:
    items = items_of(["deepseek_v3", "deepseek_v3-dora", "deepseek_v32", "keep-x", "x"], "deepseek_v3", "keep*")
    mark_cases(items, complete=True)
    assert [[mark.name for mark in item.added] for item in items] == [[], [], ["slow"], [], ["slow"]]


def test_a_pattern_without_a_case_is_an_error_where_all_cases_were_collected() -> None:
    mark_cases(items_of(["a"], "a", "b"), complete=False)
    with pytest.raises(pytest.UsageError, match="test_it: fast_cases: no case is 'b'"):
        mark_cases(items_of(["a"], "a", "b"), complete=True)


def test_no_test_module_imports_another() -> None:
    """What two of them need lies in tests/helpers or in a conftest.py."""
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            bad = [name for name in names if name.rpartition(".")[2].startswith("test_")]
            assert not bad, f"{path.relative_to(TESTS)}:{node.lineno} imports {bad}"
