"""Qwen2.5-0.5B-Instruct (Apache-2.0): nine learning rates over one frozen base, the worst dropped on the way.

    python -m jaxlora.sweep --config configs/sweeps/qwen05b_lr.py --workdir runs/qwen05b_lr

Your own data: --config.base.data.train=data/mine.jsonl --config.base.data.train_split=train --config.base.data.eval=

Hardware: one accelerator of 24 GB or more, by an estimate: the base 1 GB; nine adapters with their Adam moments, 8.8
million x 12 bytes each, 1 GB; what a micro-batch of 9 x 8 rows of 1024 tokens leaves for the backward pass, 24 layers
x 896 x 2 bytes a token, 3 GB, and one layer computed again, 4 GB. Where less fits, fewer are trained at a time.
Time: an estimate, not measured: a step costs what nine of configs/qwen05b.py do. Of nine trials five go on after a
quarter of the run and three after a half: all in all five whole runs.
"""

from pathlib import Path

from jaxlora.config.sweep import sweep_config

BASE = Path(__file__).resolve().parents[1] / "qwen05b.py"


def get_config():
    config = sweep_config(BASE)
    # The data and its licence (# Apache-2.0) are those of configs/qwen05b.py.
    # Half a decade around the notebook's best, 2e-4, and out to both ends: 2e-5 was slow there, 2e-3 spiked.
    config.sweep.grid = {"optim.learning_rate": [2e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3]}
    # A high rate looks good early and a low one late: nothing is dropped before a quarter, and no tie ever.
    config.sweep.halving.rungs = (0.25, 0.5)
    config.sweep.halving.eta = 2.0
    return config
