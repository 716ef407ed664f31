"""The figures of spectra by layer, class and batch size say what was measured, and show it."""

from __future__ import annotations

import io
import math

import numpy as np
from rich.console import Console

from landscape_ray.reports.spectra import (
    MAX_DRAWN,
    Part,
    SizeRow,
    batch_size_figure,
    batch_size_table,
    part_table,
    parts_figure,
)
from landscape_ray.reports.static import render


def part(name, *values, smallest=-1.0, size="10", converged=True):
    return Part(name, size, [(value, 0.01) for value in values], [(smallest, 0.02)], converged, 30.0)


def cells(table, heading):
    (place,) = [place for place, name in enumerate(table.headings) if name == heading]
    return [row[place].plain for row, _ in table.rows]


def test_layers_are_beside_the_whole():
    rows = [part("whole network", 20.0, 9.0), part("0", 5.0, 1.0), part("2", 15.0, 4.0, smallest=-0.5)]
    figure = parts_figure("spectrum-layers-t0", "Spectra", "layer", rows, note="Blocks.")
    assert "block is that of layer 2: its largest eigenvalue 15 is 75 % of the 20 of the whole" in figure.takeaway
    (panel,) = figure.panels
    assert panel.y.categories == ("whole network, 10", "0, 10", "2, 10")
    drawn = {item.name: item for item in panel.series}
    assert drawn["largest"].x.tolist() == [20.0, 5.0, 15.0]
    assert drawn["2nd largest"].x.tolist() == [9.0, 1.0, 4.0]
    assert drawn["smallest"].x.tolist() == [-1.0, -1.0, -0.5]
    assert render(figure)[1:4] == b"PNG"


def test_far_apart_layers_are_on_a_logarithmic_axis_with_the_sizes_of_negative_eigenvalues():
    rows = [part("whole", 50.0, 20.0, 9.0), part("a", 40.0, 10.0, 5.0), part("b", 0.1, 0.05, -0.01, smallest=0.001)]
    figure = parts_figure("spectrum-layers-t0", "Spectra", "layer", rows, note="")
    assert figure.x.scale == "log"
    drawn = {item.name: item for item in figure.panels[0].series}
    assert drawn["size of the smallest, where negative"].x.tolist() == [1.0, 1.0]
    assert drawn["largest"].x.tolist() == [50.0, 40.0, 0.1]
    assert sorted(x for s in figure.panels[0].series if s.name == "2nd and 3rd largest" for x in s.x.tolist()) == [
        0.05,
        5.0,
        9.0,
        10.0,
        20.0,
    ]
    assert render(figure)[1:4] == b"PNG"


def test_a_table_keeps_its_numbers_in_a_narrow_terminal():
    values = (55.123, 28.222, 20.811, 19.755, 18.666)
    table = part_table("found", "layer", "parameters", [part("blocks.0.attention.qkv", *values, size="16,384")] * 2)
    out = io.StringIO()
    Console(file=out, width=60).print(table, crop=False)
    for value in ("55.12", "28.22", "20.81", "19.75", "18.67", "16,384", "blocks.0.attention.qkv"):
        assert out.getvalue().count(value) == 2


def test_classes_are_compared():
    rows = [part("all targets", 8.0, size=""), part("3", 30.0), part("7", 2.0)]
    figure = parts_figure("spectrum-classes-t0", "Spectra", "class", rows, note="")
    assert "sharpest on class 3, 30, and flattest on class 7, 2; on all targets the largest" in figure.takeaway
    assert figure.panels[0].y.categories[0] == "all targets"


def test_many_layers_leave_out_the_flattest_and_say_so():
    rows = [part("whole", 99.0), *(part(f"layer{n}", float(n)) for n in range(MAX_DRAWN + 5))]
    figure = parts_figure("spectrum-layers-t0", "Spectra", "layer", rows, note="Blocks.")
    categories = figure.panels[0].y.categories
    assert len(categories) == MAX_DRAWN + 1
    assert categories[1] == "layer5, 10"  # in the order of the network
    assert figure.note == "Blocks. Not drawn: 5 layers with smaller eigenvalues."


def test_few_parameters_and_unknown_values():
    rows = [part("whole", 3.0, 2.0, 1.0), part("tiny", 1.0), part("lost", math.nan, converged=False)]
    table = part_table("found", "layer", "parameters", rows)
    assert cells(table, "largest") == ["3", "1", "unknown"]
    assert cells(table, "3rd") == ["1", "", ""]
    assert cells(table, "± error") == ["0.02"] * 3
    assert cells(table, "") == ["", "", "rough"]
    assert "lost" not in "".join(parts_figure("k", "t", "layer", rows, note="").panels[0].y.categories)
    assert parts_figure("k", "t", "layer", [rows[0], rows[2]], note="").takeaway.startswith("No layer has eigenvalues")


def test_batch_sizes_are_drawn_with_the_law_and_the_whole():
    rows = [
        SizeRow(8, (40.0, 3.0), (-12.0, 1.0), (42.0, -11.0)),
        SizeRow(32, (22.0, 2.0), (-6.0, 0.5), (21.0, -6.5)),
        SizeRow(512, (10.0, 0.01), (-2.0, 0.01), (10.0, -2.0)),
    ]
    sizes = np.array([8, 32, 512])
    figure = batch_size_figure("t0", rows, sizes, ([42.0, 21.0, 10.0], [-11.0, -6.5, -2.0]), (0.05, 0.08))
    assert "On batches of 8 the largest eigenvalue is 4 times that on all 512 examples" in figure.takeaway
    assert "off by 5 % at the largest and 8 % at the smallest" in figure.takeaway
    above, below = figure.panels
    assert [item.role for item in above.series] == ["line", "points", "points"]
    assert above.series[1].low.tolist() == [37.0, 20.0]
    assert below.series[2].y.tolist() == [-2.0]
    assert figure.x.scale == "log"
    assert render(figure)[1:4] == b"PNG"
    table = batch_size_table("sizes", rows)
    assert cells(table, "batch size") == ["8", "32", "512 (all)"]
    assert [row[3].plain for row, _ in table.rows] == ["42", "21", ""]
