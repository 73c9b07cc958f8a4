"""Placement: from the roles in a recipe to the exact matrices to adapt, with rank, alpha and learning rate of each."""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.arch.roles import GROUPS, PRESETS, Role
from mla_tune.arch.site import Architecture, Site
from mla_tune.errors import PlacementError, did_you_mean
from mla_tune.recipe.schema import AdapterSection, RoleOverride
from mla_tune.sockets import ADAPTER_METHODS

#: Initializations whose A and B begin at a part of W, so that the base would have to be W minus that part.
RESIDUAL_INITS = ("pissa", "olora")


def reached_as_parameter(arch: Architecture, role: Role) -> bool:
    """Return whether PEFT can adapt this role only as a parameter (`target_parameters`), which makes W + ΔW in memory.

    That is so for fused experts, and for dense and shared MLPs of the families in which PEFT rewrites their module
    names to the experts (`Family.peft_remaps_experts`).
    """
    return role in GROUPS["experts"] or (arch.family.peft_remaps_experts and role in GROUPS["mlp"])


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """One matrix or stack of experts to adapt."""

    site: Site
    """The matrix."""
    rank: int
    """The LoRA rank r."""
    alpha: float
    """LoRA's alpha."""
    lr_scale: float
    """Factor on the learning rate, on top of `mla_lr_scale`."""

    @property
    def lora_params(self) -> int:
        """Number of parameters of A (r, in) and B (out, r), over all experts of a stack."""
        return self.site.lora_params(self.rank)


@dataclass(frozen=True, slots=True)
class Placement:
    """Everything that a recipe's adapter section means on one architecture."""

    method: str
    """`adapter.method` of the recipe; `none` trains every weight, without an adapter."""
    dropout: float
    """Dropout on the input of A."""
    rank: int
    """The rank of roles without one of their own."""
    alpha: float
    """The alpha of roles without one of their own."""
    sites: tuple[PlannedSite, ...]
    """The matrices to adapt, in the order of the model's layers; empty for the method `none`."""
    init: str = "default"
    """How A and B begin: `adapter.init` of the recipe."""
    modules_to_save: tuple[tuple[str, int], ...] = ()
    """Modules that are fully trained beside the LoRA: path and number of parameters (`model.modules_to_save`)."""

    @property
    def width(self) -> int:
        """Factor from the planned rank to the rank that PEFT attaches: 2 with `pissa` and `olora`, which keep the A and
        B that they began with as a frozen, negative second half."""
        return 2 if self.init in RESIDUAL_INITS else 1

    def scale(self, planned: PlannedSite) -> float:
        """Return the factor s on B·A of a planned matrix, for its planned rank."""
        return ADAPTER_METHODS.get(self.method).scale(planned.alpha, planned.rank)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The adapted roles, in the order of `Role`."""
        present = {p.site.role for p in self.sites}
        return tuple(r for r in Role if r in present)

    def by_role(self, role: Role) -> list[PlannedSite]:
        """Return the planned matrices of one role, in the order of the layers."""
        return [p for p in self.sites if p.site.role == role]

    @property
    def trainable_params(self) -> int:
        """Number of trained parameters, of the adapter and of fully trained modules."""
        return self.lora_params + self.modules_to_save_params

    @property
    def modules_to_save_params(self) -> int:
        """Number of parameters of the fully trained modules."""
        return sum(count for _, count in self.modules_to_save)

    @property
    def modules_to_save_names(self) -> tuple[str, ...]:
        """Names of the fully trained modules (last parts of their paths); tables use them in the place of a role."""
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path, _ in self.modules_to_save))

    @property
    def lora_params(self) -> int:
        """Number of trained parameters of the adapter: A, B, and the vectors of its method (DoRA's magnitudes)."""
        if not self.sites:
            return 0
        method = ADAPTER_METHODS.get(self.method)
        return sum(method.params(p.lora_params, p.site.shape[0]) for p in self.sites)


def place(arch: Architecture, adapter: AdapterSection) -> Placement:
    """Return the matrices that a recipe's adapter section means on this architecture.

    A group means those of its roles that the model has.  Raises `PlacementError` for a role or group that is named
    explicitly and the model lacks, for an override (`adapter.roles`) of something that is not adapted, and for what
    PEFT can't do on this family.
    """
    if adapter.method == "none":
        return Placement("none", 0.0, adapter.rank, adapter.alpha, ())
    roles = _target_roles(arch, adapter)
    overrides = _overrides(arch, adapter, roles)
    _refuse_impossible(arch, adapter, roles)
    planned = []
    for site in arch.sites:
        if site.role in roles and site.attachable:
            override = overrides.get(site.role, RoleOverride())
            rank = override.rank or adapter.rank
            # A role with another rank keeps the adapter's alpha/r, unless its alpha is given too.
            alpha = override.alpha if override.alpha is not None else adapter.alpha / adapter.rank * rank
            planned.append(PlannedSite(site, rank, alpha, override.lr_scale or 1.0))
    _refuse_init(adapter, planned)
    return Placement(adapter.method, adapter.dropout, adapter.rank, adapter.alpha, tuple(planned), adapter.init)


def _target_roles(arch: Architecture, adapter: AdapterSection) -> set[Role]:
    """Return the roles that `adapter.targets` means.  Raises `PlacementError` for one that the model lacks."""
    present = set(arch.roles)
    roles: set[Role] = set()
    for name in adapter.target_names:
        if name in GROUPS:
            found = present & set(GROUPS[name])
            # A group that comes from a preset may be empty; one that the recipe names itself may not.
            named = not isinstance(adapter.targets, str) or (adapter.experts and name not in PRESETS[adapter.targets])
            if not found and named:
                raise PlacementError(
                    f"adapter.targets: {arch.title} has nothing in the group '{name}' "
                    f"({', '.join(GROUPS[name])}). Roles of this model: {', '.join(arch.roles)}"
                )
            roles |= found
        else:
            role = Role(name)
            if role not in present:
                raise PlacementError(f"adapter.targets: {_lacks(arch, role)}")
            roles.add(role)
    return roles


def _lacks(arch: Architecture, role: Role) -> str:
    """Say that the model lacks a role, and why if the reason is its query compression."""
    why = ""
    if role in (Role.W_DQ, Role.W_UQ) and arch.dims.L is None:
        why = " (it has no query compression: its query projection is W_Q)"
    elif role == Role.W_Q and arch.dims.L is not None:
        why = " (its query is compressed: W_DQ and W_UQ)"
    return f"this {arch.title} model has no {role}{why}. Roles of this model: {', '.join(arch.roles)}"


def _overrides(arch: Architecture, adapter: AdapterSection, roles: set[Role]) -> dict[Role, RoleOverride]:
    """Return the override of each adapted role; field by field, the entry of the smallest group wins.

    Raises `PlacementError` for an entry of `adapter.roles` that changes nothing.
    """
    result: dict[Role, RoleOverride] = {}
    # Large groups first, single roles last: a later entry overwrites an earlier one.
    for name in sorted(adapter.roles, key=lambda n: -len(GROUPS.get(n, (n,)))):
        members = {r for r in GROUPS[name] if r in roles} if name in GROUPS else {Role(name)} & roles
        if not members:
            targeted = ", ".join(r for r in Role if r in roles)
            raise PlacementError(
                f"adapter.roles.{name}: none of its roles is adapted, so the override would do nothing. "
                f"Adapted: {targeted}{did_you_mean(name, [r.value for r in roles])}"
            )
        for role in members:
            old = result.get(role, RoleOverride()).model_dump(exclude_none=True)
            result[role] = RoleOverride(**(old | adapter.roles[name].model_dump(exclude_none=True)))
    return result


def _refuse_impossible(arch: Architecture, adapter: AdapterSection, roles: set[Role]) -> None:
    """Raise `PlacementError` for roles whose adapters PEFT would not load again, and for a method or dropout that PEFT
    can't do through parameters."""
    lost = [r for r in Role if r in roles and r in arch.family.not_reloaded]
    if lost:
        loadable = [r.value for r in arch.roles if r not in arch.family.not_reloaded]
        raise PlacementError(
            f"adapter.targets: adapters on {', '.join(lost)} of {arch.family.title} don't survive saving: PEFT "
            "renames their keys when it loads them, finds no such module, and only warns. "
            f"Adapt attention only (targets: attention-only), or some of {', '.join(loadable)}"
        )
    through_parameters = {r for r in roles if reached_as_parameter(arch, r)}
    setting = f"dropout: {adapter.dropout:g}" if adapter.dropout else ""
    if not ADAPTER_METHODS.get(adapter.method).through_parameters:
        setting = f"method: {adapter.method}"
    if not setting or not through_parameters:
        return
    names = ", ".join(r for r in Role if r in through_parameters)
    usable = " or ".join(method.name for method in ADAPTER_METHODS.values() if method.through_parameters)
    raise PlacementError(
        f"adapter.{setting}: PEFT can't do that for {names} of {arch.family.title}, which it can only reach as "
        f"parameters. Use method {usable} without dropout, or adapt attention only (targets: attention-only)"
    )


def _refuse_init(adapter: AdapterSection, planned: list[PlannedSite]) -> None:
    """Raise `PlacementError` for what an initialization can't do: fused experts, a rank larger than the matrix, an odd
    rank."""
    if adapter.init in ("default", "gaussian"):
        return
    experts = sorted({p.site.role.value for p in planned if p.site.is_experts})
    if experts:
        raise PlacementError(
            f"adapter.init: {adapter.init} is defined for single matrices, and {', '.join(experts)} are stacks of "
            f"them; use init: default or gaussian, or leave the routed experts out"
        )
    for p in planned:
        if adapter.init in RESIDUAL_INITS and p.rank > min(p.site.shape):
            raise PlacementError(
                f"adapter.rank: {adapter.init} needs {p.rank} directions of {p.site.role}, but {p.site.path} "
                f"({p.site.shape[0]} × {p.site.shape[1]}) has only {min(p.site.shape)}"
            )
        if adapter.init == "orthogonal" and p.rank % 2:
            raise PlacementError(f"adapter.init: orthogonal halves the rank, so it has to be even; {p.rank} is not")
