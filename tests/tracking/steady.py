"""A network that takes its time, whatever the machine is like."""

import time

import torch
from torch import nn

from landscape_ray.signature import Signature


class Network(nn.Module):
    """One linear layer on images; each training batch takes so many seconds more.

    Args:
        signature: of the data.
        seconds: to wait.
    """

    def __init__(self, signature: Signature, seconds: float) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(10)
        self.seconds = seconds
        with torch.random.fork_rng():
            self.layer(torch.zeros(1, 64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.seconds)
        out: torch.Tensor = self.layer(inputs.flatten(1))
        return out
