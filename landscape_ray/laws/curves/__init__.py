"""Laws of whole loss curves: what a run's losses say about schedules that were not run."""
