"""A model with any number of unmerged adapters, ready to answer: loaded once, asked in batches.

Rows of one batch have adapters of their own.  Those of an adapter that can't be applied row by row, because it has
whole modules of its own or is on a router, are answered apart.
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
from mla_tune.inference.load_adapters import has_whole_modules, load_adapters, without_whole_modules
from mla_tune.inference.lora_tensors import BASE
from mla_tune.inference.requests import BASE_NAME, GenerateResult, Request, Settings
from mla_tune.inference.resolve_model import resolve_model
from mla_tune.model.load import base_hash, load_model, silence_libraries
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.schema import ModelSection
from mla_tune.runs.folder import RunFolder


class Session:
    """`model` is what a user names (see `resolve_model`), `adapters` names and folders (adapter or run folders) beside
    the one that `model` may stand for itself, whose name is `adapter`.

    Raises `FileError` and `InputError` for folders that are missing, damaged or do not belong together.
    """

    def __init__(self, model: str, adapters: Mapping[str, str] | None = None, attention: str = "auto") -> None:
        silence_libraries()
        base, own = resolve_model(model)
        folders = {"adapter": str(own)} if own is not None and not adapters else {}
        folders |= dict(adapters or {})
        if BASE_NAME in folders:
            raise InputError(
                f"--adapter {BASE_NAME}=…: '{BASE_NAME}' is the model without an adapter: take another name"
            )
        section = ModelSection(base=base)
        self.loaded = load_model(section)
        self.tokenizer = load_tokenizer(tokenizer_source(section))
        self.net: Any = cast(Any, self.loaded.model.eval())
        #: User's name → PEFT's: a dot in a name is no module name.
        self._internal = {name: f"adapter_{i}" for i, name in enumerate(folders)}
        opened = {name: self._opened(Path(folder).expanduser()) for name, folder in folders.items()}
        #: The tensor that the base has lost to its one adapter; empty: the base is whole.
        self._lost = ""
        if opened:
            self.net, self._lost = load_adapters(self.net, opened, self._internal, str(self.loaded.base))
        absorb(self.net, attention)
        #: Adapters that rows of a mixed batch can't have.
        self._alone = {
            name
            for name, own in self._internal.items()
            if has_whole_modules(self.net, own) or not supports_batched_lora(self.net, own)
        }
        self.attention = attention

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that were loaded, in their order."""
        return list(self._internal)

    def not_absorbed(self) -> str:
        """Why attention is not absorbed whatever was asked for; empty where it can be."""
        return next(iter(unsupported_reasons(self.net).values()), "")

    def answer(
        self, requests: Sequence[Request], settings: Settings, stream: Callable[[str], None] | None = None
    ) -> list[GenerateResult]:
        """The answers, in the order of the requests.  `stream` is told the text of a single request as it comes.

        Raises `InputError` for an unknown adapter, or if a prompt and its answer do not fit the model's window.
        """
        ids = [self._encode(request, settings) for request in requests]
        for request in requests:
            if request.adapter is not None and request.adapter not in self._internal:
                hint = did_you_mean(request.adapter, self.adapters) or "."
                known = ", ".join([*self.adapters, BASE_NAME])
                raise InputError(f"no adapter is called '{request.adapter}'{hint} There are: {known}")
            if request.adapter is None and self._lost:
                raise InputError(
                    f"the adapter has a {self._lost} of its own in the place of the base's: the base can't answer "
                    "beside it. Ask it in a run without the adapter"
                )
        torch.manual_seed(settings.seed)
        answers: dict[int, GenerateResult] = {}
        for rows in self._batches(requests, settings.batch):
            found = self._generate([requests[i] for i in rows], [ids[i] for i in rows], settings, stream)
            answers |= dict(zip(rows, found, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request], size: int) -> list[list[int]]:
        """Rows that are answered together: all, but for those of an adapter that can't be mixed."""
        groups: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.adapter if request.adapter in self._alone else None, []).append(i)
        return [rows[i : i + size] for rows in groups.values() for i in range(0, len(rows), size)]

    def _generate(
        self, requests: list[Request], ids: list[list[int]], settings: Settings, stream: Callable[[str], None] | None
    ) -> list[GenerateResult]:
        width, device = max(map(len, ids)), self.loaded.device
        pad = self.tokenizer.pad_token_id
        inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        how: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            how = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        if stream and len(ids) == 1:
            how["streamer"] = _streamer(self.tokenizer, stream)
        began = time.monotonic()
        try:
            with torch.inference_mode(), self._adapted([r.adapter for r in requests], how):
                out = self.net.generate(
                    input_ids=inputs,
                    attention_mask=mask,
                    past_key_values=LatentCache(config=self.loaded.model.config),
                    max_new_tokens=settings.max_new_tokens,
                    pad_token_id=pad,
                    **how,
                )
        except BaseException:
            drop_stale_adapter_names(self.net)
            raise
        seconds = round(time.monotonic() - began, 3)
        return [
            self._result(request, row, seconds, len(ids)) for request, row in zip(requests, out[:, width:], strict=True)
        ]

    def _adapted(self, names: list[str | None], how: dict[str, Any]) -> Any:
        """The context in which these rows have these adapters; PEFT is told of a mixed batch by an argument."""
        if not self._internal:
            return nullcontext()
        if len(set(names)) > 1:
            how["adapter_names"] = [BASE if name is None else self._internal[name] for name in names]
            return without_whole_modules(self.net)
        if names[0] is None:
            return self.net.disable_adapter()
        self.net.set_adapter(self._internal[names[0]])
        return nullcontext()

    def _result(self, request: Request, row: torch.Tensor, seconds: float, batch: int) -> GenerateResult:
        new, end = row.tolist(), self.tokenizer.eos_token_id
        ended = end in new
        new = new[: new.index(end) + 1] if ended else new
        prompt = request.prompt if request.prompt is not None else (request.messages or [{}])[-1].get("content", "")
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        stopped = "end of text" if ended else "length"
        return GenerateResult(prompt, text, len(new), seconds, stopped, request.adapter, batch)

    def _encode(self, request: Request, settings: Settings) -> list[int]:
        tokenizer = self.tokenizer
        if request.messages is None and (settings.raw or not tokenizer.chat_template):
            ids = list(tokenizer(request.prompt, add_special_tokens=False)["input_ids"])
            ids = ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []) + ids
        else:
            if not tokenizer.chat_template:
                raise InputError("messages need a chat template, and this model's tokenizer has none: give a prompt")
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
        """The base's tensors by key; of a model of the hub, names and shapes of those in memory, which are enough."""
        base = Path(str(self.loaded.base))
        if base.is_dir():
            return Checkpoint.open(base).tensors
        state = self.loaded.model.state_dict()
        return {key: TensorRef(key, base, str(t.dtype), tuple(t.shape), 0, 0) for key, t in state.items()}

    @cached_property
    def _base_hash(self) -> dict[str, str]:
        """Gigabytes are read for it: once, however many adapters there are."""
        return base_hash(str(self.loaded.base))

    def _opened(self, folder: Path) -> Adapter:
        """The adapter against the base's headers (every key, every shape) and the base that its run recorded."""
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
                    raise InputError(f"it was trained on another base (see base_path and base_hash in {run.run_json})")
            opened = open_adapter(path, self.loaded.arch, self._base_tensors)
        except InputError as error:
            raise InputError(f"{path}: this adapter does not fit {base}: {error}") from error
        opened.check_finite()
        return opened


def _streamer(tokenizer: Any, tell: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Teller(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            tell(text)

    return Teller(tokenizer, skip_prompt=True, skip_special_tokens=True)
