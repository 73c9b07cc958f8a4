"""The YAML that a recipe is written in: `1e-4` is a number, a key given twice is an error, every key has its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from mla_tune.errors import RecipeError

# YAML 1.2's scalars.  PyYAML follows 1.1, in which `1e-4` is text, `010` is 8, `1:30` is 90 and `on` is true.
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
#: Half a character of UTF-16, and NUL: YAML's escapes can write them, but no path or name can hold them.
_UNUSABLE = re.compile(r"[\ud800-\udfff\0]")
#: Values and levels of a recipe at most, each alias counted as often as it is used.
MOST_NODES, DEEPEST = 10_000, 40
_OURS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool")}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers and booleans of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in pairs if tag not in _OURS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))


@dataclass(slots=True)
class Document:
    """Parsed YAML; `lines` maps a path of keys to the line (from 1) on which its key stands."""

    value: Any
    lines: dict[tuple[Any, ...], int] = field(default_factory=dict)


def parse(text: str, where: str) -> Document:
    """Parse one YAML document.

    Raises `RecipeError`, with line and column, for broken YAML, for duplicate keys, for a value that its tag does not
    fit, for text that no file or name can hold (NUL, half a character), and for nesting and aliases without end.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        doc = Document(None)
        if node is None:
            return doc
        walk = _Walk(loader, where, doc.lines)
        walk.node(node, ())
        if walk.problems:
            raise RecipeError(walk.problems)
        doc.value = loader.construct_document(node)
        return doc
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError([f"{where}{at}: not valid YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise RecipeError([f"{where}: not valid YAML: {' '.join(str(error).split())}"]) from None
    except RecursionError:
        raise RecipeError([f"{where}: nested too deeply: a recipe is sections with keys"]) from None
    finally:
        loader.dispose()


def scalar(text: str, where: str) -> Any:
    """The value of a `--set` override, read as YAML."""
    return parse(text, where).value


class _Walk:
    """One pass over the nodes of a document: lines of keys, duplicate keys, values that can't be used."""

    def __init__(self, loader: _Loader, where: str, lines: dict[tuple[Any, ...], int]) -> None:
        self.loader, self.where, self.lines = loader, where, lines
        self.problems: list[str] = []
        self.nodes = 0

    def node(self, node: yaml.Node, path: tuple[Any, ...]) -> None:
        """Check `node`, which lies under the keys of `path`, and all below it."""
        self.nodes += 1
        if self.nodes > MOST_NODES or len(path) > DEEPEST:
            what = f"more than {MOST_NODES:,} values" if self.nodes > MOST_NODES else f"more than {DEEPEST} levels"
            raise RecipeError([f"{self._at(node)}: {what}, aliases (*name) written out: no recipe needs them"])
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.lines[(*path, i)] = item.start_mark.line + 1
                self.node(item, (*path, i))
        else:
            self._value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple[Any, ...]) -> None:
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = self._value(key_node, path)
            line = key_node.start_mark.line + 1
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                dotted = ".".join(map(str, (*path, key)))
                first = f"first on line {seen[key]}; keep one"
                self.problems.append(f"{self.where}:{line}: {dotted}: given twice, {first}")
            seen.setdefault(key, line)
            self.lines[(*path, key)] = line
            self.node(value_node, (*path, key))

    def _value(self, node: yaml.Node, path: tuple[Any, ...]) -> Any:
        """The value of a scalar; a line of `problems` for one that can't be used."""
        dotted = f"{'.'.join(map(str, path))}: " if path else ""
        try:
            value = self.loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # PyYAML's constructors let what int(), date() and their like raise pass
            why = str(error) or type(error).__name__
            self.problems.append(
                f"{self._at(node)}: {dotted}{shortened(node.value)} is no {node.tag.split(':')[-1]}: {why}"
            )
            return None
        if isinstance(value, str) and (wrong := _UNUSABLE.search(value)):
            self.problems.append(f"{self._at(node)}: {dotted}holds U+{ord(wrong[0]):04X}, which no name or path can")
        return value

    def _at(self, node: yaml.Node) -> str:
        return f"{self.where}:{node.start_mark.line + 1}"


def shortened(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 120 else f"{shown[:117]}…"
