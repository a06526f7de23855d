"""Qwen2.5-0.5B-Instruct (Apache-2.0) on general conversations: the config to start one's own from.

    python -m jaxlora.train --config configs/qwen05b.py --workdir runs/qwen05b

Your own data, in any of the forms that README.md lists, and what can be held out of it:

    python -m jaxlora.train --config configs/qwen05b.py --config.data.train=data/mine.jsonl --config.data.eval= \\
        --config.data.train_split=train --workdir runs/mine

Hardware: one accelerator of 16 GB or more. The base is 494 million parameters, 1.0 GB in bfloat16; the adapter with its
two Adam moments 8.8 million x 12 bytes, 0.1 GB; the rest is a micro-batch's activations.
Time: an estimate, not measured: a token costs 6 x 494 million FLOP (forward, again for remat, and the gradient of the
activations; the frozen base needs no gradient of its own), a step 128 x 1024 tokens, so 0.39 PFLOP: about 5 s at 40 %
of a TPU v5e's 197 TFLOP/s.
"""

from jaxlora.config.load import base_config


def get_config():
    config = base_config()
    config.model.path = "Qwen/Qwen2.5-0.5B-Instruct"

    # Apache-2.0; 460,341 conversations as messages, and 24,229 held out. The first 50,000 are a morning's work, all of
    # them take --config.data.train_split=train.
    config.data.train = "HuggingFaceTB/smol-smoltalk"
    config.data.train_split = "train[:50000]"
    config.data.eval = "HuggingFaceTB/smol-smoltalk"
    config.data.eval_split = "test"

    # configs/notebook.py tried 128 on this model and on the 7B: the larger rank trained faster and evaluated no better.
    config.lora.rank = 16
    config.lora.alpha = (
        32.0  # the scale alpha / r is 2: change both, or a rank's effect is mixed with a step size's
    )

    # The best of the notebook's rates between 2e-5 (slow) and 2e-3 (a loss spike).
    config.optim.learning_rate = 2e-4

    # A row costs a third of what it does in training: at most 1,000 rows every 100 steps are 3 % of the time.
    config.eval.every = 100
    config.eval.max_examples = 1000
    config.checkpoint.every = 100
    return config
