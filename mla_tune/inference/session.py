"""`Session`: a model with any number of unmerged adapters, loaded once, which answers requests in batches.

Rows of one batch can have different adapters.  Some adapters can't be applied row by row, because they have fully
trained modules (`modules_to_save`) or adapt a router; their requests get batches of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from mla_tune.adapter.deltas import Adapter
from mla_tune.adapter.files import adapter_folder, open_adapter
from mla_tune.checkpoint.index import Checkpoint, TensorRef
from mla_tune.errors import FileError, InputError, did_you_mean
from mla_tune.inference.absorb import absorb, unsupported_reasons
from mla_tune.inference.batched_lora import drop_stale_adapter_names, supports_batched_lora
from mla_tune.inference.latent_cache import LatentCache
from mla_tune.inference.load_adapters import has_modules_to_save, load_adapters, modules_to_save_disabled
from mla_tune.inference.lora_tensors import BASE
from mla_tune.inference.requests import BASE_NAME, GenerateResult, GenerationSettings, Request
from mla_tune.inference.resolve_model import resolve_model
from mla_tune.model.load import base_hash, load_model, silence_libraries
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.schema import ModelSection
from mla_tune.runs.folder import RunFolder


class Session:
    """A loaded, absorbed model with its adapters.

    `model` is a model as a user names it (see `resolve_model`).  `adapters` are names and folders (adapter or run
    folders); where there are none and `model` stands for an adapter itself, that adapter is loaded with the name
    `adapter`.  `attention` is a mode of `absorb`.

    Raises `FileError` and `InputError` for folders that are missing, damaged or do not belong together.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, attention: str = "auto") -> None:
        silence_libraries()
        base, adapter = resolve_model(model)
        folders = {"adapter": str(adapter)} if adapter is not None and not adapters else {}
        folders |= dict(adapters or {})
        if BASE_NAME in folders:
            raise InputError(
                f"--adapter {BASE_NAME}=…: '{BASE_NAME}' means the model without an adapter; choose another name"
            )
        section = ModelSection(base=base)
        self.loaded = load_model(section)
        self.tokenizer = load_tokenizer(tokenizer_source(section))
        self.net: Any = cast(Any, self.loaded.model.eval())
        #: User's name of an adapter → its name in PEFT, which allows no dots.
        self._peft_names = {name: f"adapter_{i}" for i, name in enumerate(folders)}
        opened = {name: self._open_adapter(Path(folder).expanduser()) for name, folder in folders.items()}
        #: Key of the base tensor that its only adapter has overwritten, or "".
        self._overwritten = ""
        if opened:
            self.net, self._overwritten = load_adapters(self.net, opened, self._peft_names, str(self.loaded.base))
        absorb(self.net, attention)
        #: Names of the adapters that can't be in a batch with others.
        self._unmixable = {
            name
            for name, peft_name in self._peft_names.items()
            if has_modules_to_save(self.net, peft_name) or not supports_batched_lora(self.net, peft_name)
        }
        self.attention = attention

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, in the order given."""
        return list(self._peft_names)

    def not_absorbed_reason(self) -> str:
        """Return why attention is expanded in every mode, or "" where it can be absorbed."""
        return next(iter(unsupported_reasons(self.net).values()), "")

    def answer(
        self, requests: Sequence[Request], settings: GenerationSettings, stream: Callable[[str], None] | None = None
    ) -> list[GenerateResult]:
        """Return the answers, in the order of the requests.

        `stream` is called with pieces of the text as they are generated, in batches of a single row.  Raises
        `InputError` for an unknown adapter, and where a prompt and its answer are longer than the model allows.
        """
        ids = [self._encode(request, settings) for request in requests]
        for request in requests:
            if request.adapter is not None and request.adapter not in self._peft_names:
                hint = did_you_mean(request.adapter, self.adapters) or "."
                known = ", ".join([*self.adapters, BASE_NAME])
                raise InputError(f"no adapter is called '{request.adapter}'{hint} There are: {known}")
            if request.adapter is None and self._overwritten:
                raise InputError(
                    f"the adapter has replaced {self._overwritten} of the base, so the base can't answer while it is "
                    "loaded: run the base without the adapter"
                )
        torch.manual_seed(settings.seed)
        answers: dict[int, GenerateResult] = {}
        for rows in self._batches(requests, settings.batch_size):
            results = self._generate([requests[i] for i in rows], [ids[i] for i in rows], settings, stream)
            answers |= dict(zip(rows, results, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request], size: int) -> list[list[int]]:
        """Return batches as indices of requests; an adapter that can't be mixed gets batches of its own."""
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.adapter if request.adapter in self._unmixable else None, []).append(i)
        return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]

    def _generate(
        self,
        requests: list[Request],
        ids: list[list[int]],
        settings: GenerationSettings,
        stream: Callable[[str], None] | None,
    ) -> list[GenerateResult]:
        """Answer one batch of prompts, given as token ids, with the model's `generate`."""
        width, device = max(map(len, ids)), self.loaded.device
        pad = self.tokenizer.pad_token_id
        inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        options: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            options = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        if stream and len(ids) == 1:
            options["streamer"] = _streamer(self.tokenizer, stream)
        start = time.monotonic()
        try:
            with torch.inference_mode(), self._with_adapters([r.adapter for r in requests], options):
                out = self.net.generate(
                    input_ids=inputs,
                    attention_mask=mask,
                    past_key_values=LatentCache(config=self.loaded.model.config),
                    max_new_tokens=settings.max_new_tokens,
                    pad_token_id=pad,
                    **options,
                )
        except BaseException:
            drop_stale_adapter_names(self.net)
            raise
        seconds = round(time.monotonic() - start, 3)
        return [
            self._result(request, row, seconds, len(ids)) for request, row in zip(requests, out[:, width:], strict=True)
        ]

    def _with_adapters(self, names: list[str | None], options: dict[str, Any]) -> Any:
        """Return a context manager in which row i has the adapter `names[i]`.

        For a mixed batch it also adds `adapter_names` to the `options` of `generate`.
        """
        if not self._peft_names:
            return nullcontext()
        if len(set(names)) > 1:
            options["adapter_names"] = [BASE if name is None else self._peft_names[name] for name in names]
            return modules_to_save_disabled(self.net)
        if names[0] is None:
            return self.net.disable_adapter()
        self.net.set_adapter(self._peft_names[names[0]])
        return nullcontext()

    def _result(self, request: Request, row: torch.Tensor, seconds: float, batch: int) -> GenerateResult:
        """Decode the new tokens `row` of one request, up to the end of the text."""
        new, end = row.tolist(), self.tokenizer.eos_token_id
        ended = end in new
        new = new[: new.index(end) + 1] if ended else new
        prompt = request.prompt if request.prompt is not None else (request.messages or [{}])[-1].get("content", "")
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        stopped = "end of text" if ended else "length"
        return GenerateResult(prompt, text, len(new), seconds, stopped, request.adapter, batch)

    def _encode(self, request: Request, settings: GenerationSettings) -> list[int]:
        """Return the token ids of a request.  Raises `InputError` where they and the answer are too many."""
        tokenizer = self.tokenizer
        if request.messages is None and (settings.raw or not tokenizer.chat_template):
            ids = list(tokenizer(request.prompt, add_special_tokens=False)["input_ids"])
            ids = ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []) + ids
        else:
            if not tokenizer.chat_template:
                raise InputError(
                    "messages need a chat template, but this model's tokenizer has none: give a prompt instead"
                )
            turns = request.messages or [{"role": "user", "content": request.prompt or ""}]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        window = self.loaded.arch.max_position_embeddings
        if window and len(ids) + settings.max_new_tokens > window:
            raise InputError(
                f"--prompt has {len(ids)} tokens; with {settings.max_new_tokens} new ones that is more than the "
                f"model's window of {window}. Shorten it or lower --max-new-tokens"
            )
        return ids

    @cached_property
    def _base_tensors(self) -> Mapping[str, TensorRef]:
        """Tensors of the base by key: from its headers, or for a hub model, names and shapes of those in memory."""
        base = Path(str(self.loaded.base))
        if base.is_dir():
            return Checkpoint.open(base).tensors
        state = self.loaded.model.state_dict()
        return {key: TensorRef(key, base, str(t.dtype), tuple(t.shape), 0, 0) for key, t in state.items()}

    @cached_property
    def _base_hash(self) -> dict[str, str]:
        """Hashes of the base's files.  Computing them reads gigabytes, so it is done once for all adapters."""
        return base_hash(str(self.loaded.base))

    def _open_adapter(self, folder: Path) -> Adapter:
        """Open an adapter, and check its keys, shapes and recorded base hash against the base.

        Raises `FileError` where it is missing or damaged, and `InputError` where it does not belong to the base.
        """
        base = str(self.loaded.base)
        try:
            path = adapter_folder(folder)
        except FileError:
            raise FileError(f"{folder}: no adapter_config.json: not an adapter folder") from None
        try:
            run = RunFolder(path.parent)
            if run.run_json.is_file() and Path(base).is_dir():
                recorded = run.read().base_hash
                if recorded and recorded != self._base_hash:
                    raise InputError(
                        f"it was trained on another base (compare base_path and base_hash in {run.run_json})"
                    )
            opened = open_adapter(path, self.loaded.arch, self._base_tensors)
        except InputError as error:
            raise InputError(f"{path}: this adapter does not fit {base}: {error}") from error
        opened.check_finite()
        return opened


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """Return a streamer for `generate` that calls `on_text` with each piece of the answer."""
    from transformers import TextStreamer

    class CallbackStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return CallbackStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
