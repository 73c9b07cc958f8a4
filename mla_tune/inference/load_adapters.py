"""Adapters of any placement side by side in one PEFT model, each on just the matrices that its file names.

PEFT puts what it adds to a parameter into a wrapper around the parameter's module: down_proj's around gate_up_proj's
around the experts.  A key in a file tells only how deep its wrapper lies, so PEFT refuses adapters whose
`target_parameters` differ.  Here an adapter with the parameters of all of them makes the wrappers and is taken out
again; then each is loaded by its own config, with its keys moved to the depth of its wrappers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mla_tune.adapter.deltas import Adapter, LoraDelta
from mla_tune.adapter.keys import PREFIX
from mla_tune.adapter.settings import CONFIG_FILE, AdapterSettings
from mla_tune.errors import InputError
from mla_tune.model.attach import AttachedLora, attached_loras

#: PEFT's name for the adapter that makes the wrappers.
_FRAME = "frame"
#: What an adapter can't have on a matrix that another one reaches as a parameter, and its name in messages.
_NOT_ON_PARAMETERS = {"use_dora": "DoRA", "lora_dropout": "dropout", "lora_bias": "lora_bias"}


def load_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter], internal: Mapping[str, str], base: str
) -> tuple[Any, str]:
    """(a `PeftModel` on `model` with these adapters, the tensor of the base that it has lost, or "").

    The first adapter is active; `internal` are PEFT's names for them.  PEFT loads a trained bias, or an embedding that
    was saved without being adapted, into the base itself.

    Raises `InputError` for adapters that can't be together, and for one that PEFT would load otherwise than its file
    says.
    """
    _refuse_conflicts(adapters)
    weights = model.state_dict()
    net: Any = _with_wrappers(model, adapters)
    depths = {a.parameter: path for path, a in _wrapped(net)}
    targets, lost = {}, ""
    for name, adapter in adapters.items():
        before = {saved.key: weights[saved.key].clone() for saved in adapter.saved if saved.key in weights}
        try:
            with warnings.catch_warnings():
                # Patterns of parameters are matched and used; `_check` sees the ranks that come of them.
                warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
                result = net.load_adapter(
                    str(adapter.folder), adapter_name=internal[name], key_mapping=_moved(adapter, depths)
                )
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            raise InputError(f"{adapter.folder}: this adapter does not fit {base}: {why}") from error
        lost = next((key for key, old in before.items() if not torch.equal(weights[key], old)), "")
        if lost and len(adapters) > 1:
            raise InputError(
                f"{name} has a {lost} of its own that would take the place of the base's for every adapter: answer it "
                "in a run of its own, or merge it (mla-tune merge-absorb)"
            )
        config = net.peft_config[internal[name]]
        targets[name], config.target_parameters = config.target_parameters, None
        missing = [key for key in result.missing_keys if f".{internal[name]}." in key]  # PEFT asks for less than a name
        _check(adapter, attached_loras(net, internal[name]), [*missing, *result.unexpected_keys])
    for name in adapters:
        net.peft_config[internal[name]].target_parameters = targets[name]
    net.set_adapter(internal[next(iter(adapters))])
    net.delete_adapter(_FRAME)
    return net.eval(), lost


def has_whole_modules(net: nn.Module, name: str) -> bool:
    """Whether this adapter, by PEFT's name, has modules of modules_to_save."""
    return any(isinstance(m, AuxiliaryTrainingWrapper) and name in m._adapters for m in net.modules())


@contextmanager
def without_whole_modules(net: nn.Module) -> Iterator[None]:
    """PEFT has modules of modules_to_save choose by row, even where no row of the batch has one, and fails at it."""
    modules: list[Any] = [m for m in net.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for module in modules:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters(True)


def _with_wrappers(model: nn.Module, adapters: Mapping[str, Adapter]) -> nn.Module:
    """A `PeftModel` with a wrapper, without weights, for every parameter that one of the adapters is on."""
    parameters = sorted({d.site.parameter for a in adapters.values() for d in a.deltas if _by_parameter(a, d)})
    config = LoraConfig(
        task_type="CAUSAL_LM", r=1, target_modules=DUMMY_TARGET_MODULES, target_parameters=parameters or None
    )
    net: Any = get_peft_model(model, config, adapter_name=_FRAME, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    net.peft_config[_FRAME].target_parameters = None  # PEFT compares it with that of every other adapter
    return net


def _by_parameter(adapter: Adapter, delta: LoraDelta) -> bool:
    """Whether PEFT reaches the matrix of this delta as a parameter; the adapter of one expert becomes one of all."""
    names = AdapterSettings(adapter.folder / CONFIG_FILE, adapter.settings)
    return delta.expert is not None or names.is_parameter(delta.site.parameter)


def _wrapped(net: nn.Module) -> Iterator[tuple[str, AttachedLora]]:
    """The path in a file's keys, and the parameter, of each wrapper."""
    layers = {id(a.layer): a for a in attached_loras(net, _FRAME)}
    for path, module in net.named_modules():
        if id(module) in layers:
            yield path.removeprefix(PREFIX), layers[id(module)]


def _moved(adapter: Adapter, depths: Mapping[str, str]) -> dict[str, str]:
    """Pattern → text, for keys without PEFT's prefix, of factors that lie at another depth in the model."""
    moves = {}
    for delta in adapter.deltas:
        stem = delta.A.key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        depth = depths.get(delta.site.parameter, stem)
        if delta.expert is None and depth != stem:
            moves[rf"^{re.escape(stem)}\.lora_"] = f"{depth}.lora_"
    return moves


def _refuse_conflicts(adapters: Mapping[str, Adapter]) -> None:
    """Raise `InputError` for two adapters of one matrix, one as a parameter, where PEFT lacks what the other has."""
    wrapped = {d.site.path: name for name, a in adapters.items() for d in a.deltas if _by_parameter(a, d)}
    for name, adapter in adapters.items():
        method = next((what for key, what in _NOT_ON_PARAMETERS.items() if adapter.settings.get(key)), None)
        for delta in adapter.deltas if method else ():
            other = wrapped.get(delta.site.path, name)
            if other != name:
                raise InputError(
                    f"{name} and {other} can't be in one model: both adapt {delta.site.path}, {other} as a parameter "
                    f"(target_parameters), and there PEFT has no {method}, which {name} has. Merge one of them "
                    "(mla-tune merge-absorb), or answer them in two runs"
                )


def _check(adapter: Adapter, found: list[AttachedLora], stray: list[str]) -> None:
    """What PEFT attached == what the file holds, rank and scale of each matrix included.

    `stray` are keys of the file that PEFT left out, and of the model that the file did not fill.
    """
    parts: dict[str, set[Any]] = {}
    for delta in adapter.deltas:
        parts.setdefault(delta.site.parameter, set()).add(delta.rows)
    # PEFT joins gate and up of an expert, apart in an old file, into one adapter of both ranks.
    want = {d.site.parameter: (d.rank * len(parts[d.site.parameter]), d.scale) for d in adapter.deltas}
    have = {a.parameter: a for a in found}
    problems = [f"left out: {k}" for k in want.keys() - have.keys()]
    problems += [f"without weights in the file: {k}" for k in have.keys() - want.keys()]
    for key in want.keys() & have.keys():
        (rank, scale), a = want[key], have[key]
        if a.rank != rank or abs(a.scale - scale) > 1e-9 * scale:
            problems.append(f"{key}: rank {rank}, scale {scale:g} in the file; {a.rank}, {a.scale:g} in PEFT")
    if problems := sorted(problems) or [f"not loaded: {key}" for key in stray]:
        more = f", and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise InputError(
            f"{adapter.folder}: PEFT does not load this adapter as its file has it ({'; '.join(problems[:3])}{more}). "
            "Merge it with mla-tune merge-absorb, which follows the file, and ask the merged model"
        )
