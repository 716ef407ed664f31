"""Spectra of the parts of a run: of its layers, of its classes, and of batches of several sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from landscape_ray import text
from landscape_ray.data import Batch, Data, TextData
from landscape_ray.probes.operators.blocks import by_class, frequency_bands, layers
from landscape_ray.probes.spectrum.batch_size import BatchSizeEffect, batch_size_effect
from landscape_ray.probes.spectrum.eigenpairs import Eigenvalues, eigenvalues
from landscape_ray.probes.spectrum.parts import class_eigenvalues, layer_eigenvalues
from landscape_ray.training.state import TrainState

MAX_CLASSES = 20
"""Of what a network tells apart, each by itself; more, such as the tokens of a vocabulary, are put into bands."""

NUM_BANDS = 8

MAX_NAMED = 4
"""Tokens that the name of a band spells out."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartSpectrum:
    """Eigenvalues of the Hessian of one part.

    Attributes:
        found: the largest and the smallest.
        size: of a layer, its trainable parameters; of a class, its share of the targets.
    """

    found: Eigenvalues
    size: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectra:
    """What was asked for; empty or None where it was not.

    Attributes:
        whole: of all weights on all targets, where parts were asked for.
        layers: of the diagonal block of each layer, by its name.
        classes: of the mean loss on the targets of each class, by its name.
        bands: whether the classes are bands of frequency.
        batch_sizes: extremal eigenvalues on batches of several sizes.
        unknown: what could not be measured, with the reason.
    """

    whole: Eigenvalues | None = None
    layers: dict[str, PartSpectrum] = dataclasses.field(default_factory=dict)
    classes: dict[str, PartSpectrum] = dataclasses.field(default_factory=dict)
    bands: bool = False
    batch_sizes: BatchSizeEffect | None = None
    unknown: dict[str, str] = dataclasses.field(default_factory=dict)


def spectra(
    state: TrainState,
    batches: list[tuple[Batch, int]],
    *,
    by_layer: bool = False,
    by_target: bool = False,
    batch_sizes: Sequence[int] = (),
    num_eigenvalues: int = 3,
    progress: Progress | None = None,
) -> Spectra:
    """Return spectra of the Hessian at the present weights, in eval mode.

    Args:
        state: of the run; left as it is.
        batches: what to measure on, with numbers of examples; of the sizes, batches are drawn from all of it.
        by_layer: whether to measure each layer's diagonal block.
        by_target: whether to measure the loss on each class, or on each of 8 bands of frequency where there are more
            than 20 values.
        batch_sizes: see :func:`landscape_ray.probes.spectrum.batch_size.batch_size_effect`; none: not measured.
        num_eigenvalues: largest ones of each part, >= 1; one smallest beside them.
        progress: called with the name of what comes next.

    Raises:
        UserError: batch sizes that are too few, or too large for the examples.
    """
    tell = progress or (lambda name: None)
    module, loss, seed = state.module, state.objective, state.config.seed
    whole: Eigenvalues | None = None
    found_layers: dict[str, PartSpectrum] = {}
    found_classes: dict[str, PartSpectrum] = {}
    unknown: dict[str, str] = {}
    if not all(bool(p.isfinite().all()) for p in module.parameters()):
        return Spectra(unknown={"spectra": "the weights are not finite"})
    if by_layer or by_target:
        tell("spectrum of the whole network")
        whole = eigenvalues(module, loss, batches, k=num_eigenvalues, num_smallest=1, tol=0.03, seed=seed)
    if by_layer:
        owned = layers(module)
        places = {name: place for place, name in enumerate(owned, start=1)}
        by_name = layer_eigenvalues(
            module,
            loss,
            batches,
            k=num_eigenvalues,
            num_smallest=1,
            seed=seed,
            progress=lambda name: tell(f"spectrum of layer {places[name]} of {len(places)}, {name}"),
        )
        found_layers = {
            name: PartSpectrum(found=found, size=sum(p.numel() for p in owned[name])) for name, found in by_name.items()
        }
    targets = torch.cat([own.flatten() for (_, own), _ in batches])
    bands = False
    if by_target and (targets.is_floating_point() or bool((targets < 0).any())):
        unknown["class-wise spectra"] = "the targets are no classes"
    elif by_target:
        bands = int((torch.bincount(targets) > 0).sum()) > MAX_CLASSES
        groups = frequency_bands(targets, NUM_BANDS) if bands else None
        shares = {number: part.share for number, part in by_class(loss, batches, groups).items()}
        names = {
            number: _band(state.data, targets, groups, number) if groups is not None else str(number)
            for number in shares
        }
        by_number = class_eigenvalues(
            module,
            loss,
            batches,
            groups=groups,
            k=num_eigenvalues,
            num_smallest=1,
            seed=seed,
            progress=lambda number: tell(f"spectrum of {'band' if bands else 'class'} {names[number]}"),
        )
        found_classes = {
            names[number]: PartSpectrum(found=found, size=shares[number]) for number, found in by_number.items()
        }
    effect: BatchSizeEffect | None = None
    if batch_sizes:
        inputs, outputs = (torch.cat([batch[place] for batch, _ in batches]) for place in (0, 1))
        effect = batch_size_effect(
            module, loss, (inputs, outputs), batch_sizes, seed=seed, progress=lambda name: tell(f"spectrum on {name}")
        )
    return Spectra(
        whole=whole, layers=found_layers, classes=found_classes, bands=bands, batch_sizes=effect, unknown=unknown
    )


def _band(data: Data, targets: torch.Tensor, groups: torch.Tensor, number: int) -> str:
    """Return a band's name: its place, and the values in it that occur: a few as text, or how many."""
    counts = torch.bincount(targets.flatten().cpu())
    present = [value for value in counts.argsort(descending=True, stable=True).tolist() if counts[value] > 0]
    own = [value for value in present if int(groups[value]) == number]
    if isinstance(data, TextData) and len(own) <= MAX_NAMED:
        texts = [data.text_of([value]) for value in own]
        if None not in texts:
            return f"{number + 1} ({' '.join(repr(own_text) for own_text in texts)})"
    return f"{number + 1} ({text.plural(len(own), 'token' if isinstance(data, TextData) else 'value')})"
