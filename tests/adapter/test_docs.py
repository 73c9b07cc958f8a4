"""The tables of docs/adapters.md agree with the registered adapter methods and with the recipe's schema."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from mla_tune.adapter.methods import LORA, AdapterMethod
from mla_tune.recipe.schema import AdapterSection
from mla_tune.sockets import ADAPTER_METHODS

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
#: Values of r and alpha for which α/r, α/√r and other formulas differ.
RANK, ALPHA = 4, 12.0
SCALES = {"α/r": ALPHA / RANK, "α/√r": ALPHA / RANK**0.5}


def table(title: str) -> dict[str, list[str]]:
    """Return the cells of each row by the row's name (`name` in the first column), for the table under this title."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name.strip("`"): cells for name, *cells in rows[2:]}


def test_the_page_has_every_method_and_none() -> None:
    assert list(table("Methods")) == [*ADAPTER_METHODS, "none"]


@pytest.mark.parametrize("name", list(ADAPTER_METHODS))
def test_a_method_is_described_as_it_is(name: str) -> None:
    method = ADAPTER_METHODS.get(name)
    formula, scale, vectors, through_parameters, quantized, sharded = table("Methods")[name]
    assert (formula == "W + s·B·A") == (type(method).finish is AdapterMethod.finish)
    assert method.scale(ALPHA, RANK) == SCALES[scale]
    assert (vectors == "–") == (method.params(0, 1) == 0)
    assert (through_parameters == "yes") == method.through_parameters == method.on_experts
    assert (quantized == "yes") == (not method.unsupported_on_quantized)
    assert (sharded == "yes") == method.sharded
    assert {through_parameters, quantized, sharded} <= {"yes", "refused"}


def test_a_wrong_cell_would_be_found() -> None:
    assert LORA.scale(ALPHA, RANK) != SCALES["α/√r"]
    assert table("Methods")["dora"][3] == "refused"


def test_the_page_has_every_init() -> None:
    assert tuple(table("How A and B begin")) == get_args(AdapterSection.model_fields["init"].annotation)
