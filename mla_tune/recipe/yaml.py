"""YAML as a recipe needs it: `1e-4` is a number, a key given twice is an error, and every key knows its line."""

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
    """Parse one YAML document.  Raises `RecipeError` with line and column for broken YAML and for duplicate keys."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        doc = Document(None)
        if node is None:
            return doc
        duplicates: list[str] = []
        _walk(loader, node, (), doc.lines, duplicates, where)
        if duplicates:
            raise RecipeError(duplicates)
        doc.value = loader.construct_document(node)
        return doc
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError([f"{where}{at}: not valid YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise RecipeError([f"{where}: not valid YAML: {' '.join(str(error).split())}"]) from None
    finally:
        loader.dispose()


def scalar(text: str, where: str) -> Any:
    """The value of a `--set` override, read as YAML."""
    return parse(text, where).value


def _walk(loader: _Loader, node: yaml.Node, path: tuple, lines: dict, duplicates: list[str], where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            key = loader.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                dotted = ".".join(map(str, (*path, key)))
                duplicates.append(f"{where}:{line}: {dotted}: given twice, first on line {seen[key]}; keep one")
            seen.setdefault(key, line)
            lines[(*path, key)] = line
            _walk(loader, value_node, (*path, key), lines, duplicates, where)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*path, i)] = item.start_mark.line + 1
            _walk(loader, item, (*path, i), lines, duplicates, where)
