"""Eight learning rates on the quickstart: which one teaches a base of a million parameters pig latin best?

    python -m jaxlora.sweep --config configs/sweeps/quickstart_lr.py

All eight are trained at once over one copy of the base. Each alone is configs/quickstart.py with another
optim.learning_rate, and without its questions.

Hardware: any CPU.
"""

from pathlib import Path

from jaxlora.config.sweep import sweep_config

BASE = Path(__file__).resolve().parents[1] / "quickstart.py"


def get_config():
    config = sweep_config(BASE)
    # Answering 200 questions takes longer than 40 steps of training: in a sweep eval/nll decides, and the best trial
    # can be asked afterwards, by python -m jaxlora.evaluate --run.
    config.base.eval.generate = 0
    config.sweep.grid = {"optim.learning_rate": [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]}
    return config
