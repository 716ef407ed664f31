"""From runs to fits and decisions: what was logged, as the arrays that laws take, and what the laws then say.

    runs.py          a run with its rows, and what was really applied to it
    annealing.py     the annealing law of a sweep, and its forecasts of held-out schedules
    forecast.py      the forecast of one schedule that was not run

No plotting library is needed here, and pyarrow only by whoever reads a sweep.
"""
