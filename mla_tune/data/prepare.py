"""Prepare a recipe's data: load, tokenize, mix and pack it, and count everything that was cut or left out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from mla_tune.arch.site import Architecture
from mla_tune.data.cache import cache_key, load_or_encode
from mla_tune.data.collate import trainer_rows
from mla_tune.data.encode import Encoded, encode
from mla_tune.data.mixing import mix_samples
from mla_tune.data.rows import EMBEDDED, RowSet, hash_rows, load_evaluation_rows, load_rows
from mla_tune.errors import InputError
from mla_tune.preflight.family_limits import check_window
from mla_tune.recipe.schema import DataSection, Recipe

_NAMED = 3
"""How many of the rows left out are named; the others are counted."""


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """One data set: its rows, and the samples made of them."""

    rows: RowSet
    """Its rows; of a streamed data set the first ones."""
    train: Encoded
    """Samples of the training rows."""
    held_out: Encoded | None
    """Samples of the held-out rows, if there are any."""
    weight: float = 1.0
    """Its weight among several sources."""
    used: int = 0
    """How many of an epoch's samples are from it, where there are several sources or the data is streamed."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a run: what the Trainer trains and evaluates on, and what it was made of."""

    sources: list[PreparedSource]
    """The data sets, with the counts of each."""
    train_rows: Any
    """Trainer rows to train on: a list, or a `data.stream.Stream`; then `sources` hold only its first rows."""
    held_out_rows: list[dict[str, Any]]
    """Trainer rows to evaluate on."""
    first_rows: int = 0
    """If streamed: the number of trainer rows that the first rows in `sources` make."""
    lines: list[str] = field(default_factory=list)
    """Lines for the log: rows left out, how often each source is used, what came from the cache."""

    @property
    def sha256(self) -> str:
        """Hash of the rows of all sources."""
        hashes = [source.rows.sha256 for source in self.sources]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return what run.json and `plan` hold about the data: source, hash, kind, counts, and rows left out."""
        found: dict[str, Any] = {
            "source": ", ".join(source.rows.source for source in self.sources),
            "sha256": self.sha256,
            "kind": "/".join(sorted({source.rows.kind for source in self.sources})),
        }
        if self.streamed:
            found["streamed"] = True
        for side in ("train", "held_out"):
            encoded = [e for source in self.sources if (e := getattr(source, side)) is not None]
            if encoded:
                found[side] = {"samples": sum(len(e.samples) for e in encoded), "rows": self.count(side)}
                for count in ("tokens", "trained_tokens", "truncated", "dropped", "split", "untrained"):
                    found[side][count] = sum(getattr(e, count) for e in encoded)
        skipped = self.skipped
        if skipped:
            found["skipped"] = {"rows": len(skipped), "first": skipped[:_NAMED]}
        if len(self.sources) > 1:
            found["sources"] = [
                {"source": s.rows.source, "weight": s.weight, "samples": len(s.train.samples), "used": s.used}
                for s in self.sources
            ]
            found["train"]["used"] = sum(source.used for source in self.sources)
        return found

    @property
    def streamed(self) -> bool:
        """Whether training rows are read while training (`data.streaming`)."""
        return not isinstance(self.train_rows, list)

    def count(self, side: str) -> int:
        """Return the number of trainer rows of a side, `train` or `held_out`; of a stream that of its first rows."""
        if side == "train" and self.streamed:
            return self.first_rows
        return len(self.train_rows if side == "train" else self.held_out_rows)

    @property
    def skipped(self) -> list[str]:
        """For each row that was left out as invalid, a message that says what is wrong with it."""
        found = [fault for source in self.sources for fault in source.rows.skipped]
        for source in self.sources:
            found += source.train.skipped + (source.held_out.skipped if source.held_out else [])
        return found


def prepare(recipe: Recipe, arch: Architecture, tokenizer: Any) -> Prepared:
    """Load the rows of a recipe, tokenize them, mask what the loss doesn't count, mix the sources, and pack samples.

    Raises:
        FileError: a file is missing or can't be decoded.
        InputError: `train.max_length` is more than the model allows, the tokenizer doesn't fit the model, or rows can't
            be used; the message names the first of them.
    """
    check_window(recipe, arch)
    length = recipe.train.max_length
    if arch.vocab_size < len(tokenizer):
        raise InputError(
            f"model.base: the tokenizer has {len(tokenizer)} entries, but the model's vocabulary only "
            f"{arch.vocab_size}; do the two belong together?"
        )
    if recipe.data.streaming:
        return _prepare_streamed(recipe, tokenizer)
    packing = recipe.train.packing
    lines: list[str] = []
    sources = [
        _prepare_source(section, weight, recipe, tokenizer, lines) for section, weight in source_sections(recipe.data)
    ]
    samples = sources[0].train.samples
    if len(sources) > 1:
        samples, used = mix_samples([s.train.samples for s in sources], [s.weight for s in sources], recipe.train.seed)
        sources = [replace(source, used=count) for source, count in zip(sources, used, strict=True)]
        lines += [
            f"{s.rows.source}: {s.used} of an epoch's {len(samples)} samples, {s.used / len(s.train.samples):.2f} "
            f"times its {len(s.train.samples)}"
            for s in sources
        ]
    train_rows = trainer_rows(samples, length, packing=packing)
    prepared = Prepared(sources, train_rows, _held_out_rows(sources, recipe), lines=lines)
    if skipped := prepared.skipped:
        more = f"\n  … and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        named = "\n  ".join(skipped[:_NAMED])
        lines.insert(0, f"data.on_invalid_row: skip: {len(skipped)} rows are left out:\n  {named}{more}")
    return prepared


def _prepare_source(
    data: DataSection, weight: float, recipe: Recipe, tokenizer: Any, lines: list[str]
) -> PreparedSource:
    """Load and encode one data set; a line for the log is appended to `lines` if its tokens were in the cache."""
    rows = load_rows(data, recipe.train.seed)
    length = recipe.train.max_length

    def encoded(part: str, part_rows: list[Any]) -> Encoded:
        def encode_part() -> Encoded:
            return encode(part_rows, rows.kind, tokenizer, data, length, part=part)

        if not data.cache:
            return encode_part()
        found, was_cached = load_or_encode(cache_key(rows.sha256, part, tokenizer, data, length), encode_part)
        if was_cached:
            lines.append(f"{rows.source}, {part}: {len(found.samples)} samples, tokenized earlier (data.cache)")
        return found

    train = encoded("training rows", rows.train)
    held_out = encoded("held-out rows", rows.held_out) if rows.held_out else None
    return PreparedSource(rows, train, held_out, weight)


def _prepare_streamed(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Prepare the held-out rows, the first rows of each source (for counts), and a `Stream` to train on."""
    from mla_tune.data.stream import Stream, StreamSource

    length = recipe.train.max_length
    stream_sources = [StreamSource(section, weight) for section, weight in source_sections(recipe.data)]
    stream = Stream(recipe, tokenizer, stream_sources)
    sources, lines = [], []
    for stream_source in stream_sources:
        data = stream_source.data
        has_own_held_out = data.eval_path is not None or bool(data.eval_fraction and data.path in EMBEDDED)
        fraction = 0.0 if has_own_held_out else data.eval_fraction
        first, held_out, skipped = stream_source.peek(fraction, recipe.train.seed)
        data, kind = stream_source.data, stream_source.kind  # `peek` settles the format and the kind
        assert kind is not None
        source = stream_source.reader.source
        if has_own_held_out:
            held_out, suffix = load_evaluation_rows(data, kind, source, skipped)
            source += suffix
        rows = RowSet(first, held_out, source, hash_rows(kind, first, held_out), kind, skipped)
        train = stream.encode(stream_source, first, f"{source}, first rows")
        held = encode(held_out, kind, tokenizer, data, length, part="held-out rows") if held_out else None
        sources.append(PreparedSource(rows, train, held, stream_source.weight, len(train.samples)))
        lines.append(f"{source}: streamed, shuffled and packed among {recipe.data.buffer:,} rows at a time")
    packing = recipe.train.packing
    first_rows = sum(len(trainer_rows(s.train.samples, length, packing=packing)) for s in sources)
    return Prepared(sources, stream, _held_out_rows(sources, recipe), first_rows, lines)


def _held_out_rows(sources: list[PreparedSource], recipe: Recipe) -> list[dict[str, Any]]:
    """Return the trainer rows of the held-out samples of all sources."""
    samples = [sample for source in sources if source.held_out for sample in source.held_out.samples]
    return trainer_rows(samples, recipe.train.max_length, packing=recipe.train.packing) if samples else []


def source_sections(data: DataSection) -> list[tuple[DataSection, float]]:
    """Return a data section and a weight for each data set of a recipe. `data.eval_path` is given to the first one."""
    if not data.sources:
        return [(data, 1.0)]
    found = []
    for i, source in enumerate(data.sources):
        keys = source.model_dump(exclude={"weight"})
        if data.eval_path is not None:
            keys |= {"eval_path": data.eval_path} if i == 0 else {"eval_path": None, "eval_fraction": 0.0}
        found.append((data.model_copy(update={**keys, "sources": []}), source.weight))
    return found


def optimizer_steps(recipe: Recipe, rows: Any, processes: int = 1) -> int:
    """Return the optimizer steps of a run: `train.max_steps`, else those of `train.epochs` epochs of `rows`.

    The last batch of an epoch may be smaller than the others and is a step too. `processes` share each global batch.
    """
    if recipe.train.max_steps:
        return recipe.train.max_steps
    batches = -(-len(rows) // (recipe.train.batch_size * processes))
    steps_per_epoch = -(-batches // recipe.train.gradient_accumulation_steps)
    # Round up, but not for the rounding error of a product such as 0.1 · 30.
    return max(1, -(-int(recipe.train.epochs * steps_per_epoch * 1_000_000) // 1_000_000))
