"""SmolLM2-135M-Instruct (Apache-2.0) on single-turn instructions: a real model that a laptop trains.

    python -m jaxlora.train --config configs/smollm2_135m.py --workdir runs/smollm2

Your own data: --config.data.train=data/mine.jsonl --config.data.train_split=train (README.md lists the forms). A base
in a local folder: --config.model.path=FOLDER.

Hardware: a CPU with 8 GB of memory. The base is 135 million parameters, 0.27 GB in bfloat16; the adapter with its two
Adam moments 4.9 million x 12 bytes, 0.06 GB.
"""

from jaxlora.config.load import base_config


def get_config():
    config = base_config()
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"

    # CC BY 4.0; 51,760 rows of instruction, input, output. Not the model's own fine-tuning data (smol-smoltalk), on
    # which it would have nothing to learn. 4,000 rows show what a setting does.
    config.data.train = "yahma/alpaca-cleaned"
    config.data.train_split = "train[:4000]"
    config.data.eval_fraction = 0.05
    # Most rows are far shorter: packing fills each with several.
    config.data.max_length = 512

    config.lora.rank = 16
    config.lora.alpha = 32.0

    # Small steps, since there are few: 16 rows of 512 tokens, four at a time to stay in a laptop's memory.
    config.train.batch_size = 16
    config.train.micro_batch_size = 4
    config.train.epochs = 2.0
    config.eval.batch_size = 4
    # A small adapter on little data takes a higher rate than the larger models, and a shorter warmup.
    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 10

    config.eval.every = 25
    config.checkpoint.every = 25
    config.log.every = 5
    return config
