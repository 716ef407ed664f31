"""Parts of a curvature matrix: the parameters of a layer, the targets of a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from landscape_ray.errors import UserError
from landscape_ray.probes.fixed_loss import Batches, weighted
from landscape_ray.probes.losses import DetailedLoss, Likelihood, Loss, detailed


def layers(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters by the layer that owns them, in the order of `module.parameters()`.

    For `FixedLoss(..., parameters=...)`, whose operators are then the diagonal blocks of the layers. A layer is a
    module with parameters of its own, under its name in `named_modules`, "root" for the module itself; tied weights are
    in the first layer that has them, and parametrised ones in the layer that uses them.

    >>> {name: len(own) for name, own in layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))).items()}
    {'0': 2, '2': 2}
    """
    itself = "root_" if "root" in dict(module.named_children()) else "root"  # names become keys: "." is refused as one
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0].partition("parametrizations.")[0].removesuffix(".")
            found.setdefault(owner or itself, []).append(parameter)
    return found


class ClassLoss:
    """The mean loss over the targets of one class, where an example has targets of several.

    `per_target` gives one loss for each target still: those of other classes are zero, and those of the class
    larger in proportion, so that the mean over all is the mean over the class.
    """

    likelihood: Likelihood | None = None

    def __init__(self, loss: DetailedLoss, classes: Tensor) -> None:
        """Take the loss of all targets, and which target values belong to the class, (number of values,) of bools."""
        self.loss, self.classes = loss, classes

    def per_target(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one loss for each target, flat.

        Raises:
            UserError: the loss reduces.
        """
        inside = self.classes.to(targets.device)[targets.flatten()]
        losses = self.loss.per_target(outputs, targets)
        if losses.dim() == 0 or losses.numel() != inside.numel():  # one mean would be taken for the loss of each
            raise UserError(
                f"loss.per_target must give one value for each of {inside.numel()} targets for class-wise curvature, "
                f"got shape {tuple(losses.shape)}; do not reduce"
            )
        return torch.where(inside, losses, 0.0) / inside.to(losses.dtype).mean()

    def __call__(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean loss over the targets of the class, 0-d."""
        inputs, targets = batch
        return self.per_target(module(inputs), targets).mean()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassPart:
    """What belongs to one class: `observing(module, part.loss, part.batches)` gives its function.

    Attributes:
        loss: its mean over the batches is the mean loss over the targets of the class.
        batches: pairs of the examples with such targets and their weight.
        share: of the class in the whole; the functions of all classes, weighted by it, sum to that of all targets, and
            so do their Hessians and Gauss-Newton matrices.
    """

    loss: DetailedLoss
    batches: list[tuple[tuple[Tensor, Tensor], float]]
    share: float


def by_class(loss: Loss, batches: Batches, groups: Tensor | Sequence[int] | None = None) -> dict[int, ClassPart]:
    """Return the parts of the mean loss on these batches that belong to the classes of the targets.

    Examples without a target of a class are left out of its part. Where examples have one target each, the loss stays
    what it is; where they have several, such as the tokens of a sequence, targets of other classes are masked.

    Args:
        loss: a `DetailedLoss`.
        batches: see :data:`landscape_ray.probes.fixed_loss.Batches`; `(inputs, targets)` each, with integer targets
            >= 0. With data-parallel processes, each must hold every class that is measured.
        groups: class of each target value, such as a frequency band of each token; None takes the values as classes.

    Returns:
        The parts by class, ascending; classes without targets have none.

    Raises:
        UserError: the loss cannot be taken apart, or targets that are not integers, or beyond the groups.

    References:
        Papyan, Traces of class/cross-class structure pervade deep learning spectra, 2020, arXiv:2008.11865.

    >>> from landscape_ray.probes.losses import OutputLoss
    >>> cross_entropy = OutputLoss(nn.CrossEntropyLoss(reduction="none"), "categorical")
    >>> parts = by_class(cross_entropy, [(torch.zeros(4, 2), torch.tensor([0, 2, 2, 2]))])
    >>> {number: part.share for number, part in parts.items()}
    {0: 0.25, 2: 0.75}
    """
    whole = detailed(loss, "class-wise curvature")
    pairs = weighted(batches)
    for (_, targets), _ in pairs:
        if targets.is_floating_point() or bool((targets < 0).any()):
            raise UserError(
                f"targets must be classes, integers >= 0, got {targets.dtype} from {targets.min().item():g}; "
                "class-wise curvature needs a classification"
            )
    num_values = 1 + max(int(targets.max()) for (_, targets), _ in pairs)
    class_of = torch.arange(num_values) if groups is None else torch.as_tensor(groups)
    if num_values > len(class_of):
        raise UserError(
            f"groups must give every target its class, got {len(class_of)} for targets up to {num_values - 1}"
        )
    parts: dict[int, ClassPart] = {}
    for number in sorted(set(class_of[:num_values].tolist())):
        classes = class_of == number
        chosen: list[tuple[tuple[Tensor, Tensor], float]] = []
        for (inputs, targets), share in pairs:
            inside = classes.to(targets.device)[targets]
            rows = inside.flatten(1).any(1) if inside.dim() > 1 else inside
            if bool(rows.any()):
                chosen.append(((inputs[rows], targets[rows]), share * float(inside.double().mean())))
        if chosen:
            several = any(targets.dim() > 1 for (_, targets), _ in chosen)
            parts[int(number)] = ClassPart(
                loss=ClassLoss(whole, classes) if several else whole,
                batches=chosen,
                share=sum(weight for _, weight in chosen),
            )
    return parts


def frequency_bands(targets: Tensor, num_bands: int) -> Tensor:
    """Return a band of each target value, by how often it occurs: groups for :func:`by_class`.

    Band 0 holds the most frequent values, and each band about as many targets as the next, so that a vocabulary of
    thousands comes down to a few classes whose curvatures can be measured. A value that is alone more frequent than
    that has a band of its own. Values that do not occur belong to the last.

    Args:
        targets: integers >= 0, any shape.
        num_bands: most bands, >= 1.

    Returns:
        The band of every value 0 ... targets.max().

    Raises:
        UserError: fewer than one band.

    >>> frequency_bands(torch.tensor([2, 2, 2, 2, 0, 0, 1, 4]), 2).tolist()
    [1, 1, 0, 1, 1]
    """
    if num_bands < 1:
        raise UserError(f"num_bands must be at least 1, got {num_bands}")
    counts = torch.bincount(targets.flatten().cpu())
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    band = (before * num_bands) // max(int(counts.sum()), 1)
    steps = band.clamp(max=num_bands - 1).diff(prepend=band[:1]) > 0  # values more frequent than a band skip some
    bands = torch.empty_like(order)
    bands[order] = steps.long().cumsum(0)
    return bands
