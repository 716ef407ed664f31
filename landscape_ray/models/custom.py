"""Modules of others as networks: a user's own at a dotted path, and causal language models of `transformers`.

What such a module lacks is found out once, when it is built: the shape of its outputs is compared with the signature,
and its FLOPs are counted on one example.

Groups of its parameters are guessed: embedding, the weights of embedding layers; norm, vectors in layers whose class
has "norm" in its name; bias, all other vectors; hidden, the rest, a head too. Learning rates are not scaled and initial
values are the module's own, unless the module has a method `rules()`, which returns a `Rule` by name of parameter, or
is made of this package's layers, which have their rules with them.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import textwrap
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from landscape_ray.config import Model
from landscape_ray.errors import UserError
from landscape_ray.models.layers import Embedding
from landscape_ray.models.network import Group, Network
from landscape_ray.models.parametrisation import Rule
from landscape_ray.registry import resolve, suggest
from landscape_ray.signature import Images, Signature, Tokens

Options: TypeAlias = dict[str, str | int | float | bool | list[str] | list[int] | list[float]]


class CustomModelConfig(Model):
    """The table [train.model] of a sweep file for a module of the user's."""

    name: str = Field(pattern=":")
    """The path `package.module:Name` of a class or function that returns a `torch.nn.Module`."""
    options: Options = {}
    """Keyword arguments that it is called with; `signature` is added where it takes one of that name."""


class TransformersConfig(Model):
    """The table [train.model] of a sweep file with name = "transformers"."""

    name: Literal["transformers"] = "transformers"
    """transformers."""
    architecture: str
    """Type of the model as `transformers` calls it: gpt2, llama, gpt_neox ..."""
    options: Options = {}
    """Fields of the architecture's configuration, under its own names: sizes, dropout, tied embeddings."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Implementation of attention; eager for the few architectures that have no other."""

    @model_validator(mode="after")
    def _vocabulary_is_the_data_s(self) -> TransformersConfig:
        if "vocab_size" in self.options:
            raise ValueError(
                f"options must not hold vocab_size, got {self.options['vocab_size']!r}; it comes from the data"
            )
        return self


class ForeignNetwork(Network):
    """A module that was not written for this package.

    Random numbers that it draws from PyTorch's global generators, when it is built and in training, are functions of
    the seed and of (seed, step): for that time the generators are seeded, and afterwards as they were.

    Attributes:
        module: the module itself.
    """

    draws_noise = True

    def __init__(self, signature: Signature, generator: torch.Generator, called: str) -> None:
        """Build the module; `called` is its name in error messages."""
        super().__init__(signature)
        _leave_out_of_compilation()
        self.called = called
        self._noise = 0
        with _seeded(generator.initial_seed(), torch.device("cpu")):
            self.module = self.build()
        self._own_rules = self._check_rules()
        self._groups = _guess_groups(self.module)
        self.initialise(generator)
        self._forward_flops = self._measure()

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the module, initialised from the global generator."""

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs for a batch of inputs; see the signature for the shapes."""
        if not self.training:
            return super().__call__(inputs)
        with _seeded(self._noise, inputs.device):
            return super().__call__(inputs)

    def set_noise(self, seed: int, step: int) -> None:
        """Make whatever is random in training that of update number `step` of the run with this seed."""
        super().set_noise(seed, step)
        self._noise = int(np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1, np.uint64)[0])

    def group_of(self, name: str) -> Group:
        """Return the group of the parameter with this name, as guessed (see the module)."""
        return self._groups[name.removeprefix("module.")]

    def forward_flops_per_unit(self) -> float:
        """Return the FLOPs of one forward pass per unit, measured on one example in evaluation mode.

        Counted as PyTorch's counter does: matrix products, convolutions, and attention through
        `scaled_dot_product_attention` over the causal half where the call says so; other kernels count 0.
        """
        return self._forward_flops

    def _rules(self) -> Iterator[tuple[str, Rule]]:
        for name, _ in self.named_parameters():
            yield name, Rule(init_std=0.0)
        for prefix, layer in self.named_modules():
            if isinstance(rules := getattr(layer, "rules", None), Mapping):
                yield from ((f"{prefix}.{name}", rule) for name, rule in rules.items())
        yield from self._own_rules.items()

    def _check_rules(self) -> dict[str, Rule]:
        """Return what the module's method `rules` says, with this network's names."""
        method = getattr(self.module, "rules", None)
        if not callable(method):
            return {}
        rules = method()
        names = dict(self.module.named_parameters())
        for name, rule in rules.items():
            if name not in names or not isinstance(rule, Rule):
                raise UserError(
                    f"rules() of '{self.called}' must return a landscape_ray Rule by name of parameter, got "
                    f"{rule!r} for '{name}'; {suggest(name, names)}"
                )
        return {f"module.{name}": rule for name, rule in rules.items()}

    def _measure(self) -> float:
        """Return the FLOPs of one forward pass per unit; check the outputs on the way.

        Raises:
            UserError: the outputs are not what the signature asks for.
        """
        example, expected = _example(self.signature)
        self.eval()
        try:
            try:
                outputs, flops = _count(self._on_meta(), example.to("meta"))
            except Exception:  # it reads values, say, or cannot be copied: nothing that it cannot do on the CPU
                outputs, flops = _count(self, example)
        except Exception as error:
            error.add_note(
                f"raised by model '{self.called}' for inputs of shape {tuple(example.shape)}, {example.dtype}: "
                "one example of the data"
            )
            raise
        self.train()
        got = f"{tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        if not isinstance(outputs, Tensor) or outputs.shape != expected or not outputs.is_floating_point():
            kind = f", {outputs.dtype}" if isinstance(outputs, Tensor) and not outputs.is_floating_point() else ""
            raise UserError(
                f"outputs of model '{self.called}' must be a floating-point tensor of shape {tuple(expected)} for "
                f"inputs of shape {tuple(example.shape)}, got {got}{kind}; change its output layer"
            )
        return flops / self.signature.units_per_example

    def _on_meta(self) -> ForeignNetwork:
        """Return a copy without values. A copy, because modules may keep tensors that they make in a forward pass."""
        tensors = [*self.parameters(), *self.buffers()]
        return copy.deepcopy(self, {id(tensor): tensor.to("meta") for tensor in tensors})


def _leave_out_of_compilation() -> None:
    """Mark `ForeignNetwork.__call__`, once: torch.compile takes what draws random numbers, not what seeds them.

    Done by the first network that is built instead of by a decorator, which would import the compiler here: half as
    long again as PyTorch itself, in every process that only reads a sweep file.
    """
    if not hasattr(ForeignNetwork.__call__, "_torchdynamo_disable"):
        disable: Any = torch.compiler.disable
        ForeignNetwork.__call__ = disable(ForeignNetwork.__call__, recursive=False)  # type: ignore[method-assign]


class CustomNetwork(ForeignNetwork):
    """A user's module.

    Args:
        config: where it is found, and its options.
        signature: what it is to be trained on.
        generator: its seed decides the initial weights; the global generator is not touched.

    Raises:
        UserError: the module cannot be imported or built, or its outputs do not suit the signature.
    """

    def __init__(self, config: CustomModelConfig, signature: Signature, generator: torch.Generator) -> None:
        self.config = config
        super().__init__(signature, generator, called=config.name)

    def build(self) -> nn.Module:
        """Return what the class or function gives for the options."""
        make: Any = resolve(self.config.name, {}, "model.name")
        arguments: dict[str, Any] = dict(self.config.options)
        if not callable(make):
            raise UserError(
                f"model.name must lead to a class or function that returns a torch.nn.Module, got "
                f"{type(make).__name__} at '{self.config.name}'; give the path of one"
            )
        parameters = inspect.signature(make)
        if "signature" in parameters.parameters:
            arguments["signature"] = self.signature
        try:
            parameters.bind(**arguments)
        except TypeError as error:
            raise UserError(
                f"model.options must be arguments of '{self.config.name}', got {self.config.options} ({error}); "
                f"it takes {parameters}"
            ) from None
        module = make(**arguments)
        if not isinstance(module, nn.Module):
            raise UserError(
                f"model.name must lead to a class or function that returns a torch.nn.Module, got "
                f"{type(module).__name__} from '{self.config.name}'; return a module"
            )
        return module

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the module returns."""
        out: Tensor = self.module(inputs)
        return out


class TransformersNetwork(ForeignNetwork):
    """A causal language model of `transformers`, with fresh weights; nothing is downloaded.

    Args:
        config: architecture and sizes.
        signature: tokens of which every next one is predicted.
        generator: its seed decides the initial weights; the global generator is not touched.

    Raises:
        UserError: `transformers` is not installed, the architecture or an option is not known, the model is shorter
            than the data's context or looks at later tokens.
    """

    def __init__(self, config: TransformersConfig, signature: Signature, generator: torch.Generator) -> None:
        if not isinstance(signature, Tokens) or signature.num_classes is not None:
            raise UserError(
                "model.name must suit the data, got 'transformers', which predicts every next token, for other "
                "targets; choose another model or text"
            )
        self.config, self.vocab_size, self.context_length = config, signature.vocab_size, signature.context_length
        super().__init__(signature, generator, called=config.architecture)
        self._check_causality()
        head = self.module.get_output_embeddings()  # type: ignore[operator]
        heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        for name, parameter in self.module.named_parameters():
            if id(parameter) in heads and self._groups[name] == "hidden":
                self._groups[name] = "head"

    def build(self) -> nn.Module:
        """Return the model with weights drawn as its authors do."""
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise UserError(
                f"model.name = 'transformers' must find the package of that name, got '{error}'; "
                "pip install transformers"
            ) from None
        architecture = self.config.architecture
        try:
            defaults = transformers.AutoConfig.for_model(architecture)
            known = set(defaults.to_dict()) | set(defaults.attribute_map)
            for option in self.config.options:
                if option not in known:
                    raise UserError(
                        f"model.options must be fields of the configuration of '{architecture}', got '{option}'; "
                        f"{suggest(option, known)}"
                    )
            # Special tokens belong to vocabularies that are not ours: padding would freeze an embedding.
            special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            config = transformers.AutoConfig.for_model(
                architecture, **{"vocab_size": self.vocab_size, **special, **self.config.options}
            )
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=self.config.attention
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"model.architecture must be one that transformers builds a causal language model of, got "
                f"'{architecture}' with options {self.config.options} and attention = '{self.config.attention}' "
                f"({textwrap.shorten(str(error), 240)}); change them"
            ) from None
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and longest < self.context_length:
            raise UserError(
                f"model.options.max_position_embeddings must be at least the context length {self.context_length}, "
                f"got {longest}; set it, or lower data.context_length"
            )
        return model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.module(inputs, use_cache=False).logits
        return logits

    def _check_causality(self) -> None:
        """Refuse encoders, which `transformers` also counts among causal models: they see the token to predict."""
        tokens = torch.tensor([[0, 0], [0, 1]])
        self.eval()
        with torch.no_grad():
            first, second = self(tokens)[:, 0]
        self.train()
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-6):
            raise UserError(
                f"model.architecture must not look at later tokens, got '{self.config.architecture}', which does; "
                "set options.is_decoder = true if it has that field, or choose another"
            )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of a device; afterwards they are as they were."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _count(network: ForeignNetwork, example: Tensor) -> tuple[Tensor, float]:
    """Return outputs and FLOPs of one forward pass; the network's buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    # Gradients stay on: without them, layers of PyTorch take fused kernels that the counter does not know.
    with torch.device(example.device), FlopCounterMode(display=False) as counter, _AttentionCounter() as attention:
        outputs = torch.func.functional_call(network, buffers, (example,))
    return outputs, float(counter.get_total_flops() + attention.flops)


class _AttentionCounter(TorchFunctionMode):
    """Counts FLOPs of scaled-dot-product attention in place of computing it.

    Which kernel would run depends on the device, and no counter of PyTorch knows of causality.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        rows, columns = query.shape[-2], key.shape[-2]
        causal = min(rows, columns) * (min(rows, columns) + 1) // 2 + max(0, rows - columns) * columns
        pairs = query.shape[:-2].numel() * (causal if is_causal else rows * columns)
        self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1])
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


def _example(signature: Signature) -> tuple[Tensor, torch.Size]:
    """Return inputs of one example, and the shape of its outputs."""
    match signature:
        case Tokens(context_length=length, num_classes=num_classes):
            positions = (length,) if num_classes is None else ()
            inputs = torch.zeros(1, length, dtype=torch.int64)
            return inputs, torch.Size((1, *positions, signature.num_outputs))
        case Images(channels=channels, height=height, width=width):
            return torch.zeros(1, channels, height, width), torch.Size((1, signature.num_outputs))
        case _:
            return torch.zeros(1, signature.num_features), torch.Size((1, signature.num_outputs))


def _guess_groups(module: nn.Module) -> dict[str, Group]:
    embeddings: set[int] = set()
    norms: set[int] = set()
    for layer in module.modules():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag, Embedding)):
            embeddings |= own
        elif "norm" in type(layer).__name__.lower():
            norms |= own

    def guess(parameter: nn.Parameter) -> Group:
        if id(parameter) in embeddings:
            return "embedding"
        if parameter.dim() > 1:
            return "hidden"
        return "norm" if id(parameter) in norms else "bias"

    return {name: guess(parameter) for name, parameter in module.named_parameters()}
