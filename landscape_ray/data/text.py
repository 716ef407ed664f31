"""Language-model batches from real text: the standard library's source code, or the user's own files.

A batch is a function of (seed, step): nothing is remembered between calls, so that a resumed, cloned or repeated run
sees the same data, and any process can say what step 1,000 was trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from landscape_ray.config import Model
from landscape_ray.data.build import Advance, build_corpus
from landscape_ray.data.cache import corpus_folder, default_cache, open_or_build
from landscape_ray.data.shards import Manifest, SplitName, Tokens, is_corpus, read_corpus
from landscape_ray.data.sources import Source, find_source
from landscape_ray.errors import UserError

TRAIN_STREAM, PROBE_STREAM = 0, 1


class TextConfig(Model):
    """The fields of `[train.data]` for text."""

    source: str = Field("stdlib", min_length=1)
    """`stdlib` (the source code of the running Python's standard library), or a path: a folder of UTF-8 text files, a
    text file, `.jsonl` or `.jsonl.gz`, Parquet (strings, or a column `tokens`), a dataset saved by `save_to_disk`, or
    a corpus folder of this package."""
    context_length: int = Field(128, ge=8)
    """Tokens in one training window."""
    text_field: str = Field("text", min_length=1)
    """The field of JSONL or the column of a table that holds the text (or lists of tokens)."""
    validation_fraction: float = Field(0.1, gt=0.0, le=0.5)
    """Share of the bytes to hold out, where the source does not come with splits of its own."""
    vocab_size: int | None = Field(None, ge=1)
    """Number of token values; by default 256 for text, and the largest token plus one for a source of tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A corpus in memory, and the batches drawn from it.

    >>> data = TextData(np.arange(200, dtype=np.uint8), np.arange(100, dtype=np.uint8), 256, 8)
    >>> inputs, targets = data.batch(seed=0, step=3, batch_size=4)
    >>> bool((targets == inputs + 1).all()), tuple(inputs.shape)
    (True, (4, 8))
    """

    train_tokens: Tokens
    validation_tokens: Tokens
    vocab_size: int
    context_length: int
    manifest: Manifest | None = None

    def __post_init__(self) -> None:
        for name, tokens in (("train", self.train_tokens), ("validation", self.validation_tokens)):
            if len(tokens) < 2 * (self.context_length + 1):
                raise UserError(
                    f"the {name} split must have at least 2 * (context_length + 1) = {2 * (self.context_length + 1)} "
                    f"tokens, got {len(tokens)}; give data.source more text, or change data.context_length or "
                    f"data.validation_fraction"
                )
            if int(tokens.max()) >= self.vocab_size:
                raise UserError(
                    f"data.vocab_size must be above every token, got {self.vocab_size} with token {tokens.max()} in "
                    f"{name}; leave it out or raise it"
                )

    @property
    def corpus_id(self) -> str:
        """Identity of the corpus: equal exactly where training would see the same data; empty without a manifest."""
        return self.manifest.corpus_id if self.manifest is not None else ""

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return inputs and next-token targets of one training step: windows at uniformly random offsets.

        Args:
            seed: seed of the run's data, >= 0.
            step: updates completed before this one, >= 0.
            batch_size: number of windows, B.

        Returns:
            Two (B, T) int64 tensors with T = context_length; targets[b, t] is the token after inputs[b, t].
        """
        return self._draw(seed, (TRAIN_STREAM, step), batch_size)

    def probe_batch(self, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return a fixed batch of training text for curvature probes, independent of every training batch.

        Args:
            seed: seed of the run's data, >= 0.
            batch_size: number of windows, B.

        Returns:
            Two (B, T) int64 tensors, as from :meth:`batch`.
        """
        return self._draw(seed, (PROBE_STREAM,), batch_size)

    def validation_batches(self, num_batches: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Return held-out windows, evenly spaced over the split and without overlap; the same at every call.

        With n = num_batches * batch_size windows over N tokens, window i starts at floor(i (N - 1 - T) / (n - 1)).

        Args:
            num_batches: number of batches, >= 1.
            batch_size: windows in each, >= 1.

        Raises:
            UserError: the held-out text has too few windows.
        """
        num_windows = num_batches * batch_size
        available = (len(self.validation_tokens) - 1) // self.context_length
        if not 1 <= num_windows <= available:
            raise UserError(
                f"validation needs 1 to {available} windows of {self.context_length} tokens, got num_batches * "
                f"batch_size = {num_batches} * {batch_size}; lower them, or give data.source more text"
            )
        last = len(self.validation_tokens) - 1 - self.context_length
        starts = np.arange(num_windows, dtype=np.int64) * last // max(num_windows - 1, 1)
        return [self._windows(self.validation_tokens, part) for part in np.split(starts, num_batches)]

    def _draw(self, seed: int, stream: tuple[int, ...], batch_size: int) -> tuple[Tensor, Tensor]:
        # A spawn key, because SeedSequence([5]) and SeedSequence([5, 0]) are the same sequence.
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream)))
        starts = generator.integers(len(self.train_tokens) - self.context_length, size=batch_size)
        return self._windows(self.train_tokens, starts)

    def _windows(self, tokens: Tokens, starts: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
        windows = tokens[starts[:, None] + np.arange(self.context_length + 1)].astype(np.int64)
        inputs, targets = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def open_text(
    config: TextConfig, *, cache: Path | None = None, progress: bool = False, verify: bool = False
) -> TextData:
    """Return the corpus that a configuration names; the first time it is built into the cache.

    The tokens of the corpus are held in memory. A damaged cache is built again; a damaged corpus folder of the user's
    is an error.

    Args:
        config: what to open.
        cache: the cache folder; by default `LANDSCAPE_RAY_CACHE`, else the user's cache folder.
        progress: show a progress bar on standard error while building.
        verify: check every hash of an existing corpus.

    Raises:
        UserError: missing, unreadable or too little text, a damaged corpus folder, or a cache that cannot be written.
    """
    manifest, tokens = _open(config, cache or default_cache(), progress, verify)
    vocab_size = config.vocab_size or manifest.vocab_size
    if vocab_size < manifest.vocab_size:
        raise UserError(
            f"data.vocab_size must be at least {manifest.vocab_size} for {manifest.source}, got {vocab_size}; "
            f"leave it out or raise it"
        )
    return TextData(tokens["train"], tokens["validation"], vocab_size, config.context_length, manifest)


def _open(config: TextConfig, cache: Path, progress: bool, verify: bool) -> tuple[Manifest, dict[SplitName, Tokens]]:
    own = Path(config.source).expanduser()
    if config.source != "stdlib" and is_corpus(own):
        return read_corpus(own, verify=verify)
    source = find_source(config.source)

    def build(folder: Path) -> None:
        with _progress(source, progress) as advance:
            build_corpus(
                source, folder, text_field=config.text_field, fraction=config.validation_fraction, advance=advance
            )

    folder = corpus_folder(cache, source, text_field=config.text_field, fraction=config.validation_fraction)
    return open_or_build(folder, build, verify=verify)


@contextlib.contextmanager
def _progress(source: Source, shown: bool) -> Iterator[Advance]:
    if not shown:
        yield lambda num_tokens: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        # Only whole files say beforehand how many tokens they are.
        total = 2 * sum(file.size_bytes for file in source.files) if source.kind in ("files", "paragraphs") else None
        task = bar.add_task(f"reading {source.label}", total=total)
        yield lambda num_tokens: bar.advance(task, num_tokens)
