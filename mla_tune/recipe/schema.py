"""The recipe: what `mla-tune train` is asked to do.  One class a section; every field says what it means and its unit.

Unknown keys are errors.  Key names are a contract: recipes written today must load tomorrow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from mla_tune.arch.roles import ADAPTABLE, GROUPS, PRESETS
from mla_tune.errors import did_you_mean
from mla_tune.sockets import ADAPTER_METHODS, OBJECTIVES

TARGET_NAMES: tuple[str, ...] = (*(r.value for r in ADAPTABLE), *GROUPS)


def _unknown(kind: str, name: Any, allowed: tuple[str, ...]) -> str:
    hint = did_you_mean(str(name), allowed) or "."
    return f"unknown {kind} '{name}'{hint} Allowed: {', '.join(allowed)}"


def _targets(value: Any) -> Any:
    """A preset stays a word, a single role or group becomes a list; every unknown name is told at once."""
    if isinstance(value, str):
        if value in PRESETS:
            return value
        if value not in TARGET_NAMES:
            raise ValueError(_unknown("preset, role or group", value, (*PRESETS, *TARGET_NAMES)))
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a preset or a list of roles and groups, got {value!r}")
    wrong = [v for v in value if v not in TARGET_NAMES]
    if wrong:
        raise ValueError("; ".join(_unknown("role or group", v, TARGET_NAMES) for v in wrong))
    return value


def _role_keys(value: Any) -> Any:
    if isinstance(value, dict):
        wrong = [v for v in value if v not in TARGET_NAMES]
        if wrong:
            raise ValueError("; ".join(_unknown("role or group", v, TARGET_NAMES) for v in wrong))
    return value


def _one_of(names: Callable[[], tuple[str, ...]]) -> Callable[[Any], Any]:
    """A check for a name of a registry, asked when a recipe is read: what was registered by then is allowed."""

    def check(value: Any) -> Any:
        allowed = names()
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(
                f"expected one of {', '.join(allowed)}, got {str(value)[:80]!r}{did_you_mean(str(value)[:80], allowed)}"
            )
        return value

    return check


def _methods() -> tuple[str, ...]:
    return (*ADAPTER_METHODS.names, "none")


def _objectives() -> tuple[str, ...]:
    return OBJECTIVES.names


_NAMES: dict[str, Any] = {"type": "string", "enum": list(TARGET_NAMES)}
Targets = Annotated[
    list[str] | str,
    BeforeValidator(_targets),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "enum": [*PRESETS, *TARGET_NAMES]}, {"type": "array", "items": _NAMES}]}
    ),
]


#: `adapter.method`: a name in `sockets.ADAPTER_METHODS`, or none.
Method = Annotated[str, BeforeValidator(_one_of(_methods)), WithJsonSchema({"type": "string", "enum": [*_methods()]})]
#: `train.objective`: a name in `sockets.OBJECTIVES`.
ObjectiveName = Annotated[
    str, BeforeValidator(_one_of(_objectives)), WithJsonSchema({"type": "string", "enum": [*_objectives()]})
]


class Section(BaseModel):
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
    """Attention in training. packed: mla-tune's, one fused call a sample, no mask, no padding; the others are
    transformers'. auto: the fastest of those that are here, by a short measurement (kept for the next run)."""
    experts: Literal["auto", "eager", "grouped_mm", "batched_mm"] = "auto"
    """transformers' implementation of the routed experts. auto: the faster of grouped_mm and eager, by a short
    measurement (batched_mm copies a weight for each token: never chosen)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
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
        """What the model comes from, as one word for tables."""
        return f"preset {self.preset}" if self.preset else (self.base or "embedded")


class RoleOverride(Section):
    """What differs for one role."""

    rank: int | None = Field(default=None, ge=1, le=4096)
    """LoRA rank r of this role."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha of this role. Default: the adapter's alpha/rank ratio times this role's rank."""
    lr_scale: float | None = Field(default=None, gt=0)
    """Factor on the learning rate of this role, after `mla_lr_scale`."""


class AdapterSection(Section):
    """What is trained."""

    method: Method = "lora"
    """lora: W + (alpha/r)·B·A. rslora: scaled by alpha/√r. dora: magnitude and direction apart.
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
    """How A and B begin. default: A uniform, B zero. pissa, olora: with the leading part of W, which W then loses;
    the saved adapter is a plain LoRA of twice the rank on the unchanged base."""
    modules_to_save: list[str] = []
    """Modules that are trained whole and saved with the adapter: embed_tokens, lm_head, input_layernorm, or one by its
    path (model.norm)."""
    roles: Annotated[
        dict[str, RoleOverride], BeforeValidator(_role_keys), Field(json_schema_extra={"propertyNames": _NAMES})
    ] = {}
    """Overrides by role or group; a role's own entry wins over its group's."""

    @property
    def target_names(self) -> list[str]:
        names = list(PRESETS[self.targets]) if isinstance(self.targets, str) else list(self.targets)
        return [*names, "experts"] if self.experts and "experts" not in names else names


class OptimizerSection(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate, as one would use it for LoRA on a standard-attention model."""
    mla_lr_scale: float = Field(default=0.65, gt=0)
    """Factor on the learning rate of every adapter on an MLA model. A hypothesis with range 0.5 to 0.8, not a law.
    Without an adapter it is not applied."""
    modules_to_save_lr_scale: float = Field(default=0.1, gt=0)
    """Factor on the learning rate of `adapter.modules_to_save`, after `mla_lr_scale`: whole matrices want a smaller one
    than LoRA's factors."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up; cosine and linear end at 0."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Warm-up in steps; wins over warmup_ratio."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay; norms and biases are left out."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0: not clipped."""
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Factor on the learning rate of B over that of A (LoRA+, arXiv:2402.12354, advises 16). 1: the same."""


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
    """Use the first so many rows only."""


class DataSection(Section):
    """What it is trained on."""

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
    """Tokens that count. completion: the answer, or the assistant's turns of a chat. Plain text: always all."""
    on_overflow: Literal["truncate", "split", "drop", "error"] = "truncate"
    """A row of more than max_length tokens: cut its end, split it into several samples, leave it out (each is counted
    and told), or stop. A row whose completion lies wholly beyond max_length can't be cut and is an error under
    `truncate`. Plain text is always split."""
    on_invalid_row: Literal["error", "skip"] = "error"
    """A row that can't be used (an empty completion, other columns, a broken line): stop and name it, or leave it out,
    counted and told."""
    streaming: bool = False
    """Read rows as they are needed, over and over, instead of all before the first step; needs train.max_steps.
    .jsonl, .csv, .parquet and hub data sets; eval_fraction is then of the first `buffer` rows."""
    buffer: int = Field(default=1000, ge=1)
    """Rows that a streamed data set is shuffled and packed among."""
    cache: bool = True
    """Keep tokenized rows on disk ($MLA_TUNE_CACHE, else ~/.cache/mla-tune), found again by their content's hash."""
    eval_path: str | None = None
    """A file or data set to evaluate on. Default: a part of `path`."""
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows held out for evaluation (the embedded sets have a fixed held-out part instead). 0: none."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows only."""

    @model_validator(mode="after")
    def _path_or_sources(self) -> DataSection:
        if self.sources and "path" in self.model_fields_set and self.path != type(self).model_fields["path"].default:
            raise ValueError("give 'path' or 'sources', not both")
        return self


class SpikeSection(Section):
    """Guard against spikes: a step whose loss or gradient norm leaves its running band is skipped and counted."""

    guard: bool = True
    """false: no step is skipped."""
    window: int = Field(default=64, ge=8)
    """Steps that the running band is made of; the guard is silent before a quarter of them (at least 8) is there."""
    width: float = Field(default=8.0, gt=0)
    """Half the band's width, in robust standard deviations (1.4826 × median absolute deviation) above the median."""
    patience: int = Field(default=3, ge=1)
    """So many skipped steps in a row cut the learning rate."""
    cut: float = Field(default=0.5, gt=0, lt=1)
    """Factor on every learning rate at a cut, for the rest of the run."""


class TrainSection(Section):
    """How long, in what portions, and what is kept on the way."""

    objective: ObjectiveName = "sft"
    """What a step minimizes. sft: the cross-entropy of the trained tokens (supervised fine-tuning)."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; not used when max_steps is given."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=8, ge=1)
    """Rows a forward pass and device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes an optimizer step."""
    max_length: int = Field(default=512, ge=8)
    """Tokens a row at most."""
    packing: bool = True
    """Put several samples in one row; attention and positions stay within each sample."""
    activation_checkpointing: Literal["none", "mla", "full"] = "none"
    """What the backward pass computes again instead of keeping it. mla: norms and MLA up-projections with the keys and
    values that they make, as DeepSeek-V3's report does. full: whole layers, for about a third more time."""
    compile: bool = False
    """torch.compile the decoder layers: some minutes before the first step, faster steps after it."""
    spike: SpikeSection = SpikeSection()
    """What happens when the loss or the gradient norm leaves its running band."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out rows; 0: only before and after."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only when interrupted and at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints are kept."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialization, data order and dropout."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better held-out loss; needs eval_every."""

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
    """Empty a run folder that is there already."""
    samples: int = Field(default=3, ge=0)
    """Held-out prompts that the model answers before and after, for report.html; 0: none."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Also log to these, through transformers."""


class Recipe(Section):
    """A complete recipe."""

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
