"""What a merged checkpoint must consist of, from headers and config.json: keys, shapes, dtypes, and where each tensor's
numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mla_tune.adapter.files import Adapter, LoraDelta
from mla_tune.adapter.merge_options import DTYPES
from mla_tune.arch.build import architecture
from mla_tune.arch.site import Architecture, Site
from mla_tune.checkpoint.index import INDEX_FILE, TensorRef
from mla_tune.checkpoint.quantized.base import QuantizedTensor
from mla_tune.checkpoint.quantized.config import quantization_field
from mla_tune.errors import InputError
from mla_tune.verification.dequantize import Values
from mla_tune.verification.read import PRECISION

#: Layers that engines (vLLM) make one of: the other part of a weight with this ending.
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
    what: str


@dataclass(frozen=True, slots=True)
class Rules:
    """How the output was made.  `strict`: by merge-absorb with these options; else by a tool that is not known."""

    strict: bool
    rounding: str = "nearest"
    exact: bool = False
    dtype: str = "keep"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor must be: `source` (the base's, or an adapter's whole tensor) plus updates on rows of `site`."""

    source: TensorRef
    updates: tuple[tuple[LoraDelta, float], ...] = ()
    site: Site | None = None
    is_bias: bool = False


def expectations(base: Values, arch: Architecture, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Expected]:
    """Every weight that the adapters change, by its key in an unquantized checkpoint.

    Raises `InputError` for tensors that the base lacks, and for sums that are not defined: a DoRA, or whole tensors,
    with a weight or beside another adapter.
    """
    alone = len(adapters) == 1 and adapters[0][1] == 1
    result: dict[str, Expected] = {}
    for adapter, weight in adapters:
        sums = all(delta.method.additive for delta in adapter.deltas)
        if not alone and (adapter.saved or not sums):
            what = "whole tensors" if adapter.saved else f"a {adapter.method.title}"
            raise InputError(f"{adapter.folder}: holds {what}, which is merged alone and with the weight 1 only")
        for saved in adapter.saved:
            tied = arch.tied and saved.key == arch.head_key and adapter.settings.get("ensure_weight_tying")
            result[arch.embedding_key if tied else saved.key] = Expected(saved.ref)
        for delta in adapter.deltas:
            for key, is_bias in _touched(delta):
                tied = key == arch.head_key and arch.tied
                ref = base.ref(key) or base.checkpoint[arch.embedding_key if tied else key]
                known = result.get(key, Expected(ref))
                result[key] = Expected(known.source, (*known.updates, (delta, weight)), delta.site, is_bias)
    return result


def _touched(delta: LoraDelta) -> Iterator[tuple[str, bool]]:
    """(key, whether it is the bias) of each tensor that one update reaches."""
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
    """The headers of both checkpoints against each other."""

    def __init__(
        self, base: Values, merged: Values, arch: Architecture, expected: dict[str, Expected], rules: Rules
    ) -> None:
        self.base, self.merged, self.arch, self.expected, self.rules = base, merged, arch, expected, rules
        self.dequantized = base.quantized.keys() - merged.quantized.keys()
        self.experts = {site.disk_path: site.count for site in arch if site.disk == "per_expert"}
        self.untied = not _tied(merged.checkpoint.config, arch)
        #: Codes of the base under a key of their own → the weight's key, where the output has the weight unquantized.
        self.renamed = {base.quantized[key].codes.key: key for key in self.dequantized}

    def failures(self) -> list[Failure]:
        """Everything that is wrong with keys, shapes, dtypes, formats, fused layers and files, in this order."""
        return [
            Failure(key, what)
            for found in (self._keys(), self._dtypes(), self._quantized(), self._fused(), self._files())
            for key, what in found
        ]

    def source(self, key: str) -> Expected | None:
        """What the tensor `key` of the output must be; None for one that has no business there."""
        if key in self.expected:
            return self.expected[key]
        ref = self.base.ref(key)
        embedding = self.arch.embedding_key
        if ref is None and key == self.arch.head_key and self.arch.tied:
            # A head that is written out starts as the embedding, and where both stay tied it is the embedding.
            return (
                self.expected.get(embedding)
                if not self.untied and embedding in self.expected
                else (Expected(self.base.checkpoint[embedding]))
            )
        return None if ref is None else Expected(ref)

    def is_unread(self, key: str) -> bool:
        """Whether the tensor belongs to one of LongCat-Flash's identity experts, which transformers saves rows for and
        nothing reads; PEFT's merge changes them."""
        match = _EXPERT.fullmatch(key)
        return match is not None and int(match[2]) >= self.experts.get(match[1], int(match[2]) + 1)

    def _keys(self) -> Iterator[tuple[str, str]]:
        base, merged = self.base.checkpoint.tensors, self.merged.checkpoint.tensors
        scales = {key for weight in self.dequantized for key in self.base.quantized[weight].dependent_keys}
        for key in base:
            if self.renamed.get(key, key) not in merged and key not in scales:
                yield key, "is in the base and missing in the output"
        for key, ref in merged.items():
            expected = self.source(self.merged.name(ref))
            if key in scales:
                yield key, "is a scale of a weight that is not quantized any more"
            elif expected is None:
                yield key, "is in the output and not in the base"
            elif (right := self.base.shape(expected.source)) != (found := self.merged.shape(ref)):
                yield key, f"is {found}, and {right} is right"
        for key in self.expected:
            if self.base.ref(key) is None and self.merged.ref(key) is None:
                yield key, "is changed by the adapter and missing in the output"
        head = self.arch.head_key
        if head in self.expected and head not in base and head in merged and not self.untied:
            yield head, "is changed by the adapter, but config.json still ties it to the embedding"

    def _dtypes(self) -> Iterator[tuple[str, str]]:
        merged = self.merged.checkpoint.tensors
        for key, ref in merged.items():
            name = self.merged.name(ref)
            expected = self.source(name)
            if expected is None:
                continue
            base = self.base.ref(name) or self.base.checkpoint.tensors.get(self.arch.embedding_key, ref)
            right = self._dtype(name, base)
            coded = name in self.base.quantized
            if self.rules.strict and ref.dtype != right:
                yield key, f"is {ref.dtype}, and {right} is right"
            elif ref.dtype != base.dtype and not (coded or {ref.dtype, base.dtype} <= PRECISION.keys()):
                yield key, f"is {ref.dtype}, and {base.dtype} in the base"

    def _dtype(self, key: str, base: TensorRef) -> str:
        """The dtype in which merge-absorb writes a tensor."""
        wanted = DTYPES.get(self.rules.dtype)
        if key in self.base.quantized:
            return wanted or ("BF16" if key in self.dequantized else base.dtype)
        return wanted if wanted and base.dtype in PRECISION and not self._keeps(key) else base.dtype

    def _keeps(self, key: str) -> bool:
        return key.endswith(self.arch.family.keeps_dtype)

    def _quantized(self) -> Iterator[tuple[str, str]]:
        """Whether config.json of the output describes the quantized weights that are there, and no other."""
        ours, theirs = (_ignored(v.checkpoint.config) for v in (self.base, self.merged))
        still = quantization_field(self.merged.checkpoint.config) is not None
        for key in sorted(self.dequantized & self.merged.checkpoint.tensors.keys()):
            if still and not _names(theirs, key):
                yield key, "is not quantized any more, but quantization_config of config.json does not leave it out"
        for key, how in self.merged.quantized.items():
            was = self.base.quantized.get(key)
            if was is not None and _reading(was) != _reading(how):
                yield key, f"is read {_reading(how)}, and {_reading(was)} in the base"
            elif _names(theirs, key) and not _names(ours, key):
                yield key, "is quantized, but quantization_config of config.json leaves it out"

    def _fused(self) -> Iterator[tuple[str, str]]:
        """Engines make one layer of these: all parts need one precision, if they had one."""
        merged, experts = self.merged.checkpoint.tensors, {}
        for key, ref in merged.items():
            ending = next((e for e in _FUSED_WITH if key.endswith(f".{e}")), None)
            other = None if ending is None else key.removesuffix(ending) + _FUSED_WITH[ending]
            match = _EXPERT.fullmatch(key)
            if other not in merged and match:
                other = experts.setdefault(match[1], key)
            if other is not None and other in merged and ref.dtype != merged[other].dtype and self._alike(key, other):
                yield key, f"is {ref.dtype}, and {other}, with which engines make one layer, {merged[other].dtype}"

    def _alike(self, key: str, other: str) -> bool:
        base = self.base.checkpoint.tensors
        return key in base and other in base and base[key].dtype == base[other].dtype

    def _files(self) -> Iterator[tuple[str, str]]:
        merged = self.merged.checkpoint
        try:
            there = architecture(merged.config, str(merged.folder / "config.json"))
        except InputError as error:
            yield "config.json", str(error)
        else:
            if _matrices(there) != _matrices(self.arch):
                yield "config.json", "describes another model than the base's"
        size = ((merged.index or {}).get("metadata") or {}).get("total_size")
        if size is not None and size != merged.nbytes:
            yield INDEX_FILE, f"total_size is {size:,}, and the tensors have {merged.nbytes:,} bytes"


def _tied(config: dict, arch: Architecture) -> bool:
    """What config.json of the output says, or leaves to the base's."""
    text = config.get("text_config") or {}
    inner = text.get("tie_word_embeddings", arch.tied) if arch.wrapper is None else arch.tied
    return bool(config.get("tie_word_embeddings", inner))


def _matrices(arch: Architecture) -> set[tuple[str, tuple[int, int], int]]:
    return {(site.path, site.shape, site.count) for site in arch}


def _reading(how: QuantizedTensor) -> str:
    return "with one scale" if how.block is None else f"in blocks of {how.block[0]} × {how.block[1]}"


def _ignored(config: dict) -> list[str]:
    """The modules that a quantization_config leaves out, under the names that engines give to that list."""
    quant = config.get(quantization_field(config) or "") or {}
    lists = (quant.get(name) or [] for name in ("modules_to_not_convert", "ignored_layers", "ignore"))
    return [str(entry) for entries in lists for entry in entries]


def _names(entries: Iterable[str], key: str) -> bool:
    """Whether a list of modules means the module of this weight: by its name or a parent's, by its ending, or as a
    regular expression (`re:`)."""
    module = key.removesuffix(".weight")
    return any(
        re.match(entry[3:], module) is not None
        if entry.startswith("re:")
        else module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
        for entry in entries
    )
