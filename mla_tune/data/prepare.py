"""A recipe's data section → rows that a trainer takes, with counts of everything that was cut or left out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from mla_tune.arch.site import Architecture
from mla_tune.data.cache import cached, key_of
from mla_tune.data.collate import rows_for
from mla_tune.data.encode import Encoded, encode
from mla_tune.data.mixing import mix_samples
from mla_tune.data.rows import EMBEDDED, RowSet, evaluation_rows, load_rows, sha256_of
from mla_tune.errors import InputError
from mla_tune.preflight.family_limits import check_window
from mla_tune.recipe.schema import DataSection, Recipe

#: How many of the rows left out are named.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """One data set: its rows, and both sides as tokens.  `used`: samples of it in an epoch of the mixture."""

    rows: RowSet
    train: Encoded
    held_out: Encoded | None
    weight: float = 1.0
    used: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """Trainer rows of both sides; `parts` keep the counts of each data set."""

    parts: list[PreparedSource]
    train_rows: Any
    """A list of rows, or a `data.stream.Stream` of them; then `parts` hold its first rows only."""
    held_out_rows: list[dict[str, Any]]
    first_rows: int = 0
    """Of a stream: trainer rows that its first rows make."""
    lines: list[str] = field(default_factory=list)
    """What the log should say: rows left out, passes over a source, tokens that were there already."""

    @property
    def sha256(self) -> str:
        hashes = [p.rows.sha256 for p in self.parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What run.json and `plan` say of the data."""
        found: dict[str, Any] = {
            "source": ", ".join(p.rows.source for p in self.parts),
            "sha256": self.sha256,
            "kind": "/".join(sorted({p.rows.kind for p in self.parts})),
        }
        if self.streamed:
            found["streamed"] = True
        for name in ("train", "held_out"):
            sides = [e for p in self.parts if (e := getattr(p, name)) is not None]
            if sides:
                found[name] = {"samples": sum(len(e.samples) for e in sides), "rows": self.count(name)}
                for count in ("tokens", "trained_tokens", "truncated", "dropped", "split", "untrained"):
                    found[name][count] = sum(getattr(e, count) for e in sides)
        skipped = self.skipped
        if skipped:
            found["skipped"] = {"rows": len(skipped), "first": skipped[:_NAMED]}
        if len(self.parts) > 1:
            found["sources"] = [
                {"source": p.rows.source, "weight": p.weight, "samples": len(p.train.samples), "used": p.used}
                for p in self.parts
            ]
            found["train"]["used"] = sum(p.used for p in self.parts)
        return found

    @property
    def streamed(self) -> bool:
        """Whether training rows are read as they are needed (`data.streaming`)."""
        return not isinstance(self.train_rows, list)

    def count(self, side: str) -> int:
        """Trainer rows of a side; of a stream what its first rows make."""
        if side == "train" and self.streamed:
            return self.first_rows
        return len(self.train_rows if side == "train" else self.held_out_rows)

    @property
    def skipped(self) -> list[str]:
        """What is wrong with each row that was left out."""
        found = [fault for p in self.parts for fault in p.rows.skipped]
        for p in self.parts:
            found += p.train.skipped + (p.held_out.skipped if p.held_out else [])
        return found


def prepare(recipe: Recipe, arch: Architecture, tokenizer: Any) -> Prepared:
    """Load, render, tokenize, mask, mix and pack.  Raises `FileError` or `InputError` with the row at fault."""
    check_window(recipe, arch)
    length = recipe.train.max_length
    if arch.vocab_size < len(tokenizer):
        raise InputError(f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary only {arch.vocab_size}")
    if recipe.data.streaming:
        return _streamed(recipe, tokenizer)
    seed, packing = recipe.train.seed, recipe.train.packing
    lines: list[str] = []
    sections = sections_of(recipe.data)
    parts = [_part(section, weight, recipe, tokenizer, lines) for section, weight in sections]
    samples = parts[0].train.samples
    if len(parts) > 1:
        samples, counts = mix_samples([p.train.samples for p in parts], [p.weight for p in parts], seed)
        parts = [
            PreparedSource(p.rows, p.train, p.held_out, p.weight, used) for p, used in zip(parts, counts, strict=True)
        ]
        lines += [
            f"{p.rows.source}: {p.used} of an epoch's {len(samples)} samples, {p.used / len(p.train.samples):.2f} "
            f"times its {len(p.train.samples)}"
            for p in parts
        ]
    held_out = [sample for p in parts if p.held_out for sample in p.held_out.samples]
    held_rows = rows_for(held_out, length, packing) if held_out else []
    prepared = Prepared(parts, rows_for(samples, length, packing), held_rows, lines=lines)
    if skipped := prepared.skipped:
        more = f"\n  … and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        named = "\n  ".join(skipped[:_NAMED])
        lines.insert(0, f"data.on_invalid_row: skip: {len(skipped)} rows are left out:\n  {named}{more}")
    return prepared


def _streamed(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Held-out rows, the first rows of each source as a sample of what comes, and a `Stream` for training."""
    from mla_tune.data.stream import Stream, StreamSource

    length, packing, seed = recipe.train.max_length, recipe.train.packing, recipe.train.seed
    origins = [StreamSource(section, weight) for section, weight in sections_of(recipe.data)]
    stream = Stream(recipe, tokenizer, origins)
    parts, lines = [], []
    for origin in origins:
        fraction = origin.data.eval_fraction
        own = origin.data.eval_path is not None or bool(fraction and origin.data.path in EMBEDDED)
        first, held_out, skipped = origin.peek(0.0 if own else fraction, seed)
        assert origin.kind is not None
        source = origin.reader.source
        if own:
            held_out, further = evaluation_rows(origin.data, origin.kind, source, skipped)
            source += further
        rows = RowSet(first, held_out, source, sha256_of(origin.kind, first, held_out), origin.kind, skipped)
        encoded = stream.encoded(origin, first, f"{source}, first rows")
        held = encode(held_out, origin.kind, tokenizer, origin.data, length, "held-out rows") if held_out else None
        parts.append(PreparedSource(rows, encoded, held, origin.weight, len(encoded.samples)))
        lines.append(f"{source}: streamed, shuffled and packed among {recipe.data.buffer:,} rows at a time")
    held_samples = [sample for p in parts if p.held_out for sample in p.held_out.samples]
    held_rows = rows_for(held_samples, length, packing) if held_samples else []
    first_rows = sum(len(rows_for(p.train.samples, length, packing)) for p in parts)
    return Prepared(parts, stream, held_rows, first_rows, lines)


def sections_of(data: DataSection) -> list[tuple[DataSection, float]]:
    """A data section and a weight for each data set; `eval_path` belongs to the first."""
    if not data.sources:
        return [(data, 1.0)]
    found = []
    for i, source in enumerate(data.sources):
        keys = source.model_dump(exclude={"weight"})
        if data.eval_path is not None:
            keys |= {"eval_path": data.eval_path} if i == 0 else {"eval_path": None, "eval_fraction": 0.0}
        found.append((data.model_copy(update={**keys, "sources": []}), source.weight))
    return found


def _part(data: DataSection, weight: float, recipe: Recipe, tokenizer: Any, lines: list[str]) -> PreparedSource:
    rows = load_rows(data, recipe.train.seed)
    length = recipe.train.max_length

    def tokens(part: str, of: list[Any]) -> Encoded:
        def make() -> Encoded:
            return encode(of, rows.kind, tokenizer, data, length, part)

        if not data.cache:
            return make()
        found, was_there = cached(key_of(rows.sha256, part, tokenizer, data, length), make)
        if was_there:
            lines.append(f"{rows.source}, {part}: {len(found.samples)} samples, tokenized earlier (data.cache)")
        return found

    train = tokens("training rows", rows.train)
    return PreparedSource(rows, train, tokens("held-out rows", rows.held_out) if rows.held_out else None, weight)


def steps_of(recipe: Recipe, rows: Any, processes: int = 1) -> int:
    """Optimizer steps of a run: `max_steps`, or the epochs' (the last, smaller batch of an epoch counts)."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    rows = len(rows)
    batches = -(-rows // (recipe.train.batch_size * processes))
    per_epoch = -(-batches // recipe.train.gradient_accumulation_steps)
    return max(1, -(-int(recipe.train.epochs * per_epoch * 1_000_000) // 1_000_000))
