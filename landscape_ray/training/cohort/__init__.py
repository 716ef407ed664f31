"""K runs of one architecture trained as one program, each with its own hyperparameters, seed and order of the data.

    cohort.py     Cohort: members that advance, are observed, copied, replaced and saved
    shared.py     what members have in common
    evaluation.py held-out losses of many members at once
    folder.py     the files of a checkpoint
    buffers.py    weights and optimizer states of all members as rows of matrices
    memory.py     where these are
    routes.py     gradients of several members: stacked, by vmap, or one by one
    recording.py  what a program does, to be done again at a lower price
    sequence.py   kernels one after the other as one call
    plan.py       which route on how many members at once, by measurement
    workers.py    programs side by side on the threads of a CPU
    updates.py    hyperparameters, clipping and optimizer by rows

`Cohort` is the way in.
"""

from landscape_ray.training.cohort.cohort import Cohort
from landscape_ray.training.cohort.plan import Choice
from landscape_ray.training.cohort.shared import check_shared

__all__ = ["Choice", "Cohort", "check_shared"]
