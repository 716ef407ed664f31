"""What the gradients of single examples and batches say. The functions are imported from their files.

per_example.py   gradients of single examples, written out or factored; rows.py, layer_calls.py: the routes
noise_scale.py   gradient noise scale and critical batch size; pair_formula.py, units.py: the estimators
coherence.py     how far the gradients of examples agree
norms.py         gradient norms of the layers, distance from initialisation
opposing.py      groups of outlying examples with opposing gradients
"""
