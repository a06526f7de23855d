"""Every number at which a rule of the journal begins to speak: the one place to look, and to change.

nll is in nats per trained token. A share of an nll is taken of max(nll, 1 nat): near zero, a share would mean nothing.
"""

FEWEST_EVALUATIONS = 3
"""Below as many, nothing is said of how eval nll goes."""

FEWEST_POINTS = 8
"""Logged train losses below which nothing is said of their curve."""

CONFIDENCE = 0.95
"""Of every interval."""

NEGLIGIBLE = 0.005
"""Share of the baseline's eval nll: a difference below it is told, but not called better or worse."""

UNPAIRED_NEGLIGIBLE = 0.02
"""Likewise where there are no shared examples to pair, and no interval says how far chance reaches."""

# ---- convergence

LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the baseline's fall of train nll at which the steps of both are compared."""

SLIGHTLY, SLOWER, MUCH_SLOWER = 1.15, 1.4, 2.5
"""Steps over the baseline's steps, from which a run converges slightly slower, slower, much slower; faster below the
inverse."""

AGREEING = 0.75
"""Share of the levels that must be on the same side of equal."""

APART, FEWEST_APART = 3.0, 4
"""Standard errors by which two train curves differ in the mean, over as many logged steps at least."""

SAME_CURVE, NEARER = 0.01, 3.0
"""Runs are alike where the falls of train nll are this share of it apart, and the baseline's as many times as far."""

# ---- spikes and divergence; the first four are those of the guard (jaxlora/training/spikes.py)

SPIKE, WINDOW, CAUTION = 6.0, 32, 8.0
"""Robust deviations above the median of the last WINDOW logged losses; 1 + CAUTION / n times as many of n only."""

LOSS_FLOOR = 0.02
"""Least deviation of a loss, as a share of the median."""

SMALL_SPIKE, NORM_FLOOR = 4.5, 0.2
"""Deviations of a small spike; least deviation of the logarithm of a gradient norm."""

SMALL_SPIKES = 3
"""As many of them, WINDOW logged steps or more after the start, are a risk."""

STEADY = 2.0
"""Deviations of noise by which the loss of a run that trains steadily falls at least."""

RISING_NORM, RISING_RANK = 2.0, 0.5
"""Median gradient norm of the last quarter over that of the second, and its rank correlation with the step."""

DIVERGED_SHARE, DIVERGED_NATS = 0.5, 0.3
"""Divergence: the end lies above the lowest by this share of the fall, by this share of the lowest, at least."""

BACK = 0.5
"""Share of a spike's height below which the loss is back."""

# ---- how eval nll goes

OVERFIT_ERRORS, IN_A_ROW = 3.0, 2
"""Standard errors of the paired rise since the minimum, at as many evaluations in a row."""

OVERFIT_SHARE, OVERFIT_NOISE = 0.01, 4.0
"""Without examples: least rise as a share of the minimum, and in deviations of the evaluations' own noise."""

OVERFIT_AFTER = 3
"""Without examples: least number of evaluations after the minimum."""

FALLING_SHARE, FALLING_NOISE = 0.0075, 3.0
"""Still falling: least fall over the last third of the steps, as a share of the nll and in deviations of noise."""

FLAT_SHARE, FLAT_STEPS = 0.02, 0.5
"""Plateau: all later evaluations within this share of their median, over at least this share of the run."""

VERY_EARLY = 0.25
"""Share of the planned steps within which a stop is very early."""

GAP = 0.3
"""Gap between eval and train nll, as a share of eval nll, from which it is told."""

# ---- advice

LONG_WARMUP = 0.2
"""Share of the run."""

SMALL_DECAY = 0.1
"""Share by which weight decay shrinks a parameter over the run, below which it is too small to matter."""

COARSE = 0.1
"""Share of the run between two evaluations, above which the best one is found but roughly."""

SAME_SCALE = 1e-6
"""Relative difference of two alpha / r below which they are the same."""
