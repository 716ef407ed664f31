"""Populations on Ray: any strategy of `landscape_ray.populations`, carried out by trials that train at the same time.

config.py     the table [population], and the strategy that it describes
orders.py     what a member is told to do, and where weights wait to be copied
book.py       the strategy and all orders of a sweep, durable; asks for decisions
explorer.py   an Optuna sampler as the explorer of a strategy
member.py     a member and its folder: carries orders out
exchange.py   where trials fetch their orders, and the weights that come with them, on Ray
trainable.py  a member as a Ray actor
scheduler.py  the book as Ray Tune's scheduler

A member trains until the step that its order names, makes rows and weights durable, and reports. The strategy answers
with decisions; they are written to the sweep's folder before anybody hears of them. Each becomes a numbered order. The
checkpoint of a member says which order it was made under, so that whoever opens it, now or after a crash, knows
whether the order has been begun: nothing is done twice, and one history is continued.

A member that fails in every attempt at an order is to the strategy one that has diverged. Its next order is to copy
another; the book counts how often that may happen, and what it failed of stays in the book. One that is left out has no
next order: the next driver lets it try the last one again.
"""
