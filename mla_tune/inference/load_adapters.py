"""Load several adapters into one PEFT model, each on exactly the matrices that its file names.

For each adapted parameter of a module, PEFT puts a wrapper around the module: that of down_proj around that of
gate_up_proj around the experts.  The keys in an adapter's file say how deep a wrapper lies, but not for which parameter
it is.  Therefore PEFT refuses adapters whose `target_parameters` differ.  Here a temporary adapter, with the parameters
of all adapters, creates the wrappers.  Then each adapter is loaded with its own config, and its keys are renamed to the
depth of its wrappers.  At the end the temporary adapter is deleted.
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

#: PEFT's name for the temporary adapter that creates the wrappers.
_TEMPORARY = "frame"
#: Settings that an adapter can't have on a matrix that another adapter adapts as a parameter → name in messages.
_NOT_ON_PARAMETERS = {"use_dora": "DoRA", "lora_dropout": "dropout", "lora_bias": "lora_bias"}


def load_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter], peft_names: Mapping[str, str], base: str
) -> tuple[Any, str]:
    """Load adapters onto `model`; return the `PeftModel`, and the key of a base tensor that was overwritten, or "".

    `peft_names` are the names that the adapters get in PEFT; the first adapter is active.  `base` is the base in
    messages.  A base tensor is overwritten by an adapter that holds a trained bias, or an embedding that was saved but
    not adapted: PEFT loads these into the base itself.

    Raises `InputError` for adapters that can't be in one model, and for one that PEFT loads differently from what its
    file holds.
    """
    _refuse_conflicts(adapters)
    weights = model.state_dict()
    net: Any = _with_wrappers(model, adapters)
    wrapper_paths = {a.parameter: path for path, a in _temporary_wrappers(net)}
    targets, overwritten = {}, ""
    for name, adapter in adapters.items():
        before = {saved.key: weights[saved.key].clone() for saved in adapter.saved if saved.key in weights}
        try:
            with warnings.catch_warnings():
                # PEFT warns of patterns for parameters, though it uses them; `_check_loaded` compares the ranks.
                warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
                result = net.load_adapter(
                    str(adapter.folder), adapter_name=peft_names[name], key_mapping=_key_mapping(adapter, wrapper_paths)
                )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{adapter.folder}: this adapter does not fit {base}: {reason}") from error
        overwritten = next((key for key, old in before.items() if not torch.equal(weights[key], old)), "")
        if overwritten and len(adapters) > 1:
            raise InputError(
                f"{name} holds a {overwritten} that would replace the base's for every adapter: load it as the only "
                "adapter, or merge it (mla-tune merge-absorb)"
            )
        config = net.peft_config[peft_names[name]]
        targets[name], config.target_parameters = config.target_parameters, None
        # PEFT also lists keys of adapters whose names contain this one.
        missing = [key for key in result.missing_keys if f".{peft_names[name]}." in key]
        _check_loaded(adapter, attached_loras(net, peft_names[name]), [*missing, *result.unexpected_keys])
    for name in adapters:
        net.peft_config[peft_names[name]].target_parameters = targets[name]
    net.set_adapter(peft_names[next(iter(adapters))])
    net.delete_adapter(_TEMPORARY)
    return net.eval(), overwritten


def has_modules_to_save(net: nn.Module, name: str) -> bool:
    """Whether the adapter with this name in PEFT has fully trained modules (`modules_to_save`)."""
    return any(isinstance(m, AuxiliaryTrainingWrapper) and name in m._adapters for m in net.modules())


@contextmanager
def modules_to_save_disabled(net: nn.Module) -> Iterator[None]:
    """Disable `modules_to_save` within the block, for a mixed batch in which no row has any.

    PEFT would look for the module of each row, and fail because there is none.
    """
    modules: list[Any] = [m for m in net.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for module in modules:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters(True)


def _with_wrappers(model: nn.Module, adapters: Mapping[str, Adapter]) -> nn.Module:
    """Return a `PeftModel` with an empty wrapper for every parameter that one of the adapters adapts."""
    parameters = sorted({d.site.parameter for a in adapters.values() for d in a.deltas if _by_parameter(a, d)})
    config = LoraConfig(
        task_type="CAUSAL_LM", r=1, target_modules=DUMMY_TARGET_MODULES, target_parameters=parameters or None
    )
    net: Any = get_peft_model(model, config, adapter_name=_TEMPORARY, low_cpu_mem_usage=True)  # type: ignore[arg-type]
    net.peft_config[_TEMPORARY].target_parameters = None  # PEFT would compare it with that of every other adapter
    return net


def _by_parameter(adapter: Adapter, delta: LoraDelta) -> bool:
    """Whether PEFT adapts the matrix of this delta as a parameter; adapters of single experts become one of all."""
    names = AdapterSettings(adapter.folder / CONFIG_FILE, adapter.settings)
    return delta.expert is not None or names.is_parameter(delta.site.parameter)


def _temporary_wrappers(net: nn.Module) -> Iterator[tuple[str, AttachedLora]]:
    """Yield the path that a wrapper has in the keys of a file, and its LoRA, for each wrapper."""
    layers = {id(a.layer): a for a in attached_loras(net, _TEMPORARY)}
    for path, module in net.named_modules():
        if id(module) in layers:
            yield path.removeprefix(PREFIX), layers[id(module)]


def _key_mapping(adapter: Adapter, wrapper_paths: Mapping[str, str]) -> dict[str, str]:
    """Return pattern → replacement for keys (without PEFT's prefix) of factors whose wrapper lies at another depth."""
    mapping = {}
    for delta in adapter.deltas:
        stem = delta.A.key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        path = wrapper_paths.get(delta.site.parameter, stem)
        if delta.expert is None and path != stem:
            mapping[rf"^{re.escape(stem)}\.lora_"] = f"{path}.lora_"
    return mapping


def _refuse_conflicts(adapters: Mapping[str, Adapter]) -> None:
    """Raise `InputError` where two adapters adapt one matrix in ways that PEFT can't combine.

    One adapts it as a parameter, and there PEFT does not support a setting of the other (DoRA, dropout, lora_bias).
    """
    wrapped = {d.site.path: name for name, a in adapters.items() for d in a.deltas if _by_parameter(a, d)}
    for name, adapter in adapters.items():
        unsupported = next((label for key, label in _NOT_ON_PARAMETERS.items() if adapter.settings.get(key)), None)
        for delta in adapter.deltas if unsupported else ():
            other = wrapped.get(delta.site.path, name)
            if other != name:
                raise InputError(
                    f"{name} and {other} can't be in one model: both adapt {delta.site.path}, {other} as a parameter "
                    f"(target_parameters), and there PEFT does not support {unsupported}, which {name} has. Merge one "
                    "of them (mla-tune merge-absorb), or load them in two commands"
                )


def _check_loaded(adapter: Adapter, attached: list[AttachedLora], unmatched_keys: list[str]) -> None:
    """Raise `InputError` where what PEFT attached differs from what the file holds: matrices, ranks and scales.

    `unmatched_keys` are keys of the file that PEFT did not load, and of the model that the file did not fill.
    """
    parts: dict[str, set[Any]] = {}
    for delta in adapter.deltas:
        parts.setdefault(delta.site.parameter, set()).add(delta.rows)
    # PEFT joins gate and up of an expert, which older files hold separately, into one adapter with the sum of ranks.
    expected = {d.site.parameter: (d.rank * len(parts[d.site.parameter]), d.scale) for d in adapter.deltas}
    loaded = {a.parameter: a for a in attached}
    problems = [f"not loaded: {key}" for key in expected.keys() - loaded.keys()]
    problems += [f"without weights in the file: {key}" for key in loaded.keys() - expected.keys()]
    for key in expected.keys() & loaded.keys():
        (rank, scale), lora = expected[key], loaded[key]
        if lora.rank != rank or abs(lora.scale - scale) > 1e-9 * scale:
            problems.append(f"{key}: rank {rank}, scale {scale:g} in the file; {lora.rank}, {lora.scale:g} in PEFT")
    if problems := sorted(problems) or [f"not loaded: {key}" for key in unmatched_keys]:
        more = f", and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise InputError(
            f"{adapter.folder}: PEFT loads this adapter differently from what its file holds "
            f"({'; '.join(problems[:3])}{more}). Merge it with mla-tune merge-absorb, which follows the file, and use "
            "the merged model"
        )
