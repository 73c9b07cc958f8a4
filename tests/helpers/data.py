"""A byte-level BPE tokenizer with the embedded model's special tokens and chat template, trained in a blink."""

from __future__ import annotations

from typing import Any

from mla_tune.recipe.schema import DataSection

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIALS = [BOS, EOS, PAD, USER, ASSISTANT]
TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'system' -%}{{- m['content'] + '\n\n' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '" + USER + "' + m['content'] -}}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' -}}{%- generation -%}{{- m['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- raise_exception('unknown role ' + m['role']) -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)
# Border merges are what tests need: " the", "\n\n" and "ab" are tokens of their own here.
CORPUS = ["the cat sat on the mat.\n\nabab abba baab the end\n\n" * 20, "def f(x):\n    return x + 1\n" * 20]


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=template,
        model_max_length=1024,
    )


def section(**keys: Any) -> DataSection:
    return DataSection(**keys)


def no_marks(template: str) -> str:
    """The template without its {% generation %} marks, rendering the same text."""
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
