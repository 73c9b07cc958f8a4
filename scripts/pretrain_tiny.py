#!/usr/bin/env python
"""Pretrain the small DeepSeek-V3-style model that ships with mla-tune.

    python scripts/pretrain_tiny.py --prose pretrain_en.txt.xz --work work/ --out model/
    python scripts/pretrain_tiny.py --text a.txt --text b.txt.xz --no-stdlib --work work/ --out model/

The corpus is any number of text files plus Python's standard library source (for functions with a docstring
also as a chat turn: the docstring asks, the source answers).  A byte-level BPE tokenizer is trained on it, then
the model is trained from scratch, and written in Hugging Face form with a model card of what was measured.

Everything lands in `--work` as it is made, so a killed run continues where its last checkpoint was: start the
same command again.  `--max-steps-now N` trains N steps and stops (to spread the work over several sittings).
Balance between routed experts is kept without an auxiliary loss, as in DeepSeek-V3 (arXiv:2412.19437, 2.1.2):
after each step the bias of an overloaded expert falls by `gamma` and that of an underloaded one rises.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import lzma
import math
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

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


# ---------------------------------------------------------------------------------------------- corpus
def read_text(path: Path) -> str:
    raw = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
    return raw.decode("utf-8", errors="replace")


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
        bare = ast.FunctionDef(**{f: getattr(node, f) for f in node._fields} | {"body": node.body[1:]})
        answer = ast.unparse(ast.fix_missing_locations(ast.copy_location(bare, node)))
        if len(answer) <= 1500:
            yield f"Write a Python function {node.name}. {' '.join(doc.split())}", answer


def documents(texts: list[Path], with_stdlib: bool) -> Iterator[tuple[str, str | tuple[str, str]]]:
    """(domain, text) or ("chat", (question, answer))."""
    for path in texts:
        for piece in prose_documents(path):
            yield "prose", piece
    if with_stdlib:
        for path in stdlib_files():
            source = path.read_text(encoding="utf-8", errors="replace")
            yield "code", source
            for chat in docstring_chats(source):
                yield "chat", chat


def held_out(document: str | tuple[str, str], share: float) -> bool:
    """Decided by content, so that no document changes sides between runs."""
    text = document if isinstance(document, str) else "\0".join(document)
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < share * 2**32


def train_tokenizer(docs: list, vocab_size: int):
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
    tok.train_from_iterator((d if isinstance(d, str) else "\n".join(d) for _, d in docs), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_corpus(args) -> None:
    """Writes tokenizer/, train.npy (uint16 stream) and held_out.npz (a stream and a byte count a domain)."""
    work = args.work
    docs = list(documents(args.text, args.stdlib))
    if not docs:
        sys.exit("no documents: name a text with --text or leave out --no-stdlib")
    train_docs = [d for d in docs if not held_out(d[1], args.held_out)]
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
        part = [d[1] for d in docs if d[0] == domain and held_out(d[1], args.held_out)]
        if part:
            out[domain] = np.concatenate([np.asarray(x, dtype=np.uint16) for x in encode(part)])
            out[domain + "_bytes"] = np.array(
                sum(len((d if isinstance(d, str) else "".join(d)).encode()) for d in part)
            )
    np.savez(work / "held_out.npz", **out)
    np.save(work / "train.tmp.npy", train)
    os.replace(work / "train.tmp.npy", work / "train.npy")
    sizes = {k: int(v.size) for k, v in out.items() if not k.endswith("_bytes")}
    print(f"tokens: train {train.size:,}, held out {sizes}", flush=True)


# ----------------------------------------------------------------------------------------------- model
def model_config(args, tok) -> dict:
    """`config.json` of the model, or of `--config`, with this tokenizer's ids."""
    config = json.loads(args.config.read_text())
    config.update(
        vocab_size=len(tok),
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return config


def build_model(config: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = AutoConfig.for_model(**config)
    cfg.use_cache = False
    return AutoModelForCausalLM.from_config(
        cfg, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )


class ExpertBalance:
    """Counts how many tokens each routed expert got, and moves `e_score_correction_bias` against the imbalance."""

    def __init__(self, model, gamma: float) -> None:
        self.gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.gamma = gamma
        self.load = [torch.zeros_like(g.e_score_correction_bias) for g in self.gates]
        for i, gate in enumerate(self.gates):
            gate.register_forward_hook(self._count(i))

    def _count(self, i: int):
        def hook(module, args, output) -> None:
            if module.training:
                # One-hot sums rather than bincount: the latter has no static shape under torch.compile.
                self.load[i].add_(F.one_hot(output[2].flatten(), module.num_experts).sum(0).to(self.load[i].dtype))

        return hook

    @torch.no_grad()
    def step(self) -> float:
        """Update every bias; returns the largest share that one expert got, as a multiple of a fair share."""
        worst = 0.0
        for gate, load in zip(self.gates, self.load, strict=True):
            mean = load.mean()
            if mean > 0:
                worst = max(worst, float(load.max() / mean))
                gate.e_score_correction_bias += self.gamma * torch.sign(mean - load)
            load.zero_()
        return worst


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


def param_groups(model, weight_decay: float) -> list[dict]:
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model, held: dict[str, np.ndarray], length: int) -> dict[str, float]:
    """Mean next-token loss in nats for each domain."""
    model.eval()
    losses = {}
    for domain, ids in held.items():
        rows = torch.from_numpy(ids.astype(np.int64))
        total, n = 0.0, 0
        for start in range(0, len(rows) - 1, length * 8):
            window = rows[start : start + length * 8 + 1]
            usable = (len(window) - 1) // length * length
            tail = window[usable:] if len(window) - 1 - usable > 1 else window[:0]
            batches = [window[: usable + 1]] if usable else []
            for w, width in [(b, length) for b in batches] + ([(tail, len(tail) - 1)] if len(tail) else []):
                x, y = w[:-1].view(-1, width), w[1:].view(-1, width)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(input_ids=x).logits
                total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
                n += y.numel()
        losses[domain] = total / n
    model.train()
    return losses


def unigram(train: np.ndarray, held: dict[str, np.ndarray], vocab: int) -> dict[str, float]:
    """Loss of a model that knows token frequencies only (add-one smoothing), in nats a token."""
    counts = np.bincount(train, minlength=vocab).astype(np.float64) + 1
    logp = np.log(counts / counts.sum())
    return {d: float(-logp[ids[1:]].mean()) for d, ids in held.items()}


def save_checkpoint(path: Path, state: dict) -> None:
    tmp = path.with_suffix(".tmp")
    torch.save(state, tmp)
    os.replace(tmp, path)


def pretrain(args, train: np.ndarray, held: dict[str, np.ndarray], tok) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    torch.manual_seed(args.seed)
    model = build_model(model_config(args, tok))
    optimizer = torch.optim.AdamW(
        param_groups(model, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.95), fused=True
    )
    balance = ExpertBalance(model, args.gamma)
    tokens_step = args.batch_size * args.length
    steps = math.ceil(args.tokens / tokens_step)
    rows = (len(train) - 1) // args.length

    ckpt, step0, spent = args.work / "checkpoint.pt", 0, 0.0
    if ckpt.exists():
        state = torch.load(ckpt, weights_only=True)
        if state["steps"] != steps:
            sys.exit(f"{ckpt} is of a run of {state['steps']} steps, this one has {steps}: give another --work")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step0, spent = state["step"], state["seconds"]
        print(f"continuing at step {step0:,} of {steps:,}", flush=True)
    if step0 >= steps:
        return finish(args, model, tok, train, held, steps * tokens_step, spent)

    core = torch.compile(model.model) if args.compile else model.model
    vocab = model.config.vocab_size

    def row_ids(index: int) -> torch.Tensor:
        epoch, i = divmod(index, rows)
        order = np.random.default_rng((args.seed, epoch)).permutation(rows) if row_ids.epoch != epoch else None
        if order is not None:
            row_ids.epoch, row_ids.order = epoch, order
        start = int(row_ids.order[i]) * args.length
        return torch.from_numpy(train[start : start + args.length + 1].astype(np.int64))

    row_ids.epoch, row_ids.order = -1, None
    stop_at = min(steps, step0 + args.max_steps_now) if args.max_steps_now else steps
    model.train()
    log = open(args.work / "log.jsonl", "a", buffering=1)
    began, ema = time.monotonic(), None
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("pretrain", total=steps, completed=step0)
        for step in range(step0, stop_at):
            lr = learning_rate(step, steps, args.learning_rate, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = torch.stack([row_ids(step * args.batch_size + b) for b in range(args.batch_size)])
            with torch.autocast("cpu", torch.bfloat16):
                hidden = core(input_ids=batch[:, :-1]).last_hidden_state
                logits = model.lm_head(hidden)
            loss = F.cross_entropy(logits.float().view(-1, vocab), batch[:, 1:].reshape(-1))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            worst = balance.step()
            value = loss.item()
            if not math.isfinite(value):
                sys.exit(f"step {step}: the loss is {value}; the last checkpoint is in {ckpt}")
            ema = value if ema is None else 0.98 * ema + 0.02 * value
            seconds = spent + time.monotonic() - began
            bar.update(task, advance=1, description=f"loss {ema:.3f}  lr {lr:.1e}")
            if step % 20 == 0 or step + 1 == steps:
                rate = (step + 1 - step0) * tokens_step / (time.monotonic() - began)
                entry = dict(step=step, loss=value, ema=ema, lr=lr, grad_norm=float(norm), seconds=seconds)
                log.write(json.dumps(entry | {"tokens_per_s": rate, "worst_expert_load": worst}) + "\n")
            if (step + 1) % args.save_every == 0 or step + 1 == stop_at:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
                save_checkpoint(ckpt, state | {"steps": steps, "seconds": seconds})
            if (step + 1) % args.eval_every == 0:
                log.write(json.dumps({"step": step + 1, "held_out": evaluate(model, held, args.length)}) + "\n")
    if stop_at == steps:
        finish(args, model, tok, train, held, steps * tokens_step, spent + time.monotonic() - began)


def finish(args, model, tok, train, held, tokens: int, seconds: float) -> None:
    """Write model, tokenizer and card; losses are those of the bf16 weights that are written."""
    model = model.to(torch.bfloat16)
    for m in model.modules():  # the routing bias stays in fp32, as DeepSeek-V3's checkpoints have it
        if hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias = m.e_score_correction_bias.float()
    losses, base = evaluate(model, held, args.length), unigram(train, held, len(tok))
    model.config.use_cache = True
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    config_path = args.out / "config.json"
    config = json.loads(config_path.read_text())
    # Engines read these from config.json; transformers' own class has no field for them.
    config.update(topk_method="noaux_tc", scoring_func="sigmoid")
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    bytes_a_token = {d: float(np.load(args.work / "held_out.npz")[d + "_bytes"]) / len(held[d]) for d in held}
    facts = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        train_tokens=tokens,
        corpus_tokens=int(train.size),
        hours=seconds / 3600,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        held_out_loss=losses,
        unigram_loss=base,
        held_out_tokens={d: int(v.size) for d, v in held.items()},
        bits_per_byte={d: losses[d] / math.log(2) / bytes_a_token[d] for d in held},
    )
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


def main() -> None:
    here = Path(__file__).resolve().parent.parent
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", "--prose", type=Path, action="append", default=[], help="a text file, .xz allowed; repeat")
    p.add_argument("--stdlib", action=argparse.BooleanOptionalAction, default=True, help="add Python's own source")
    p.add_argument("--config", type=Path, default=here / "configs/presets/embedded.json", help="the model's config.json")
    p.add_argument("--work", type=Path, required=True, help="corpus, tokenizer, log and checkpoint")
    p.add_argument("--out", type=Path, required=True, help="the finished model")
    p.add_argument("--vocab-size", type=int, default=4096)
    p.add_argument("--held-out", type=float, default=0.02, help="share of documents kept for evaluation")
    p.add_argument("--tokens", type=float, default=20.5e6, help="tokens to train on")
    p.add_argument("--batch-size", type=int, default=4, help="rows a step")
    p.add_argument("--length", type=int, default=1024, help="tokens a row")
    p.add_argument("--learning-rate", type=float, default=3e-3)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--warmup", type=int, default=100, help="steps")
    p.add_argument("--gamma", type=float, default=1e-2, help="step of the routing bias")
    p.add_argument("--save-every", type=int, default=100, help="steps")
    p.add_argument("--eval-every", type=int, default=1000, help="steps")
    p.add_argument("--max-steps-now", type=int, default=0, help="stop after so many steps of this sitting; 0: go on")
    p.add_argument("--threads", type=int, default=0, help="0: all cores")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()

    from transformers import AutoTokenizer

    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "train.npy").exists():
        build_corpus(args)
    tok = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    train = np.load(args.work / "train.npy")
    with np.load(args.work / "held_out.npz") as z:
        held = {k: z[k] for k in z.files if not k.endswith("_bytes")}
    pretrain(args, train, held, tok)


if __name__ == "__main__":
    main()
