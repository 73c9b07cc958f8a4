"""Small models for the tests of inference: building, adapting, merging by PEFT, logits with and without a cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mla_tune.inference.absorb import mla_modules
from mla_tune.inference.lora_tensors import BASE
from tests.helpers import tiny_families
from tests.helpers.merging import FAMILIES

#: All families of transformers 5.23, wrappers included.
NAMES = sorted(tiny_families.FAMILIES)
ATTENTION = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
#: Of a logit, relative to the largest, between two orders of float32 sums.
TOLERANCE = 1e-5


def build(family: str = "deepseek_v3", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small random model of `family` (of helpers.merging), its configuration changed by `changes`, in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | changes)
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def adapt(model: Any, *names: str, **settings: Any) -> Any:
    """A PeftModel with adapters of these names, of ranks 3, 4, …, none of them zero."""
    wrapped = None
    for i, name in enumerate(names):
        config = LoraConfig(**{"r": 3 + i, "lora_alpha": 7, "target_modules": ATTENTION} | settings)
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in wrapped.named_parameters():
            if "lora_" in key:
                p.add_(0.1 * torch.randn_like(p))
    return wrapped.eval()


def merged(model: Any, name: str) -> Any:
    """By PEFT, in a copy."""
    twin = copy.deepcopy(model)
    if name == BASE:
        return twin.unload().eval()
    twin.set_adapter(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return twin.merge_and_unload().eval()


def ids(rows: int = 2, count: int = 14, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, count), none of them special."""
    return torch.randint(2, 97, (rows, count), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits (B, T, vocabulary) of one forward without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


def stepped(model: Any, tokens: torch.Tensor, prompt: int = 5, cache: Any = None, **kwargs: Any) -> torch.Tensor:
    """Logits of a prompt, and of each further token by itself with the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [logits(model, tokens[:, :prompt], past_key_values=cache, **kwargs)]
    parts += [logits(model, t, past_key_values=cache, **kwargs) for t in tokens[:, prompt:].split(1, dim=1)]
    return torch.cat(parts, dim=1)


def generate(model: Any, tokens: torch.Tensor, count: int = 24, **kwargs: Any) -> torch.Tensor:
    """The prompt and exactly `count` new tokens, greedy unless `kwargs` say otherwise."""
    with torch.no_grad():
        return model.generate(
            input_ids=tokens,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            **{"do_sample": False} | kwargs,
        )


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether a and b differ by at most `tolerance` of b's largest number."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def attention_outputs(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the first attention module of each kind returns: later ones see inputs that differ already."""
    found: list[torch.Tensor] = []
    first = next(mla_modules(model))
    handle = first.register_forward_hook(lambda _m, _a, out: found.append(out[0]))
    logits(model, tokens)
    handle.remove()
    return found


CHANGES: dict[str, Callable[[Any, float], Any]] = {
    "in place": lambda p, by: p.mul_(by),
    "through .data": lambda p, by: p.data.mul_(by),
    "another tensor": lambda p, by: setattr(p, "data", p.data * by),
}
