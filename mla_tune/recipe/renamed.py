"""Recipe keys that had another name in an earlier version: an error then names the new key."""

from __future__ import annotations

#: `section.key` as it was called → the key of that section which it is now.
OLD_KEYS = {
    "optimizer.lora_plus": "lora_plus_ratio",
    "optimizer.whole_lr_scale": "modules_to_save_lr_scale",
    "data.loss_on": "train_on",
    "data.too_long": "on_overflow",
    "data.bad_rows": "on_invalid_row",
    "train.accumulation": "gradient_accumulation_steps",
    "train.checkpointing": "activation_checkpointing",
}
