"""Optimizers under one face: torch's own, with the learning-rate factors and decay rules that a network states.

Values are written into the parameter groups at every update (`Optimizer.set_values`), times the factor of each group;
what a checkpoint holds of them never wins over the configuration of the run.

Coupling of the weight decay wd, as a factor of the weights in one update at learning rate lr:

    lr:          w <- w (1 - lr factor wd)     torch's AdamW; factor is that of the parametrisation
    independent: w <- w (1 - (lr / peak_lr) wd)     the schedule's shape only, neither peak nor factor
        (Loshchilov and Hutter 2019, arXiv 1711.05101; Wortsman et al. 2023, arXiv 2309.14322)
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field, Tag, model_validator
from torch import Tensor

from landscape_ray.config import Model, told_by_name
from landscape_ray.errors import UserError
from landscape_ray.models.network import Network, Weight

Coupling: TypeAlias = Literal["lr", "independent"]


class _DecayConfig(Model):
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices and kernels; vectors (norms, biases) never decay."""
    decay_coupling: Coupling = "lr"
    """lr: an update decays by its learning rate times weight_decay; independent: by weight_decay times the learning
    rate's share of its peak, so that the decay does not move with the peak."""


class AdamWConfig(_DecayConfig):
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """adamw."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the running mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    @property
    def momentum(self) -> float:
        """What records call momentum: beta1."""
        return self.beta1


class SGDConfig(_DecayConfig):
    """SGD with heavy-ball momentum: v <- momentum v + g; w <- w - lr v (no dampening)."""

    name: Literal["sgd"] = "sgd"
    """sgd."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Factor of the velocity; 0 is plain gradient descent."""
    nesterov: bool = False
    """Whether the update looks ahead: w <- w - lr (g + momentum v)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of matrices and kernels; vectors (norms, biases) never decay."""
    l2: bool = False
    """Whether the decay is an L2 term of the gradient (weight_decay w is added to g, and so goes through the
    momentum: about 1 / (1 - momentum) times as strong) instead of shrinking the weights directly."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("momentum must be positive with nesterov = true, got 0; raise it or set nesterov = false")
        return self


class MuonConfig(_DecayConfig):
    """Muon for hidden matrices, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The momentum of a hidden matrix is orthogonalised by Newton-Schulz iterations, so that an update has all its
    singular values near lr sqrt(max(1, rows / columns)). A convolution kernel (out, in, h, w) counts as the matrix
    (out, in h w). Embedding, head and vectors are AdamW's.
    """

    name: Literal["muon"] = "muon"
    """muon."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Of the matrices: m <- momentum m + (1 - momentum) g."""
    nesterov: bool = True
    """Whether what is orthogonalised is (1 - momentum) g + momentum m instead of m."""
    ns_steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations; with the usual 5, singular values end between about 0.7 and 1.2."""
    adamw_lr_ratio: float = Field(default=0.2, gt=0)
    """Learning rate of AdamW's parameters divided by that of the matrices, which is the one of the schedule."""
    adamw_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay of the running mean of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's decay of the running mean of the squared gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""


class ScheduleFreeConfig(_DecayConfig):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), from the package `schedulefree`.

    Made for a constant learning rate after a warm-up. Evaluations see the average x of the iterates, training computes
    gradients at y, between x and the iterate z. The decay is computed at y.
    """

    name: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    """schedule_free_adamw."""
    beta1: float = Field(default=0.9, gt=0, lt=1)
    """Share of the average in the point where gradients are computed: y = (1 - beta1) z + beta1 x."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the running mean of the squared gradient."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    @property
    def momentum(self) -> float:
        """What records call momentum: beta1."""
        return self.beta1


AnyOptimizerConfig: TypeAlias = AdamWConfig | SGDConfig | MuonConfig | ScheduleFreeConfig

OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[SGDConfig, Tag("sgd")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[ScheduleFreeConfig, Tag("schedule_free_adamw")],
    told_by_name("adamw"),
]
"""The table [train.optimizer]; without a name it is AdamW's."""

Group: TypeAlias = dict[str, Any]
"""A parameter group of torch, with two more keys: `factor` of the learning rate, and whether it `decays`."""


class Optimizer(ABC):
    """One or more torch optimizers that step together.

    Attributes:
        parameters: the trainable parameters in the order of `module.parameters()`.
        parts: the torch optimizers.
    """

    CARRIED: ClassVar[tuple[str, ...]] = ("betas",)
    """Keys of a group that tell how its state came about: a restored state brings them along."""

    def __init__(
        self, module: Network, config: AnyOptimizerConfig, peak_lr: float, parts: list[torch.optim.Optimizer]
    ) -> None:
        """Put the parts under one face, at the peak learning rate; `build_optimizer` is the way in."""
        self.parameters = list(_trainable(module).values())
        self.parts = parts
        self._name, self._independent, self._peak_lr = config.name, config.decay_coupling == "independent", peak_lr
        self._conditional = all(part.defaults.get("fused") for part in parts)
        self.set_values(peak_lr, config.weight_decay, config.momentum)

    def set_values(self, lr: float, weight_decay: float, momentum: float, beta2: float | None = None) -> None:
        """Write what the next update applies into every group.

        Args:
            lr: learning rate; each group gets it times its factor.
            weight_decay: coupled to the learning rate as the configuration says.
            momentum: what the configuration calls `momentum` (beta1 of Adam).
            beta2: decay of the second moment, where there is one; by default the configured.
        """
        for group in self._groups():
            factor = group["factor"]
            group["lr"] = lr * factor
            # Every part decays by the product of these two, so dividing by the peak leaves the schedule's shape.
            decay = weight_decay / (self._peak_lr * factor) if self._independent else weight_decay
            group["weight_decay"] = decay if group["decays"] else 0.0
            self._set_averages(group, momentum, beta2)

    @abstractmethod
    def _set_averages(self, group: Group, momentum: float, beta2: float | None) -> None:
        """Write momentum and beta2 under the keys that the group's optimizer has for them."""

    @property
    def conditional(self) -> bool:
        """Whether `step` can leave an update out without the host knowing: on a GPU, nobody waits for the answer."""
        return self._conditional and all(parameter.is_cuda for parameter in self.parameters)

    def step(self, finite: Tensor | None = None) -> None:
        """Apply one update. Gradients may be used up: read them before.

        Args:
            finite: 0-d bool; nothing happens where it is False. Only for those that are `conditional`.
        """
        for part in self.parts:
            # where torch's fused kernels look, which else is for its GradScaler
            part.found_inf = None if finite is None else (~finite).float()  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def train(self) -> None:  # noqa: B027 - most optimizers have one set of weights
        """Put the weights that are trained back into the module, to the bit."""

    def eval(self) -> None:  # noqa: B027
        """Put the weights to evaluate into the module; with schedule-free they are not those that are trained."""

    def preconditioner(self) -> list[Tensor] | None:
        """Return what an update divides the elements of the gradient by, one tensor for each of `parameters`.

        For Adam `sqrt(v / (1 - beta2^t)) + eps`, for SGD 1; divided by the factor that the parametrisation gives the
        learning rate of a parameter, so that it goes with the learning rate of the schedule. None before Adam's first
        update, and where there is no such diagonal for all parameters (Muon).
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors (no copies) and plain values; `load_state_dict` continues from it to the bit."""
        return {"name": self._name, "shapes": self._shapes(), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a copy of another optimizer's state; the values of the configuration stay this one's.

        Raises:
            UserError: the state is of another kind of optimizer, or of another network.
        """
        if state["name"] != self._name:
            raise UserError(
                f"optimizer.name must be '{state['name']}' to continue from this checkpoint, got '{self._name}'; "
                "keep the name or start a new run"
            )
        if state["shapes"] != self._shapes():
            raise UserError(
                "the optimizer's state must be of the same network, got parameters of other shapes or groups; "
                "continue with the model of the checkpoint"
            )
        for part, saved in zip(self.parts, state["parts"], strict=True):
            groups = [
                {**ours, **{key: theirs[key] for key in self.CARRIED if key in theirs}, "params": theirs["params"]}
                for ours, theirs in zip(part.param_groups, saved["param_groups"], strict=True)
            ]
            # torch takes tensors over uncopied where device and type agree, but a donor in memory goes on training
            copied = {i: {key: value.clone() for key, value in values.items()} for i, values in saved["state"].items()}
            part.load_state_dict({"state": copied, "param_groups": groups})

    def _groups(self) -> Iterator[Group]:
        for part in self.parts:
            yield from part.param_groups

    def _roots(self, updates: Callable[[Group, dict[str, Tensor]], Any]) -> list[Tensor] | None:
        """Return the preconditioner of a single part, given how many `updates` a parameter has had."""
        state = self.parts[0].state
        group_of = {parameter: group for group in self._groups() for parameter in group["params"]}
        # the state may be there before there was an update: a cohort makes room for it
        counts = {
            parameter: float(updates(group_of[parameter], state[parameter]))
            if "exp_avg_sq" in state.get(parameter, {})
            else 0.0
            for parameter in self.parameters
        }
        if not any(counts.values()):
            return None
        roots = []
        for parameter in self.parameters:
            group, own = group_of[parameter], state.get(parameter, {})
            if counts[parameter]:
                unbiased = own["exp_avg_sq"] / (1.0 - group["betas"][1] ** counts[parameter])
                roots.append((unbiased.sqrt() + group["eps"]) / group["factor"])
            else:  # never had a gradient
                roots.append(torch.full_like(parameter, group["eps"] / group["factor"], requires_grad=False))
        return roots

    def _shapes(self) -> list[list[list[int]]]:
        return [[list(parameter.shape) for parameter in group["params"]] for group in self._groups()]


class _AdamW(Optimizer):
    def __init__(self, module: Network, config: AdamWConfig, peak_lr: float) -> None:
        self._beta2 = config.beta2
        groups = _grouped(module, lambda weight: weight.rule.lr_adam)
        super().__init__(module, config, peak_lr, [torch.optim.AdamW(groups, eps=config.eps, fused=_fuses(groups))])

    def _set_averages(self, group: Group, momentum: float, beta2: float | None) -> None:
        group["betas"] = (momentum, self._beta2 if beta2 is None else beta2)

    def preconditioner(self) -> list[Tensor] | None:
        return self._roots(lambda group, state: state["step"])


class _SGD(Optimizer):
    def __init__(self, module: Network, config: SGDConfig, peak_lr: float) -> None:
        self._l2 = config.l2
        groups = _grouped(module, lambda weight: weight.rule.lr_sgd)
        # a momentum for torch's check of `nesterov`
        part = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, fused=_fuses(groups))
        super().__init__(module, config, peak_lr, [part])

    def set_values(self, lr: float, weight_decay: float, momentum: float, beta2: float | None = None) -> None:
        super().set_values(lr, weight_decay, momentum, beta2)
        for group in self._groups():
            # torch's own decay is the L2 term
            group["shrinks"] = 0.0 if self._l2 else group["lr"] * group["weight_decay"]
            group["weight_decay"] = group["weight_decay"] if self._l2 else 0.0

    def _set_averages(self, group: Group, momentum: float, beta2: float | None) -> None:
        group["momentum"] = momentum

    def preconditioner(self) -> list[Tensor] | None:
        group_of = {parameter: group for group in self._groups() for parameter in group["params"]}
        return [
            torch.full_like(parameter, 1.0 / group_of[parameter]["factor"], requires_grad=False)
            for parameter in self.parameters
        ]

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> None:
        for group in self._groups():
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving and group["shrinks"]:
                keeps = 1.0 - group["shrinks"]
                torch._foreach_mul_(moving, keeps if finite is None else torch.where(finite, keeps, 1.0))
            if finite is not None and group["momentum"]:
                for parameter in moving:  # torch's own first one is what the memory held, where it is left out
                    state = self.parts[0].state[parameter]
                    if state.get("momentum_buffer") is None:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
        super().step(finite)


class _Muon(Optimizer):
    """The learning-rate factor of a hidden matrix is one over its layer's multiplier.

    The matrix times its multiplier then moves by sqrt(rows / columns) lr in spectral norm under every parametrisation,
    which is what feature learning asks for at any width (Yang, Simon and Bernstein 2023, arXiv 2310.17813); the scale
    of the gradient does not matter to Muon.
    """

    def __init__(self, module: Network, config: MuonConfig, peak_lr: float) -> None:
        self._beta1, self._beta2 = config.adamw_beta1, config.beta2

        def is_matrix(parameter: Tensor, weight: Weight) -> bool:
            return weight.group == "hidden" and parameter.dim() > 1

        matrices = _grouped(module, lambda weight: 1.0 / weight.rule.multiplier, is_matrix)
        others = _grouped(
            module, lambda weight: config.adamw_lr_ratio * weight.rule.lr_adam, lambda p, w: not is_matrix(p, w)
        )
        # torch's Muon knows matrices only. It gets kernels as flat copies, not as views, because those would break
        # when the module's weights are put into another memory format.
        self._kernels: list[tuple[Tensor, Tensor]] = []
        for group in matrices:
            for i, parameter in enumerate(group["params"]):
                if parameter.dim() > 2:
                    group["params"][i] = flat = parameter.detach().flatten(1).clone()
                    self._kernels.append((parameter, flat))
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(torch.optim.Muon(matrices, nesterov=config.nesterov, ns_steps=config.ns_steps))
        if others:
            parts.append(torch.optim.AdamW(others, eps=config.eps, fused=_fuses(others)))
        super().__init__(module, config, peak_lr, parts)

    def _set_averages(self, group: Group, momentum: float, beta2: float | None) -> None:
        if "betas" in group:
            group["betas"] = (self._beta1, self._beta2 if beta2 is None else beta2)
        else:
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> None:
        for kernel, flat in self._kernels:
            flat.copy_(kernel.flatten(1))
            flat.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        super().step(finite)
        for kernel, flat in self._kernels:
            kernel.copy_(flat.view(kernel.shape))
            flat.grad = None


class _ScheduleFree(Optimizer):
    CARRIED = ("betas", "k", "weight_sum", "lr_max", "train_mode")

    def __init__(self, module: Network, config: ScheduleFreeConfig, peak_lr: float) -> None:
        try:
            library: Any = importlib.import_module("schedulefree")
        except ImportError:
            raise UserError(
                "optimizer.name must be installed, got 'schedule_free_adamw' without the package schedulefree; "
                "run: pip install schedulefree"
            ) from None
        self._beta2 = config.beta2
        self._trained: list[Tensor] | None = None
        groups = _grouped(module, lambda weight: weight.rule.lr_adam)
        self._part: Any = library.AdamWScheduleFree(groups, eps=config.eps)
        super().__init__(module, config, peak_lr, [self._part])
        self._part.train()

    def set_values(self, lr: float, weight_decay: float, momentum: float, beta2: float | None = None) -> None:
        moves = any(group["betas"][0] != momentum for group in self._groups())
        training = self._trained is None
        if moves and training:  # the average x must not move with beta1: y is placed anew between x and z
            self._part.eval()
        super().set_values(lr, weight_decay, momentum, beta2)
        if moves and training:
            self._part.train()

    def _set_averages(self, group: Group, momentum: float, beta2: float | None) -> None:
        group["betas"] = (momentum, self._beta2 if beta2 is None else beta2)

    def eval(self) -> None:
        if self._trained is None:
            # the library computes y back from x, which is not what it was in the last bits
            self._trained = [parameter.detach().clone() for parameter in self.parameters]
            self._part.eval()

    @torch.no_grad()
    def train(self) -> None:
        if self._trained is not None:
            self._part.train()
            for parameter, trained in zip(self.parameters, self._trained, strict=True):
                parameter.copy_(trained)
            self._trained = None

    def preconditioner(self) -> list[Tensor] | None:
        return self._roots(lambda group, state: group["k"])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"trained": self._trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        trained = state["trained"]
        if trained is not None:
            trained = [kept.to(own, copy=True) for kept, own in zip(trained, self.parameters, strict=True)]
        self._trained = trained


class Entry(NamedTuple):
    """What is known of an optimizer by its name."""

    config: type[AnyOptimizerConfig]
    build: Callable[[Network, Any, float], Optimizer]
    """Takes the network, a configuration of the class `config` and the peak learning rate."""


OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(AdamWConfig, _AdamW),
    "sgd": Entry(SGDConfig, _SGD),
    "muon": Entry(MuonConfig, _Muon),
    "schedule_free_adamw": Entry(ScheduleFreeConfig, _ScheduleFree),
}


def build_optimizer(module: Network, config: AnyOptimizerConfig, *, peak_lr: float) -> Optimizer:
    """Return the optimizer of a run.

    Args:
        module: on its device; its `weights()` say what decays, and the learning-rate factor of each parameter.
        config: one of the branches of `OptimizerConfig`.
        peak_lr: the highest learning rate of the schedule, > 0.

    Raises:
        UserError: no parameter requires a gradient, or the optimizer's package is not installed.
    """
    return OPTIMIZERS[config.name].build(module, config, peak_lr)


def _trainable(module: Network) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError(
            f"model {type(module).__name__} must have parameters that require a gradient, got none; unfreeze some"
        )
    return parameters


def _grouped(
    module: Network,
    factor: Callable[[Weight], float],
    belongs: Callable[[Tensor, Weight], bool] = lambda parameter, weight: True,
) -> list[Group]:
    """Return torch parameter groups of the trainable parameters that `belong`, one for each (decays, factor)."""
    weights = module.weights()
    groups: dict[tuple[bool, float], Group] = {}
    for name, parameter in _trainable(module).items():
        weight = weights[name]
        if belongs(parameter, weight):
            key = weight.decays, factor(weight)
            group = groups.setdefault(key, {"params": [], "decays": key[0], "factor": key[1]})
            group["params"].append(parameter)
    return list(groups.values())


def _fuses(groups: list[Group]) -> bool:
    """Return whether torch has one kernel for a whole update of these parameters."""
    return all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda", "mps", "xpu")
        for group in groups
        for parameter in group["params"]
    )
