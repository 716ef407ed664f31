"""The rules by which populations copy and mutate.

By name, in :data:`STRATEGIES`:

- truncation: the worst copy the best (Jaderberg et al. 2017)
- significance: likewise, where Welch's t-test agrees
- pb2: copies get values from a time-varying Gaussian process (Parker-Holder et al. 2020)
- fire: parents judged by their rate of improvement (Dalibard and Jaderberg 2021)
- mf_pbt: parts that evolve at several frequencies (Doulazmi et al. 2025)
- ipbt: restarts with longer intervals at stagnation (Chebykin et al. 2025)
- forecast: members ranked by the loss that a law expects after the common cooldown
- independent: no copying at all, random search
"""

from landscape_ray.populations.strategies.bandit import Bandit
from landscape_ray.populations.strategies.forecast import Forecast
from landscape_ray.populations.strategies.frequencies import Frequencies
from landscape_ray.populations.strategies.improvement import ImprovementRate
from landscape_ray.populations.strategies.independent import Independent
from landscape_ray.populations.strategies.iterated import Iterated
from landscape_ray.populations.strategies.truncation import Significance, Truncation
from landscape_ray.populations.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Truncation,
        Significance,
        Bandit,
        ImprovementRate,
        Frequencies,
        Iterated,
        Forecast,
        Independent,
    )
}

__all__ = [
    "STRATEGIES",
    "Bandit",
    "Forecast",
    "Frequencies",
    "ImprovementRate",
    "Independent",
    "Iterated",
    "Significance",
    "Truncation",
]
