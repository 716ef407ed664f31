"""Sweeps: one file in, many tracked runs out.

spec.py        the sweep file as a validated value
run.py         one trial and its folder, no Ray
session.py     what every driver does around the training: checks, tracking, outcome; a single run without Ray
storing.py     folders of sweeps and trials where there is a storage beside them
disk.py        what a sweep takes of a disk, and what may go
display.py     the live table
searching/     proposals from Optuna, stopping rules, warm starts: the searcher of a search
trunk.py       checkpoints of a stable phase that trials share
memory.py      how much memory a trial uses
population.py  population-based training through Ray's scheduler
trainable.py   a trial as a Ray actor
tuner.py       a sweep on Ray Tune

Ray is imported by the last three and the searcher only: a single run needs neither Ray nor Optuna.
"""
