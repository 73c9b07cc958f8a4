"""The model card of an adapter: README.md with the front matter that Hugging Face reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mla_tune.console import human_count
from mla_tune.report.commands import commands
from mla_tune.report.run_report import role_rows

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Hub ids of the data that comes with mla-tune.
EMBEDDED = {"mbpp": "google-research-datasets/mbpp", "gsm8k": "openai/gsm8k"}


def card(root: Path, run: dict[str, Any], data_paths: list[str]) -> str:
    """`data_paths` are those of the recipe's data section.

    base_model and datasets must be hub ids, or the hub refuses the card: a base or a file of this machine is named in
    the text instead.  The license is the publisher's to choose, so there is none.
    """
    base = _hub_id(str(run.get("base", "")), str(run.get("base_path", "")))
    front: dict[str, Any] = {"base_model": base} if base else {}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    front["tags"] = [*([f"base_model:adapter:{base}"] if base else []), "lora", "mla", "mla-tune"]
    datasets = [EMBEDDED.get(path, path) for path in data_paths if path in EMBEDDED or _is_hub_name(path)]
    if datasets:
        front["datasets"] = list(dict.fromkeys(datasets))
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n{_text(root, run)}"


def _hub_id(source: str, path: str) -> str | None:
    return source if source == path and _is_hub_name(source) else None


def _is_hub_name(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    is_file = suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md") or Path(name).expanduser().exists()
    return bool(_HUB_ID.fullmatch(name)) and not is_file and not name.startswith(".")


def _text(root: Path, run: dict[str, Any]) -> str:
    adapter, data, loss = run["adapter"], run["data"], run.get("held_out_loss") or {}
    found = run.get("base_hash") or {}
    digest = f", whose `base_hash` is `{found['sha256'][:16]}…`" if found.get("kind") in ("files", "headers") else ""
    name = root.resolve().name
    auto = run.get("auto_class", "AutoModelForCausalLM")
    lines = [
        f"# {name}",
        "",
        f"An adapter ({adapter['method']}) for `{_code(_public(run['base']))}` ({run['model_type']}, multi-head latent "
        f"attention), trained with mla-tune {run['environment']['mla_tune']}.",
        "",
        f"It fits no other weights than those of this base{digest}.",
        "",
        "## What was trained",
        "",
        f"{human_count(adapter['trainable_params'])} parameters. Roles are those of the MLA papers.",
        "",
        "| role | matrices | rank | parameters | peak learning rate |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {r['role']} | {r['matrices']} | {r['rank']} | {r['params']} | {r['rate']} |"
            for r in role_rows({"adapter": adapter})
        ),
        "",
        "## Figures",
        "",
        f"- data: {_plain(_public(data['source']))}, {data['train']['samples']:,} samples, "
        f"{data['train']['trained_tokens']:,} trained tokens",
    ]
    steps = run.get("steps") or {}
    lines.append(f"- {steps.get('done', 0):,} steps, seed {run['seed']}, {run['dtype']} on {run['device']}")
    if loss.get("after") is not None:
        lines.append(
            f"- held-out loss (mean over {data['held_out']['trained_tokens']:,} tokens, nats): "
            f"{loss['before']:.4f} before, {loss['after']:.4f} after"
        )
    else:
        lines.append("- no rows were held out, so there is no held-out loss")
    spikes = run.get("spikes") or {}
    if spikes.get("skipped"):
        lines.append(
            f"- {spikes['skipped']:,} steps were skipped as spikes, {spikes['cuts']:,} cuts of the learning rate"
        )
    by_name = dict(commands(Path(name), run | {"state": "done"}))
    lines += [
        "",
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
        "## Limits",
        "",
        "- Unmerged, an engine may apply a part of the roles only, without an error: "
        "`mla-tune serve-check ADAPTER --engine NAME` tells.",
        "- The figures are the loss on rows held out of this data. Other tasks, safety and bias were not measured.",
        "",
    ]
    return "\n".join(lines)


def _public(source: str) -> str:
    """A folder of this machine by its last name: a card is made to be shown."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source


def _plain(text: str) -> str:
    """Without what Markdown would read as its own."""
    return re.sub(r"([\\\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """As it may stand between back-ticks."""
    return " ".join(text.replace("`", "'").split())
