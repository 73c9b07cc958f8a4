"""The objectives that come with mla-tune, one file each; `mla_tune/training/objective.py` says what one must do.

sft    cross-entropy of the trained tokens (supervised fine-tuning)
"""
