"""The searcher: proposals from any Optuna sampler, results told as what they are, early stopping, warm starts.

config.py     the table [search], validated
measures.py   what is optimised or bounded
knots.py      shapes of schedules as domains
samplers.py   Optuna samplers by name
proposer.py   ask and tell on domains: a study in memory
book.py       the list of a sweep's trials, in a journal that survives the driver
guard.py      learning rates below the limit of stability
warm.py       what earlier sweeps know
searcher.py   all of it as Ray Tune's searcher and scheduler

Ray is imported by the last one only, Optuna by the samplers and what is built on them.
"""
