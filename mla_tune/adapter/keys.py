"""Map the keys of an adapter file to the matrices and tensors of the base model (`AdapterKeys`).

Low-rank factors of the dense and routed MLPs of deepseek_v3, as examples (without `base_model.model.` in front):

    adapter key                                            module path, parameter name
    model.layers.0.mlp.gate_proj.lora_A.weight             model.layers.0.mlp.gate_proj, as module or as `.weight`
    model.layers.3.mlp.experts.base_layer.lora_A.weight    model.layers.3.mlp.experts.gate_up_proj, with down_proj
    model.layers.3.mlp.experts.lora_A.weight               …experts.down_proj, or the only parameter adapted there
    model.layers.3.mlp.experts.5.gate_proj.lora_A.weight   rows of expert 5 in …experts.gate_up_proj

PEFT wraps the adapted parameters of one module inside each other, in the order in which the module holds them,
gate_up_proj first (`BaseTuner._inject_parameters`).  A key does not name the parameter; it only says, by the number of
`base_layer`, how deep its wrapper is.

The last form is from transformers before 5, where each expert was a module.  When PEFT 0.21 loads such a file onto
today's fused experts, it joins the factors of gate and up into one adapter of twice the rank, but silently drops those
of dense and shared MLPs in the same file, scales gate_up √2 times too high with rsLoRA, ignores patterns and refuses
DoRA.  mla-tune maps every pair of factors to the matrix that its name says, as it was trained.

Keys without `lora_` are fully trained tensors (modules_to_save, trained biases, resized embeddings).  PEFT writes the
trained copy of a module under the module's own name, and a tensor of an adapted module under `.base_layer.`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

from mla_tune.adapter.methods import vector_names
from mla_tune.adapter.settings import CONFIG_FILE, AdapterSettings
from mla_tune.arch.key_mapping import KeyMapping
from mla_tune.arch.roles import Role
from mla_tune.arch.site import HEAD, Architecture, Site
from mla_tune.checkpoint.index import TensorRef, nearest
from mla_tune.errors import InputError

#: Begins every key that PEFT writes.
PREFIX = "base_model.model."
_LORA_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<stem>.+)\."
    r"(?:(?P<part>lora_A\.weight|lora_B\.(?:weight|bias))|(?P<vector>lora_[a-z]\w*)(\.weight)?)"
)
_SINGLE_EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<expert>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)"
)
#: Modules of a decoder that are not in a layer.
_OUTSIDE_LAYERS = ("embed_tokens", "norm", "rotary_emb", "hc_head")
_SAVE_AGAIN = "save the adapter again with PeftModel.save_pretrained"


@dataclass(frozen=True, slots=True)
class KeyTarget:
    """The matrix that the factors under one stem adapt; a stem is the module path that PEFT puts into a key."""

    site: Site
    """The site that the matrix is, or is a part of."""
    name: str
    """The name that rank_pattern and alpha_pattern are matched against."""
    shape: tuple[int, int]
    """(out, in) of the adapted matrix."""
    expert: int | None = None
    """The expert, if the factors are those of a single one; else None."""
    rows: tuple[int, int] | None = None
    """First and end row in the site's matrix, for gate or up of a single expert; None: all rows."""


class AdapterKeys:
    """Maps the keys of one adapter to the matrices of one architecture; with `mtp` to those of MTP layers, too."""

    def __init__(self, arch: Architecture, names: AdapterSettings, mtp: bool = False) -> None:
        self.arch = arch
        #: Stem → the matrix that it adapts, for all stems but those of single experts.
        self.stems: dict[str, KeyTarget] = {}
        #: Path of the module with the experts → name of an expert's matrix → its site.
        self._experts: dict[str, dict[str, Site]] = {}
        sites = arch.stored_sites if mtp else arch.sites
        for site in sites:
            if not site.is_experts:
                name = site.parameter if names.is_parameter(site.parameter) else site.path
                self.stems[site.path] = KeyTarget(site, name, site.shape)
        downs = {s.path: s for s in sites if s.role == Role.EXPERTS_DOWN}
        for up in (s for s in sites if s.role == Role.EXPERTS_GATE_UP):
            container = up.path.rpartition(".")[0]
            down = downs[f"{container}.down_proj"]
            for path in arch.key_mapping.candidates(container):
                for gate_leaf, up_leaf, down_leaf in (arch.key_mapping.experts, KeyMapping().experts):
                    leaves = {gate_leaf: up, up_leaf: up, down_leaf: down}
                    self._experts[path] = {**leaves, **self._experts.get(path, {})}
            adapted = [s for s in (up, down) if names.is_parameter(s.parameter)]
            for depth, site in enumerate(reversed(adapted)):
                self.stems[container + ".base_layer" * depth] = KeyTarget(site, site.parameter, site.shape)
        # A model with code of its own (`trust_remote_code`) names its modules as the checkpoint does.
        for site in sites:
            for path in () if site.is_experts else arch.key_mapping.candidates(site.path):
                self.stems.setdefault(path, KeyTarget(site, path, site.shape))

    def target_of(self, stem: str) -> KeyTarget | None:
        """Return the matrix that factors under this stem adapt; None if the model has no such matrix."""
        if stem in self.stems:
            return self.stems[stem]
        match = _SINGLE_EXPERT.fullmatch(stem)
        if match is None or match["experts"] not in self._experts:
            return None
        site, expert = self._experts[match["experts"]][match["leaf"]], int(match["expert"])
        if expert >= site.count:
            return None
        out, inner = site.shape
        if site.role == Role.EXPERTS_DOWN:
            return KeyTarget(site, stem, site.shape, expert)
        rows = (0, out // 2) if match["leaf"] in ("gate_proj", "w1") else (out // 2, out)
        return KeyTarget(site, stem, (out // 2, inner), expert, rows)

    def parse_lora_key(self, where: str, key: str) -> tuple[str, str, KeyTarget]:
        """Return (stem, part, target) of a key with `lora_` in it; `where` names the file in errors.

        The part is lora_A.weight, lora_B.weight, lora_B.bias, or a vector of some adapter method
        (`AdapterMethod.vectors`).  Raises `InputError` for a key that fits no matrix of the base model.
        """
        match = _LORA_KEY.fullmatch(key)
        known = match is not None and (match["vector"] is None or match["vector"] in vector_names())
        target = self.target_of(match["stem"]) if match is not None and known else None
        if match is None or target is None:
            raise InputError(f"{where}: '{key}' fits no weight of the base model{self._hint(key)}")
        return match["stem"], match["part"] or match["vector"], target

    def replaced_key(self, where: str, ref: TensorRef, adapted: Collection[str], base: Mapping[str, TensorRef]) -> str:
        """Return the key of the base's tensor that PEFT's loader would replace by the fully trained tensor `ref`.

        `where` names the file in errors, `adapted` are the stems that have factors, `base` the base's tensors by key.
        Raises `InputError` for a tensor that PEFT would ignore, and for one whose shape is not that of the base's.
        """

        def refuse(why: str) -> NoReturn:
            raise InputError(f"{where}: '{ref.key}' {why}")

        if not ref.key.startswith(PREFIX):
            refuse(f"does not begin with '{PREFIX}': no key of a PEFT adapter. To fix the file, {_SAVE_AGAIN}")
        module, _, leaf = ref.key.removeprefix(PREFIX).rpartition(".")
        if ".original_module." in ref.key or ".modules_to_save." in ref.key:
            refuse(
                "is a copy that PEFT does not load again: it comes with modules_to_save and bias: all. "
                "Remove it from the file; the trained tensor is stored under the module's own name"
            )
        in_base_layer = module.endswith(".base_layer")
        module = module.removesuffix(".base_layer")
        if in_base_layer != (module in adapted):
            state = (
                "has no LoRA in this file"
                if in_base_layer
                else f"has a LoRA, so its own tensors must be in '{module}.base_layer'"
            )
            refuse(f"would be ignored by PEFT: '{module}' {state}. To fix the file, {_SAVE_AGAIN}")
        name = f"{module}.{leaf}" if module else leaf
        key = self.arch.key_mapping.on_disk(name, base)
        if key not in base and any(s.is_experts and f"{name}.".startswith(f"{s.path}.") for s in self.arch.sites):
            refuse("holds fully trained experts, which are not supported: train a LoRA on them (target_parameters)")
        alias = base.get(self.arch.embedding_key) if name == HEAD and self.arch.tied else None
        target = base.get(key, alias)
        if target is None:
            known = nearest(ref.key, [PREFIX + k for k in base])
            refuse(f"fits no tensor of the base model{known}")
        if not in_model(name, self.arch):
            refuse("belongs to a layer that transformers does not load (MTP): PEFT would ignore it")
        if ref.shape != target.shape:
            difference = f"is {ref.shape}, but '{target.key}' of the base model is {target.shape}: "
            if name in (self.arch.embedding, HEAD) and ref.shape[1:] == target.shape[1:]:
                refuse(
                    f"{difference}the vocabulary was resized for the training. Do the same to the base: load it, "
                    f"resize_token_embeddings({ref.shape[0]}), save_pretrained, and give that folder with --base"
                )
            refuse(f"{difference}was the adapter trained on another base model?")
        return key

    def _hint(self, key: str) -> str:
        """Return the rest of the error for a key that fits nothing: why, or what to do, or the most similar key."""
        layer = re.search(r"\.layers\.(\d+)\.", key)
        mtp = range(self.arch.num_layers, self.arch.num_layers + self.arch.mtp_layers)
        if layer and int(layer[1]) in mtp:
            how = "give --mtp to merge it too" if self.arch.mtp_sites else "whose layout is not known here"
            return f": it is on an MTP layer, {how}"
        if not key.startswith(PREFIX):
            return f": keys of a PEFT adapter begin with '{PREFIX}'. To fix the file, {_SAVE_AGAIN}"
        if match := re.search(rf"\.(?:lora_[AB]|{'|'.join(vector_names())})\.(?!weight$|bias$)([^.]+)", key):
            return f": it holds the adapter's name '{match[1]}'; to get a file without it, {_SAVE_AGAIN}"
        if "lora_embedding" in key:
            return (
                ": a LoRA on the embedding is not supported. Merge it with PEFT, or train the whole embedding "
                "(modules_to_save)"
            )
        if match := _SINGLE_EXPERT.search(key):  # the matrix is known, so the expert's number is too large
            sites = self._experts.get(match["experts"].removeprefix(PREFIX))
            if sites:
                count = next(iter(sites.values())).count
                return f": the experts of '{match['experts'].removeprefix(PREFIX)}' are 0 to {count - 1}"
        if re.search(r"\.experts\.(base_layer\.)?lora_", key):
            return f": target_parameters in {CONFIG_FILE} does not say which of the experts' weights it adapts"
        return nearest(key, [f"{PREFIX}{stem}{key[key.rfind('.lora_') :]}" for stem in self.stems])


def is_expert_key(key: str) -> bool:
    """Return whether a checkpoint key belongs to a single routed expert, which is not a module in memory."""
    return _SINGLE_EXPERT.match(key) is not None


def in_model(name: str, arch: Architecture) -> bool:
    """Return whether transformers' model has a parameter of this name; MTP layers are in checkpoints only."""
    if not name.startswith(f"{arch.prefix}."):
        return name.startswith("lm_head.") or (arch.wrapper is not None and name.startswith("model."))
    module, _, rest = name.removeprefix(f"{arch.prefix}.").partition(".")
    if module != "layers":
        return module in _OUTSIDE_LAYERS
    number = rest.partition(".")[0]
    return number.isdecimal() and int(number) < arch.num_layers
