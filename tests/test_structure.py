"""No cycle of imports among the files of mla_tune, no test module that imports another, figures of the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mla_tune"


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, modules: set[str]) -> set[str]:
    """Modules of mla_tune that a file imports when it runs, inside functions too; not those for type checkers."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    walk(other)
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                for name in child.names:
                    inner = f"{child.module}.{name.name}"
                    found.update({inner} if inner in modules else {child.module} & modules)
            elif isinstance(child, ast.Import):
                found.update({name.name for name in child.names} & modules)
            walk(child)

    walk(ast.parse(file.read_text(encoding="utf-8")))
    return found - {"mla_tune", module_of(file)}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that can reach each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_files_import_each_other() -> None:
    files = {module_of(file): file for file in PACKAGE.rglob("*.py")}
    assert cycles({module: imports_of(file, set(files)) for module, file in files.items()}) == []


def test_a_cycle_would_be_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_tests_import_no_tests(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
            assert not any(part.startswith("test_") for part in (node.module or "").split(".")), node.module


@pytest.mark.parametrize("script", ["code_health.py", "make_file_map.py"])
def test_checks_of_the_code_hold(script: str) -> None:
    run = subprocess.run([sys.executable, f"scripts/{script}", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
