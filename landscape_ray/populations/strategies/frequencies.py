"""MF-PBT: sub-populations that decide at different frequencies, and let only good weights pass between them.

References:
    Doulazmi et al. 2025, arXiv 2506.03225: Multiple-Frequencies Population-Based Training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from landscape_ray.errors import UserError
from landscape_ray.populations.decisions import Choice
from landscape_ray.populations.strategies.truncation import Truncation


class Frequencies(Truncation):
    """Equal parts of the population evolve every `frequencies[i]` intervals.

    When a part evolves, its members are ranked. The last quarter copies the first and mutates. The quarter before it is
    open to immigrants: the best of the other parts, where they are better. From a slower part, values come along with
    the weights; from a faster one, which may owe its rank to greedy values, only the weights come, and go on under the
    values of the best member here.

    Args:
        frequencies: increasing, one for each part; at least three members in each.
        **options: of every strategy.
    """

    name: ClassVar[str] = "mf_pbt"

    def __init__(self, *args: Any, frequencies: Sequence[int] = (1, 4), **options: Any) -> None:
        super().__init__(*args, **options)
        parts, size = len(frequencies), len(self.members) // max(len(frequencies), 1)
        if parts < 2 or list(frequencies) != sorted(set(frequencies)) or frequencies[0] < 1:
            raise UserError(f"frequencies must be two or more, increasing, >= 1, got {list(frequencies)}; try (1, 4)")
        if size < 3 or size * parts != len(self.members):
            raise UserError(
                f"num_members must be a multiple of {parts} with 3 or more in each part, got {len(self.members)}; "
                "change it or frequencies"
            )
        self.frequencies = tuple(frequencies)
        self._size = size

    def part_of(self, member: int) -> int:
        """Return the index of the member's part in `frequencies`."""
        return member // self._size

    def decide(self, ready: list[int]) -> dict[int, Choice]:
        """Let the parts that are due evolve."""
        choices: dict[int, Choice] = {}
        for part, frequency in enumerate(self.frequencies):
            members = range(part * self._size, (part + 1) * self._size)
            due = [n for n in ready if n in members and self._round(n) % frequency == 0]
            if due:
                choices |= self._evolve(due, part, self.ranked(members))
        return choices

    def _round(self, member: int) -> int:
        return self.members[member].step // self.interval_steps

    def _evolve(self, due: list[int], part: int, order: list[int]) -> dict[int, Choice]:
        share = max(1, len(order) // 4)
        best, losers, open_to_others = order[:share], order[-share:], order[-2 * share : -share]
        choices = {}
        for number in due:
            if number in losers and number not in best:
                donors = self.donors(number, best)
                if donors:
                    donor = self.draw(donors)
                    choices[number] = Choice(self.propose(donor), donor)
        strangers = self.ranked(n for n in self.members if self.part_of(n) != part)
        for number in open_to_others:
            if number not in due or number in best:
                continue
            donors = self.donors(number, strangers)
            if donors and self.members[donors[0]].loss < self.members[number].loss:
                strangers.remove(donors[0])
                slower = self.frequencies[self.part_of(donors[0])] > self.frequencies[part]
                values = self.members[donors[0] if slower else order[0]].values
                choices[number] = Choice(dict(values), donors[0], reason="immigrant")
        return choices
