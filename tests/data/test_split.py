"""Which documents are held out: properties of the division."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from landscape_ray.data.build import choose_held_out

DOCUMENTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2**64 - 1)), min_size=1, max_size=60)
FRACTIONS = st.floats(0.01, 0.5)


def columns(documents: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Content c has size 7 c mod 23: equal content has equal size, and some documents are empty."""
    content = np.array([c for c, _ in documents], dtype=np.uint64)
    key = np.array([k for _, k in documents], dtype=np.uint64)
    return content, key, (content * 7 % 23).astype(np.int64)


@given(DOCUMENTS, FRACTIONS)
def test_both_splits_get_something_whenever_two_contents_differ(
    documents: list[tuple[int, int]], fraction: float
) -> None:
    content, key, size = columns(documents)
    held_out = choose_held_out(content, key, size, fraction)
    assert held_out.shape == content.shape
    if len(np.unique(content[size > 0])) < 2:
        assert not held_out.any()
    else:
        assert size[held_out].sum() > 0
        assert size[~held_out].sum() > 0


@given(DOCUMENTS, FRACTIONS)
def test_equal_content_goes_to_one_split(documents: list[tuple[int, int]], fraction: float) -> None:
    content, key, size = columns(documents)
    held_out = choose_held_out(content, key, size, fraction)
    assert not set(content[held_out].tolist()) & set(content[~held_out].tolist())


@given(DOCUMENTS, FRACTIONS)
def test_share_is_not_exceeded_unless_no_group_fits(documents: list[tuple[int, int]], fraction: float) -> None:
    content, key, size = columns(documents)
    held_out = choose_held_out(content, key, size, fraction)
    group_sizes = [int(size[content == c].sum()) for c in np.unique(content) if size[content == c].sum() > 0]
    if len(group_sizes) >= 2:
        assert size[held_out].sum() <= max(fraction * size.sum(), min(group_sizes)) + 1e-9


@given(DOCUMENTS, FRACTIONS, st.randoms(use_true_random=False))
def test_order_of_the_documents_does_not_matter(
    documents: list[tuple[int, int]], fraction: float, random: object
) -> None:
    order = list(range(len(documents)))
    random.shuffle(order)  # type: ignore[attr-defined]
    documents = [(c, k) for c, k in {k: (c, k) for c, k in documents}.values()]  # ties of keys have no order
    order = [index for index in order if index < len(documents)]
    held_out = choose_held_out(*columns(documents), fraction)
    permuted = choose_held_out(*columns([documents[index] for index in order]), fraction)
    assert permuted.tolist() == held_out[order].tolist()


def test_share_of_many_small_documents_is_met_closely() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    content = generator.integers(0, 2**63, 3000).astype(np.uint64)
    size = generator.integers(1, 1000, 3000)
    held_out = choose_held_out(content, content, size, 0.1)
    assert 0.0999 < size[held_out].sum() / size.sum() <= 0.1
