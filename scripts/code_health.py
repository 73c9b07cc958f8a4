"""Figures on the code that must not get worse: lengths of functions, positional arguments, docstrings.

python scripts/code_health.py            # print the figures and what is over a limit
python scripts/code_health.py --check    # the same; exit 1 where a limit of LIMITS is broken (CI)
python scripts/code_health.py mla_tune/merge    # one package
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Lines of a function, signature and docstring included.
LONGEST = 60
#: Positional arguments of a function, `self` not counted.
MOST_POSITIONAL = 7
#: Lines of a file (a guide, printed but not checked).
LONG_FILE = 300
#: What `--check` holds the code to.
LIMITS = {"long functions": 6, "functions of many arguments": 0, "files of many lines": 12}
LEAST_DOCUMENTED = 0.95


@dataclass(frozen=True, slots=True)
class Function:
    """One function or class; `positional` is 0 for a class."""

    file: str
    line: int
    name: str
    lines: int
    positional: int
    public: bool
    documented: bool


def functions(file: Path, root: Path) -> Iterator[Function]:
    """All functions and classes of a file, nested functions but not lambdas."""
    tree = ast.parse(file.read_text(encoding="utf-8"))

    def walk(node: ast.AST, path: tuple[str, ...], public: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from walk(child, path, public)
                continue
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            seen = public and not inside and not child.name.startswith("_")
            decorators = [ast.unparse(d) for d in child.decorator_list]
            overrides = any(d == "override" or d.endswith((".setter", ".overload")) for d in decorators)
            count = 0
            if not isinstance(child, ast.ClassDef):
                arguments = [*child.args.posonlyargs, *child.args.args]
                count = len(arguments) - (bool(arguments) and arguments[0].arg in ("self", "cls", "ctx"))
            lines = (child.end_lineno or child.lineno) - child.lineno + 1
            is_class = isinstance(child, ast.ClassDef)
            yield Function(
                str(file.relative_to(root)),
                child.lineno,
                ".".join((*path, child.name)),
                0 if is_class else lines,
                count,
                seen and not overrides,
                bool(ast.get_docstring(child)),
            )
            yield from walk(child, (*path, child.name), seen)

    yield from walk(tree, (), True)


def bases(files: list[Path]) -> dict[str, list[str]]:
    """Class → its bases, by name."""
    return {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def inherited(found: list[Function], classes: dict[str, list[str]]) -> list[Function]:
    """The functions, with a method documented where the method that it overrides is (as `inspect.getdoc` sees it)."""
    documented = {f.name for f in found if f.documented}

    def has(owner: str, method: str) -> bool:
        above = classes.get(owner, [])
        return any(f"{base}.{method}" in documented or has(base, method) for base in above if base != owner)

    result = []
    for f in found:
        owner, _, method = f.name.rpartition(".")
        result.append(f if f.documented or not owner else replace(f, documented=has(owner, method)))
    return result


def is_command(function: Function) -> bool:
    """Commands of the CLI: typer reads their arguments as options, so they are many by nature."""
    return function.file.startswith("mla_tune/cli/") and function.name in ("command", "decode", "train", "root")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "mla_tune", help="what is measured")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is broken")
    parser.add_argument("--all", action="store_true", help="name every public function without a docstring")
    args = parser.parse_args()
    files = sorted(args.folder.resolve().rglob("*.py"))
    found = inherited([f for file in files for f in functions(file, ROOT)], bases(files))
    long = [f for f in found if f.lines > LONGEST and not is_command(f)]
    many = [f for f in found if f.positional > MOST_POSITIONAL and not is_command(f)]
    large = [f for f in files if len(f.read_text(encoding="utf-8").splitlines()) > LONG_FILE]
    public = [f for f in found if f.public]
    bare = [f for f in public if not f.documented]
    share = 1 - len(bare) / max(1, len(public))

    print(f"{len(files)} files, {sum(f.lines > 0 for f in found)} functions, {len(public)} public names")
    print(f"functions over {LONGEST} lines: {len(long)}")
    for f in sorted(long, key=lambda f: -f.lines):
        print(f"  {f.file}:{f.line} {f.name}: {f.lines} lines")
    print(f"functions of more than {MOST_POSITIONAL} positional arguments: {len(many)}")
    for f in many:
        print(f"  {f.file}:{f.line} {f.name}: {f.positional}")
    print(f"files over {LONG_FILE} lines: {len(large)}")
    for f in large:
        print(f"  {f.relative_to(ROOT)}: {len(f.read_text(encoding='utf-8').splitlines())}")
    print(f"public classes and functions with a docstring: {share:.1%} of {len(public)}")
    if args.all:
        for f in bare:
            print(f"  {f.file}:{f.line} {f.name}")

    figures = {
        "long functions": len(long),
        "functions of many arguments": len(many),
        "files of many lines": len(large),
    }
    broken = [f"{what}: {n}, at most {LIMITS[what]}" for what, n in figures.items() if n > LIMITS[what]]
    if share < LEAST_DOCUMENTED:
        broken.append(f"docstrings: {share:.1%}, at least {LEAST_DOCUMENTED:.0%}")
    if args.check and broken:
        print("over the limit: " + "; ".join(broken), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
