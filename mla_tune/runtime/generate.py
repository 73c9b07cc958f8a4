"""A model folder, with or without an adapter → text, through transformers' own `generate`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mla_tune.checkpoint.files import read_json_object
from mla_tune.errors import FileError, InputError
from mla_tune.model.load import load_model, quiet
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.schema import ModelSection


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer; `tokens` counts the new ones."""

    prompt: str
    text: str
    tokens: int
    seconds: float
    stopped: str


def resolve_model(model: str) -> tuple[str, Path | None]:
    """(base, adapter) of what a user names: a model, a run folder (its merged or trained model, else its base with its
    adapter), or an adapter folder (its recorded base)."""
    path = Path(model).expanduser()
    run, adapter = path / "run.json", path / "adapter_config.json"
    if run.is_file():
        for name in ("merged", "model"):
            if (path / name / "config.json").is_file():
                return str(path / name), None
        if not (path / "adapter").is_dir():
            raise FileError(f"{model}: this run has no adapter yet; finish it with `mla-tune train --resume`")
        return read_json_object(run, "the record of the run")["base_path"], path / "adapter"
    if adapter.is_file():
        recorded = read_json_object(adapter, "the adapter's configuration").get("base_model_name_or_path")
        if not recorded:
            raise InputError(f"{model}: an adapter that names no base; give the base as MODEL and this with --adapter")
        return recorded, path
    return model, None


def generate(
    model: str,
    prompt: str,
    *,
    adapter: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> Generated:
    """Answer one prompt.  Temperature 0 is greedy.  `raw` leaves the chat template out.

    Raises `InputError` if the prompt and its answer do not fit the model's window.
    """
    quiet()
    base, own_adapter = resolve_model(model)
    adapter_path = Path(adapter).expanduser() if adapter else own_adapter
    if adapter_path is not None:
        if (adapter_path / "adapter").is_dir():
            adapter_path = adapter_path / "adapter"
        if not (adapter_path / "adapter_config.json").is_file():
            raise FileError(f"{adapter_path}: no adapter_config.json: not an adapter folder")
    section = ModelSection(base=base)
    loaded = load_model(section)
    tokenizer = load_tokenizer(tokenizer_source(section))
    net = cast(Any, loaded.model.eval())
    if adapter_path is not None:
        from peft import PeftModel

        try:
            net = PeftModel.from_pretrained(loaded.model, str(adapter_path)).eval()
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(f"{adapter_path}: this adapter does not fit {base}: {why}") from error
    if raw or not tokenizer.chat_template:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []) + list(ids)
    else:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    window = loaded.arch.max_position_embeddings
    if window and len(ids) + max_new_tokens > window:
        raise InputError(
            f"--prompt has {len(ids)} tokens; with {max_new_tokens} new ones that is more than the model's window of "
            f"{window}. Shorten it or lower --max-new-tokens"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=loaded.device)
    began = time.monotonic()
    with torch.inference_mode():
        out = net.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    new = out[0, len(ids) :].tolist()
    ended = bool(new) and new[-1] == tokenizer.eos_token_id
    return Generated(
        prompt=prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        seconds=round(time.monotonic() - began, 3),
        stopped="end of text" if ended else "length",
    )
