"""Names that NVIDIA's NeMo, Megatron-Bridge and Automodel give to adapters on MLA → sites.  Names only, no weights.

    (module.)*decoder.layers.3.self_attention.linear_kv_up_proj.adapter.linear_in.weight      A (r, in)
    (module.)*decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.adapter.linear_out.weight
                                                                                              B (2I, r): gate, then up

Their linear_fc1 is gate and up in one.  Routed experts have an adapter each (`local_experts.N`), one for all of a layer
(two dimensions), or a stack (three).  Layers of `mtp` come after the decoder's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mla_tune.arch.roles import ADAPTABLE, FACTS, GROUPS, Role
from mla_tune.arch.site import Architecture, Site

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?:module\.|model\.|language_model\.)*"
    r"(?P<where>decoder|mtp)\.layers\.(?P<layer>\d+)\.(?:transformer_layer\.|mtp_model_layer\.)?"
    r"(?P<block>self_attention|mlp(?:\.shared_experts|\.experts(?:\.experts|\.local_experts\.(?P<expert>\d+))?)?)\."
    r"(?P<name>linear_\w+)\."
    r"(?:adapter\.linear_(?P<side>in|out)|lora_(?P<ab>[ABab])(?:\.default)?)\.weight$"
)
#: Parts of other names that belong to the same parts of a model, and that have no meaning here.
_IGNORED = ("._extra_state", ".layer_norm_weight", ".layer_norm_bias")

#: Name inside a layer → roles: `mlp.linear_fc1` is gate and up, in this order.
_ROLES: dict[str, tuple[Role, ...]] = {}
for _role in ADAPTABLE:
    _name = f"{'self_attention' if _role in GROUPS['attention'] else 'mlp'}.{FACTS[_role].nemo}"
    _ROLES[_name] = (*_ROLES.get(_name, ()), _role)


@dataclass(frozen=True, slots=True)
class MegatronFactor:
    """One factor: `is_a` or B, of these sites (two where B's rows are gate and up), of one expert or of all."""

    key: str
    sites: tuple[Site, ...]
    is_a: bool
    expert: int | None


class MegatronNames:
    """Translates keys for one architecture."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self._sites: dict[tuple[int, Role], Site] = {}
        for site in arch.stored_sites:
            if site.layer is not None:
                # LongCat-Flash has two attentions a layer, which these names can't tell apart.
                self._sites.setdefault((site.layer, site.role), site)
        self.ambiguous = len({a.layer for a in arch.attention}) != len(arch.attention)

    def source(self, key: str) -> MegatronFactor | str | None:
        """What a key is: a factor, None for what may be left out, or a sentence on why it is neither."""
        if key.endswith(_IGNORED):
            return None
        match = _KEY.match(key)
        if match is None:
            return "is no name of a LoRA that NeMo, Megatron-Bridge or Automodel write for an MLA model"
        layer = int(match["layer"]) + (self.arch.num_layers if match["where"] == "mtp" else 0)
        block = "mlp.experts" if match["block"].startswith("mlp.experts") else match["block"]
        roles = _ROLES.get(f"{block}.{match['name']}", ())
        if not roles:
            return f"'{match['name']}' is no matrix of MLA or of its MLPs"
        sites = [self._sites.get((layer, role)) for role in roles]
        if any(site is None for site in sites):
            return f"layer {layer} of this model has no {' and '.join(roles)}"
        is_a = match["side"] == "in" or (match["ab"] or "").lower() == "a"
        expert = int(match["expert"]) if match["expert"] else None
        return MegatronFactor(key, tuple(site for site in sites if site is not None), is_a, expert)
