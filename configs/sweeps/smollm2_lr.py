"""SmolLM2-135M-Instruct (Apache-2.0): eight learning rates from 2e-5 to 2e-3, the worst dropped on the way.

    python -m jaxlora.sweep --config configs/sweeps/smollm2_lr.py --workdir runs/smollm2_lr

Your own data: --config.base.data.train=data/mine.jsonl --config.base.data.train_split=train --config.base.data.eval=

Hardware: a CPU with 8 GB of memory: by the compiler's count, base and states of all eight are 0.74 GB, and a step of
8 x 4 rows of 512 tokens needs 2.57 GB beside them. Time: what came of 48 steps on GSM8K on two cores, and how long it
took, is in docs/sweep.md.
"""

from pathlib import Path

from jaxlora.config.sweep import sweep_config

BASE = Path(__file__).resolve().parents[1] / "smollm2_135m.py"


def get_config():
    config = sweep_config(BASE)
    # The data and its licence (# CC BY 4.0) are those of configs/smollm2_135m.py.
    # Two decades around its own rate, 5e-4.
    config.sweep.grid = {"optim.learning_rate": [2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 7e-4, 1e-3, 2e-3]}
    config.sweep.halving.rungs = (0.25, 0.5)
    return config
