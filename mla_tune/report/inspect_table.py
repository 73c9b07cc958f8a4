"""The tables of `mla-tune inspect`, laid out to read at 80 columns and to use 120."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mla_tune.arch.roles import GROUPS, Role
from mla_tune.console import human_count

Depth = Literal["roles", "layers", "all"]
Layer = dict[str, Any]

LETTERS = {
    "H": "heads",
    "P": "key size without rope, a head",
    "R": "rope size",
    "V": "value size, a head",
    "C": "latent",
    "L": "query latent",
    "D": "hidden size",
}

#: What an adapter on a role touches beside the output, in one short column; the notes below the table say it in full.
EFFECTS = {
    Role.W_DKV: "alters cache",
    Role.W_UKV: "is absorbed",
    Role.W_UQ: "before fold",
    Role.W_Q: "before fold",
    Role.W_O: "before fold",
}

RISK_STYLE = {"low": "green", "medium": "yellow", "high": "red"}
HIT = "●"
#: Letters of a module's name that fit into 80 columns.
_NAME = 28
#: From this width on the table has room for the names in NeMo; below it they follow as a line.
WIDE = 108


def render(document: dict[str, Any], depth: Depth, console: Console) -> None:
    """Print what `preflight.inspect.inspect_architecture` found: a header, the table of the asked depth, and notes."""
    layers: list[Layer] = document["layers"]
    for line in _header(document):
        console.print(line, soft_wrap=True)  # a long path breaks where the terminal ends, not before
    console.print()
    if depth == "roles":
        console.print(_roles_table(layers, document["mtp"], wide=console.width >= WIDE))
        console.print()
        console.print(_role_notes(layers))
        if console.width < WIDE:
            console.print(_nemo_line(layers))
    else:
        blocks = _blocks([*layers, *document["mtp"]], collapse=depth == "layers")
        console.print(_modules_table(blocks, wide=console.width >= WIDE))
    console.print()
    if "adapted" in document:
        console.print(_adapted_line(document))
    for note in document["notes"]:
        console.print(Text(note))
    console.print(Text(_legend(document, depth), style="dim"))


def _header(document: dict[str, Any]) -> Iterator[Text]:
    """Yield name, size, dimensions and KV cache, a line each; all but a long path fit 80 columns."""
    layers, attentions, cache = document["num_layers"], document["attention_modules"], document["kv_cache"]
    mla = document["mla_layers"]
    facts = [
        f"{layers} layer{'s' if layers != 1 else ''}"
        + (f", {mla} with MLA" if mla != layers else f" of {attentions // layers} attentions" * (attentions != layers)),
        f"{human_count(document['params_total'])} parameters",
        f"{human_count(document['params_active'])} active a token",
        *([document["quantization"]] if document["quantization"] else []),
        *(["tied embeddings"] if document["tied_embeddings"] else []),
    ]
    name = document.get("model", document["model_type"])
    yield Text.assemble((name, "bold"), f"  family {document['title']}, model_type {document['model_type']}")
    yield Text(" · ".join(facts))
    yield Text(f"{_dims(document['dims'])}  vocabulary {document['vocab_size']:,}")
    for other in document["other_dims"]:
        differing = {k: v for k, v in document["dims"].items() if other[k] != v}
        yield Text(f"{_dims({k: other[k] for k in differing})}  in {other['modules']} of the attention modules")
    yield Text(
        f"KV cache, {cache['dtype']}: {cache['latent_bytes_per_token']:,} bytes a token latent · "
        f"{cache['expanded_bytes_per_token']:,} expanded · {cache['ratio']:.1f} ×"
    )
    if cache["indexer_bytes_per_token"]:
        yield Text(f"  and {cache['indexer_bytes_per_token']:,} bytes a token of the indexers' keys")


def _dims(dims: dict[str, int | None]) -> str:
    return "  ".join(f"{k} {'none' if v is None else v}" for k, v in dims.items())


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="bold")


def _roles_table(layers: list[Layer], mtp: list[Layer], wide: bool) -> Table:
    """Make the table with one row for each role; parameters and LoRA parameters are sums over its matrices."""
    table = _table()
    if wide:
        table.padding = (0, 1)
    table.add_column("Role", no_wrap=True)
    table.add_column("Count", justify="right", no_wrap=True)
    table.add_column("Shape", justify="right", no_wrap=True)
    table.add_column("Params", justify="right", no_wrap=True)
    table.add_column("LoRA", justify="right", no_wrap=True)
    table.add_column("Risk", no_wrap=True)
    table.add_column("Effect", no_wrap=True)
    if wide:
        table.add_column("NeMo, Megatron", no_wrap=True)
    for role, sites in _by_role(layers).items():
        first = sites[0]
        shapes = {tuple(s["shape"]) for s in sites}
        experts = f"×{first['count']}" if first["count"] > 1 else ""
        table.add_row(
            _marked(role.value, sites),
            f"{len(sites)}{experts}",
            _shape(first["shape"]) if len(shapes) == 1 else "several",
            human_count(sum(s["params"] for s in sites)),
            _lora(sites),
            Text(first["risk"], style=RISK_STYLE[first["risk"]]),
            EFFECTS.get(role, "") if first["attachable"] else "not adapted",
            *([first["nemo"]] if wide else []),
        )
    if mtp:
        params = human_count(sum(s["params"] for s in mtp))
        row = ("MTP layers", f"{len({s['layer'] for s in mtp})}", "several", params, "–", "", "not adapted")
        table.add_row(*row, *([""] if wide else []))
    return table


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive layers with equal modules (or one layer); `rows` holds each module's entries over those layers."""

    title: str
    rows: list[tuple[str, list[Layer]]]


def _blocks(layers: list[Layer], collapse: bool) -> list[_Block]:
    """Group the entries by layer; with `collapse`, join equal layers that follow each other into one block."""
    per_layer = [(i, list(group)) for i, group in groupby(layers, key=lambda s: s["layer"])]

    def look(item: tuple[int | None, list[Layer]]) -> tuple[Any, ...]:
        i, sites = item
        if i is None or not collapse:
            return (i,)
        keys = ("role", "shape", "count", "selected", "rank", "mtp")
        return tuple((_inside(s), *(str(s[k]) for k in keys)) for s in sites)

    blocks = []
    for _, run in groupby(per_layer, key=look):
        members = list(run)
        kind = " of MTP" if members[0][1][0]["mtp"] else ""
        columns = zip(*(sites for _, sites in members), strict=True)
        rows = [(_inside(column[0]), list(column)) for column in columns]
        blocks.append(_Block(_title(members[0][0], len(members)) + kind, rows))
    return blocks


def _title(first: int | None, n: int) -> str:
    if first is None:
        return "outside the layers"
    return f"layer {first}" if n == 1 else f"layers {first}–{first + n - 1} × {n}"


def _modules_table(blocks: Iterable[_Block], wide: bool) -> Table:
    """Make the table with one row for each module of a block; parameters are sums over the block's layers."""
    table = _table()
    table.add_column("Module", no_wrap=True)
    table.add_column("Role", no_wrap=True)
    table.add_column("Shape", justify="right", no_wrap=True)
    table.add_column("Params", justify="right", no_wrap=True)
    table.add_column("LoRA", justify="right", no_wrap=True)
    for block in blocks:
        table.add_row(Text(block.title, style="bold"))
        for name, sites in block.rows:
            first = sites[0]
            shape = f"{first['count']}×{_shape(first['shape'])}" if first["count"] > 1 else _shape(first["shape"])
            params = human_count(sum(s["params"] for s in sites))
            table.add_row(_marked(name if wide else _in_lines(name), sites), first["role"], shape, params, _lora(sites))
    return table


def _in_lines(name: str) -> str:
    """Break a long path into several lines at its dots."""
    lines = [""]
    for part in re.findall(r"[^.]+\.?", name):
        if lines[-1].strip() and len(lines[-1]) + len(part) > _NAME:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(lines)


def _role_notes(layers: list[Layer]) -> Table:
    """Say for each role why it has its risk, and what an adapter there does to the cache and to absorption."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    seen: dict[str, list[Role]] = {}
    for role, sites in _by_role(layers).items():
        seen.setdefault(_note(sites[0]), []).append(role)
    for note, roles in seen.items():
        grid.add_row(Text(_label(roles), style="bold"), Text(note))
    return grid


def _note(site: Layer) -> str:
    """Describe an adapter on this layer in a sentence or two; what holds for every layer is left out."""
    if not site["attachable"]:
        return site["reason"].removeprefix(f"{site['role']}: ")
    parts = [f"{site['risk']} risk: {site['note']}"]
    if not site["cache"].endswith("unchanged"):
        parts.append(site["cache"])
    if site["absorption"] != "not involved":
        parts.append(site["absorption"])
    return "; ".join(parts)


def _label(roles: list[Role]) -> str:
    """Name several roles by their group, if they are one (or that part of one that the model has)."""
    if len(roles) > 1:
        for name in ("dense", "shared", "mlp", "experts"):
            if set(roles) <= set(GROUPS[name]):
                return name
    return ", ".join(roles)


def _nemo_line(layers: list[Layer]) -> Padding:
    names: dict[str, list[str]] = {}
    for role, sites in _by_role(layers).items():
        if sites[0]["nemo"]:
            names.setdefault(sites[0]["nemo"], []).append(role.value)
    pairs = ", ".join(f"{'+'.join(roles)}={nemo}" for nemo, roles in names.items())
    return Padding(Text.assemble(("In NeMo and Megatron: ", "bold"), pairs), (1, 0, 0, 0))


def _adapted_line(document: dict[str, Any]) -> Text:
    a, recipe = document["adapted"], document.get("recipe", "this recipe")
    if a["method"] == "none":
        return Text(f"{recipe} has no adapter (method none): every weight is trained.", style="bold")
    return Text(
        f"{HIT} adapted by {recipe} ({a['method']}): {a['modules']:,} modules, {a['matrices']:,} matrices, "
        f"{human_count(a['lora_params'])} parameters to train, {a['share']:.3%} of the model.",
        style="bold",
    )


def _legend(document: dict[str, Any], depth: Depth) -> str:
    where = f"Modules lie in {document['prefix']}.layers.N."
    tables = "Count: modules × experts in each." if depth == "roles" else where
    ranks = sorted({s["rank"] for s in document["layers"] if s["selected"] is not False and s["rank"]})
    lora = f"LoRA: parameters at rank {', '.join(map(str, ranks))}." if ranks else "LoRA: none."
    letters = " · ".join(f"{k} {LETTERS[k]}" for k in document["dims"])
    return f"{tables} {lora} Shapes: out×in. {letters}"


def _by_role(layers: list[Layer]) -> dict[Role, list[Layer]]:
    result: dict[Role, list[Layer]] = {role: [] for role in Role}
    for site in layers:
        result[Role(site["role"])].append(site)
    return {role: sites for role, sites in result.items() if sites}


def _inside(site: Layer) -> str:
    """Return the path below the decoder layer: `self_attn.kv_b_proj`."""
    return site["path"].partition(f".layers.{site['layer']}.")[2] or site["path"]


def _shape(shape: list[int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def _lora(sites: list[Layer]) -> str:
    """Sum the LoRA parameters; with a recipe only of the entries that it adapts."""
    counted = [s for s in sites if s["attachable"] and s["selected"] is not False]
    return human_count(sum(s["lora_params"] for s in counted)) if counted else "–"


def _marked(name: str, sites: list[Layer]) -> Text:
    """Put a mark in front of the name if the recipe adapts it; without a recipe the name stands alone."""
    if sites[0]["selected"] is None:
        return Text(name)
    return Text.assemble((f"{HIT} " if any(s["selected"] for s in sites) else "  ", "bold green"), name)
