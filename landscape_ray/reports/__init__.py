"""Sweeps to look at: numbers from a sweep folder, figures from numbers, one HTML page or PNG files from figures.

    analysis.py      law of annealing fitted on a sweep, and its forecasts of held-out schedules
    views.py         a sweep folder as the few objects that a page needs
    lineage.py       who copied whom in a population, and the schedule that the winner went through
    text.py          numbers, durations and learning rates as people write them
    figures.py       what a figure is: titled panels of series, before any plotting library
    charts.py        the figures of a report, as pure functions of views
    interactive.py   figure -> plotly
    static.py        figure -> matplotlib -> PNG or SVG
    page.py          the HTML page and the folder of PNG files

Nothing is imported here: `analysis` is usable without a plotting library.
"""
