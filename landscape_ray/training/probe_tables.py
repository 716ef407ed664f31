"""The tables under [train.probes]: which probes a run has, how often and on what they measure, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from landscape_ray.config import Model
from landscape_ray.errors import UserError
from landscape_ray.probes import PROBES, Probe
from landscape_ray.probes.spectrum.eigenpairs import Curvature
from landscape_ray.registry import resolve


class ProbeTable(Model):
    """What the table of every probe has."""

    every_steps: int | Literal["auto"] = 100
    """Distance of measurements in updates; the first is at step 0, the last at the end. auto: as often as
    probes.budget allows."""
    batch_size: int | Literal["auto"] = 4
    """Examples in the probe batch, the same at every measurement. Values on different batch sizes do not compare. auto:
    as many as the probe's share of probes.budget pays for every every_steps, by its price, the training batch at most;
    the same for equal files, whatever the clock says."""
    num_batches: int = Field(default=1, ge=1)
    """How many such batches. For most probes parts of one large batch, computed one after the other to save memory; for
    those of noise (batch_sharpness, gradient_noise_scale) the sample."""

    double: bool = False
    """Whether to measure a copy of the weights in float64."""

    @model_validator(mode="after")
    def _at_least_one(self) -> ProbeTable:
        for name in ("every_steps", "batch_size"):
            if (value := getattr(self, name)) != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.every_steps == self.batch_size == "auto":
            raise ValueError("every_steps or batch_size must be a number, got 'auto' for both; a budget decides one")
        return self

    def probe(self, name: str) -> Callable[..., Probe]:
        """Return what makes the probe of this table, which is called `name`."""
        return PROBES[name]

    def settings(self) -> dict[str, Any]:
        """Return the keywords of the probe's constructor."""
        named = self.model_dump(exclude={"every_steps", "batch_size", "num_batches", "double", "tf32"})
        return {("tol" if name == "tolerance" else name): value for name, value in named.items()}


class TopTable(ProbeTable):
    """What the tables of largest eigenvalues along a run have."""

    route: Literal["exact", "finite_difference", "auto"] = "auto"
    """How Hessian-vector products are computed; auto: finite differences where a check with an exact one agrees."""
    cold_every: int = Field(default=10, ge=1)
    """Every so many measurements start from a random vector, others from the last eigenvector, which another one may
    have overtaken unseen; with 1 all do, at two to three times the price."""
    tf32: bool = False
    """Whether exact products on NVIDIA GPUs may round their factors to TF32 (10 bits of mantissa): a third faster on a
    GPT of 124 M parameters, with the same value to three digits. By default they are in float32, whatever the precision
    of training."""

    @model_validator(mode="after")
    def _no_differences_of_rounded_gradients(self) -> TopTable:
        if self.tf32 and self.route != "exact":
            raise ValueError(
                f"route must be 'exact' with tf32 = true, got '{self.route}'; the difference of two gradients of few "
                "bits is noise"
            )
        return self


class SharpnessConfig(TopTable):
    """The table [train.probes.sharpness]: top Hessian eigenvalue on a fixed batch of training data."""

    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Lanczos stops when the residual is below this share of the eigenvalue. At 0.03, one cold start in five settles
    early on a value that is more than 1 % too low; at 0.01, one in twenty-five."""
    max_matvecs: int = Field(default=30, ge=1, le=1000)
    extrapolate: bool = False
    """Whether to add what a further product is expected to: about as good as a third of the tolerance, for less."""


class PreconditionedSharpnessConfig(TopTable):
    """The table [train.probes.preconditioned_sharpness]: top eigenvalue of the Hessian as the optimizer sees it.

    Preconditioned by Adam's second moments, and by the parametrisation's factors of the learning rate; what the
    threshold of the optimizer is one of.
    """

    tolerance: float = Field(default=0.03, gt=0, lt=1)
    """Lanczos stops when the residual is below this share of the eigenvalue."""
    max_matvecs: int = Field(default=40, ge=1, le=1000)


class LayerSharpnessConfig(ProbeTable):
    """The table [train.probes.layer_sharpness]: curvature of each layer."""

    kind: Literal["quotient", "eigenvalue"] = "quotient"
    """quotient: along the part of the top eigenvector that lies in the layer; eigenvalue: the largest one of the
    layer's own block of the Hessian, dearer."""
    tolerance: float = Field(default=0.03, gt=0, lt=1)
    """Of the eigenvalues, relative."""
    max_matvecs: int = Field(default=30, ge=1, le=1000)


class BatchSharpnessConfig(ProbeTable):
    """The table [train.probes.batch_sharpness]: curvature of minibatches along their own gradients.

    batch_size is that of a minibatch, usually the one of training; num_batches how many are looked at.
    """

    batch_size: int | Literal["auto"] = 16
    """Examples in each minibatch."""
    num_batches: int = Field(default=8, ge=2)
    """How many minibatches."""
    route: Literal["exact", "finite_difference"] = "exact"
    """By second derivatives, or by the difference of two gradients, a third of the price."""


class DirectionalSharpnessConfig(ProbeTable):
    """The table [train.probes.directional_sharpness]: curvature along the last update."""

    route: Literal["auto", "exact", "gradient", "parabola"] = "auto"
    """By a Hessian-vector product, a difference of gradients or a parabola through losses; auto takes the cheapest
    that will do."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """Relative error that is asked for."""


class CriticalSharpnessConfig(ProbeTable):
    """The table [train.probes.critical_sharpness]: 2 over the smallest multiple of the update that raises the loss."""

    tolerance: float = Field(default=0.1, gt=0, lt=1)
    """Relative width of the bracket."""
    max_forwards: int = Field(default=20, ge=3)


class _PerturbationConfig(ProbeTable):
    norm: Literal["l2", "linf"] = "l2"
    """Of the ball that weights are moved in."""
    eta: float = Field(default=0.0, ge=0)
    """Added to the scale of each weight under adaptive scaling; at 0, weights that are zero stay."""
    one_dimensional: bool = True
    """Whether biases and gains are moved, too."""
    normalise_logits: bool = False
    """Whether the logits of each target are centred and divided by their norm first."""


class SamSharpnessConfig(_PerturbationConfig):
    """The table [train.probes.sam_sharpness]: rise of the loss after one normalised step up the gradient."""

    radii: list[float] = [0.05]
    """Lengths of the step; a value for each."""
    scaling: Literal["standard", "elementwise", "filterwise"] = "standard"
    """Whether a weight may move by the same as all, in proportion to its size, or to the norm of its filter."""
    subset_examples: int = Field(default=0, ge=0)
    """m of m-sharpness: mean over parts of the batch of this size, each with its own step; 0: the batch as a whole."""


class WorstCaseSharpnessConfig(_PerturbationConfig):
    """The table [train.probes.worst_case_sharpness]: highest loss found in a ball around the weights."""

    radii: list[float] = [0.5]
    """Of the ball, relative to the weights under adaptive scaling; a value for each."""
    scaling: Literal["standard", "elementwise", "filterwise"] = "elementwise"
    """See sam_sharpness."""
    subset_examples: int = Field(default=0, ge=0)
    """See sam_sharpness."""
    num_steps: int = Field(default=20, ge=1)
    """Most steps of the ascent."""
    num_starts: int = Field(default=1, ge=1)
    """Ascents from different points; under linf take several."""


class AverageCaseSharpnessConfig(_PerturbationConfig):
    """The table [train.probes.average_case_sharpness]: mean rise of the loss under random perturbations."""

    radii: list[float] = [0.05]
    """Standard deviations of the noise, relative to the weights under adaptive scaling; a value for each."""
    scaling: Literal["standard", "elementwise", "filterwise"] = "elementwise"
    """See sam_sharpness."""
    per_dimension: bool = False
    """Whether the noise is divided by the root of the number of weights."""
    num_pairs: int = Field(default=10, ge=2)
    """Pairs of opposite perturbations."""


class LogitSharpnessConfig(ProbeTable):
    """The table [train.probes.logit_sharpness]: rise of the loss, in per cent, in a box around the last logits."""

    radii: list[float] = [0.001, 0.0005]
    """Relative half-widths of the box; a value for each."""


class LinfSmoothnessConfig(ProbeTable):
    """The table [train.probes.linf_smoothness]: sum of the absolute entries of the Hessian.

    It bounds how fast the gradient changes under updates of equal size in all weights (Adam's, sign descent's).
    """

    num_vectors: int = Field(default=20, ge=2)
    """Products it is estimated from; with 20 the error is 20 to 40 %."""
    num_ascents: int = Field(default=4, ge=0)
    """Products spent on a lower bound."""


class EigenvaluesConfig(ProbeTable):
    """The table [train.probes.eigenvalues]: the largest and the smallest eigenvalues of the curvature."""

    k: int = Field(default=3, ge=1)
    """How many of the largest."""
    num_smallest: int = Field(default=1, ge=0)
    """How many of the smallest."""
    curvature: Curvature = "hessian"
    """Of which matrix: the Hessian, the Gauss-Newton matrix, the Fisher matrix by sampled or by true labels."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Residual of each, relative to its value; at 0.03 neighbours in a cluster are missed now and then."""
    max_matvecs: int = Field(default=100, ge=1)


class SpectralDensityConfig(ProbeTable):
    """The table [train.probes.spectral_density]: bulk and outliers, trace and norm from one Lanczos run."""

    num_steps: int = Field(default=50, ge=2)
    """Products for each vector."""
    num_vectors: int = Field(default=1, ge=1)
    """Random vectors; with two or more the errors are known."""
    curvature: Curvature = "hessian"
    """See eigenvalues."""
    min_gap: float = Field(default=0.25, gt=0, lt=1)
    """Gap that parts outliers from the bulk, relative to their distance from the median."""
    route: Literal["exact", "finite_difference", "auto"] = "exact"
    """How Hessian-vector products are computed; auto: finite differences where a check with an exact one agrees."""


class TraceConfig(ProbeTable):
    """The table [train.probes.trace]: trace of the curvature."""

    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """Relative standard error to reach."""
    max_matvecs: int = Field(default=100, ge=3)
    curvature: Curvature = "hessian"
    """Of which matrix; see eigenvalues."""
    method: Literal["auto", "hutchinson", "hutch++", "xtrace"] = "auto"
    """The estimator; auto: what is found to be the cheapest along the run, the trace of the Gauss-Newton matrix and of
    the rest for a loss that names its likelihood, or what a few samples of the whole say."""
    route: Literal["exact", "finite_difference", "auto"] = "exact"
    """How Hessian-vector products are computed."""
    frobenius: bool = False
    """Whether the Frobenius norm is recorded, too, as trace/frobenius, which makes SGD's trace condition of a report
    sharper. Then the whole matrix is sampled, which takes up to twice as long."""


class GGNTraceConfig(ProbeTable):
    """The table [train.probes.ggn_trace]: trace of the Gauss-Newton matrix, for a few gradients."""

    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """Relative standard error to reach."""
    max_gradients: float = Field(default=50.0, ge=1)
    """Most to spend."""


class GradientNoiseScaleConfig(ProbeTable):
    """The table [train.probes.gradient_noise_scale]: noise of the gradient, and the batch size that it makes critical.

    From the examples of the probe batch, or from num_batches batches of batch_size, eight or more.
    """

    batch_size: int | Literal["auto"] = 64
    """Examples in each batch."""
    source: Literal["auto", "micro_batches", "examples"] = "auto"
    """What is compared: batches where there are eight or more, else single examples."""
    num_products: int = Field(default=0, ge=0)
    """Hessian-vector products for the Hessian-weighted scale; 0 leaves it out, otherwise 2 or more."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Weight of earlier measurements in a running mean of numerator and denominator."""

    @model_validator(mode="after")
    def _enough(self) -> GradientNoiseScaleConfig:
        if self.source == "micro_batches" and self.num_batches < 3:
            raise ValueError(f"num_batches must be at least 3 with source 'micro_batches', got {self.num_batches}")
        if self.num_products == 1:
            raise ValueError("num_products must be 0 or at least 2, got 1; an error needs two")
        return self


class GradientCoherenceConfig(ProbeTable):
    """The table [train.probes.gradient_coherence]: how far the gradients of single examples agree."""

    batch_size: int | Literal["auto"] = 64
    """Examples to compare."""


class GradientNormsConfig(ProbeTable):
    """The table [train.probes.gradient_norms]: norm of the gradient, of all weights and of each layer's."""

    layers: bool = True
    """Whether each layer's is recorded."""


class DistanceFromInitConfig(ProbeTable):
    """The table [train.probes.distance_from_init]: how far the weights have moved since the first measurement."""

    layers: bool = True
    """Whether each layer's is recorded."""


class OpposingSignalsConfig(ProbeTable):
    """The table [train.probes.opposing_signals]: outlying groups of examples that pull against each other."""

    batch_size: int | Literal["auto"] = 256
    """Examples to search."""
    fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the examples in each of the two groups."""
    num_permutations: int = Field(default=999, ge=19)
    """Of the test that the groups oppose each other more than chance would have it."""


class CustomProbeConfig(ProbeTable):
    """The table [train.probes.custom.NAME]: a probe of yours, whose `name` is NAME."""

    path: str
    """package.module:Class of a `landscape_ray.probes.Probe`."""
    arguments: dict[str, Any] = {}
    """Keywords of its constructor, beyond batches and seed."""

    @model_validator(mode="after")
    def _there(self) -> CustomProbeConfig:
        self.probe("")
        return self

    def probe(self, name: str) -> Callable[..., Probe]:
        """Return the class at the path."""
        return resolve(self.path, PROBES, "path")

    def settings(self) -> dict[str, Any]:
        """Return the keywords of the probe's constructor."""
        return self.arguments


class ProbesConfig(Model):
    """The table [train.probes]; a probe that is not named does not run."""

    budget: float | None = Field(default=None, gt=0)
    """Most that all probes together may take, as a share of the training time: 0.05 is 5 %. What is due waits until it
    can be paid for; so that with a budget the clock has a say in what is measured when. None: no limit."""
    sharpness: SharpnessConfig | None = None
    preconditioned_sharpness: PreconditionedSharpnessConfig | None = None
    layer_sharpness: LayerSharpnessConfig | None = None
    batch_sharpness: BatchSharpnessConfig | None = None
    directional_sharpness: DirectionalSharpnessConfig | None = None
    critical_sharpness: CriticalSharpnessConfig | None = None
    sam_sharpness: SamSharpnessConfig | None = None
    worst_case_sharpness: WorstCaseSharpnessConfig | None = None
    average_case_sharpness: AverageCaseSharpnessConfig | None = None
    logit_sharpness: LogitSharpnessConfig | None = None
    linf_smoothness: LinfSmoothnessConfig | None = None
    eigenvalues: EigenvaluesConfig | None = None
    spectral_density: SpectralDensityConfig | None = None
    trace: TraceConfig | None = None
    ggn_trace: GGNTraceConfig | None = None
    gradient_noise_scale: GradientNoiseScaleConfig | None = None
    gradient_coherence: GradientCoherenceConfig | None = None
    gradient_norms: GradientNormsConfig | None = None
    distance_from_init: DistanceFromInitConfig | None = None
    opposing_signals: OpposingSignalsConfig | None = None
    custom: dict[str, CustomProbeConfig] = {}
    """Probes of yours, by name."""

    @property
    def tables(self) -> dict[str, ProbeTable]:
        """The probes that run, by name."""
        return {name: value for name, value in self if isinstance(value, ProbeTable)} | self.custom

    @model_validator(mode="after")
    def _paid_for(self) -> ProbesConfig:
        for name, table in self.tables.items():
            try:
                table.probe(name)(batches=[], seed=0, **table.settings())
            except UserError as error:
                raise ValueError(f"{name}.{error}") from None
            except TypeError as error:  # what a user's constructor does not take
                raise ValueError(f"custom.{name}.arguments: {error}") from None
            for field in ("every_steps", "batch_size"):
                if getattr(table, field) == "auto" and self.budget is None:
                    raise ValueError(f"{name}.{field} must be a number where probes.budget is not set, got 'auto'")
        return self
