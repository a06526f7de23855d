"""Eighteen runs that one person once did by hand, each under its own name, to do again or to compare with.

    python -m jaxlora.train --config configs/notebook.py:Nov22_10-57 --workdir runs/Nov22_10-57

The workdir gives the run its name, under which the others' `journal.baseline` finds it.

What was written down: learning rate 2e-4, 2200 warmup steps, batch 128, weight decay 0.01, no label smoothing, 3 epochs
unless a run says otherwise; the rank of each run; one run that shuffled its data, so the others did not.
What was not, and is chosen here:
- alpha is twice the rank: the scale alpha / r is 2 in every run, and a rank is compared with nothing else changed.
- Evaluations and saves are 500 steps apart, as in the one run that says so.
- Runs could stop early (one "stops very early"); a patience of 5 evaluations is a guess.
- The data. Here: Apache-2.0, 460,341 conversations, which makes an epoch some 3,000 steps of 128 rows of 1024 tokens
  (an estimate: 1.8 GB of text at 4.4 bytes a token), enough for 2200 steps of warmup. Put your own in DATA.
- Which Mistral: 0.3.

Hardware and time for each model: configs/qwen05b.py, qwen7b.py, mistral7b.py.
"""

from jaxlora.config.load import base_config
from jaxlora.core.errors import InputError

DATA = {
    "data.train": "HuggingFaceTB/smol-smoltalk",
    "data.eval": "HuggingFaceTB/smol-smoltalk",
    "data.eval_split": "test",
    "data.shuffle": False,
    "eval.max_examples": 1000,  # of 24,229; the same ones in every run
}

BASELINE = {
    "optim.learning_rate": 2e-4,
    "optim.warmup_steps": 2200,
    "optim.weight_decay": 0.01,
    "optim.label_smoothing": 0.0,
    "train.batch_size": 128,
    "train.epochs": 3.0,
    "eval.every": 500,
    "checkpoint.every": 500,
    "stop.patience": 5,
}

# A base of 15 GB is split over all devices; one of 1 GB is not worth it.
SPLIT = {"mesh.data": 1, "mesh.fsdp": -1}
QWEN_05B = {"model.path": "Qwen/Qwen2.5-0.5B-Instruct", "journal.baseline": "Nov22_10-57"}
QWEN_7B = {"model.path": "Qwen/Qwen2.5-7B-Instruct", "journal.baseline": "Nov22_23-06"} | SPLIT
MISTRAL_7B = {"model.path": "mistralai/Mistral-7B-Instruct-v0.3", "journal.baseline": "Nov24_10-49"} | SPLIT

# The comment above each is what came of it then.
RUNS = {
    # The fastest fall of the train loss so far, to 0.7; eval stays near 1.5.
    "Nov22_10-57": QWEN_05B | {"lora.rank": 128, "journal.baseline": ""},
    # Converges slightly slower, no better in eval.
    "Nov22_14-28": QWEN_05B
    | {"lora.rank": 128, "optim.learning_rate": 1e-4, "optim.warmup_steps": 1000, "data.shuffle": True},
    # Slower still, no better in eval.
    "Nov22_18-58": QWEN_05B | {"lora.rank": 128, "train.batch_size": 64},
    # Much slower, and a much higher eval loss: it was smoothed as well, which eval/nll never is.
    "Nov22_21-31": QWEN_05B | {"lora.rank": 128, "optim.weight_decay": 0.1, "optim.label_smoothing": 0.1},
    # Like Nov22_18-58: the higher weight decay does nothing. Over a run it shrinks A and B by a few per cent.
    "Nov22_22-20": QWEN_05B | {"lora.rank": 128, "optim.weight_decay": 0.1},
    # No better in eval.
    "Nov23_15-59": QWEN_05B | {"lora.rank": 128, "train.batch_size": 64, "optim.label_smoothing": 0.05},
    # A loss spike.
    "Nov23_19-53": QWEN_05B | {"lora.rank": 128, "optim.learning_rate": 2e-3},
    # Slow but steady; a lower eval loss is possible.
    "Nov23_21-37": QWEN_05B | {"lora.rank": 128, "optim.learning_rate": 2e-5},
    # Trains slower.
    "Nov23_23-30": QWEN_05B
    | {
        "lora.rank": 128,
        "optim.learning_rate": 5e-5,
        "train.epochs": 5.0,
        "journal.hypothesis": "A learning rate in between is better.",
    },
    # Trains faster, but is at risk of diverging.
    "Nov24_23-30": QWEN_05B
    | {
        "lora.rank": 16,
        "optim.learning_rate": 5e-4,
        "train.epochs": 5.0,
        "journal.hypothesis": "A slightly larger learning rate is better still.",
    },
    # Converges slower, to a worse eval loss.
    "Nov25_09-19": QWEN_05B | {"lora.rank": 16, "optim.learning_rate": 1e-4},
    # Trains well; what separates it from the first run may be the lower rank.
    "Nov25_12-25": QWEN_05B | {"lora.rank": 16, "optim.learning_rate": 3e-4},
    # To compare with a large model. Healthy: train 0.88, eval about 1.2.
    "Nov22_23-06": QWEN_7B | {"lora.rank": 16, "journal.baseline": ""},
    # Train 0.67, eval 1.21: the larger rank does not help.
    "Nov23_08-13": QWEN_7B
    | {"lora.rank": 128, "eval.every": 500, "checkpoint.every": 500, "train.epochs": 3.0},
    # Converges slower, but trains well.
    "Nov24_02-27": QWEN_7B | {"lora.rank": 128, "optim.learning_rate": 5e-5, "train.epochs": 5.0},
    # Diverges.
    "Nov24_22-17": QWEN_7B | {"lora.rank": 128, "optim.learning_rate": 5e-4, "train.epochs": 5.0},
    # Seems to train well.
    "Nov24_10-49": MISTRAL_7B | {"lora.rank": 128, "optim.learning_rate": 5e-5, "journal.baseline": ""},
    # Converges faster, but stops very early.
    "Nov25_02-30": MISTRAL_7B | {"lora.rank": 128, "optim.learning_rate": 5e-4},
}


def get_config(run=""):
    if run not in RUNS:
        raise InputError(
            f"configs/notebook.py{':' if run else ''}{run}: {'there is no such run' if run else 'which run?'}\n"
            f"Known are {', '.join(RUNS)}."
        )
    keys = DATA | BASELINE | RUNS[run]
    config = base_config()
    config.update_from_flattened_dict(keys | {"lora.alpha": 2.0 * keys["lora.rank"]})
    return config
