"""What a merged checkpoint must consist of, from headers and config.json: keys, shapes, dtypes, and the source of each
tensor's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.adapter.merge_options import DTYPES
from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import INDEX_FILE, TensorRef
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import quantization_field
from mla_tune.errors import InputError
from mla_tune.verification.dequantize import DequantizedCheckpoint
from mla_tune.verification.read import PRECISION

#: Weights that engines (vLLM) fuse into one layer: ending of one → ending of the other.
_FUSED_WITH = {
    "q_a_proj.weight": "kv_a_proj_with_mqa.weight",
    "gate_proj.weight": "up_proj.weight",
    "w1.weight": "w3.weight",
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\..*")


@dataclass(frozen=True, slots=True)
class Failure:
    """One tensor, or one file, that is not as it must be."""

    key: str
    """Key of the tensor, or name of the file."""
    what: str
    """What is wrong, as the rest of a sentence that begins with the key."""


@dataclass(frozen=True, slots=True)
class ProofRules:
    """How the output was made, which decides what the proof allows."""

    strict: bool
    """merge-absorb wrote it, with the options below; otherwise an unknown tool did, which may round more often."""
    rounding: str = "nearest"
    """`nearest` or `stochastic`, as `MergeOptions.round`."""
    exact: bool = False
    """Sums were computed in float64 instead of float32."""
    dtype: str = "keep"
    """The dtype written, as `MergeOptions.dtype`."""


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """What a tensor of the output must be: `source` plus `updates`."""

    source: TensorRef
    """The base's tensor, or the tensor that an adapter stores in its place."""
    updates: tuple[tuple[LoraDelta, float], ...] = ()
    """The LoRA updates to add, each with the weight of its adapter; empty for a tensor that is copied."""
    site: Site | None = None
    """The site that the updates belong to; None where there are none."""
    is_bias: bool = False
    """The tensor is the bias of the site, not its weight."""


def expected_changes(
    base: DequantizedCheckpoint, arch: Architecture, adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, ExpectedTensor]:
    """Return every weight that the adapters change, by its key in an unquantized checkpoint.

    Raises `InputError` for tensors that the base lacks, and for sums that are not defined: a DoRA, or an adapter that
    stores whole tensors, with a weight other than 1 or together with another adapter.
    """
    alone = len(adapters) == 1 and adapters[0][1] == 1
    result: dict[str, ExpectedTensor] = {}
    for adapter, weight in adapters:
        is_additive = all(delta.method.additive for delta in adapter.deltas)
        if not alone and (adapter.saved or not is_additive):
            what = "whole tensors" if adapter.saved else f"a {adapter.method.title}"
            raise InputError(f"{adapter.folder}: holds {what}, which is merged alone and with the weight 1 only")
        for saved in adapter.saved:
            tied = arch.tied and saved.key == arch.head_key and adapter.settings.get("ensure_weight_tying")
            result[arch.embedding_key if tied else saved.key] = ExpectedTensor(saved.ref)
        for delta in adapter.deltas:
            for key, is_bias in _changed_keys(delta):
                tied = key == arch.head_key and arch.tied
                ref = base.find(key) or base.checkpoint[arch.embedding_key if tied else key]
                known = result.get(key, ExpectedTensor(ref))
                result[key] = ExpectedTensor(known.source, (*known.updates, (delta, weight)), delta.site, is_bias)
    return result


def _changed_keys(delta: LoraDelta) -> Iterator[tuple[str, bool]]:
    """Yield (key, is_bias) of each tensor that one update changes."""
    site = delta.site
    for key in (*site.disk_keys(), *(key for copy in site.alias_keys() for key in copy)):
        if delta.expert is not None and site.disk == "per_expert":
            if f".experts.{delta.expert}." not in key:
                continue
            gate, *up = site.leaves
            if delta.rows is not None and not key.endswith(f".{gate if delta.rows[0] == 0 else up[0]}.weight"):
                continue
        yield key, False
    if delta.bias is not None:
        yield site.disk_key("bias"), True


class LayoutCheck:
    """Compares the headers and config.json of base and output; reads no weights."""

    def __init__(
        self,
        base: DequantizedCheckpoint,
        merged: DequantizedCheckpoint,
        arch: Architecture,
        expected: dict[str, ExpectedTensor],
        rules: ProofRules,
    ) -> None:
        self.base, self.merged, self.arch, self.expected, self.rules = base, merged, arch, expected, rules
        #: Keys of weights that the base has quantized and the output has not.
        self.dequantized = base.quantized.keys() - merged.quantized.keys()
        #: Path of a layer's experts on disk → how many of them the model uses.
        self.expert_counts = {site.disk_path: site.count for site in arch if site.disk == "per_expert"}
        self.is_untied = not _is_tied(merged.checkpoint.config, arch)
        #: Key of the base's codes → key of the weight, for the weights in `dequantized`.
        self.dequantized_keys = {base.quantized[key].codes.key: key for key in self.dequantized}

    def failures(self) -> list[Failure]:
        """Return what is wrong: keys and shapes first, then dtypes, quantization, fused layers and files."""
        return [
            Failure(key, what)
            for found in (
                self._wrong_keys(),
                self._wrong_dtypes(),
                self._wrong_quantization(),
                self._wrong_fused_layers(),
                self._wrong_files(),
            )
            for key, what in found
        ]

    def expected_tensor(self, key: str) -> ExpectedTensor | None:
        """Return what the weight `key` of the output must be; None for a key that does not belong there."""
        if key in self.expected:
            return self.expected[key]
        ref = self.base.find(key)
        embedding = self.arch.embedding_key
        if ref is None and key == self.arch.head_key and self.arch.tied:
            # The base has no output head of its own.  A head in the output is the embedding, with the embedding's
            # changes only where config.json still ties the two.
            if not self.is_untied and embedding in self.expected:
                return self.expected[embedding]
            return ExpectedTensor(self.base.checkpoint[embedding])
        return None if ref is None else ExpectedTensor(ref)

    def is_unread(self, key: str) -> bool:
        """Tell whether the tensor belongs to an identity expert of LongCat-Flash.

        transformers saves weights for these experts that nothing reads, and PEFT's merge changes them.
        """
        match = _EXPERT.fullmatch(key)
        return match is not None and int(match[2]) >= self.expert_counts.get(match[1], int(match[2]) + 1)

    def _wrong_keys(self) -> Iterator[tuple[str, str]]:
        base, merged = self.base.checkpoint.tensors, self.merged.checkpoint.tensors
        scales = {key for weight in self.dequantized for key in self.base.quantized[weight].dependent_keys}
        for key in base:
            if self.dequantized_keys.get(key, key) not in merged and key not in scales:
                yield key, "is in the base and missing in the output"
        for key, ref in merged.items():
            expected = self.expected_tensor(self.merged.weight_key(ref))
            if key in scales:
                yield key, "is the scale of a weight that is no longer quantized"
            elif expected is None:
                yield key, "is in the output and not in the base"
            elif (right := self.base.shape(expected.source)) != (found := self.merged.shape(ref)):
                yield key, f"has the shape {found}; {right} is right"
        for key in self.expected:
            if self.base.find(key) is None and self.merged.find(key) is None:
                yield key, "is changed by the adapter and missing in the output"
        head = self.arch.head_key
        if head in self.expected and head not in base and head in merged and not self.is_untied:
            yield head, "is changed by the adapter, but config.json still ties it to the embedding"

    def _wrong_dtypes(self) -> Iterator[tuple[str, str]]:
        merged = self.merged.checkpoint.tensors
        for key, ref in merged.items():
            name = self.merged.weight_key(ref)
            expected = self.expected_tensor(name)
            if expected is None:
                continue
            base = self.base.find(name) or self.base.checkpoint.tensors.get(self.arch.embedding_key, ref)
            right = self._written_dtype(name, base)
            is_quantized = name in self.base.quantized
            if self.rules.strict and ref.dtype != right:
                yield key, f"has the dtype {ref.dtype}; {right} is right"
            elif ref.dtype != base.dtype and not (is_quantized or {ref.dtype, base.dtype} <= PRECISION.keys()):
                yield key, f"has the dtype {ref.dtype}; the base has it in {base.dtype}"

    def _written_dtype(self, key: str, base: TensorRef) -> str:
        """Return the dtype in which merge-absorb writes a tensor."""
        wanted = DTYPES.get(self.rules.dtype)
        if key in self.base.quantized:
            return wanted or ("BF16" if key in self.dequantized else base.dtype)
        keeps_dtype = key.endswith(self.arch.family.keeps_dtype)
        return wanted if wanted and base.dtype in PRECISION and not keeps_dtype else base.dtype

    def _wrong_quantization(self) -> Iterator[tuple[str, str]]:
        """Compare what config.json of the output says about quantization with the tensors that are there."""
        ignored_in_base, ignored = (_ignored_modules(c.checkpoint.config) for c in (self.base, self.merged))
        has_quantization = quantization_field(self.merged.checkpoint.config) is not None
        for key in sorted(self.dequantized & self.merged.checkpoint.tensors.keys()):
            if has_quantization and not _matches(ignored, key):
                yield key, "is no longer quantized, but quantization_config in config.json does not exclude it"
        for key, weight in self.merged.quantized.items():
            before = self.base.quantized.get(key)
            if before is not None and _scale_blocks(before) != _scale_blocks(weight):
                yield key, f"is read with {_scale_blocks(weight)}; the base has it with {_scale_blocks(before)}"
            elif _matches(ignored, key) and not _matches(ignored_in_base, key):
                yield key, "is quantized, but quantization_config in config.json excludes it"

    def _wrong_fused_layers(self) -> Iterator[tuple[str, str]]:
        """Find weights of different dtypes that engines fuse into one layer, where the base has them in one dtype."""
        merged, experts = self.merged.checkpoint.tensors, {}
        for key, ref in merged.items():
            ending = next((e for e in _FUSED_WITH if key.endswith(f".{e}")), None)
            other = None if ending is None else key.removesuffix(ending) + _FUSED_WITH[ending]
            match = _EXPERT.fullmatch(key)
            if other not in merged and match:
                other = experts.setdefault(match[1], key)
            if other is None or other not in merged:
                continue
            dtype = merged[other].dtype
            if ref.dtype != dtype and self._share_dtype(key, other):
                yield key, f"has the dtype {ref.dtype}, but {other}, which engines fuse with it, has {dtype}"

    def _share_dtype(self, key: str, other: str) -> bool:
        """Tell whether the base has both tensors in one dtype."""
        base = self.base.checkpoint.tensors
        return key in base and other in base and base[key].dtype == base[other].dtype

    def _wrong_files(self) -> Iterator[tuple[str, str]]:
        merged = self.merged.checkpoint
        try:
            arch = architecture(merged.config, str(merged.folder / "config.json"))
        except InputError as error:
            yield "config.json", str(error)
        else:
            if _matrices(arch) != _matrices(self.arch):
                yield "config.json", "describes a model other than the base"
        size = ((merged.index or {}).get("metadata") or {}).get("total_size")
        if size is not None and size != merged.nbytes:
            yield INDEX_FILE, f"has total_size {size:,}, but the tensors have {merged.nbytes:,} bytes"


def _is_tied(config: dict, arch: Architecture) -> bool:
    """Tell whether the embeddings are tied by config.json of the output, or by the base's where it doesn't say."""
    text = config.get("text_config") or {}
    inner = text.get("tie_word_embeddings", arch.tied) if arch.wrapper is None else arch.tied
    return bool(config.get("tie_word_embeddings", inner))


def _matrices(arch: Architecture) -> set[tuple[str, tuple[int, int], int]]:
    return {(site.path, site.shape, site.count) for site in arch}


def _scale_blocks(weight: QuantizedTensor) -> str:
    return "one scale" if weight.block is None else f"one scale for each block of {weight.block[0]} × {weight.block[1]}"


def _ignored_modules(config: dict) -> list[str]:
    """Return the modules that config.json lists as not quantized; engines give that list different names."""
    quant = config.get(quantization_field(config) or "") or {}
    lists = (quant.get(name) or [] for name in ("modules_to_not_convert", "ignored_layers", "ignore"))
    return [str(entry) for entries in lists for entry in entries]


def _matches(entries: Iterable[str], key: str) -> bool:
    """Tell whether a list of modules covers the module of a weight: by its name or a parent's, by the ending of its
    name, or by a regular expression (`re:…`)."""
    module = key.removesuffix(".weight")
    return any(
        re.match(entry[3:], module) is not None
        if entry.startswith("re:")
        else module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )
