"""The front door: what `import mla_tune` offers, without torch until it is needed, and docs/python.md as it stands."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mla_tune

ROOT = Path(__file__).parents[1]
NAMES = (
    "load_recipe", "inspect", "plan", "train", "merge_absorb", "verify", "generate", "absorb", "expand", "LatentCache",
)  # fmt: skip


def test_the_front_door_has_these_names() -> None:
    assert set(mla_tune.__all__) == set(NAMES)
    assert set(NAMES) <= set(dir(mla_tune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mla_tune.nothing  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_each_is_documented_and_typed(name: str) -> None:
    found = getattr(mla_tune, name)
    assert len((inspect.getdoc(found) or "").split()) > 15
    call = found.__init__ if isinstance(found, type) else found
    hints = inspect.signature(call).parameters.values()
    assert all(p.annotation is not inspect.Parameter.empty for p in hints if p.name != "self")


def test_names_stay_functions_whatever_is_imported() -> None:
    import mla_tune.training.run
    import mla_tune.verification.verify

    assert callable(mla_tune.train)
    assert callable(mla_tune.verify)


def test_import_and_inspect_load_no_torch() -> None:
    program = (
        "import sys, mla_tune\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "recipe = mla_tune.load_recipe('safe')\n"
        "assert mla_tune.inspect('deepseek-v3', recipe=recipe).architecture.dims.H == 128\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_docs_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "128 512 64" in printed
    assert "70272" in printed
    assert "done 4" in printed
    assert "['mine', None]" in printed
    assert "unknown key 'rnk'" in printed
    lines = printed.splitlines()
    assert lines.count("True") == 2  # verify holds; absorbed and expanded decoding agree
