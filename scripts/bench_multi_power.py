"""How the regularisation of the multi-power law is chosen, by the training schedules alone.

Protocol, written before the first look at an error on a test schedule:

Data: three model sizes, three training schedules each (cosine_24000, constant_24000, wsdcon_9). Test schedules (the six
others) are read only with `--test`.

Score of a candidate: the test asks for unseen schedules at the fitted horizon (four of six) and for three times the
horizon (two of six), so does the score, on training curves:
    2/3 of the mean relative error over whole curves whose schedule was left out (of all sizes at once), three a size,
  + 1/3 of the mean relative error after update 12,000 of fits to the points up to there (each decay has been seen).

Candidates, with the choice common to all sizes; centre of the shape: where the law's authors start, C = 1 in their unit
(sqrt(3e-4) per update at the peak here), beta = gamma = 1/2:
    A  each size on its own: the rises of the warm-up counted or not; points weighted by step^w, w in 0, .5, 1, 1.5, 2,
       3; points before update 4,000 kept or not; alpha held near 1/2 or free; Huber 1e-3 or least squares; strengths
       1e-8 to 1e-5.
    B  sizes pooled: the shape of every size is held near one shape, which is held near the centre (strengths of both
       1e-7 to 1e-4; the latter infinite too), alpha free or held near its mean over the sizes; w in .25, .5, .75, 1, 2.
    C  the authors' procedure, early stopping: the law of instant annealing first, then AdamW (rates .05 and .005) from
       the centre; 25 to 800 steps; the rises of the warm-up counted or not.

Rule: the least score of all is the regularisation; its test errors are looked at once. Every further look is recorded
here with its reason.
"""
