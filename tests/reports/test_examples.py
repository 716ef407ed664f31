"""Examples with opposing signals can be looked at."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from landscape_ray.reports.examples import groups_picture, groups_sentence, groups_table


def printed(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_sentence_tells_opposition_from_chance():
    apart = groups_sentence(-0.8, 0.05, 0.001, 0.4, 200, 10)
    assert apart.startswith("The 10 examples whose loss the next update lowers most and the 10 whose loss it raises")
    assert "of 200, pull against each other: cosine of their gradients −0.80 ± 0.05, p = 0.001" in apart
    assert "40 % of all changes" in apart
    for cosine, p_value in ((-0.8, 0.2), (0.3, 0.001)):
        assert "do not pull against each other beyond chance" in groups_sentence(cosine, 0.1, p_value, 0.1, 200, 10)


def test_the_table_has_both_groups_with_their_targets_or_texts():
    lines = printed(groups_table([3, 1, 7, 5], [-2.0, -1.0, 4.0, 3.0], ["a", "b", "c", "d"], None))
    assert lines[0].split() == ["group", "example", "loss", "change", "target"]
    assert lines[1].split() == ["loss", "falls", "3", "−2.0000", "a"]
    assert lines[3].split() == ["loss", "rises", "7", "+4.0000", "c"]
    text = "[red]" + "x" * 70 + "\nend"
    lines = printed(groups_table([0, 1], [-1.0, 1.0], ["9", "9"], [text, "short"]))
    assert lines[1].endswith("xxx\\nend")  # the end of a long text, on one line
    assert lines[2].endswith("short")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_shows_up_to_eight_of_each(channels):
    images = np.random.default_rng(0).normal(size=(20, channels, 8, 8))
    png = groups_picture(images, np.linspace(-1, 1, 20).tolist(), [str(k) for k in range(20)], "two groups")
    assert imread(io.BytesIO(png)).shape[:2] == (640, 1280)
    assert png == groups_picture(images, np.linspace(-1, 1, 20).tolist(), [str(k) for k in range(20)], "two groups")
    flat = groups_picture(np.zeros((2, 1, 4, 4)), [0.0, 0.0], ["0", "1"], "flat")
    assert flat[:4] == b"\x89PNG"
