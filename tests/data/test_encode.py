"""Encoding: ids are the template's, labels sit on exactly the tokens that count, and nothing is lost unseen."""

from __future__ import annotations

import logging

import pytest

from mla_tune.data.encode import encode
from mla_tune.errors import InputError
from tests.helpers.data import SPECIALS, TEMPLATE, make_tokenizer, no_marks, section

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the mat."},
    {"role": "user", "content": "and?\n"},
    {"role": "assistant", "content": "\nthe end"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def one(tokenizer, row, max_length=200, **keys):
    """The single sample of one row."""
    kind = "chat" if "messages" in row else "text" if "text" in row else "prompt"
    encoded = encode([row], kind, tokenizer, section(**keys), max_length)
    assert len(encoded.samples) == 1
    return encoded.samples[0]


def pieces(tokenizer, *parts):
    """(ids, labels) of text pieces given as (text or special id, counts): pieces tokenized one by one by hand."""
    ids, labels = [], []
    for part, counts in parts:
        tokens = [part] if isinstance(part, int) else tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if counts else [-100] * len(tokens)
    return ids, labels


def specials(tokenizer):
    return (tokenizer.convert_tokens_to_ids(t) for t in SPECIALS)


# ------------------------------------------------------------------------------------------------- prompt
def test_prompt_with_template_trains_the_completion_and_its_end(tokenizer):
    bos, eos, _, user, assistant = specials(tokenizer)
    sample = one(tokenizer, {"prompt": "the cat", "completion": " sat on"})
    want = pieces(tokenizer, (bos, 0), (user, 0), ("the cat", 0), (assistant, 0), (" sat on", 1), (eos, 1))
    assert (sample.input_ids, sample.labels) == want


def test_prompt_without_template_never_merges_the_border():
    tokenizer = make_tokenizer()
    bos, eos, *_ = specials(tokenizer)
    row = {"prompt": "x a", "completion": "b the"}
    merged = tokenizer("x ab the", add_special_tokens=False)["input_ids"]
    want = pieces(tokenizer, (bos, 0), ("x a", 0), ("b the", 1), (eos, 1))
    assert want[0][1:-1] != merged, "the corpus must make 'ab' a token for this test to mean anything"
    sample = one(tokenizer, row, template="none")
    assert (sample.input_ids, sample.labels) == want
    tokenizer.chat_template = None
    assert one(tokenizer, row) == sample  # auto
    sample = one(tokenizer, row, train_on="all")
    assert sample.labels == [-100, *sample.input_ids[1:]]
    tokenizer.bos_token = None
    assert one(tokenizer, row).input_ids == want[0][1:]


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        no_marks(TEMPLATE),
        # Plain marks that can merge with what follows: "…answer:a" + "b the"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        # A generation prompt that opens reasoning, which the finished turn doesn't have.
        no_marks(TEMPLATE)[: -len("{%- endif -%}")] + "{{- '<think>' -}}{%- endif -%}",
    ],
)
@pytest.mark.parametrize("completion", ["b the", " the end", "\n\nabab"])
def test_rendered_ids_are_the_templates_own(template, completion):
    tokenizer = make_tokenizer(template)
    turns = [{"role": "user", "content": "x a"}, {"role": "assistant", "content": completion}]
    sample = one(tokenizer, {"prompt": "x a", "completion": completion})
    assert sample.input_ids == tokenizer.apply_chat_template(turns)["input_ids"]
    first = next(i for i, label in enumerate(sample.labels) if label != -100)
    assert sample.labels[first:] == sample.input_ids[first:]
    assert completion in tokenizer.decode(sample.input_ids[first:])
    assert "x a" not in tokenizer.decode(sample.input_ids[first:])
    assert one(tokenizer, {"messages": turns}) == sample


def test_a_template_that_drops_reasoning_is_an_error():
    drops = no_marks(TEMPLATE).replace("m['content'] + eos_token", "m['content'].split('</think>')[-1] + eos_token")
    row = {"prompt": "the cat", "completion": "<think>ab</think>the end"}
    with pytest.raises(InputError, match=r"data: row 1 \('the cat'\): the chat template leaves out .*template: none"):
        one(make_tokenizer(drops), row)
    assert one(make_tokenizer(drops), row, template="none")


# --------------------------------------------------------------------------------------------------- chat
@pytest.mark.parametrize("template", [TEMPLATE, no_marks(TEMPLATE)], ids=["marked", "by prefixes"])
def test_chat_trains_every_assistants_turn(template):
    tokenizer = make_tokenizer(template)
    bos, eos, _, user, assistant = specials(tokenizer)
    sample = one(tokenizer, {"messages": CHAT})
    want = pieces(
        tokenizer,
        *[(bos, 0), ("be brief\n\n", 0), (user, 0), ("the cat?", 0), (assistant, 0), ("the mat.", 1), (eos, 1)],
        *[(user, 0), ("and?\n", 0), (assistant, 0), ("\nthe end", 1), (eos, 1)],
    )
    assert (sample.input_ids, sample.labels) == want
    assert sample.input_ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    whole = one(tokenizer, {"messages": CHAT}, train_on="all")
    assert whole.input_ids == sample.input_ids
    assert whole.labels == [-100, *whole.input_ids[1:]]


def test_a_template_that_rewrites_the_past_needs_marks():
    shifting = no_marks(TEMPLATE).replace(
        "{%- if m['role'] == 'system' -%}", "{%- if loop.last -%}!{%- endif -%}{%- if m['role'] == 'system' -%}"
    )
    tokenizer = make_tokenizer(shifting)
    with pytest.raises(InputError, match=r"first 2 messages otherwise.*{% generation %}.*data.train_on: all"):
        one(tokenizer, {"messages": CHAT})
    assert one(tokenizer, {"messages": CHAT}, train_on="all")


def test_template_refusals_name_the_row(tokenizer):
    rows = [{"messages": CHAT}, {"messages": [{"role": "tool", "content": "ab"}]}]
    with pytest.raises(
        InputError, match=r"held-out: row 2 \('ab'\): .*refuses the messages \(tool\): unknown role tool"
    ):
        encode(rows, "chat", tokenizer, section(train_on="all"), 200, part="held-out")


def test_templates_that_cannot_serve():
    bare = make_tokenizer(None)
    with pytest.raises(InputError, match=r"tokenizer has no chat template; set data.template: none, or"):
        one(bare, {"prompt": "a", "completion": "b"}, template="chat")
    with pytest.raises(InputError, match="tokenizer has no chat template; use a model"):
        one(bare, {"messages": CHAT})
    with pytest.raises(InputError, match="template: none can't join the turns"):
        one(make_tokenizer(), {"messages": CHAT}, template="none")
    bare.eos_token = None
    with pytest.raises(InputError, match="no eos token"):
        one(bare, {"text": "ab"})


# --------------------------------------------------------------------------------------------------- text
def test_text_is_all_trained(tokenizer):
    bos, eos, *_ = specials(tokenizer)
    sample = one(tokenizer, {"text": "the end"})
    assert (sample.input_ids, [-100, *sample.input_ids[1:]]) == (
        pieces(tokenizer, (bos, 1), ("the end", 1), (eos, 1))[0],
        sample.labels,
    )


@pytest.mark.parametrize("extra", range(9))
def test_long_text_is_cut_and_every_token_predicted_once(tokenizer, extra):
    text = "xyz" * 8 + "q" * extra
    whole = one(tokenizer, {"text": text}).input_ids
    encoded = encode([{"text": text}], "text", tokenizer, section(), 9)
    assert [len(s.input_ids) for s in encoded.samples[:-1]] == [9] * (len(encoded.samples) - 1)
    assert 2 <= len(encoded.samples[-1].input_ids) <= 9
    assert [label for s in encoded.samples for label in s.labels if label != -100] == whole[1:]
    assert (encoded.truncated, encoded.dropped, encoded.trained_tokens) == (0, 0, len(whole) - 1)


# ----------------------------------------------------------------------------------------------- too long
def test_too_long_rows(tokenizer):
    rows = [{"prompt": "x" * n, "completion": "y" * 10} for n in (2, 12, 7)]  # 16, 26 and 21 tokens
    cut = encode(rows, "prompt", tokenizer, section(), 16)
    assert [len(s.input_ids) for s in cut.samples] == [16, 16, 16]
    assert (cut.truncated, cut.dropped, cut.tokens, cut.trained_tokens) == (2, 0, 48, 11 + 1 + 6)
    dropped = encode(rows, "prompt", tokenizer, section(on_overflow="drop"), 16)
    assert (len(dropped.samples), dropped.truncated, dropped.dropped, dropped.tokens) == (1, 0, 2, 16)
    with pytest.raises(
        InputError, match=r"row 2 \('x{12}'\): 26 tokens, but train.max_length is 16.*2 such rows, the longest of 26"
    ):
        encode(rows, "prompt", tokenizer, section(on_overflow="error"), 16)
    with pytest.raises(InputError, match=r"all 3 rows are longer than train.max_length \(8 tokens\) and were dropped"):
        encode(rows, "prompt", tokenizer, section(on_overflow="drop"), 8)
    with pytest.raises(InputError, match=r"row 1 .*: 26 tokens"):
        encode([{"text": "x" * 24}], "text", tokenizer, section(on_overflow="error"), 16)


@pytest.mark.parametrize("keys", [{}, {"train_on": "all"}, {"template": "none"}])
def test_a_prompt_that_fills_the_window_is_an_error(tokenizer, keys):
    room = 16 - (1 if "template" in keys else 3)  # none: bos; chat: bos and two role marks
    fits, fills = ({"prompt": "x" * n, "completion": "yy"} for n in (room - 1, room))
    assert encode([fits], "prompt", tokenizer, section(**keys), 16).truncated == 1
    words = r"row 2 \('x+'\): its first 16 tokens are prompt and train.max_length is 16, so no token of the completion "
    with pytest.raises(InputError, match=words + ".*data.on_overflow: drop.*train.max_length: 19"):
        encode([fits, fills], "prompt", tokenizer, section(**keys), 16)
    assert encode([fits, fills], "prompt", tokenizer, section(**keys), 19).truncated == 0


def test_all_masked_is_an_error():
    nothing = TEMPLATE.replace("{%- generation -%}{{-", "{{-").replace(
        "{%- endgeneration -%}", "{%- generation -%}{%- endgeneration -%}"
    )
    with pytest.raises(InputError, match=r"data: all labels are masked in all 1 samples.*data.train_on"):
        one(make_tokenizer(nothing), {"messages": CHAT})


def test_no_rows_and_no_warnings(tokenizer, caplog):
    assert encode([], "prompt", tokenizer, section(), 16).samples == []
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        rows = [{"messages": [{"role": "user", "content": "x" * 3000}, CHAT[2]]}]
        encode(rows, "chat", make_tokenizer(), section(), 4000)
        encode([{"text": "x" * 3000}], "text", make_tokenizer(), section(), 4000)
    assert caplog.text == ""
