"""What the loss landscape looks like from where the weights stand. Needs torch; sees a module, a loss, fixed batches.

    estimate.py    Estimate: value, error, cost
    guard.py       host_untouched: the host is bit-identical after a probe
    operators.py   Hessian-vector products of the mean loss over fixed micro-batches, exact and by finite differences
    lanczos.py     the largest eigenvalue of a symmetric operator, with an error bound
    sharpness.py   the largest Hessian eigenvalue: one call, and a probe that follows it along a training run
    probe.py       Probe: what a training loop calls

`PROBES` holds the probes under their names; the functions are imported from their files.
"""

from collections.abc import Callable

from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.probe import Probe
from landscape_ray.probes.sharpness import SharpnessProbe

PROBES: dict[str, Callable[..., Probe]] = {"sharpness": SharpnessProbe}

__all__ = ["PROBES", "Estimate", "Probe", "SharpnessProbe"]
