"""The benchmark measures what it says, on two members."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "bench_cohort.py"))


def test_a_line_of_the_table() -> None:
    line = SCRIPT["measure"]("mlp-9k", 2, torch.device("cpu"), 1, 0.001, True).split()
    assert line[:2] == ["mlp-9k", "2"]
    assert all(float(rate) > 0 for rate in line[2:7])
    assert line[-1] in ("single/1", "recorded/2", "abreast/1")


@pytest.mark.parametrize(("name", "size"), [("mlp-9k", 8970), ("mlp-301k", 301066), ("gpt-875k", 874_880)])
def test_models_have_the_sizes_of_their_names(name: str, size: int) -> None:
    (config,), data = SCRIPT["configs"](name, 1, "cpu"), SCRIPT["data_for"](name)
    module = SCRIPT["ByHand"]([config], data, torch.device("cpu"))._modules[0]
    assert module.num_params() == pytest.approx(size, rel=0.07)


def test_by_hand_is_what_the_cohort_trains() -> None:
    settings, data = SCRIPT["configs"]("mlp-9k", 2, "cpu"), SCRIPT["data_for"]("mlp-9k")
    by_hand = SCRIPT["ByHand"](settings, data, torch.device("cpu"))
    together = SCRIPT["Together"](settings, data, "stacked")
    for _ in range(5):
        by_hand()
        together()
    for module, member in zip(by_hand._modules, together.cohort.members, strict=True):
        for a, b in zip(module.parameters(), member.module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
