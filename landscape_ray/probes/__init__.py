"""What the loss landscape looks like from where the weights stand. Needs torch; sees a module, a loss, fixed batches.

    losses.py       what a loss is; OutputLoss makes one that can be taken apart
    fixed_loss.py   the mean loss on fixed batches as a function of the weights
    guard.py        host_untouched: the host is bit-identical after a probe
    estimate.py     Estimate: value, error, cost
    probe.py        Probe: what a training loop calls; Host: what the loop tells it
    monitor.py      Monitor: several probes along a run, within a budget of time
    operators/      curvature matrices by their products with vectors
    spectrum/       eigenvalues, traces, densities
    sharpness/      the measures of sharpness
    gradients/      noise scale, coherence, norms, opposing signals

`PROBES` holds the probes under their names; the functions are imported from their files.
"""

from landscape_ray.probes.estimate import Estimate
from landscape_ray.probes.fixed_loss import FixedLoss
from landscape_ray.probes.gradients.coherence import GradientCoherenceProbe
from landscape_ray.probes.gradients.noise_scale import GradientNoiseScaleProbe
from landscape_ray.probes.gradients.norms import DistanceFromInitProbe, GradientNormsProbe
from landscape_ray.probes.gradients.opposing import OpposingSignalsProbe
from landscape_ray.probes.losses import OutputLoss
from landscape_ray.probes.monitor import Monitor
from landscape_ray.probes.probe import Host, Probe
from landscape_ray.probes.sharpness import (
    AverageCaseSharpnessProbe,
    BatchSharpnessProbe,
    CriticalSharpnessProbe,
    DirectionalSharpnessProbe,
    LayerSharpnessProbe,
    LinfSmoothnessProbe,
    LogitSharpnessProbe,
    PreconditionedSharpnessProbe,
    SamSharpnessProbe,
    SharpnessProbe,
    WorstCaseSharpnessProbe,
)
from landscape_ray.probes.spectrum.density import SpectralDensityProbe
from landscape_ray.probes.spectrum.eigenpairs import EigenvaluesProbe
from landscape_ray.probes.spectrum.ggn_trace import GGNTraceProbe
from landscape_ray.probes.spectrum.trace import TraceProbe

PROBES: dict[str, type[Probe]] = {
    probe.name: probe
    for probe in (
        SharpnessProbe,
        PreconditionedSharpnessProbe,
        LayerSharpnessProbe,
        BatchSharpnessProbe,
        DirectionalSharpnessProbe,
        CriticalSharpnessProbe,
        SamSharpnessProbe,
        WorstCaseSharpnessProbe,
        AverageCaseSharpnessProbe,
        LogitSharpnessProbe,
        LinfSmoothnessProbe,
        EigenvaluesProbe,
        SpectralDensityProbe,
        TraceProbe,
        GGNTraceProbe,
        GradientNoiseScaleProbe,
        GradientCoherenceProbe,
        GradientNormsProbe,
        DistanceFromInitProbe,
        OpposingSignalsProbe,
    )
}

__all__ = ["PROBES", "Estimate", "FixedLoss", "Host", "Monitor", "OutputLoss", "Probe", "SharpnessProbe"]
