"""The sections and keys of a recipe, each with its meaning, unit and default: one class for each section.

`docs/recipe.md` and `recipes/schema.json` are made from this file.  An unknown key is an error.  A key that is renamed
gets an entry in `recipe.renamed`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mla_tune.arch.roles import PRESETS
from mla_tune.recipe.names import NAME_SCHEMA, Method, ObjectiveName, Targets, check_role_keys


class Section(BaseModel):
    """A section of a recipe: no unknown keys, no conversion of types, no change after it was made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )


class ModelSection(Section):
    """Which model to start from."""

    base: str | None = None
    """`embedded` (the model that ships with mla-tune), a folder in Hugging Face form, or a hub id.
    Default: embedded, when `preset` is not given."""
    preset: Literal["tiny", "small", "base"] | None = None
    """An untrained MLA model of about 1 M, 30 M or 150 M parameters, with the embedded tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights in memory. auto: bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal[
        "auto", "packed", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Implementation of attention in training. packed: mla-tune's own, which calls a fused kernel for each sample and
    needs neither mask nor padding; the others are transformers'. auto: the fastest one on this machine, found by a
    short measurement that is kept for later runs."""
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    """transformers' implementation of the routed experts. auto: the faster of grouped_mm and eager, found by a short
    measurement; batched_mm copies a weight for each token, so auto never takes it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that the model is trained on. auto: a GPU where there is one, else the CPU."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: keep the frozen linear layers in 4 bits (bitsandbytes; `pip install 'mla-tune[quant]'`).
    A checkpoint in block FP8 stays in FP8 by itself."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if self.base is not None and self.preset is not None:
            raise ValueError("give 'base' or 'preset', not both")
        return self

    @property
    def source(self) -> str:
        """Where the model comes from, for tables and messages: `embedded`, a folder, a hub id, or `preset NAME`."""
        return f"preset {self.preset}" if self.preset else (self.base or "embedded")


class RoleOverride(Section):
    """Settings of one role or group that differ from the adapter's."""

    rank: int | None = Field(default=None, ge=1, le=4096)
    """LoRA rank r of this role."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha of this role. Default: the adapter's alpha/rank ratio times this role's rank."""
    lr_scale: float | None = Field(default=None, gt=0)
    """Factor on the learning rate of this role, after `mla_lr_scale`."""


class AdapterSection(Section):
    """Which matrices are trained, and by which method."""

    method: Method = "lora"
    """lora: W + (alpha/r)·B·A. rslora: the same, scaled by alpha/√r. dora: magnitude and direction are trained apart.
    none: no adapter, every weight is trained."""
    targets: Targets = "safe"
    """A preset, or a list of roles and groups. An explicit role that the model lacks is an error;
    a group means those of its roles that the model has."""
    experts: bool = False
    """Adapt the routed experts too."""
    rank: int = Field(default=16, ge=1, le=4096)
    """LoRA rank r."""
    alpha: float = Field(default=32.0, gt=0)
    """LoRA alpha; the update is scaled by alpha/r (rslora: alpha/√r)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """Initial values of A and B. default: A uniform, B zero. pissa, olora: the leading part of W, which is taken out of
    W; the saved adapter is a plain LoRA of twice the rank on the unchanged base."""
    modules_to_save: list[str] = []
    """Modules whose own weights are trained and saved with the adapter: embed_tokens, lm_head, input_layernorm, or a
    path (model.norm)."""
    roles: Annotated[
        dict[str, RoleOverride],
        BeforeValidator(check_role_keys),
        Field(json_schema_extra={"propertyNames": NAME_SCHEMA}),
    ] = {}
    """Overrides by role or group; a role's own entry wins over its group's."""

    @property
    def target_names(self) -> list[str]:
        """Roles and groups of `targets`, a preset written out, and `experts` where the routed experts are adapted."""
        names = list(PRESETS[self.targets]) if isinstance(self.targets, str) else list(self.targets)
        return [*names, "experts"] if self.experts and "experts" not in names else names


class OptimizerSection(Section):
    """AdamW, its learning rates, and their schedule."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate, as one would use it for LoRA on a standard-attention model."""
    mla_lr_scale: float = Field(default=0.65, gt=0)
    """Factor on the learning rate of an adapter, because MLA's matrices react more strongly; 0.5 to 0.8 is advised, as
    a hypothesis and not a law. It is not applied without an adapter."""
    modules_to_save_lr_scale: float = Field(default=0.1, gt=0)
    """Factor on the learning rate of `adapter.modules_to_save`, after `mla_lr_scale`: whole matrices need a smaller
    rate than LoRA's factors."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Warm-up in steps; wins over warmup_ratio."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0: they are not clipped."""
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Learning rate of B divided by that of A (LoRA+, arXiv:2402.12354, advises 16). 1: both are equal."""


class DataSource(Section):
    """One of several data sets that are mixed."""

    path: str
    """As data.path."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples that come from here, in proportion to the other sources' weights."""
    split: str = "train"
    """Split of a hub data set."""
    name: str | None = None
    """Configuration name of a hub data set."""
    format: Literal["auto", "prompt", "chat", "text", "alpaca", "sharegpt", "tokens"] = "auto"
    """As data.format."""
    prompt: str = "prompt"
    """Column of the prompt."""
    completion: str = "completion"
    """Column of the completion."""
    messages: str = "messages"
    """Column of the chat."""
    tools: str = "tools"
    """Column of the tools of a chat."""
    text: str = "text"
    """Column of plain text."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many rows, from the beginning."""


class DataSection(Section):
    """The rows that are trained on and evaluated on."""

    path: str = "mbpp"
    """`mbpp` or `gsm8k` (they ship with mla-tune), a local .jsonl, .json, .parquet, .csv or .txt file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    name: str | None = None
    """Configuration name of a hub data set."""
    sources: list[DataSource] = []
    """Several data sets, mixed by weight, instead of `path`."""
    format: Literal["auto", "prompt", "chat", "text", "alpaca", "sharegpt", "tokens"] = "auto"
    """auto: by the columns found. prompt: prompt and completion. chat: a list of {role, content}.
    alpaca: instruction, input, output. sharegpt: a list of {from, value}. tokens: input_ids and perhaps labels."""
    prompt: str = "prompt"
    """Column of the prompt."""
    completion: str = "completion"
    """Column of the completion."""
    messages: str = "messages"
    """Column of the chat (sharegpt: usually `conversations`)."""
    tools: str = "tools"
    """Column of the tools that a chat may call: a list of JSON schemas, or such a list as text."""
    text: str = "text"
    """Column of plain text."""
    template: Literal["auto", "chat", "none"] = "auto"
    """How prompt and completion are joined. chat: with the tokenizer's chat template. none: as they stand.
    auto: chat where the tokenizer has a template."""
    train_on: Literal["completion", "all"] = "completion"
    """Tokens that the loss counts. completion: the answer, or the assistant's turns of a chat. all: prompts too. Of
    plain text all tokens count."""
    on_overflow: Literal["truncate", "split", "drop", "error"] = "truncate"
    """What happens to a row of more than `train.max_length` tokens. truncate: its end is cut off. split: it becomes
    several samples. drop: it is left out. error: the run stops before training. How many rows were cut, split or
    dropped is reported. Under truncate, a row whose completion begins beyond max_length is an error. Plain text is
    always split."""
    on_invalid_row: Literal["error", "skip"] = "error"
    """What happens to a row that can't be used (an empty completion, other columns, a broken line). error: the run
    stops before training and names it. skip: it is left out, counted and reported."""
    streaming: bool = False
    """Read rows while training, over and over, instead of all of them before the first step. Needs `train.max_steps`,
    and a .jsonl, .csv or .parquet file or a hub data set; eval_fraction is taken from the first `buffer` rows."""
    buffer: int = Field(default=1000, ge=1)
    """Rows of a streamed data set that are in memory at once, to be shuffled and packed."""
    cache: bool = True
    """Keep tokenized rows on disk ($MLA_TUNE_CACHE, else ~/.cache/mla-tune), to be found again by a hash of their
    contents."""
    eval_path: str | None = None
    """A file or data set to evaluate on. Default: the part of `path` that `eval_fraction` holds out."""
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows held out for evaluation (the embedded sets have a fixed held-out part instead). 0: none."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many rows, from the beginning."""

    @model_validator(mode="after")
    def _path_or_sources(self) -> DataSection:
        if self.sources and "path" in self.model_fields_set and self.path != type(self).model_fields["path"].default:
            raise ValueError("give 'path' or 'sources', not both")
        return self


class SpikeSection(Section):
    """The guard against spikes: it skips and counts steps whose loss or gradient norm rises above a running band."""

    guard: bool = True
    """Whether such steps are skipped."""
    window: int = Field(default=64, ge=8)
    """Steps from which the running band is computed; the guard begins after a quarter of them, and after 8 at least."""
    width: float = Field(default=8.0, gt=0)
    """Upper edge of the band: so many robust standard deviations above the median (one is 1.4826 × the median absolute
    deviation)."""
    patience: int = Field(default=3, ge=1)
    """Skipped steps in a row after which the learning rate is cut."""
    cut: float = Field(default=0.5, gt=0, lt=1)
    """Factor on every learning rate at a cut; it holds for the rest of the run."""


class TrainSection(Section):
    """Length of training, batches, evaluation and checkpoints."""

    objective: ObjectiveName = "sft"
    """What a step minimizes. sft: the cross-entropy of the trained tokens (supervised fine-tuning)."""
    epochs: float = Field(default=1.0, gt=0)
    """Length of training in passes over the data; not used when max_steps is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Length of training in optimizer steps."""
    batch_size: int = Field(default=8, ge=1)
    """Rows in one forward pass, on each device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes in one optimizer step."""
    max_length: int = Field(default=512, ge=8)
    """Most tokens in a row."""
    packing: bool = True
    """Put several samples in one row; attention and positions stay within each sample."""
    activation_checkpointing: Literal["none", "mla", "full"] = "none"
    """What the backward pass computes again, to save memory, instead of keeping it. mla: norms and MLA up-projections
    with the keys and values that they make, as in DeepSeek-V3's report. full: whole layers, at about a third more
    time."""
    compile: bool = False
    """Compile the decoder layers (torch.compile): some minutes before the first step, faster steps after it."""
    spike: SpikeSection = SpikeSection()
    """The guard against spikes of the loss or the gradient norm."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out rows; 0: only before the first step and after the last."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end, or when the run is interrupted."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that are kept; older ones are deleted."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialization, data order and dropout."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a lower held-out loss after which training stops; needs eval_every."""

    @model_validator(mode="after")
    def _early_stopping_needs_eval(self) -> TrainSection:
        if self.early_stopping and not self.eval_every:
            raise ValueError("'early_stopping' needs 'eval_every' > 0")
        return self


class OutputSection(Section):
    """Where the results go."""

    dir: str = "runs/run"
    """Run folder: adapter/, checkpoints/, recipe.yaml, run.json, metrics.jsonl, loss.png, report.html."""
    overwrite: bool = False
    """Delete what a run folder of that name holds."""
    samples: int = Field(default=3, ge=0)
    """Held-out prompts that the model answers before and after training, for report.html; 0: none."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that the run is logged to as well, through transformers."""


class Recipe(Section):
    """A complete recipe: what `mla-tune train` does.  Every section and every key has a default."""

    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _keys_agree(self) -> Recipe:
        a, o = self.adapter, self.optimizer
        if a.modules_to_save and a.method == "none":
            raise ValueError("adapter.modules_to_save is about an adapter; with method none every weight is trained")
        if self.data.streaming and self.train.max_steps is None:
            raise ValueError("data.streaming has no end that is known: set train.max_steps")
        if self.model.quantize != "none" and self.model.preset is not None:
            raise ValueError("model.quantize is for a trained base; the weights of a preset are drawn, not read")
        if self.model.quantize != "none" and a.method == "none":
            raise ValueError("model.quantize keeps the weights frozen, and adapter.method: none would train them")
        if a.method == "none" and o.lora_plus_ratio != 1:
            raise ValueError("optimizer.lora_plus_ratio is about the factors of an adapter, and adapter.method is none")
        if a.method == "none" and a.init != "default":
            raise ValueError(f"adapter.init: {a.init} begins an adapter, and adapter.method is none")
        if a.init in ("pissa", "olora") and o.weight_decay:
            raise ValueError(
                f"optimizer.weight_decay: with adapter.init {a.init} the factors hold a part of the base's own "
                f"weights, which decay would shrink; set it to 0"
            )
        return self
