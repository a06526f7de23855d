"""A sweep in a process of its own, to be killed: python -m tests.sweeps.killed CONFIG FOLDER AT_ONCE."""

import os
import sys
from pathlib import Path

from jaxlora.config.load import load_config
from jaxlora.core.compilation import use_persistent_cache
from jaxlora.sweeps.trials import Halving
from tests.sweeps.conftest import Swept, trial

SHAPE = {"train__max_steps": 14, "eval__every": 4, "checkpoint__every": 3, "eval__batch_size": 4}
TRIALS = {
    "a": {"optim__learning_rate": 1e-2},
    "b": {"optim__learning_rate": 2e-2, "lora__rank": 2},
    "c": {"optim__learning_rate": 3e-3, "lora__dropout": 0.1},
    "d": {"optim__learning_rate": 1e-5},
    "stops": {"optim__learning_rate": 1e-5, "stop__patience": 1, "stop__min_delta": 1.0, "eval__every": 2},
    "diverges": {"optim__learning_rate": 1e20},
}
HALVING = Halving((0.5,), 2.0, drop_ties=True)
"""Step 7: four are left, two go on."""


def main(config: str, folder: str, at_once: str) -> None:
    use_persistent_cache()
    base = load_config(config, [])
    trials = [trial(base, name, **(SHAPE | changes)) for name, changes in TRIALS.items()]
    swept = Swept(trials, Path(folder), int(at_once), HALVING)
    print({name: outcome.status for name, outcome in swept.outcomes.items()})


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
    sys.exit(0)  # the nursery's child ends here
