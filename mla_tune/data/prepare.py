"""A recipe's data section → rows that a trainer takes, with counts of everything that was cut or left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_tune.arch.site import Architecture
from mla_tune.data.collate import rows_for
from mla_tune.data.encode import Encoded, encode
from mla_tune.data.rows import RowSet, load_rows
from mla_tune.errors import InputError
from mla_tune.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Prepared:
    """Trainer rows of both sides; `train` and `held_out` keep the counts."""

    rows: RowSet
    train: Encoded
    held_out: Encoded | None
    train_rows: list[dict[str, Any]]
    held_out_rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """What run.json and `plan` say of the data."""
        sides = {"train": (self.train, self.train_rows), "held_out": (self.held_out, self.held_out_rows)}
        return {
            "source": self.rows.source,
            "sha256": self.rows.sha256,
            "kind": self.rows.kind,
            **{
                name: {
                    "samples": len(encoded.samples),
                    "rows": len(rows),
                    "tokens": encoded.tokens,
                    "trained_tokens": encoded.trained_tokens,
                    "truncated": encoded.truncated,
                    "dropped": encoded.dropped,
                }
                for name, (encoded, rows) in sides.items()
                if encoded is not None
            },
        }


def prepare(recipe: Recipe, arch: Architecture, tokenizer: Any) -> Prepared:
    """Load, render, tokenise, mask and pack.  Raises `FileError` or `InputError` with the row at fault."""
    window, length = arch.max_position_embeddings, recipe.train.max_length
    if window and length > window:
        raise InputError(f"train.max_length is {length}, but this model's window is {window} tokens")
    rows = load_rows(recipe.data, recipe.train.seed)
    train = encode(rows.train, rows.kind, tokenizer, recipe.data, length, "training rows")
    held_out = None
    if rows.held_out:
        held_out = encode(rows.held_out, rows.kind, tokenizer, recipe.data, length, "held-out rows")
    if arch.vocab_size < len(tokenizer):
        raise InputError(f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary only {arch.vocab_size}")
    packing = recipe.train.packing
    return Prepared(
        rows,
        train,
        held_out,
        rows_for(train.samples, length, packing),
        rows_for(held_out.samples, length, packing) if held_out else [],
    )


def steps_of(recipe: Recipe, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run: `max_steps`, or the epochs' (the last, smaller batch of an epoch counts)."""
    if recipe.train.max_steps:
        return recipe.train.max_steps
    batches = -(-rows // (recipe.train.batch_size * processes))
    per_epoch = -(-batches // recipe.train.accumulation)
    return max(1, -(-int(recipe.train.epochs * per_epoch * 1_000_000) // 1_000_000))
