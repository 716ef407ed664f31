"""The searcher: proposals from any Optuna sampler, results told as what they are, early stopping, warm starts.

config.py     the table [search], validated
measures.py   what is optimised or bounded
knots.py      shapes of schedules as domains
samplers.py   Optuna samplers by name
proposer.py   ask and tell on domains: a study in memory
proposals.py  asks and tells it in a thread of its own, while trials run
journal.py    the same study in a file: what was proposed, and what became of it
history.py    what trials have left in their folders
guard.py      learning rates below the limit of stability
warm.py       what earlier sweeps know
book.py       the list of a sweep's trials, which survives the driver
searcher.py   all of it as Ray Tune's searcher and scheduler

Ray is imported by the last one only, Optuna by the samplers and what is built on them.
"""
