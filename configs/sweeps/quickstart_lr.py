"""Eight learning rates on the quickstart: which one teaches a base of a million parameters pig latin best?

    python -m jaxlora.sweep --config configs/sweeps/quickstart_lr.py

All eight are trained at once over one copy of the base. Each alone is configs/quickstart.py with another
optim.learning_rate, evaluated every 30 steps and without its questions. To train all to their end:
--config.sweep.halving.rungs=

Hardware: any CPU. Time: 2:56 minutes on two cores, with an empty compilation cache; 5e-3 wins (eval nll 0.0080).
"""

from pathlib import Path

from jaxlora.config.sweep import sweep_config

BASE = Path(__file__).resolve().parents[1] / "quickstart.py"


def get_config():
    config = sweep_config(BASE)
    # Answering 200 questions takes longer than 40 steps of training: in a sweep eval/nll decides, and the best trial
    # can be asked afterwards, by python -m jaxlora.evaluate --run.
    config.base.eval.generate = 0
    # At both rungs, which then need no evaluation of their own.
    config.base.eval.every = 30
    # After a quarter of the 120 steps the worst four are dropped, after a half two more: half the work in all.
    config.sweep.halving.rungs = (0.25, 0.5)
    config.sweep.grid = {"optim.learning_rate": [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]}
    return config
