"""The corpus and the tokenizer of the embedded model: text files, and the source of Python's standard library."""

from __future__ import annotations

import ast
import copy
import hashlib
import lzma
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIALS = [BOS, EOS, PAD, USER, ASSISTANT]
CHAT_TEMPLATE = (
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
# Words with their leading space, single digits (so that arithmetic sees them), runs of other marks, white space.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
    return raw.decode("utf-8", errors="replace")


#: A text, or a question and its answer.
Document = str | tuple[str, str]


def prose_documents(path: Path, target: int = 32_768) -> Iterator[str]:
    """Cut a text at blank lines into pieces of about `target` characters."""
    piece: list[str] = []
    size = 0
    for paragraph in read_text(path).split("\n\n"):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= target:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"} & set(parts):
            yield path


def docstring_chats(source: str) -> Iterator[tuple[str, str]]:
    """(question, answer) for each function with a docstring: what it does, then its source without it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        doc = ast.get_docstring(node)
        if not doc or len(doc) > 600 or len(node.body) < 2:
            continue
        bare = copy.copy(node)
        bare.body = node.body[1:]
        answer = ast.unparse(bare)
        if len(answer) <= 1500:
            yield f"Write a Python function {node.name}. {' '.join(doc.split())}", answer


def documents(texts: list[Path], with_stdlib: bool) -> Iterator[tuple[str, Document, str]]:
    """(domain, document, group): documents of a group go to the same side, so that no function is trained on as a chat
    turn and held out as a part of its file."""
    for path in texts:
        for piece in prose_documents(path):
            yield "prose", piece, piece
    if with_stdlib:
        for path in stdlib_files():
            source = path.read_text(encoding="utf-8", errors="replace")
            yield "code", source, source
            for chat in docstring_chats(source):
                yield "chat", chat, source


def held_out(group: str, share: float) -> bool:
    """Decided by content, so that nothing changes sides between runs."""
    return int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) < share * 2**32


def train_tokenizer(docs: list, vocab_size: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator((d if isinstance(d, str) else "\n".join(d) for _, d, _ in docs), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_corpus(args: Any) -> None:
    """Writes tokenizer/, train.npy (uint16 stream) and held_out.npz (a stream and a byte count a domain)."""
    work = args.work
    docs = list(documents(args.text, args.stdlib))
    if not docs:
        sys.exit("no documents: name a text with --text or leave out --no-stdlib")
    train_docs = [d for d in docs if not held_out(d[2], args.held_out)]
    print(f"corpus: {len(docs):,} documents, {len(docs) - len(train_docs):,} held out", flush=True)
    tok = train_tokenizer(train_docs, args.vocab_size)
    tok.save_pretrained(work / "tokenizer")

    bos, eos, user, assistant = (tok.convert_tokens_to_ids(t) for t in (BOS, EOS, USER, ASSISTANT))

    def encode(batch: list) -> Iterator[list[int]]:
        flat: list[str] = [s for d in batch for s in ((d,) if isinstance(d, str) else d)]
        ids = iter(tok(flat, add_special_tokens=False)["input_ids"])
        for d in batch:
            if isinstance(d, str):
                yield [bos, *next(ids), eos]
            else:
                yield [bos, user, *next(ids), assistant, *next(ids), eos]

    order = np.random.default_rng(args.seed).permutation(len(train_docs))
    stream: list[np.ndarray] = []
    for i in range(0, len(order), 512):
        for ids in encode([train_docs[j][1] for j in order[i : i + 512]]):
            stream.append(np.asarray(ids, dtype=np.uint16))
    train = np.concatenate(stream)
    counts = {d: sum(1 for x in docs if x[0] == d) for d in ("prose", "code", "chat")}

    out: dict[str, np.ndarray] = {}
    for domain in counts:
        part = [d[1] for d in docs if d[0] == domain and held_out(d[2], args.held_out)]
        if part:
            out[domain] = np.concatenate([np.asarray(x, dtype=np.uint16) for x in encode(part)])
            out[domain + "_bytes"] = np.array(
                sum(len((d if isinstance(d, str) else "".join(d)).encode()) for d in part)
            )
    np.savez(work / "held_out.npz", **out)  # type: ignore[arg-type]
    np.save(work / "train.tmp.npy", train)
    os.replace(work / "train.tmp.npy", work / "train.npy")
    sizes = {k: int(v.size) for k, v in out.items() if not k.endswith("_bytes")}
    print(f"tokens: train {train.size:,}, held out {sizes}", flush=True)
