"""A model that fails in the middle of its training, as often as there are files that tell it to."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from landscape_ray.signature import Signature
from landscape_ray.sweep.trainable import SweepTrainable
from landscape_ray.training.parallel import world


class Network(nn.Module):
    """One linear layer on images. From the fourth training batch on it takes one file of `orders` and does its bidding.

    Args:
        signature: of the data.
        orders: folder of files called raise.N, memory.N, die.N or hang.N; of several workers of a trial, those with a
            rank in their name, such as die-1.N, are for the worker of that rank.
    """

    def __init__(self, signature: Signature, orders: str) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(10)
        self.orders = Path(orders)
        self.calls = 0
        with torch.random.fork_rng():
            self.layer(torch.zeros(1, 64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            if self.calls > 3:
                self.obey()
        out: torch.Tensor = self.layer(inputs.flatten(1))
        return out

    def obey(self) -> None:
        for order in sorted(self.orders.glob("*.*")):
            how, _, rank = order.stem.partition("-")
            if rank and int(rank) != world().rank:
                continue
            try:
                order.unlink()  # one trial alone takes it
            except FileNotFoundError:
                continue
            self.fail(how)

    def fail(self, how: str) -> None:
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
        if how == "hang":
            time.sleep(3600)
        error: Any = torch.OutOfMemoryError("CUDA out of memory") if how == "memory" else RuntimeError("a faulty batch")
        raise error


class DiesBetweenTrials(SweepTrainable):
    """A trial's actor whose process dies when it is to become the next trial, once for each file die.N of `orders`."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        for order in sorted((Path(new_config["sweep_path"]).parents[1] / "orders").glob("die.*")):
            try:
                order.unlink()
            except FileNotFoundError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset_config(new_config)


class SlowToStart(SweepTrainable):
    """A trial's actor whose worker takes longer to load than several trials; it leaves its number in `workers`."""

    def __init__(self, *given: Any, **more: Any) -> None:
        time.sleep(4)
        super().__init__(*given, **more)

    def step(self) -> dict[str, Any]:
        workers = Path(self._given["sweep_path"]).parents[1] / "workers"
        workers.mkdir(exist_ok=True)
        (workers / str(os.getpid())).touch()
        return super().step()
