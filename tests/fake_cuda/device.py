"""A CUDA device that is not there: code for CUDA runs on tensors without values, and what it does is written down.

PyTorch's FakeTensorMode knows shape, type and device of every result and computes nothing. Operands on two devices
raise as on a GPU, and a read of a value on the device is seen: there the host would wait. `load` makes autograd work on
such tensors in builds without CUDA; it must be called before torch is imported, and changes what this process takes
for its accelerator, so that all of this runs in processes of its own.

Attention is replaced by the operator of the flash kernel, which PyTorch would choose on a GPU, and the prefetcher draws
batches when they are asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

HERE = Path(__file__).parent
LIBRARIES = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")


def load(folder: Path) -> None:
    """Compile what autograd needs into a folder, unless it is there, and load it."""
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    if (root / "lib/libtorch_cuda.so").exists():  # such a build has all of it
        return
    first, second = (_compiled(name, folder, root) for name in ("accelerator", "backend"))
    for path in (first, *(root / "lib" / name for name in LIBRARIES), second):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _compiled(name: str, folder: Path, root: Path) -> Path:
    target = folder / f"{name}.so"
    if not target.exists():
        paths = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        partial = target.with_suffix(f".{id(folder)}.tmp")
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(HERE / f"{name}.cpp"), "-o", str(partial)]
        subprocess.run([*command, *(paths if name == "backend" else paths[:1])], check=True)
        partial.replace(target)
    return target


class Op(NamedTuple):
    """A kernel that was started."""

    name: str
    num_bytes: int
    """Read and written."""
    flops: int
    what: str
    """Shapes and types of its operands."""


class Record:
    """What happened on the device.

    Attributes:
        ops: what was started, in order.
        waits: where the host waited for the device, each as the line of the package that did.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.waits: list[str] = []

    def clear(self) -> None:
        self.ops.clear()
        self.waits.clear()

    @property
    def num_bytes(self) -> int:
        return sum(op.num_bytes for op in self.ops)

    def table(self) -> dict[str, tuple[int, int]]:
        """Return count and bytes of each operator."""
        counts, num_bytes = Counter(op.name for op in self.ops), Counter[str]()
        for op in self.ops:
            num_bytes[op.name] += op.num_bytes
        return {name: (count, num_bytes[name]) for name, count in counts.items()}


def _where() -> str:
    frames = [frame for frame in traceback.extract_stack() if "landscape_ray/" in frame.filename]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "outside"


@contextlib.contextmanager
def fake_cuda() -> Iterator[Record]:
    """Run the block on a CUDA device that is not there; values that are read are 1."""
    import torch
    from torch import Tensor
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    from landscape_ray.data import prefetch

    aten = torch.ops.aten
    record = Record()
    silent = {aten.detach, aten.lift_fresh, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.alias}
    silent |= {aten._unsafe_view, aten._reshape_alias, aten.new_empty_strided}

    def size(tensor: Tensor) -> int:
        """Bytes that a pass over a tensor touches: of an expanded one those that are there."""
        dims = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0]
        number = 1
        for n in dims:
            number *= n
        return number * tensor.element_size()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            packet = func.overloadpacket
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if func.namespace != "aten":
                return func(*args, **kwargs)
            if packet in (aten._pin_memory, aten.pin_memory):
                return args[0]
            if packet is aten._local_scalar_dense:
                if given[0].is_cuda:
                    record.waits.append(_where())
                try:
                    return func(*args, **kwargs)
                except DataDependentOutputException:
                    return True if given[0].dtype == torch.bool else 1.0 if given[0].is_floating_point() else 1
            # it has no formula for results without values; there are none, it writes into its operands
            out = None if packet is aten._fused_sgd_ else func(*args, **kwargs)
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            devices = {each.device.type for each in (*given, *made)}
            if packet in (aten._to_copy, aten.copy_) and devices == {"cpu", "cuda"}:
                blocking = args[2:3] != (True,) and not kwargs.get("non_blocking")
                if blocking and any(each.numel() for each in given):
                    record.waits.append(_where())
            if "cuda" not in devices or packet in silent or func.is_view:
                return out
            written = [args[i] for i, a in enumerate(func._schema.arguments) if i < len(args) and a.is_write]
            written += [kwargs[a.name] for a in func._schema.arguments if a.is_write and a.name in kwargs]
            if not func._schema.is_mutable:
                written += made
            if packet in (aten.copy_, aten.fill_, aten.zero_):
                given = given[1:]
            if packet is aten.embedding:
                given = [given[1], made[0]]
            if packet in (aten.nll_loss_forward, aten.nll_loss_backward):  # one logit of each row
                given = [each for each in given if each.dim() < 2]
            if packet in (aten.zeros_like, aten.ones_like, aten.full_like):
                given = []
            num_bytes = sum(map(size, given)) + sum(size(t) for t in tree_leaves(written) if isinstance(t, Tensor))
            count = flop_registry.get(packet)
            flops = count(*args, **kwargs, out_val=out) if count is not None else 0
            what = " ".join(f"{tuple(t.shape)}:{str(t.dtype)[6:]}" for t in given[:4])
            record.ops.append(Op(str(packet)[5:], num_bytes, flops, what))
            return out

    class Event:
        def record(self, *given: Any) -> None:
            pass

        def synchronize(self) -> None:
            record.waits.append(_where())

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, scale: float | None = None, **rest: Any
    ) -> Tensor:
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            out: Tensor = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
            return out
        return real(q, k, v, is_causal=is_causal, scale=scale)

    def move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """Do what `Module.to` does, which wants to swap the insides of tensors that others refer to."""
        moved: dict[Tensor, Tensor] = {}  # a tied weight stays one
        for each in module.modules():
            for name, tensor in each._parameters.items():
                if tensor is not None:
                    moved.setdefault(tensor, torch.nn.Parameter(tensor.detach().to(device), tensor.requires_grad))
                    each._parameters[name] = moved[tensor]  # type: ignore[assignment]
            for name, tensor in each._buffers.items():
                each._buffers[name] = None if tensor is None else tensor.to(device)
        return module

    real = torch.nn.functional.scaled_dot_product_attention
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for name, value in {
            "is_available": lambda: True,
            "is_bf16_supported": lambda *given: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "synchronize": lambda *given: None,
            "Event": Event,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", move))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(prefetch, "CUDA_DEPTH", 0))
        stack.enter_context(Recorder())
        yield record
