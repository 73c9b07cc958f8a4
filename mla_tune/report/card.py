"""The model card of an adapter: README.md with the front matter that Hugging Face reads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from mla_tune.console import human_count
from mla_tune.report.commands import commands
from mla_tune.report.run_report import role_rows
from mla_tune.runs.record import RunRecord, TrainedParameters

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Hub ids of the data that comes with mla-tune.
EMBEDDED = {"mbpp": "google-research-datasets/mbpp", "gsm8k": "openai/gsm8k"}


def card(root: Path, record: RunRecord, data_paths: list[str]) -> str:
    """Return the text of README.md for the adapter of a run.

    `root` is the run folder, `record` its run.json, `data_paths` are `data.path` or the paths of
    `data.sources`.

    base_model and datasets must be hub ids, or the hub refuses the card, so a base or a data file on this machine is
    named in the text only.  No license is set: choosing it is up to whoever publishes the adapter.
    """
    base = _hub_id(record.base or "", record.base_path or "")
    front: dict[str, Any] = {"base_model": base} if base else {}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    front["tags"] = [*([f"base_model:adapter:{base}"] if base else []), "lora", "mla", "mla-tune"]
    datasets = [EMBEDDED.get(path, path) for path in data_paths if path in EMBEDDED or _is_hub_name(path)]
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{_text(root, record)}"


def _hub_id(source: str, path: str) -> str | None:
    return source if source == path and _is_hub_name(source) else None


def _is_hub_name(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_file = suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md") or Path(name).expanduser().exists()
    return bool(_HUB_ID.fullmatch(name)) and not is_file and not name.startswith(".")


def _text(root: Path, record: RunRecord) -> str:
    name = root.resolve().name
    trained = record.adapter or TrainedParameters()
    parts = [
        _introduction(name, record, trained.method),
        _trained(record, trained),
        _figures(record),
        _use(name, record),
    ]
    return "\n".join([*(line for part in parts for line in part), *_LIMITS])


_LIMITS = (
    "## Limits",
    "",
    "- Unmerged, an engine may apply a part of the roles only, without an error: "
    "`mla-tune serve-check ADAPTER --engine NAME` tells.",
    "- The figures are the loss on rows held out of this data. Other tasks, safety and bias were not measured.",
    "",
)


def _introduction(name: str, record: RunRecord, method: str) -> list[str]:
    found = record.base_hash or {}
    digest = f", whose `base_hash` is `{found['sha256'][:16]}…`" if found.get("kind") in ("files", "headers") else ""
    return [
        f"# {name}",
        "",
        f"An adapter ({method}) for `{_code(_public(record.base or '?'))}` ({record.model_type}, multi-head "
        f"latent attention), trained with mla-tune {record.environment.get('mla_tune', '?')}.",
        "",
        f"It fits no other weights than those of this base{digest}.",
        "",
    ]


def _trained(record: RunRecord, trained: TrainedParameters) -> list[str]:
    return [
        "## What was trained",
        "",
        f"{human_count(trained.trainable_params)} parameters. Roles are those of the MLA papers.",
        "",
        "| role | matrices | rank | parameters | peak learning rate |",
        "|---|---:|---:|---:|---|",
        *(f"| {r['role']} | {r['matrices']} | {r['rank']} | {r['params']} | {r['rate']} |" for r in role_rows(record)),
        "",
    ]


def _figures(record: RunRecord) -> list[str]:
    data, loss, spikes = record.data or {}, record.held_out_loss, record.spikes
    lines = [
        "## Figures",
        "",
        f"- data: {_plain(_public(data['source']))}, {data['train']['samples']:,} samples, "
        f"{data['train']['trained_tokens']:,} trained tokens",
        f"- {record.steps.done:,} steps, seed {record.seed}, {record.dtype} on {record.device}",
    ]
    if loss is not None and loss.after is not None:
        lines.append(
            f"- held-out loss (mean over {data['held_out']['trained_tokens']:,} tokens, nats): "
            f"{loss.before:.4f} before, {loss.after:.4f} after"
        )
    else:
        lines.append("- no rows were held out, so there is no held-out loss")
    if spikes is not None and spikes.skipped:
        lines.append(f"- {spikes.skipped:,} steps were skipped as spikes, {spikes.cuts:,} cuts of the learning rate")
    return [*lines, ""]


def _use(name: str, record: RunRecord) -> list[str]:
    auto = record.auto_class or "AutoModelForCausalLM"
    by_name = dict(commands(Path(name), replace(record, state="done")))
    return [
        "## Use",
        "",
        "Load it with PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'model = PeftModel.from_pretrained({auto}.from_pretrained("BASE"), "ADAPTER")',
        "```",
        "",
        "Merge it into the base's own layout, prove the merge, and serve it as any other checkpoint:",
        "",
        "```bash",
        "mla-tune merge-absorb ADAPTER --base BASE --out merged",
        "mla-tune verify merged --base BASE",
        "mla-tune serve-check merged --engine vllm",
        "vllm serve merged",
        "```",
        "",
        f"From the run folder `{_code(name)}`: `{_code(by_name['merge'])}`.",
        "",
    ]


def _public(source: str) -> str:
    """Shorten an absolute path to its last part: a card is made to be shown to others."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source


def _plain(text: str) -> str:
    """Escape the characters that Markdown would read as markup, and fold white space."""
    return re.sub(r"([\\\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Make a text fit for Markdown's back-ticks: no back-tick inside, white space folded."""
    return " ".join(text.replace("`", "'").split())
