"""Laws of the best hyperparameters: what sweeps of learning rate and batch say about runs that were not made."""
