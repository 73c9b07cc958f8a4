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
    """Return the text of README.md for the adapter of a run.

    `root` is the run folder, `run` the contents of its run.json, `data_paths` are `data.path` or the paths of
    `data.sources`.

    base_model and datasets must be hub ids, or the hub refuses the card, so a base or a data file on this machine is
    named in the text only.  No license is set: choosing it is up to whoever publishes the adapter.
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
    name = root.resolve().name
    return "\n".join([*_introduction(name, run), *_trained(run), *_figures(run), *_use(name, run), *_LIMITS])


_LIMITS = (
    "## Limits",
    "",
    "- Unmerged, an engine may apply a part of the roles only, without an error: "
    "`mla-tune serve-check ADAPTER --engine NAME` tells.",
    "- The figures are the loss on rows held out of this data. Other tasks, safety and bias were not measured.",
    "",
)


def _introduction(name: str, run: dict[str, Any]) -> list[str]:
    found = run.get("base_hash") or {}
    digest = f", whose `base_hash` is `{found['sha256'][:16]}…`" if found.get("kind") in ("files", "headers") else ""
    return [
        f"# {name}",
        "",
        f"An adapter ({run['adapter']['method']}) for `{_code(_public(run['base']))}` ({run['model_type']}, multi-head "
        f"latent attention), trained with mla-tune {run['environment']['mla_tune']}.",
        "",
        f"It fits no other weights than those of this base{digest}.",
        "",
    ]


def _trained(run: dict[str, Any]) -> list[str]:
    rows = role_rows({"adapter": run["adapter"]})
    return [
        "## What was trained",
        "",
        f"{human_count(run['adapter']['trainable_params'])} parameters. Roles are those of the MLA papers.",
        "",
        "| role | matrices | rank | parameters | peak learning rate |",
        "|---|---:|---:|---:|---|",
        *(f"| {r['role']} | {r['matrices']} | {r['rank']} | {r['params']} | {r['rate']} |" for r in rows),
        "",
    ]


def _figures(run: dict[str, Any]) -> list[str]:
    data, loss = run["data"], run.get("held_out_loss") or {}
    steps, spikes = run.get("steps") or {}, run.get("spikes") or {}
    lines = [
        "## Figures",
        "",
        f"- data: {_plain(_public(data['source']))}, {data['train']['samples']:,} samples, "
        f"{data['train']['trained_tokens']:,} trained tokens",
        f"- {steps.get('done', 0):,} steps, seed {run['seed']}, {run['dtype']} on {run['device']}",
    ]
    if loss.get("after") is not None:
        lines.append(
            f"- held-out loss (mean over {data['held_out']['trained_tokens']:,} tokens, nats): "
            f"{loss['before']:.4f} before, {loss['after']:.4f} after"
        )
    else:
        lines.append("- no rows were held out, so there is no held-out loss")
    if spikes.get("skipped"):
        lines.append(
            f"- {spikes['skipped']:,} steps were skipped as spikes, {spikes['cuts']:,} cuts of the learning rate"
        )
    return [*lines, ""]


def _use(name: str, run: dict[str, Any]) -> list[str]:
    auto = run.get("auto_class", "AutoModelForCausalLM")
    by_name = dict(commands(Path(name), run | {"state": "done"}))
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
