"""The memory of a training run, estimated from shapes.

Activations are counted tensor by tensor, as autograd keeps them for the backward pass in transformers' MLA models under
PEFT LoRA; a test compares the count with what autograd really keeps.  Dimensions have the letters of `arch.roles`; `k`
is the number of routed experts that a token goes to.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.adapter.placement import Placement, reached_as_parameter
from mla_tune.arch.dims import DTYPE_BYTES, MLADims
from mla_tune.arch.roles import ADAPTABLE, GROUPS, Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.sockets import ADAPTER_METHODS, QUANT_FORMATS
from mla_tune.tiling import DEQUANTIZED_TILE, LOGITS_TILE, LOGITS_TILE_MIN_TOKENS

#: Tiles of logits in memory at once: logits and their log-softmax; where the head is trained, also their gradients.
FROZEN_TILES, TRAINED_TILES = 2, 4
#: Bytes per weight in NF4 (`model.nf4`): half a byte for the code, a byte for the scale of 64 weights, and 4 bytes for
#: the scale of 256 such scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: Roles whose adapters act before the attention scores.
BEFORE_SCORES = (Role.W_DQ, Role.W_UQ, Role.W_Q, Role.W_DKV, Role.W_UKV)
#: Resident bytes of a process that has imported everything and trained a model of almost no size.
PROCESS = 620_000_000


@dataclass(frozen=True, slots=True)
class RunShape:
    """What the memory of a run depends on beside the model and the adapter."""

    #: Rows in a forward pass.
    batch: int
    #: Tokens in a row.
    length: int
    #: Dtype of the weights, and of matrix products.
    dtype: str
    #: Whether the run is on a GPU.
    gpu: bool = False
    #: Whether a row holds several samples.
    packing: bool = True
    #: `packed`, `eager`, or another implementation of transformers'.
    attention: str = "sdpa"
    #: `train.activation_checkpointing`.
    activation_checkpointing: str = "none"
    #: How the base's matrices are kept in memory: `plain`, `nf4`, or the `kind` of the checkpoint's format (`fp8`, …).
    base: str = "plain"


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose, at the peak of a training step."""

    #: The interpreter and its libraries; 0 on a GPU.
    process: int
    #: The base's weights.
    weights: int
    #: The adapter's weights, and copies of modules that are trained whole.
    adapters: int
    #: Gradients of what is trained.
    gradients: int
    #: AdamW's two moments of what is trained.
    optimizer: int
    #: What the forward pass keeps for the backward pass.
    activations: int
    #: The largest working set of the output head, beside what is kept.
    head: int
    #: The largest working set of a decoder layer, beside what is kept.
    transient: int

    @property
    def working(self) -> int:
        """The larger of the two working sets, which are never needed at once."""
        return max(self.head, self.transient)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return (
            self.process
            + self.weights
            + self.adapters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.working
        )


def estimate(arch: Architecture, placement: Placement, run: RunShape) -> MemoryEstimate:
    """The peak of one process that holds the whole model: of resident memory on a CPU, of allocated memory on a GPU."""
    full = placement.method == "none"
    size = 4 if full else DTYPE_BYTES[run.dtype]
    trainable = arch.params_total if full else placement.trainable_params
    trained = trainable if full else placement.lora_params * placement.width + placement.modules_to_save_params
    layers = [_layer_bytes(arch, placement, run, i) for i in range(arch.num_layers)]
    tokens = run.batch * run.length
    again = 0  # what the backward pass of one layer computes again
    if run.activation_checkpointing == "full":
        again, kept = max(layers), arch.num_layers * tokens * arch.dims.D * DTYPE_BYTES[run.dtype]
    elif run.activation_checkpointing == "mla":
        less = [_layer_bytes(arch, placement, run, i, recomputed=True) for i in range(arch.num_layers)]
        again, kept = max(a - b for a, b in zip(layers, less, strict=True)), sum(less)
    else:
        kept = sum(layers)
    mask = tokens * run.length if run.packing and run.attention in ("sdpa", "eager") else 0
    return MemoryEstimate(
        process=0 if run.gpu else PROCESS,
        weights=base_bytes(arch, run.base, size),
        adapters=0 if full else trained * 4,
        gradients=trained * 4,
        # AdamW: two float32 moments of every trained number.
        optimizer=trained * 8,
        activations=kept + 2 * tokens * arch.dims.D * size + mask,
        head=_head(arch, run, full or "lm_head" in placement.modules_to_save_names),
        transient=_transient(arch, placement, run) + again,
    )


def base_bytes(arch: Architecture, base: str, size: int) -> int:
    """Bytes of the model's own weights: `size` bytes per weight, but in the format `base` (see `RunShape.base`) in the
    matrices that an adapter may be on."""
    if base == "plain":
        return round(arch.params_total * size)
    quantized = sum(s.params for s in arch.sites if s.role in ADAPTABLE)
    return round((arch.params_total - quantized) * size + quantized * quantized_bytes_per_weight(base))


def quantized_bytes_per_weight(base: str) -> float:
    """Bytes per weight, scales included, of a matrix in the format `base` (see `RunShape.base`)."""
    if base == "nf4":
        return NF4_BYTES
    return next(f.bytes_per_weight for f in QUANT_FORMATS.values() if f.kind == base)


def _layer_bytes(arch: Architecture, placement: Placement, run: RunShape, layer: int, recomputed: bool = False) -> int:
    """Bytes that autograd keeps for one decoder layer; `recomputed`: under `activation_checkpointing: mla`."""
    full = placement.method == "none"
    keeps_weight = not full and ADAPTER_METHODS.get(placement.method).keeps_weight
    adapted = {p.site.parameter: p for p in placement.sites if p.site.layer == layer}
    sites = [s for s in arch.sites if s.layer == layer]
    low = DTYPE_BYTES[run.dtype]  # what matrix products keep
    tokens = run.batch * run.length
    first = 0 if full or placement.modules_to_save else min(p.site.layer or 0 for p in placement.sites)
    if layer < first:
        return 0

    def trains(site: Site | None) -> bool:
        return site is not None and (full or site.parameter in adapted)

    per_token = 0
    weights = 0
    for attention in [a for a in arch.attention if a.layer == layer]:
        d, here = attention.dims, {s.role: s for s in sites if s.path.rpartition(".")[0] == attention.path}
        if layer == first and not any(trains(here.get(role)) for role in BEFORE_SCORES):
            # Nothing trained lies before these scores: autograd begins at W_O's input.
            per_token += d.H * d.V * low if trains(here.get(Role.W_O)) else 0
        else:
            count = _recomputed_attention_bytes if recomputed else _attention_bytes
            per_token += count(d, here, trains, run, low)
    dense = {s.path.rpartition(".")[0] for s in sites if s.role == Role.GATE}
    shared = {s.path.rpartition(".")[0] for s in sites if s.role == Role.SHARED_GATE}
    for block in dense | shared:
        members = {s.path.rpartition(".")[2]: s for s in sites if s.path.rpartition(".")[0] == block}
        width = members["gate_proj"].shape[0]
        # gate, up, silu(gate); their product for down's A; the block's input for A of gate and up.
        per_token += 3 * width * low
        per_token += width * low if trains(members["down_proj"]) else 0
        inputs = trains(members["gate_proj"]) or trains(members["up_proj"])
        per_token += arch.dims.D * low if inputs and not recomputed else 0
        for site in members.values():
            if trains(site) and keeps_weight and reached_as_parameter(arch, site.role):
                # PEFT reaches these as parameters, and without the short cut for plain LoRA W + ΔW is made and kept.
                weights += site.shape[0] * site.shape[1] * low
    experts = {s.role: s for s in sites if s.is_experts}
    if experts:
        gate_up, down = experts[Role.EXPERTS_GATE_UP], experts[Role.EXPERTS_DOWN]
        k, width = arch.experts_per_token, down.shape[1]
        # gate and up, silu(gate), and the output of every expert that a token went to.
        per_token += k * (3 * width + arch.dims.D) * low
        per_token += k * arch.dims.D * low if trains(gate_up) else 0
        per_token += k * width * low if trains(down) else 0
        for site in (gate_up, down):
            if trains(site) and not full and run.base == "plain":
                weights += site.count * site.shape[0] * site.shape[1] * low
    # Inputs of the two norms; A's output of every adapter.
    per_token += arch.family.norms * arch.dims.D * low
    gone = (Role.W_Q, Role.W_UQ, Role.W_UKV) if recomputed else ()
    per_token += sum(p.rank * 4 for p in adapted.values() if not p.site.is_experts and p.site.role not in gone)
    return per_token * tokens + weights


def _attention_bytes(d: MLADims, here: dict[Role, Site], trains, run: RunShape, low: int) -> int:
    """Bytes that autograd keeps per token for one attention module; `trains(site)`: whether a matrix is trained."""
    q = d.H * (d.P + d.R)
    kept = (d.C + d.R + (d.L or 0)) * low  # inputs of the two latent norms
    inputs = (Role.W_DQ, Role.W_Q, Role.W_DKV)
    kept += d.D * low if any(trains(here.get(r)) for r in inputs) else 0
    kept += (d.L or 0) * low if trains(here.get(Role.W_UQ)) else 0
    kept += d.C * low if trains(here.get(Role.W_UKV)) else 0
    if run.attention == "packed":
        # Query, key, output and the logarithm of each row's sum; values are a view of the expansion, or (on a CPU,
        # where keys are wider) a padded copy, and then W_O's A keeps the output without the padding once more.
        padded = not run.gpu and d.P + d.R > d.V
        kept += (2 * q + (2 * q if padded else d.H * (d.P + d.V) + d.H * d.V)) * low + d.H * 4
        kept += d.H * d.V * low if padded and trains(here.get(Role.W_O)) else 0
    elif run.attention == "eager" or (not run.gpu and d.P + d.R != d.V):
        # No fused kernel for unequal head sizes on a CPU: scores are materialized, operands copied.
        kept += (2 * q + d.H * d.V + d.H * run.length) * low
        kept += d.H * d.V * low if trains(here.get(Role.W_O)) else 0
    else:
        # Query, key, the expansion that values are a view of, the output (which W_O's A takes as it is).
        kept += (2 * q + d.H * (d.P + d.V) + 2 * d.H * d.V) * low
        kept -= 0 if trains(here.get(Role.W_O)) else d.H * d.V * low
        kept += run.length * low if run.packing else 0  # a mask row
    return kept


def _recomputed_attention_bytes(d: MLADims, here: dict[Role, Site], trains, run: RunShape, low: int) -> int:
    """As `_attention_bytes`, where norms and up-projections are computed again in the backward pass."""
    # The latents, from which queries, keys and values are made again.
    kept = (d.C + d.R + (d.L or 0)) * low
    equal = d.P + d.R == d.V
    if run.attention == "packed":
        padded = not run.gpu and not equal
        kept += d.H * (d.P + d.R if padded else d.V) * low + d.H * 4
        kept += d.H * d.V * low if padded and trains(here.get(Role.W_O)) else 0
    elif run.attention != "eager" and (run.gpu or equal):
        kept += d.H * d.V * low + d.H * 4
        kept += d.H * d.V * low if trains(here.get(Role.W_O)) else 0
    else:
        kept += d.H * d.V * low if trains(here.get(Role.W_O)) else 0
    return kept


def _head(arch: Architecture, run: RunShape, full: bool) -> int:
    """Working set of the output head, which computes a tile of the logits at a time (`kernels.chunked_loss`)."""
    numbers = LOGITS_TILE["cuda" if run.gpu else "cpu"]
    tokens = min(run.batch * run.length, max(LOGITS_TILE_MIN_TOKENS, numbers // arch.vocab_size))
    tile = tokens * arch.vocab_size * 4
    gradient = arch.vocab_size * arch.dims.D * 4 if full else 0
    return (TRAINED_TILES if full else FROZEN_TILES) * tile + gradient


def _transient(arch: Architecture, placement: Placement, run: RunShape) -> int:
    """Working set of the widest block: its intermediates and their gradients, in float32 for adapted weights."""
    tokens = run.batch * run.length
    low = DTYPE_BYTES[run.dtype]
    widest = max(
        s.shape[0] * (arch.experts_per_token if s.is_experts else 1) for s in arch.sites if s.layer is not None
    )
    stacks = [p.site for p in placement.sites if p.site.role in GROUPS["experts"]]
    gradient = max((s.count * s.shape[0] * s.shape[1] * 4 for s in stacks), default=0)
    # Quantized matrices are turned into numbers one at a time, of one expert where there are many, and ΔW is not made.
    numbers = 0
    if run.base != "plain":
        gradient = 0
        numbers = max(s.shape[0] * s.shape[1] for s in arch.sites if s.role in ADAPTABLE) * low + 4 * DEQUANTIZED_TILE
    return 3 * widest * tokens * low + 2 * gradient + numbers
