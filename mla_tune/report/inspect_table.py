"""Print the tables of `mla-tune inspect`; they fit 80 columns and show more on a wide terminal."""

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

#: Dimension letters, as the legend explains them.
LETTERS = {
    "H": "heads",
    "P": "key size per head without rope",
    "R": "rope size",
    "V": "value size per head",
    "C": "latent",
    "L": "query latent",
    "D": "hidden size",
}

#: What an adapter on a role affects besides the layer's output, in a word or two; the notes below the table explain it.
EFFECTS = {
    Role.W_DKV: "alters cache",
    Role.W_UKV: "is absorbed",
    Role.W_UQ: "used by fold",
    Role.W_Q: "used by fold",
    Role.W_O: "used by fold",
}

RISK_STYLE = {"low": "green", "medium": "yellow", "high": "red"}
#: Marks what a recipe adapts.
ADAPTED_MARK = "●"
#: Width of a module's name with which the table fits 80 columns.
_NAME_WIDTH = 28
#: Terminal width from which on the table has a column for the names in NeMo; on a narrower one they follow as a line.
WIDE = 108


def render(document: dict[str, Any], depth: Depth, console: Console) -> None:
    """Print what `preflight.inspect.inspect_architecture` returned: a header, a table of this depth, and notes."""
    layers: list[Layer] = document["layers"]
    for line in _header(document):
        console.print(line, soft_wrap=True)  # the terminal, not rich, breaks a long path
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
    """Yield a line each with name, size, dimensions and KV cache; only a long path exceeds 80 columns."""
    layers, attentions, cache = document["num_layers"], document["attention_modules"], document["kv_cache"]
    mla = document["mla_layers"]
    layer_count = f"{layers} layer{'s' if layers != 1 else ''}"
    if mla != layers:
        layer_count += f", {mla} with MLA"
    elif attentions != layers:
        layer_count += f", {attentions} attentions"
    facts = [
        layer_count,
        f"{human_count(document['params_total'])} parameters",
        f"{human_count(document['params_active'])} active per token",
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
        f"KV cache, {cache['dtype']}: {cache['latent_bytes_per_token']:,} bytes per token latent · "
        f"{cache['expanded_bytes_per_token']:,} expanded · {cache['ratio']:.1f} ×"
    )
    if cache["indexer_bytes_per_token"]:
        yield Text(f"  and {cache['indexer_bytes_per_token']:,} bytes per token for the keys of indexers")


def _dims(dims: dict[str, int | None]) -> str:
    return "  ".join(f"{k} {'none' if v is None else v}" for k, v in dims.items())


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="bold")


def _roles_table(layers: list[Layer], mtp: list[Layer], wide: bool) -> Table:
    """Return the table with one row for each role; Params and LoRA are sums over the role's matrices."""
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
    """Consecutive layers with equal modules, or a single layer."""

    title: str
    """Which layers they are."""
    rows: list[tuple[str, list[Layer]]]
    """Path below the layer, and the entries of this module in all layers of the block."""


def _blocks(layers: list[Layer], collapse: bool) -> list[_Block]:
    """Group the entries by layer; with `collapse`, join consecutive layers with equal modules into one block."""
    per_layer = [(i, list(group)) for i, group in groupby(layers, key=lambda s: s["layer"])]

    def key_of(item: tuple[int | None, list[Layer]]) -> tuple[Any, ...]:
        """Layers with equal keys are in one block."""
        i, sites = item
        if i is None or not collapse:
            return (i,)
        keys = ("role", "shape", "count", "selected", "rank", "mtp")
        return tuple((_inside(s), *(str(s[k]) for k in keys)) for s in sites)

    blocks = []
    for _, run in groupby(per_layer, key=key_of):
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
    """Return the table with one row for each module of a block; Params and LoRA are sums over the block's layers."""
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
        if lines[-1].strip() and len(lines[-1]) + len(part) > _NAME_WIDTH:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(lines)


def _role_notes(layers: list[Layer]) -> Table:
    """Return, for each role, why it has its risk, and how an adapter there affects the cache and absorption."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    roles_of_note: dict[str, list[Role]] = {}
    for role, sites in _by_role(layers).items():
        roles_of_note.setdefault(_note(sites[0]), []).append(role)
    for note, roles in roles_of_note.items():
        grid.add_row(Text(_label(roles), style="bold"), Text(note))
    return grid


def _note(site: Layer) -> str:
    """Return a sentence or two about an adapter on this layer; "cache unchanged" and "not involved" are left out."""
    if not site["attachable"]:
        return site["reason"].removeprefix(f"{site['role']}: ")
    parts = [f"{site['risk']} risk: {site['note']}"]
    if not site["cache"].endswith("unchanged"):
        parts.append(site["cache"])
    if site["absorption"] != "not involved":
        parts.append(site["absorption"])
    return "; ".join(parts)


def _label(roles: list[Role]) -> str:
    """Return the name of the group that the roles belong to, if there is one, or else the roles' names."""
    if len(roles) > 1:
        for name in ("dense", "shared", "mlp", "experts"):
            if set(roles) <= set(GROUPS[name]):
                return name
    return ", ".join(roles)


def _nemo_line(layers: list[Layer]) -> Padding:
    """Return a line with the module names that NeMo and Megatron give to the roles."""
    names: dict[str, list[str]] = {}
    for role, sites in _by_role(layers).items():
        if sites[0]["nemo"]:
            names.setdefault(sites[0]["nemo"], []).append(role.value)
    pairs = ", ".join(f"{'+'.join(roles)}={nemo}" for nemo, roles in names.items())
    return Padding(Text.assemble(("In NeMo and Megatron: ", "bold"), pairs), (1, 0, 0, 0))


def _adapted_line(document: dict[str, Any]) -> Text:
    adapted, recipe = document["adapted"], document.get("recipe", "this recipe")
    if adapted["method"] == "none":
        return Text(f"{recipe} has no adapter (method none): every weight is trained.", style="bold")
    return Text(
        f"{ADAPTED_MARK} adapted by {recipe} ({adapted['method']}): {adapted['modules']:,} modules, "
        f"{adapted['matrices']:,} matrices, {human_count(adapted['lora_params'])} parameters to train, "
        f"{adapted['share']:.3%} of the model.",
        style="bold",
    )


def _legend(document: dict[str, Any], depth: Depth) -> str:
    where = f"Modules are in {document['prefix']}.layers.N."
    table = "Count: modules × experts in each." if depth == "roles" else where
    ranks = sorted({s["rank"] for s in document["layers"] if s["selected"] is not False and s["rank"]})
    lora = f"LoRA: parameters at rank {', '.join(map(str, ranks))}." if ranks else "LoRA: none."
    letters = " · ".join(f"{k} {LETTERS[k]}" for k in document["dims"])
    return f"{table} {lora} Shapes: out×in. {letters}"


def _by_role(layers: list[Layer]) -> dict[Role, list[Layer]]:
    """Return the entries by role, in the order of `Role`; roles without an entry are left out."""
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
    """Return the sum of LoRA parameters; with a recipe, only of the entries that it adapts."""
    counted = [s for s in sites if s["attachable"] and s["selected"] is not False]
    return human_count(sum(s["lora_params"] for s in counted)) if counted else "–"


def _marked(name: str, sites: list[Layer]) -> Text:
    """Return the name, with a recipe after a mark (it adapts some of the entries) or a space (it adapts none)."""
    if sites[0]["selected"] is None:
        return Text(name)
    return Text.assemble((f"{ADAPTED_MARK} " if any(s["selected"] for s in sites) else "  ", "bold green"), name)
