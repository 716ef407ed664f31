"""Language-model batches from real text: the standard library's source code, or the user's own files.

A batch is a function of (seed, step): nothing is remembered between calls, so that a resumed, cloned or repeated run
sees the same data, and any process can say what step 1,000 was trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from landscape_ray import signature
from landscape_ray.config import Model
from landscape_ray.data.bpe import NUM_BYTE_VALUES, BpeTokenizer, library_version
from landscape_ray.data.build import Advance, build_corpus, build_shift
from landscape_ray.data.cache import corpus_folder, default_cache, open_or_build
from landscape_ray.data.dataset import PROBE_STREAM, TRAIN_STREAM, Batch, Data, generator_for
from landscape_ray.data.shards import Corpus, Manifest, Tokens, is_corpus, read_corpus
from landscape_ray.data.sources import Source, find_source
from landscape_ray.errors import UserError

DEFAULT_BPE_SIZE = 4096


class TextConfig(Model):
    """The fields of `[train.data]` for text."""

    name: Literal["text"] = "text"
    """Which data this is."""
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
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """What a token is: a byte, or a piece of a word from a byte-pair encoding that is trained on the training split
    (with the package `tokenizers`). A source of tokens and a corpus folder stay as they are."""
    vocab_size: int | None = Field(None, ge=1)
    """Number of token values. By default 256 for bytes, and the largest token plus one for a source of tokens; for bpe
    the size to train, by default 4096."""
    shifts: dict[str, str] = {}
    """Other domains to measure the held-out loss on: a name of yours, and a source that is held out as a whole, in the
    same tokens."""

    @field_validator("shifts")
    @classmethod
    def _shift_names(cls, shifts: dict[str, str]) -> dict[str, str]:
        for name, source in shifts.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"a name must be lower-case letters, digits and _, got '{name}'; it becomes a metric")
            if not source:
                raise ValueError(f"the source of '{name}' must be 'stdlib' or a path, got an empty text")
        return shifts

    @model_validator(mode="after")
    def _room_for_bytes(self) -> Self:
        if self.tokenizer == "bpe" and self.vocab_size is not None and self.vocab_size < NUM_BYTE_VALUES:
            raise ValueError(
                f"vocab_size must be at least {NUM_BYTE_VALUES} with tokenizer = 'bpe', whose first tokens are the "
                f"bytes, got {self.vocab_size}; raise it"
            )
        return self


class ShiftSet(NamedTuple):
    """Held-out text of another domain."""

    tokens: Tokens
    bytes_per_token: float | None = None
    """Mean bytes of text that a token stands for; None where the source is tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class TextData(Data):
    """A corpus in memory, and the batches drawn from it.

    Attributes:
        train_tokens: (n,) the training split.
        validation_tokens: (m,) the held-out split.
        vocab_size: above every token.
        context_length: tokens in a window, T.
        manifest: what the corpus was made of; None for tokens that come from no folder.
        tokenizer: gives text for tokens, where they are those of a byte-pair encoding.
        shift_sets: held-out text of other domains, by name.

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
    tokenizer: BpeTokenizer | None = None
    shift_sets: Mapping[str, ShiftSet] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tokens in (("train", self.train_tokens), ("validation", self.validation_tokens)):
            if len(tokens) < 2 * (self.context_length + 1):
                raise UserError(
                    f"the {name} split must have at least 2 * (context_length + 1) = {2 * (self.context_length + 1)} "
                    f"tokens, got {len(tokens)}; give data.source more text, or change data.context_length or "
                    f"data.validation_fraction"
                )
            self._check_range(name, tokens)
        for name, (tokens, _) in self.shift_sets.items():
            if len(tokens) < self.context_length + 1:
                raise UserError(
                    f"data.shifts.{name} must have at least context_length + 1 = {self.context_length + 1} tokens, "
                    f"got {len(tokens)}; give it more text, or change data.context_length"
                )
            self._check_range(f"data.shifts.{name}", tokens)

    def _check_range(self, name: str, tokens: Tokens) -> None:
        if int(tokens.max()) >= self.vocab_size:
            raise UserError(
                f"data.vocab_size must be above every token, got {self.vocab_size} with token {tokens.max()} in "
                f"{name}; leave it out or raise it"
            )

    @property
    def signature(self) -> signature.Tokens:
        """Tokens of `vocab_size` values, of which every next one is to be predicted."""
        return signature.Tokens(vocab_size=self.vocab_size, context_length=self.context_length)

    @property
    def corpus_id(self) -> str:
        """Identity of the corpus: equal exactly where training would see the same data; empty without a manifest."""
        return self.manifest.corpus_id if self.manifest is not None else ""

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of the held-out text over its tokens: a loss in nats per token, divided by it, is in nats per byte.

        Losses per byte compare across tokenizers, since the held-out text is the same. None where the source is
        tokens, of which nobody knows the text.
        """
        return _bytes_per_token(self.manifest) if self.manifest is not None else None

    def text_of(self, tokens: Sequence[int]) -> str | None:
        """Return the text of tokens, with a sign of replacement for what is no UTF-8; None where nobody knows it."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens).decode("utf-8", "replace")
        return bytes(tokens).decode("utf-8", "replace") if self.vocab_size <= NUM_BYTE_VALUES else None

    @property
    def shifts(self) -> tuple[str, ...]:
        """Names of the other domains."""
        return tuple(self.shift_sets)

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """Return inputs and next-token targets of one training step: windows at uniformly random offsets.

        Args:
            seed: seed of the run's data, >= 0.
            step: updates completed before this one, >= 0.
            batch_size: number of windows, B.

        Returns:
            Two (B, T) int64 tensors with T = context_length; targets[b, t] is the token after inputs[b, t].
        """
        return self._windows(self.train_tokens, self._starts(batch_size, seed, TRAIN_STREAM, step))

    def batches(self, seeds: Sequence[int], step: int, batch_size: int) -> Batch:
        """Return the batches of K runs stacked, two (K, B, T) tensors; entry k is `batch(seeds[k], step, B)`."""
        if len(set(seeds)) == 1:
            return super().batches(seeds, step, batch_size)
        starts = np.stack([self._starts(batch_size, seed, TRAIN_STREAM, step) for seed in seeds])
        return self._windows(self.train_tokens, starts)

    def probe_batch(self, seed: int, batch_size: int) -> Batch:
        """Return a fixed batch of training text for curvature probes, independent of every training batch.

        Args:
            seed: seed of the run's data, >= 0.
            batch_size: number of windows, B.

        Returns:
            Two (B, T) int64 tensors, as from :meth:`batch`.
        """
        return self._windows(self.train_tokens, self._starts(batch_size, seed, PROBE_STREAM))

    def validation_batches(self, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return held-out windows, evenly spaced over the split and without overlap; the same at every call.

        With n = num_batches * batch_size windows over N tokens, window i starts at floor(i (N - 1 - T) / (n - 1)).

        Args:
            num_batches: number of batches, >= 1; None for as many windows as there are without overlap, in batches of
                which the last may be smaller.
            batch_size: windows in each, >= 1.

        Raises:
            UserError: the held-out text has too few windows.
        """
        return self._evenly_spaced("validation", self.validation_tokens, num_batches, batch_size)

    def shift_batches(self, name: str, num_batches: int | None, batch_size: int) -> list[Batch]:
        """Return windows of another domain, chosen as :meth:`validation_batches` chooses them.

        Raises:
            UserError: the data has no such shift set, or too few windows of it.
        """
        if name not in self.shift_sets:
            return super().shift_batches(name, num_batches, batch_size)
        return self._evenly_spaced(f"shift '{name}'", self.shift_sets[name].tokens, num_batches, batch_size)

    def _evenly_spaced(self, name: str, tokens: Tokens, num_batches: int | None, batch_size: int) -> list[Batch]:
        available = (len(tokens) - 1) // self.context_length
        num_windows = available if num_batches is None else num_batches * batch_size
        if not 1 <= num_windows <= available:
            raise UserError(
                f"{name} needs 1 to {available} windows of {self.context_length} tokens, got num_batches * "
                f"batch_size = {num_batches} * {batch_size}; lower them, or give it more text"
            )
        last = len(tokens) - 1 - self.context_length
        starts = np.arange(num_windows, dtype=np.int64) * last // max(num_windows - 1, 1)
        return [self._windows(tokens, starts[i : i + batch_size]) for i in range(0, num_windows, batch_size)]

    def _starts(self, batch_size: int, seed: int, *stream: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        num_starts = len(self.train_tokens) - self.context_length
        return generator_for(seed, *stream).integers(num_starts, size=batch_size)

    def _windows(self, tokens: Tokens, starts: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        windows = tokens[starts[..., None] + np.arange(self.context_length + 1)]
        inputs, targets = windows[..., :-1].astype(np.int64), windows[..., 1:].astype(np.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def _bytes_per_token(manifest: Manifest) -> float | None:
    held_out = manifest.splits["validation"]
    return held_out.num_bytes / held_out.num_tokens if held_out.num_bytes is not None else None


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
        UserError: missing, unreadable or too little text (of a shift set too), a damaged corpus folder, a cache that
            cannot be written, or a tokenizer that the source or the installation does not allow.
    """
    cache = cache or default_cache()
    corpus = _open(config, cache, progress, verify)
    manifest = corpus.manifest
    vocab_size = config.vocab_size or manifest.vocab_size
    if vocab_size < manifest.vocab_size:
        raise UserError(
            f"data.vocab_size must be at least {manifest.vocab_size} for {manifest.source}, got {vocab_size}; "
            f"leave it out or raise it"
        )
    tokenizer = BpeTokenizer(corpus.tokenizer) if corpus.tokenizer is not None else None
    shift_sets = {}
    for name, source in config.shifts.items():
        try:
            shift = _open_shift(source, config.text_field, manifest, tokenizer, cache, progress, verify)
        except UserError as error:
            raise UserError(str(error).replace("data.source", f"data.shifts.{name}")) from None
        shift_sets[name] = ShiftSet(shift.tokens["validation"], _bytes_per_token(shift.manifest))
    return TextData(
        corpus.tokens["train"],
        corpus.tokens["validation"],
        vocab_size,
        config.context_length,
        manifest,
        tokenizer,
        shift_sets,
    )


def _open(config: TextConfig, cache: Path, progress: bool, verify: bool) -> Corpus:
    own = Path(config.source).expanduser()
    if config.source != "stdlib" and is_corpus(own):
        corpus = read_corpus(own, verify=verify)
        if config.tokenizer == "bpe" and corpus.manifest.tokenization != "bpe":
            raise UserError(
                f"data.tokenizer must be left out for the corpus folder {own}, whose tokens are "
                f"{corpus.manifest.tokenization}, got 'bpe'; or give data.source the text that it was built from"
            )
        return corpus
    source = find_source(config.source)
    bpe_size = (config.vocab_size or DEFAULT_BPE_SIZE) if config.tokenizer == "bpe" else None

    def build(folder: Path) -> None:
        with _progress(source, 2 if bpe_size is None else 3, progress) as advance:
            build_corpus(
                source,
                folder,
                text_field=config.text_field,
                fraction=config.validation_fraction,
                advance=advance,
                bpe_size=bpe_size,
            )

    folder = corpus_folder(
        cache,
        source,
        text_field=config.text_field,
        fraction=config.validation_fraction,
        choices=("bytes",) if bpe_size is None else ("bpe", bpe_size, library_version()),
    )
    return open_or_build(folder, build, verify=verify)


def _open_shift(
    name: str,
    text_field: str,
    like: Manifest,
    tokenizer: BpeTokenizer | None,
    cache: Path,
    progress: bool,
    verify: bool,
) -> Corpus:
    source = find_source(name)

    def build(folder: Path) -> None:
        with _progress(source, 2, progress) as advance:
            build_shift(source, folder, text_field=text_field, advance=advance, like=like, tokenizer=tokenizer)

    kind = like.tokenizer.sha256 if like.tokenizer is not None else like.tokenization
    folder = corpus_folder(cache, source, text_field=text_field, fraction=1.0, choices=("shift", kind))
    return open_or_build(folder, build, verify=verify)


@contextlib.contextmanager
def _progress(source: Source, num_passes: int, shown: bool) -> Iterator[Advance]:
    if not shown:
        yield lambda num_tokens: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        # Only files of text say beforehand how much they hold.
        num_bytes = sum(file.size_bytes for file in source.files) if source.kind in ("files", "paragraphs") else None
        total = num_passes * num_bytes if num_bytes is not None else None
        task = bar.add_task(f"reading {source.label}", total=total)
        yield lambda num_tokens: bar.advance(task, num_tokens)
