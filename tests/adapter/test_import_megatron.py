"""Imported adapters of NeMo and Megatron-Bridge, merged, are base + alpha/r · B A.

The oracle adds the product in float64 to the tensor of the base that a name means in NeMo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_families import FAMILIES, tiny

R, ALPHA = 3, 6.0
IDS = torch.arange(12)[None]
WEIGHTS = "model.safetensors"
ATTENTION = {
    "linear_q_down_proj": ("q_a_proj", 44, 48),
    "linear_q_up_proj": ("q_b_proj", 78, 44),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa", 34, 48),
    "linear_kv_up_proj": ("kv_b_proj", 96, 28),
    "linear_proj": ("o_proj", 48, 36),
}

SIDES = ("adapter.linear_in", "adapter.linear_out")
FIRST = "module.decoder.layers"
Tensors = dict[str, torch.Tensor]


class Nemo:
    """Random factors in NeMo's names, and what they add to each tensor of the base."""

    def __init__(self, prefix: str = "module.decoder.layers", sides: tuple[str, str] = SIDES) -> None:
        self.prefix, self.generator = prefix, torch.Generator().manual_seed(3)
        self.A, self.B = sides
        self.tensors: Tensors = {}
        self.delta: dict[str, np.ndarray] = {}

    def pair(self, name: str, out: int, inner: int, *stack: int) -> tuple[np.ndarray, np.ndarray]:
        A = torch.randn(*stack, R, inner, generator=self.generator)
        B = torch.randn(*stack, out, R, generator=self.generator)
        self.tensors |= {f"{self.prefix}.{name}.{self.A}.weight": A, f"{self.prefix}.{name}.{self.B}.weight": B}
        return A.double().numpy(), B.double().numpy()

    def add(self, key: str, A: np.ndarray, B: np.ndarray) -> None:
        self.delta[key] = ALPHA / R * (B @ A)

    def attention(self, layer: int, *names: str) -> None:
        for name in names or ATTENTION:
            leaf, out, inner = ATTENTION[name]
            self.add(
                f"model.layers.{layer}.self_attn.{leaf}.weight",
                *self.pair(f"{layer}.self_attention.{name}", out, inner),
            )

    def mlp(self, layer: int, block: str, width: int, ours: str) -> None:
        """Add an adapter on an MLP; `ours` is the path of its gate_proj, up_proj and down_proj in a checkpoint."""
        A, B = self.pair(f"{layer}.{block}.linear_fc1", 2 * width, 48)
        self.add(f"{ours}.gate_proj.weight", A, B[:width])
        self.add(f"{ours}.up_proj.weight", A, B[width:])
        self.add(f"{ours}.down_proj.weight", *self.pair(f"{layer}.{block}.linear_fc2", 48, width))

    def experts(self, layer: int, kind: str) -> None:
        ours = f"model.layers.{layer}.mlp.experts"
        if kind == "some":
            for e in (0, 2):
                self.mlp(layer, f"mlp.experts.local_experts.{e}", 40, f"{ours}.{e}")
            return
        stack = (4,) if kind == "stack" else ()
        block = "mlp.experts.experts" if kind == "stack" else "mlp.experts"
        up = self.pair(f"{layer}.{block}.linear_fc1", 80, 48, *stack)
        down = self.pair(f"{layer}.{block}.linear_fc2", 48, 40, *stack)
        for e in range(4):
            (A, B), (A2, B2) = ((a[e], b[e]) if stack else (a, b) for a, b in (up, down))
            self.add(f"{ours}.{e}.gate_proj.weight", A, B[:40])
            self.add(f"{ours}.{e}.up_proj.weight", A, B[40:])
            self.add(f"{ours}.{e}.down_proj.weight", A2, B2)

    def save(self, folder: Path, **config: Any) -> Path:
        folder.mkdir()
        save_file(self.tensors, folder / "weights.safetensors")
        if config:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


def base_of(tmp_path: Path, name: str = "deepseek_v3") -> Path:
    tiny(name).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def assert_is(cli, nemo: Nemo, source: Path, base: Path, tmp_path: Path, *options: str) -> None:
    """Import and merge, and compare every tensor of the output with base + delta; the merge itself checks that the
    logits are those of PEFT with the imported adapter."""
    done = cli("import-adapter", source, "--base", base, "--out", tmp_path / "peft", *options)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    merged = cli("merge-absorb", tmp_path / "peft", "--base", base, "--out", out, "--exact", "--json", "--mtp")
    assert merged.code == 0, merged.err
    before, after = load_file(base / WEIGHTS), load_file(out / WEIGHTS)
    assert nemo.delta.keys() <= before.keys()
    for key, tensor in before.items():
        exact = tensor.double().numpy() + nemo.delta.get(key, 0.0)
        np.testing.assert_array_equal(after[key].numpy(), exact.astype(np.float32), err_msg=key)
    logits = json.loads(merged.out)["logits"]
    assert not logits["reason"]
    assert logits["merged"]["max_error"] < 2e-4


@pytest.mark.parametrize("experts", ["some", "one for all", "stack"])
def test_every_matrix(cli, experts: str, tmp_path: Path) -> None:
    nemo, base = Nemo(), base_of(tmp_path)
    nemo.attention(0)
    nemo.attention(2)
    nemo.mlp(0, "mlp", 56, "model.layers.0.mlp")
    nemo.mlp(1, "mlp.shared_experts", 80, "model.layers.1.mlp.shared_experts")
    nemo.experts(1, experts)
    nemo.tensors["module.decoder.layers.0.self_attention.linear_proj.adapter.linear_in._extra_state"] = torch.zeros(1)
    source = nemo.save(tmp_path / "nemo", r=R, lora_alpha=ALPHA)
    assert_is(cli, nemo, source, base, tmp_path)
    # Stock PEFT loads it and computes the same.
    model: Any = PeftModel.from_pretrained(tiny("deepseek_v3"), str(tmp_path / "peft")).eval()
    again: Any = tiny("deepseek_v3").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = model(input_ids=IDS).logits - again(input_ids=IDS).logits
    assert difference.abs().max() < 2e-4


@pytest.mark.parametrize(
    ("prefix", "sides"),
    [
        ("decoder.layers", ("adapter.linear_in", "adapter.linear_out")),
        ("base_model.model.model.decoder.layers", ("lora_A", "lora_B")),
        ("model.decoder.layers", ("lora_a", "lora_b")),
        ("module.module.decoder.layers", ("lora_A.default", "lora_B.default")),
    ],
)
def test_variants_of_the_names(cli, prefix: str, sides: tuple[str, str], tmp_path: Path) -> None:
    nemo, base = Nemo(prefix, sides), base_of(tmp_path)
    nemo.attention(1, "linear_kv_up_proj", "linear_proj")
    source = nemo.save(tmp_path / "nemo")
    done = cli("import-adapter", source, "--base", base, "--out", tmp_path / "no")
    assert done.code == 2
    assert "give it with --alpha" in done.err
    assert_is(cli, nemo, source, base, tmp_path, "--alpha", str(ALPHA))


def test_layers_of_mtp_come_after_the_decoders(cli, tmp_path: Path) -> None:
    base = base_of(tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / WEIGHTS)
    tensors |= {k.replace("layers.2.", "layers.3."): v + 0.1 for k, v in tensors.items() if "layers.2." in k}
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    nemo = Nemo()
    nemo.attention(0, "linear_proj")
    A, B = nemo.pair("0.self_attention.linear_q_up_proj", 78, 44)
    nemo.add("model.layers.0.self_attn.q_b_proj.weight", A, B)
    nemo.prefix = "mtp.layers"
    A, B = nemo.pair("0.transformer_layer.self_attention.linear_proj", 48, 36)
    nemo.add("model.layers.3.self_attn.o_proj.weight", A, B)
    assert_is(cli, nemo, nemo.save(tmp_path / "nemo", alpha=ALPHA), base, tmp_path)


def test_bailing_hybrid(cli, tmp_path: Path) -> None:
    """A family without query compression, whose checkpoints have names of their own."""
    base, nemo = base_of(tmp_path, "bailing_hybrid"), Nemo()
    A, B = nemo.pair("1.self_attention.linear_q_proj", 78, 48)
    nemo.add("model.layers.1.attention.q_proj.weight", A, B)
    A, B = nemo.pair("3.self_attention.linear_proj", 48, 36)
    nemo.add("model.layers.3.attention.dense.weight", A, B)
    assert_is(cli, nemo, nemo.save(tmp_path / "nemo", alpha=ALPHA), base, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "linear_out" in k)), "only one factor of a pair"),
        (lambda t: t.update({k: v[: len(v) // 2] for k, v in t.items() if "linear_out" in k}), "tensor-parallel rank"),
        (lambda t: t.update({f"{FIRST}.0.self_attention.linear_qkv.{SIDES[0]}.weight": torch.ones(3, 48)}),
         "'linear_qkv' is not a matrix of MLA"),
        (lambda t: t.update({f"{FIRST}.9.self_attention.linear_proj.{SIDES[0]}.weight": torch.ones(3, 36)}),
         "layer 9 of this model has no W_O"),
        (lambda t: t.update({"vision_model.blocks.0.lora_A.weight": torch.ones(3, 36)}), "not a name that NeMo"),
        (lambda t: t.clear(), "it holds no adapter"),
    ],
)  # fmt: skip
def test_what_can_not_be_imported_is_named(cli, change: Any, message: str, tmp_path: Path) -> None:
    nemo, base = Nemo(), base_of(tmp_path)
    nemo.attention(0, "linear_proj")
    change(nemo.tensors)
    source = nemo.save(tmp_path / "nemo", alpha=ALPHA)
    done = cli("import-adapter", source, "--base", base, "--out", tmp_path / "peft")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "peft").exists()


def test_other_formats_and_an_output_folder_that_is_not_empty(cli, tmp_path: Path) -> None:
    base, source = base_of(tmp_path), tmp_path / "source"
    source.mkdir()
    for file, message in ((None, "holds no safetensors file"), ("a.distcp", "distributed"), ("a.pt", "holds pickles")):
        if file:
            (source / file).write_bytes(b"")
        done = cli("import-adapter", source, "--base", base, "--out", tmp_path / "peft", "--alpha", "1")
        assert (done.code, message in done.err) == (2, True), done.err
    done = cli("import-adapter", source, "--base", base, "--out", base, "--alpha", "1")
    assert done.code == 2
    assert "exists already" in done.err
    longcat = base_of(tmp_path / "longcat", "longcat_flash")
    nemo = Nemo()
    nemo.attention(0, "linear_proj")
    done = cli("import-adapter", nemo.save(tmp_path / "n", alpha=1), "--base", longcat, "--out", tmp_path / "peft")
    assert done.code == 2
    assert "two attention modules in a layer" in done.err
    assert FAMILIES["longcat_flash"]["num_layers"] == 2
