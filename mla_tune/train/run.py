"""`train`: a recipe → a run folder with an adapter, metrics, and the held-out loss before and after."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback
from trl.trainer.sft_config import SFTConfig

from mla_tune.adapter.placement import Placement, place
from mla_tune.data.collate import Collator
from mla_tune.data.prepare import Prepared, prepare, steps_of
from mla_tune.errors import InputError, Interrupted, WorkError
from mla_tune.model.attach import attach
from mla_tune.model.load import Loaded, base_hash, load_model, quiet
from mla_tune.model.tokenizer import load_tokenizer, tokenizer_source
from mla_tune.recipe.schema import Recipe
from mla_tune.report.plots import plot_run
from mla_tune.resources import EMBEDDED_MODEL
from mla_tune.survey.plan import role_rates
from mla_tune.survey.source import architecture_of
from mla_tune.train.callbacks import GradientCheck, Metrics, ProgressLine, StopOnSignal
from mla_tune.train.folder import RunFolder, check_folder, environment, make_folder
from mla_tune.train.optim import param_groups
from mla_tune.train.trainer import CountingCollator, RoleTrainer

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Run a recipe to its end (or, with `resume`, from its last checkpoint) and return the contents of run.json.

    Everything that can be wrong with the input is found before weights are read or a file is written.  Raises
    `InputError`/`FileError` for the input, `CheckError` if the adapter attached or its gradients are not as planned,
    `WorkError` for a failure of the work, `Interrupted` when stopped by a signal (a checkpoint is saved).
    """
    quiet()
    folder = check_folder(recipe, resume)
    section = recipe.model
    arch = architecture_of(section)
    placement = place(arch, recipe.adapter)
    tokenizer = load_tokenizer(tokenizer_source(section), section.trust_remote_code)
    data = prepare(recipe, arch, tokenizer)
    if recipe.train.early_stopping and not data.held_out_rows:
        raise InputError("train.early_stopping needs held-out rows: set data.eval_fraction or data.eval_path")
    start_memory = _memory_now()
    with _memory_advice(recipe):
        loaded = load_model(section, seed=recipe.train.seed, full_precision=placement.method == "none")
    if not resume:
        make_folder(folder, recipe)
    base = _base_of(loaded, tokenizer, recipe, folder)

    run: dict[str, Any] = folder.read() if resume else {}
    origin = {
        "base_hash": base_hash(str(EMBEDDED_MODEL) if base == "embedded" else base),
        "data": data.summary(),
    }
    changed = [name for name in origin if resume and run[name] != origin[name]]
    if changed:
        what = " and ".join({"base_hash": "the base model", "data": "the data"}[name] for name in changed)
        raise InputError(f"--resume: {what} changed since {folder.root} was begun; start anew in another folder")
    run |= {
        "state": "running",
        "recipe": str(folder.recipe),
        "model_type": arch.model_type,
        "base": section.source,
        "base_path": base,
        **origin,
        "seed": recipe.train.seed,
        "device": str(loaded.device),
        "dtype": loaded.dtype,
        "environment": environment(),
    }
    folder.write(run)
    try:
        with _memory_advice(recipe):
            _run(recipe, folder, loaded, tokenizer, placement, data, run, resume, start_memory)
    except BaseException as error:
        run["state"] = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        folder.write(run)
        raise
    return run


def _run(
    recipe: Recipe,
    folder: RunFolder,
    loaded: Loaded,
    tokenizer: Any,
    placement: Placement,
    data: Prepared,
    run: dict[str, Any],
    resume: bool,
    start_memory: int,
) -> None:
    model: torch.nn.Module = loaded.model
    if placement.method != "none":
        model = attach(model, loaded.arch, placement, recipe.train.seed)
    run["adapter"] = {
        "method": placement.method,
        "matrices": {r.value: len(placement.by_role(r)) for r in placement.roles},
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "learning_rate": role_rates(placement, recipe),
    }
    checkpoint = folder.last_checkpoint() if resume else None
    start_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    metrics = Metrics(folder.metrics, start_step)
    progress = ProgressLine(metrics)
    stop = StopOnSignal()
    steps = steps_of(recipe, len(data.train_rows), int(os.environ.get("WORLD_SIZE", "1")))
    callbacks: list[Any] = [GradientCheck(), metrics, progress, stop]
    if recipe.train.early_stopping:
        callbacks.append(EarlyStoppingCallback(recipe.train.early_stopping))
    trainer = RoleTrainer(
        model=model,
        args=_arguments(recipe, folder, loaded, steps, bool(data.held_out_rows)),
        data_collator=CountingCollator(_collator(recipe, tokenizer)),
        train_dataset=Dataset.from_list(data.train_rows),
        eval_dataset=Dataset.from_list(data.held_out_rows) if data.held_out_rows else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        groups=lambda m: param_groups(m, placement, recipe),
    )
    trainer.remove_callback(PrinterCallback)
    metrics.trainer = trainer

    if data.held_out_rows and "held_out_loss" not in run:
        before = trainer.evaluate()["eval_loss"]
        if not math.isfinite(before):
            raise WorkError(f"before any training the held-out loss is {before}: the base model or its dtype is broken")
        run["held_out_loss"] = {"before": before, "after": None}
        folder.write(run)
    began = time.monotonic()
    with stop:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
    seconds = time.monotonic() - began
    done = trainer.state.global_step
    run["steps"] = {"done": done, "planned": steps}
    run["stopped_early"] = done < steps
    run["seconds"] = round(run.get("seconds", 0) + seconds, 2)
    run["tokens_per_s"] = round(trainer.real_tokens / seconds, 1)
    run["memory"] = _memory_report(loaded.device, start_memory)
    if stop.asked and done < steps:
        raise Interrupted(
            f"stopped at step {done} of {steps}; the checkpoint is in {folder.last_checkpoint()}.\n"
            f"Go on with the same command and --resume"
        )
    if data.held_out_rows:
        fresh = trainer.last_evaluation[0] == done
        after = trainer.last_evaluation[1] if fresh else trainer.evaluate()["eval_loss"]
        if not math.isfinite(after):
            raise WorkError(f"after training the held-out loss is {after}; lower optimizer.learning_rate")
        run["held_out_loss"]["after"] = after
    _save(model, loaded, tokenizer, folder, placement)
    run["state"] = "done"
    folder.write(run)
    with contextlib.suppress(ValueError):
        plot_run(folder.metrics, folder.plot, run)


def _collator(recipe: Recipe, tokenizer: Any) -> Collator:
    t = recipe.train
    # Flash attention finds the borders of packed samples only in a batch of one row.
    flat = t.packing and recipe.model.attention.startswith("flash")
    return Collator(tokenizer.pad_token_id, t.max_length, t.packing, flat)


def _arguments(recipe: Recipe, folder: RunFolder, loaded: Loaded, steps: int, has_eval: bool) -> SFTConfig:
    t, o = recipe.train, recipe.optimizer
    warmup = o.warmup_steps if o.warmup_steps is not None else round(o.warmup_ratio * steps)
    gpu = loaded.device.type == "cuda"
    evaluates = bool(t.eval_every) and has_eval
    return SFTConfig(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.accumulation,
        max_steps=steps,
        learning_rate=o.learning_rate,
        lr_scheduler_type=SCHEDULES[o.schedule],
        warmup_steps=warmup,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        max_grad_norm=o.max_grad_norm,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        bf16=loaded.dtype == "bfloat16",
        fp16=loaded.dtype == "float16",
        use_cpu=not gpu,
        gradient_checkpointing=t.checkpointing == "full",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=t.eval_every or None,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500,
        save_total_limit=t.keep_checkpoints,
        logging_steps=t.log_every,
        # A loss that is not a number must reach the log, and stop the run, instead of being averaged away.
        logging_nan_inf_filter=False,
        seed=t.seed,
        data_seed=t.seed,
        report_to=list(recipe.output.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=gpu,
        # Rows are tokenised, masked and packed already.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )


def _base_of(loaded: Loaded, tokenizer: Any, recipe: Recipe, folder: RunFolder) -> str:
    """What the adapter's base is, for run.json.  A preset's random weights are kept: the adapter fits nothing else."""
    if loaded.base is not None:
        folder_of_base = Path(loaded.base)
        if folder_of_base == EMBEDDED_MODEL:
            return "embedded"
        return str(folder_of_base.resolve()) if folder_of_base.is_dir() else loaded.base
    if recipe.adapter.method == "none":
        return f"preset {recipe.model.preset}"
    if not folder.base.exists():
        loaded.model.save_pretrained(folder.base)
        tokenizer.save_pretrained(folder.base)
    # What PEFT records as the adapter's base.
    loaded.model.name_or_path = loaded.model.config._name_or_path = str(folder.base.resolve())
    return str(folder.base.resolve())


def _save(model: Any, loaded: Loaded, tokenizer: Any, folder: RunFolder, placement: Placement) -> None:
    """Write adapter/ (or model/) beside its place, then rename."""
    target = folder.model if placement.method == "none" else folder.adapter
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    if placement.method == "none":
        model.to(torch.float32 if loaded.dtype == "float32" else getattr(torch, loaded.dtype))
        tokenizer.save_pretrained(beside)
    model.save_pretrained(beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def _memory_now() -> int:
    """Resident bytes of this process."""
    return psutil.Process().memory_info().rss


def _memory_peak() -> int:
    """Highest resident bytes so far.  Not getrusage's on Linux: that begins with the memory of the parent process."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory_report(device: torch.device, start: int) -> dict[str, int]:
    """Peak bytes: of the process, what of it came after the imports, and on the GPU where there is one."""
    peak = _memory_peak()
    report = {"process_peak": peak, "before_loading": start, "run_peak": peak - start}
    if device.type == "cuda":
        report["gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return report


@contextlib.contextmanager
def _memory_advice(recipe: Recipe) -> Iterator[None]:
    """Turns torch's out-of-memory errors into one that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and "out of memory" not in text and "not enough memory" not in text:
            raise
        raise WorkError(_advice(recipe, "GPU" if "CUDA" in text else "CPU")) from error


def _advice(recipe: Recipe, where: str) -> str:
    t = recipe.train
    lower = [f"train.max_length (now {t.max_length})"]
    if t.batch_size > 1:
        lower.insert(0, f"train.batch_size (now {t.batch_size}; raise train.accumulation to keep the global batch)")
    if t.checkpointing == "none":
        lower.append("or set train.checkpointing: full")
    if recipe.model.dtype in ("auto", "float32"):
        lower.append("or model.dtype: bfloat16")
    return f"out of {where} memory: lower {', '.join(lower)}. `mla-tune plan` estimates what is needed"
