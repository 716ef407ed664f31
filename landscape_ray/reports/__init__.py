"""Sweeps to look at: numbers from a sweep folder, figures from numbers, one HTML page or PNG files from figures.

    terminal.py      results as tables in a terminal

    lineage.py       who copied whom in a population, and what the weights of each member went through
    views.py         a sweep folder as the few objects that a page needs
    figures.py       what a figure is: panels of series and a palette, before any plotting library
    charts.py        figures of what happened: losses, schedules, learning rates
    population.py    a population's family tree, and the schedules that its survivors saw beside a WSD baseline
    importance_figure.py   which searched values mattered
    insight.py       figures of what it means: sharpness, forecast, cost
    stability.py     the limit of stability of a run's optimizer
    ranking.py       the rank study: which probe tells how runs generalise
    studies.py, stability_studies.py, inspection.py   figures of `landscape-ray check` and `probe`
    interactive.py   figure -> plotly
    static.py        figure -> matplotlib -> PNG or SVG

    page.py          the page, and the folder of PNG files
    recommendation.py      what to do with the result, how sure that is, what to try next
    law_checks.py    the checklist of a law of loss curves
    sections.py      its text and tables; law_section.py, probe_section.py, rank_section.py, markup.py: parts of it
    template.py      its style sheet and script

Nothing is imported here. What is computed from runs stands in `landscape_ray.analysis`.
"""
