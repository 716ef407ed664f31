"""Large matrices begin at a huge page and are zero."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from landscape_ray.training.cohort.memory import HUGE_PAGE, zeros

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(3, 5), (2, HUGE_PAGE // 8), (3, HUGE_PAGE // 8 + 1)])
def test_zeros_are_zero_and_own_their_memory(size: tuple[int, int]) -> None:
    first, second = zeros(*size, device=CPU), zeros(*size, device=CPU)
    assert first.shape == size
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    first.fill_(1.0)
    assert not second.any()
    assert first.sum().item() == first.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_large_ones_begin_at_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zeros(2, HUGE_PAGE // 8, device=CPU).data_ptr() % HUGE_PAGE == 0

    class Without(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("no huge pages in this kernel")

    monkeypatch.setattr(mmap, "mmap", Without)
    assert not zeros(2, HUGE_PAGE // 8, device=CPU).any()
