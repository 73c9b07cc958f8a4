"""Roles of a recipe → the exact matrices to adapt, with rank, alpha and learning-rate factor of each.  Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.arch.roles import GROUPS, PRESETS, Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import PlacementError, did_you_mean
from mla_tune.recipe.schema import AdapterSection, RoleOverride
from mla_tune.sockets import ADAPTER_METHODS

#: Initializations that take a part of W out of the base.
RESIDUAL = ("pissa", "olora")


def reached_as_parameter(arch: Architecture, role: Role) -> bool:
    """Whether PEFT can adapt this role only as a parameter (`target_parameters`), materializing W + ΔW: fused experts,
    and dense and shared MLPs of the families in which it rewrites their module names to the experts."""
    return role in GROUPS["experts"] or (arch.family.peft_remaps_experts and role in GROUPS["mlp"])


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """One matrix to adapt: LoRA rank r, alpha, and the factor on the learning rate beside `mla_lr_scale`."""

    site: Site
    rank: int
    alpha: float
    lr_scale: float

    @property
    def lora_params(self) -> int:
        """Parameters of A (r, in) and B (out, r), over all experts of a stack."""
        return self.site.lora_params(self.rank)


@dataclass(frozen=True, slots=True)
class Placement:
    """All matrices to adapt, in the order of the model's layers.  Empty for `method: none`."""

    method: str
    dropout: float
    rank: int
    alpha: float
    sites: tuple[PlannedSite, ...]
    init: str = "default"
    #: Modules that are trained whole beside the LoRA: path and number of parameters (`model.whole`).
    modules_to_save: tuple[tuple[str, int], ...] = ()

    @property
    def width(self) -> int:
        """Ranks that PEFT attaches for each planned one: `pissa` and `olora` carry what they began with, frozen."""
        return 2 if self.init in RESIDUAL else 1

    def scale(self, planned: PlannedSite) -> float:
        """s of ΔW = s·B A, of the planned rank."""
        return ADAPTER_METHODS.get(self.method).scale(planned.alpha, planned.rank)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles adapted, in the order of `Role`."""
        present = {p.site.role for p in self.sites}
        return tuple(r for r in Role if r in present)

    def by_role(self, role: Role) -> list[PlannedSite]:
        """The planned matrices of one role, in the order of the layers."""
        return [p for p in self.sites if p.site.role == role]

    @property
    def trainable_params(self) -> int:
        """Trained parameters of the adapter, and of modules that are trained whole beside it."""
        return self.lora_params + self.modules_to_save_params

    @property
    def modules_to_save_params(self) -> int:
        """Parameters of the modules that are trained whole."""
        return sum(count for _, count in self.modules_to_save)

    @property
    def modules_to_save_names(self) -> tuple[str, ...]:
        """Last parts of the paths of modules that are trained whole: they stand where elsewhere a role does."""
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path, _ in self.modules_to_save))

    @property
    def lora_params(self) -> int:
        """Trained parameters of the adapter: A and B, and what its method trains beside them (DoRA's magnitudes)."""
        if not self.sites:
            return 0
        method = ADAPTER_METHODS.get(self.method)
        return sum(method.params(p.lora_params, p.site.shape[0]) for p in self.sites)


def place(arch: Architecture, adapter: AdapterSection) -> Placement:
    """Resolve the recipe's roles and groups on this architecture.

    A group means those of its roles that the model has.  Raises `PlacementError` for an explicit role or group that
    the model lacks, for an override of something that is not adapted, and for what PEFT can't do on this family.
    """
    if adapter.method == "none":
        return Placement("none", 0.0, adapter.rank, adapter.alpha, ())
    roles = _resolve(arch, adapter)
    overrides = _overrides(arch, adapter, roles)
    _refuse_impossible(arch, adapter, roles)
    planned = []
    for site in arch.sites:
        if site.role in roles and site.attachable:
            o = overrides.get(site.role, RoleOverride())
            rank = o.rank or adapter.rank
            # A role of another rank keeps the adapter's strength alpha/r, unless its alpha is given too.
            alpha = o.alpha if o.alpha is not None else adapter.alpha / adapter.rank * rank
            planned.append(PlannedSite(site, rank, alpha, o.lr_scale or 1.0))
    _refuse_init(adapter, planned)
    return Placement(adapter.method, adapter.dropout, adapter.rank, adapter.alpha, tuple(planned), adapter.init)


def _resolve(arch: Architecture, adapter: AdapterSection) -> set[Role]:
    present = set(arch.roles)
    roles: set[Role] = set()
    for name in adapter.target_names:
        if name in GROUPS:
            found = present & set(GROUPS[name])
            asked = not isinstance(adapter.targets, str) or (adapter.experts and name not in PRESETS[adapter.targets])
            if not found and asked:
                raise PlacementError(
                    f"adapter.targets: {arch.title} has nothing in the group '{name}' "
                    f"({', '.join(GROUPS[name])}). Roles of this model: {', '.join(arch.roles)}"
                )
            roles |= found
        else:
            role = Role(name)
            if role not in present:
                raise PlacementError(f"adapter.targets: {_absent(arch, role)}")
            roles.add(role)
    return roles


def _absent(arch: Architecture, role: Role) -> str:
    why = ""
    if role in (Role.W_DQ, Role.W_UQ) and arch.dims.L is None:
        why = " (it has no query compression: its query projection is W_Q)"
    elif role == Role.W_Q and arch.dims.L is not None:
        why = " (its query is compressed: W_DQ and W_UQ)"
    return f"this {arch.title} model has no {role}{why}. Roles of this model: {', '.join(arch.roles)}"


def _overrides(arch: Architecture, adapter: AdapterSection, roles: set[Role]) -> dict[Role, RoleOverride]:
    """Override of each adapted role; a role's own entry wins, field by field, over its groups'."""
    result: dict[Role, RoleOverride] = {}
    # Wide groups first, single roles last, so that the narrower entry wins.
    for name in sorted(adapter.roles, key=lambda n: -len(GROUPS.get(n, (n,)))):
        members = {r for r in GROUPS[name] if r in roles} if name in GROUPS else {Role(name)} & roles
        if not members:
            targeted = ", ".join(r for r in Role if r in roles)
            raise PlacementError(
                f"adapter.roles.{name}: nothing of it is adapted, so the override would do nothing. "
                f"Adapted: {targeted}{did_you_mean(name, [r.value for r in roles])}"
            )
        for role in members:
            old = result.get(role, RoleOverride()).model_dump(exclude_none=True)
            result[role] = RoleOverride(**(old | adapter.roles[name].model_dump(exclude_none=True)))
    return result


def _refuse_impossible(arch: Architecture, adapter: AdapterSection, roles: set[Role]) -> None:
    """Raise `PlacementError` for roles whose adapters would not survive saving, and for a method or dropout that PEFT
    can't do on parameters."""
    lost = [r for r in Role if r in roles and r in arch.family.not_reloaded]
    if lost:
        keeps = [r.value for r in arch.roles if r not in arch.family.not_reloaded]
        raise PlacementError(
            f"adapter.targets: adapters on {', '.join(lost)} of {arch.family.title} don't survive saving: PEFT "
            "renames their keys when it loads them, finds no such module, and goes on with a warning. "
            f"Adapt attention only (targets: attention-only), or some of {', '.join(keeps)}"
        )
    through_parameters = {r for r in roles if reached_as_parameter(arch, r)}
    asked = f"dropout: {adapter.dropout:g}" if adapter.dropout else ""
    if not ADAPTER_METHODS.get(adapter.method).through_parameters:
        asked = f"method: {adapter.method}"
    if not asked or not through_parameters:
        return
    names = ", ".join(r for r in Role if r in through_parameters)
    able = " or ".join(method.name for method in ADAPTER_METHODS.values() if method.through_parameters)
    raise PlacementError(
        f"adapter.{asked}: PEFT can't do that for {names} of {arch.family.title}, which it can only reach as "
        f"parameters. Use method {able} without dropout, or adapt attention only (targets: attention-only)"
    )


def _refuse_init(adapter: AdapterSection, planned: list[PlannedSite]) -> None:
    """What an initialization can't do: fused experts, a rank beyond the matrix, an odd rank."""
    if adapter.init in ("default", "gaussian"):
        return
    experts = sorted({p.site.role.value for p in planned if p.site.is_experts})
    if experts:
        raise PlacementError(
            f"adapter.init: {adapter.init} is defined for single matrices, and {', '.join(experts)} are stacks of "
            f"them; use init: default or gaussian, or leave the routed experts out"
        )
    for p in planned:
        if adapter.init in RESIDUAL and p.rank > min(p.site.shape):
            raise PlacementError(
                f"adapter.rank: {adapter.init} takes {p.rank} directions of {p.site.role}, but {p.site.path} "
                f"({p.site.shape[0]} × {p.site.shape[1]}) has only {min(p.site.shape)}"
            )
        if adapter.init == "orthogonal" and p.rank % 2:
            raise PlacementError(f"adapter.init: orthogonal halves the rank, so it has to be even; {p.rank} is not")
