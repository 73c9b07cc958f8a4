#!/usr/bin/env python
"""Pretrain the small DeepSeek-V3-style model that ships with mla-tune.

    python scripts/pretrain_tiny.py --text pretrain_en.txt.xz --work work/ --out model/
    python scripts/pretrain_tiny.py --text a.txt --text b.txt.xz --no-stdlib --work work/ --out model/

Learning rate, betas, weight decay, warm-up, rows and row length default to those of the shipped recipe `full`.
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
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_card import model_card
from tiny_corpus import build_corpus, read_text

from mla_tune.recipe.load import load_recipe
from mla_tune.resources import CONFIGS


def model_config(args: Any, tok: Any) -> dict:
    """`config.json` of the model, or of `--config`, with this tokenizer's ids."""
    config = json.loads(args.config.read_text())
    config.update(
        vocab_size=len(tok),
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return config


def build_model(config: dict) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    cfg = AutoConfig.for_model(**config)
    cfg.use_cache = False
    return AutoModelForCausalLM.from_config(
        cfg, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )


class ExpertBalance:
    """Counts how many tokens each routed expert got, and moves `e_score_correction_bias` against the imbalance."""

    def __init__(self, model: Any, gamma: float) -> None:
        self.gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        self.gamma = gamma
        self.load = [torch.zeros_like(g.e_score_correction_bias) for g in self.gates]
        for i, gate in enumerate(self.gates):
            gate.register_forward_hook(self._count(i))

    def _count(self, i: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
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


class Rows:
    """Row `i` of the run: the corpus in rows of `length` + 1 tokens, in a new order each epoch."""

    def __init__(self, train: np.ndarray, length: int, seed: int) -> None:
        self.train, self.length, self.seed = train, length, seed
        self.count = (len(train) - 1) // length
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, index: int) -> torch.Tensor:
        epoch, i = divmod(index, self.count)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        start = int(self.order[i]) * self.length
        return torch.from_numpy(self.train[start : start + self.length + 1].astype(np.int64))


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.02) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x)))


def param_groups(model: Any, weight_decay: float) -> list[dict]:
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: Any, held: dict[str, np.ndarray], length: int) -> dict[str, float]:
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


def pretrain(args: Any, train: np.ndarray, held: dict[str, np.ndarray], tok: Any) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    torch.manual_seed(args.seed)
    model = build_model(model_config(args, tok))
    optimizer = torch.optim.AdamW(
        param_groups(model, args.weight_decay), lr=args.learning_rate, betas=(args.beta1, args.beta2), fused=True
    )
    balance = ExpertBalance(model, args.gamma)
    tokens_step = args.batch_size * args.length
    steps = math.ceil(args.tokens / tokens_step)

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
        finish(args, model, tok, train, held, steps * tokens_step, spent)
        return

    core = torch.compile(model.model) if args.compile else model.model
    vocab = model.config.vocab_size

    row_ids = Rows(train, args.length, args.seed)
    stop_at = min(steps, step0 + args.max_steps_now) if args.max_steps_now else steps
    model.train()

    def log(**entry: object) -> None:
        with (args.work / "log.jsonl").open("a") as f:
            f.write(json.dumps(entry) + "\n")

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
                log(
                    step=step,
                    loss=value,
                    ema=ema,
                    lr=lr,
                    grad_norm=float(norm),
                    seconds=seconds,
                    tokens_per_s=rate,
                    worst_expert_load=worst,
                )
            if (step + 1) % args.save_every == 0 or step + 1 == stop_at:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                save_checkpoint(ckpt, state | {"steps": steps, "seconds": seconds})
            if (step + 1) % args.eval_every == 0:
                log(step=step + 1, held_out=evaluate(model, held, args.length))
    if stop_at == steps:
        finish(args, model, tok, train, held, steps * tokens_step, spent + time.monotonic() - began)


def finish(args: Any, model: Any, tok: Any, train: np.ndarray, held: dict, tokens: int, seconds: float) -> None:
    """Write model, tokenizer and card; losses are those of the bf16 weights that are written."""
    model = model.to(torch.bfloat16)
    for m in model.modules():  # the routing bias stays in fp32, as DeepSeek-V3's checkpoints have it
        if hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias = m.e_score_correction_bias.float()
    with np.load(args.work / "held_out.npz") as z:
        size = {d: int(z[d + "_bytes"]) for d in held}
    for name, path in (pair.split("=", 1) for pair in args.eval_text):
        text = read_text(Path(path))
        held = held | {name: np.asarray(tok(text)["input_ids"], dtype=np.uint16)}
        size[name] = len(text.encode())
    losses, base = evaluate(model, held, args.length), unigram(train, held, len(tok))
    model.config.use_cache = True
    model.generation_config.use_cache = True
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    # Engines read these keys from config.json; transformers' own class has no field for them.
    edit_json(args.out / "config.json", topk_method="noaux_tc", scoring_func="sigmoid")
    # The name that transformers 4 and 5 both know.
    edit_json(args.out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    facts = {
        "note": args.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": tokens,
        "corpus_tokens": int(train.size),
        "hours": round(seconds / 3600, 2),
        "threads": args.threads or os.cpu_count(),
        "torch": torch.__version__,
        "held_out": {
            d: {
                "tokens": int(held[d].size),
                "loss": losses[d],
                "unigram_loss": base[d],
                "bits_per_byte": losses[d] / math.log(2) * held[d].size / size[d],
            }
            for d in held
        },
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (args.out / "README.md").write_text(model_card(facts, model.config))
    print(json.dumps(facts, indent=2))


def edit_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    full = load_recipe("full")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, action="append", default=[], help="a text file, .xz allowed; repeat")
    p.add_argument("--stdlib", action=argparse.BooleanOptionalAction, default=True, help="add Python's own source")
    shape = CONFIGS / "presets" / "embedded.json"
    p.add_argument("--config", type=Path, default=shape, help="config.json of the model")
    p.add_argument("--work", type=Path, required=True, help="corpus, tokenizer, log and checkpoint")
    p.add_argument("--out", type=Path, required=True, help="the finished model")
    p.add_argument("--vocab-size", type=int, default=4096)
    p.add_argument("--held-out", type=float, default=0.02, help="share of documents kept for evaluation")
    p.add_argument("--tokens", type=float, default=20.5e6, help="tokens to train on")
    p.add_argument("--batch-size", type=int, default=full.train.batch_size, help="rows a step")
    p.add_argument("--length", type=int, default=full.train.max_length, help="tokens a row")
    p.add_argument("--learning-rate", type=float, default=full.optimizer.learning_rate)
    p.add_argument("--weight-decay", type=float, default=full.optimizer.weight_decay)
    p.add_argument("--beta1", type=float, default=full.optimizer.beta1)
    p.add_argument("--beta2", type=float, default=full.optimizer.beta2)
    p.add_argument("--warmup", type=int, default=full.optimizer.warmup_steps, help="steps")
    p.add_argument("--gamma", type=float, default=1e-2, help="step of the routing bias")
    p.add_argument("--save-every", type=int, default=100, help="steps")
    p.add_argument("--eval-every", type=int, default=1000, help="steps")
    p.add_argument("--max-steps-now", type=int, default=0, help="stop after so many steps of this sitting; 0: go on")
    p.add_argument("--threads", type=int, default=0, help="0: all cores")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--eval-text", action="append", default=[], metavar="NAME=FILE", help="evaluate the result on it too"
    )
    p.add_argument("--note", default="", help="a sentence for the model card, below its losses")
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
