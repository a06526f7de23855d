"""What both trainings are given: a base of odd sizes, one checked config, and the examples of every step."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from jaxlora.config.schema import Config
from jaxlora.data.batches import Batches, Examples

SIZES = {
    "vocab_size": 89,
    "hidden_size": 60,
    "intermediate_size": 67,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
FAMILIES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": 5}),
}
SETTINGS = {
    "data.train": "made here",
    "data.max_length": 19,
    "data.packing": False,
    "model.dtype": "float32",
    "model.remat": "none",
    "lora.rank": 5,
    "lora.alpha": 7.0,
    # Adam turns the rounding of a gradient below eps into a step of visible size, the more so the higher the rate.
    "optim.learning_rate": 2e-3,
    "optim.warmup_steps": 3,
    "optim.weight_decay": 0.0,
    "optim.clip_norm": 1.2,
    "train.batch_size": 8,
    "train.micro_batch_size": 8,
    "train.max_steps": 20,
}


def make_base(family: str, folder: Path) -> Path:
    """A model folder of odd sizes, random in every parameter: biases and norms are not left at zero and one."""
    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES | changes)
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.15
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, spread)
    model.save_pretrained(folder)
    return folder


def make_config(base: Path, start: Path, **changed: Any) -> Config:
    """The config of a short run; other values by dotted name."""
    flat = SETTINGS | {"model.path": str(base), "lora.init_from": str(start)} | changed
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return Config.from_dict(nested)


def make_batches(config: Config, count: int = 60) -> Batches:
    """Random examples of every length, with masks in stretches, laid out as a run would lay them out.

    One example in four has a single trained token: a mean of means would weigh it like ten.
    """
    draw = np.random.default_rng(config.seed)
    longest = config.data.max_length + 1
    ids, trained = [], []
    for example in range(count):
        length = int(draw.integers(3, longest + 1))
        mask = np.repeat(draw.random(longest) < 0.6, draw.integers(1, 4))[:length]
        mask[-1] = True
        if example % 4 == 0:
            mask[:-1] = False
        ids.append(draw.integers(0, SIZES["vocab_size"], length))
        trained.append(mask)
    examples = Examples(
        ids=np.concatenate(ids).astype(np.int32),
        trained=np.concatenate(trained),
        offsets=np.cumsum([0, *map(len, ids)]),
        source_rows=np.arange(count),
        conversations=count,
        truncated=0,
        dropped=0,
        max_length=config.data.max_length,
        name="random",
    )
    return Batches(
        examples,
        config.train.batch_size,
        config.data.max_length,
        seed=config.seed,
        packing=config.data.packing,
    )
