"""How sharp the loss is where the weights stand: one room for the measures that go by that name.

top.py              the largest Hessian eigenvalue
preconditioned.py   the same as an adaptive optimizer sees it
layers.py           of each layer
batch.py            of minibatches, along their own gradients
directional.py      along the last update; critical.py: how far one could have gone along it
perturbation.py     balls around the weights, standard and adaptive; ascent.py: climbing in them
sam.py, worst_case.py, average_case.py   rise of the loss in such balls
logits.py           rise of the loss around the logits
smoothness.py       for updates of equal size in all weights
stability.py        where optimizers stop being stable
"""

from landscape_ray.probes.sharpness.average_case import AverageCaseSharpnessProbe, average_case_sharpness
from landscape_ray.probes.sharpness.batch import BatchSharpnessProbe, batch_sharpness
from landscape_ray.probes.sharpness.critical import CriticalSharpnessProbe, critical_sharpness
from landscape_ray.probes.sharpness.directional import DirectionalSharpnessProbe, directional_sharpness
from landscape_ray.probes.sharpness.layers import LayerSharpnessProbe, layer_sharpness
from landscape_ray.probes.sharpness.logits import LogitSharpnessProbe, NormalisedLogits, logit_sharpness
from landscape_ray.probes.sharpness.preconditioned import PreconditionedSharpnessProbe, preconditioned_sharpness
from landscape_ray.probes.sharpness.sam import SamSharpnessProbe, sam_sharpness
from landscape_ray.probes.sharpness.smoothness import LinfSmoothnessProbe, linf_smoothness
from landscape_ray.probes.sharpness.stability import edge_state, sgd_curvature, stability_ratio, threshold
from landscape_ray.probes.sharpness.top import SharpnessProbe, sharpness
from landscape_ray.probes.sharpness.worst_case import WorstCaseSharpnessProbe, worst_case_sharpness

__all__ = [
    "AverageCaseSharpnessProbe",
    "BatchSharpnessProbe",
    "CriticalSharpnessProbe",
    "DirectionalSharpnessProbe",
    "LayerSharpnessProbe",
    "LinfSmoothnessProbe",
    "LogitSharpnessProbe",
    "NormalisedLogits",
    "PreconditionedSharpnessProbe",
    "SamSharpnessProbe",
    "SharpnessProbe",
    "WorstCaseSharpnessProbe",
    "average_case_sharpness",
    "batch_sharpness",
    "critical_sharpness",
    "directional_sharpness",
    "edge_state",
    "layer_sharpness",
    "linf_smoothness",
    "logit_sharpness",
    "preconditioned_sharpness",
    "sam_sharpness",
    "sgd_curvature",
    "sharpness",
    "stability_ratio",
    "threshold",
    "worst_case_sharpness",
]
