"""Map the names that NVIDIA's NeMo, Megatron-Bridge and Automodel give to adapters on MLA to sites (`MegatronNames`).

    (module.)*decoder.layers.3.self_attention.linear_kv_up_proj.adapter.linear_in.weight      A (r, in)
    (module.)*decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.adapter.linear_out.weight
                                                                                              B (2I, r): gate, then up

Their linear_fc1 is gate and up in one matrix.  The routed experts of a layer have an adapter each (`local_experts.N`),
one that they share (factors of two dimensions), or a stack (three dimensions).  Layers of `mtp` become those after the
decoder's.  No weights are read here.
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
#: Endings of keys that belong to the adapted modules but hold nothing of an adapter.
_IGNORED = ("._extra_state", ".layer_norm_weight", ".layer_norm_bias")

#: Name inside a layer → roles: `mlp.linear_fc1` is gate and up, in this order.
_ROLES: dict[str, tuple[Role, ...]] = {}
for _role in ADAPTABLE:
    _name = f"{'self_attention' if _role in GROUPS['attention'] else 'mlp'}.{FACTS[_role].nemo}"
    _ROLES[_name] = (*_ROLES.get(_name, ()), _role)


@dataclass(frozen=True, slots=True)
class MegatronFactor:
    """One low-rank factor in the source."""

    key: str
    """Its key."""
    sites: tuple[Site, ...]
    """The sites that it belongs to; two for linear_fc1, whose B has the rows of gate, then those of up."""
    is_a: bool
    """Whether it is A; else it is B."""
    expert: int | None
    """The expert that it belongs to; None if it does not belong to a single expert."""


class MegatronNames:
    """Maps keys to the sites of one architecture."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self._sites: dict[tuple[int, Role], Site] = {}
        for site in arch.stored_sites:
            if site.layer is not None:
                # LongCat-Flash has two attention modules in a layer, which these names can't tell apart.
                self._sites.setdefault((site.layer, site.role), site)
        #: Whether a layer has several attention modules, so that a name does not say which one it means.
        self.is_ambiguous = len({a.layer for a in arch.attention}) != len(arch.attention)

    def resolve(self, key: str) -> MegatronFactor | str | None:
        """Return the factor that a key stands for, None for a key to ignore, or else a text: what is wrong with it."""
        if key.endswith(_IGNORED):
            return None
        match = _KEY.match(key)
        if match is None:
            return "not a name that NeMo, Megatron-Bridge or Automodel give to a LoRA on an MLA model"
        layer = int(match["layer"]) + (self.arch.num_layers if match["where"] == "mtp" else 0)
        block = "mlp.experts" if match["block"].startswith("mlp.experts") else match["block"]
        roles = _ROLES.get(f"{block}.{match['name']}", ())
        if not roles:
            return f"'{match['name']}' is not a matrix of MLA or of an MLP"
        sites = [self._sites.get((layer, role)) for role in roles]
        if any(site is None for site in sites):
            return f"layer {layer} of this model has no {' and '.join(roles)}"
        is_a = match["side"] == "in" or (match["ab"] or "").lower() == "a"
        expert = int(match["expert"]) if match["expert"] else None
        return MegatronFactor(key, tuple(site for site in sites if site is not None), is_a, expert)
