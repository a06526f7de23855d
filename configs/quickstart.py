"""Pig latin in two minutes on two CPU cores, with nothing to download.

    python -m jaxlora.train --config configs/quickstart.py

The base (configs/quickstart_assets/base: Qwen2 architecture, a million parameters, one token a byte) was pretrained
on little questions about the letters of a word: repeat it, reverse it, move its first letter to the end. It has never
seen pig latin; here an adapter learns it ("Say string in pig latin." -> "ingstray"), and is asked about words that
neither it nor the base has been trained on. make.py in that folder made all of it.

Hardware: any CPU; 61 seconds on two cores with nothing compiled before (101 seconds of CPU time in all). Exact match on
the 200 held-out questions goes from 0 % to 100 %, eval/nll from 5.59 to 0.006.
"""

from pathlib import Path

from jaxlora.config.load import base_config

ASSETS = Path(__file__).resolve().parent / "quickstart_assets"


def get_config():
    config = base_config()
    config.model.path = str(ASSETS / "base")
    # On a CPU it is faster to compute activations again than to keep them (docs/speed.md).
    config.model.remat = "dots"

    config.data.train = str(ASSETS / "train.jsonl")
    config.data.eval = str(ASSETS / "eval.jsonl")
    # The longest conversation, three questions, has 182 tokens; packing puts about two and a half into a row.
    config.data.max_length = 192

    config.lora.rank = 16
    config.lora.alpha = 32.0

    # 16 rows hold about 50 questions.
    config.train.batch_size = 16
    config.train.micro_batch_size = 16
    config.train.max_steps = 120
    # A model this narrow takes 25 times the rate of a large one; 120 steps are little more than an epoch.
    config.optim.learning_rate = 5e-3
    config.optim.warmup_steps = 10

    config.eval.every = 40
    config.eval.batch_size = 16
    config.eval.generate = 200
    config.eval.max_new_tokens = 16
    config.checkpoint.every = 40
    config.log.every = 10
    return config
