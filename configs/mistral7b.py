"""Mistral-7B-Instruct (Apache-2.0) v0.1, v0.2 or v0.3 on general conversations, its base split over all devices.

    python -m jaxlora.train --config configs/mistral7b.py:0.3 --workdir runs/mistral7b

Without a parameter it is 0.3. The three differ in vocabulary (32,000; 0.3: 32,768), in the sliding window (0.1: 4,096
tokens, which rows of 1,024 never reach), in rope theta (0.1: 10,000; then 1,000,000) and in the chat template; all of
that is read from the model's own files. If the hub asks for consent, give it on the model's page and sign in once with
hf auth login.

Your own data: --config.data.train=data/mine.jsonl --config.data.train_split=train --config.data.eval= (README.md lists
the forms).

Hardware: the base is 7.2 billion parameters, 14.5 GB in bfloat16: eight devices of 16 GB, or one of 40 GB or more.
Time: an estimate, not measured: 6 x 7.2 billion FLOP a token (see configs/qwen05b.py), 128 x 1024 tokens a step, so
5.7 PFLOP: about 9 s on eight TPU v5e chips of 197 TFLOP/s at 40 %.
"""

from jaxlora.config.load import base_config
from jaxlora.core.errors import InputError

VERSIONS = ("0.1", "0.2", "0.3")


def get_config(version="0.3"):
    if version not in VERSIONS:
        raise InputError(
            f"configs/mistral7b.py:{version}: there is no such version of Mistral-7B-Instruct.\n"
            f"Known are {', '.join(VERSIONS)}."
        )
    config = base_config()
    config.model.path = f"mistralai/Mistral-7B-Instruct-v{version}"

    # Apache-2.0; 460,341 conversations as messages, and 24,229 held out.
    config.data.train = "HuggingFaceTB/smol-smoltalk"
    config.data.train_split = "train[:50000]"
    config.data.eval = "HuggingFaceTB/smol-smoltalk"
    config.data.eval_split = "test"

    config.lora.rank = 16
    config.lora.alpha = 32.0
    # A quarter of Qwen's: in the notebook 5e-5 trained well, and 5e-4 got nowhere after a fast start.
    config.optim.learning_rate = 5e-5

    config.eval.every = 50
    config.eval.max_examples = 1000
    config.checkpoint.every = 50
    config.stop.patience = 8

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
