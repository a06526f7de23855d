"""The training by torch, transformers and PEFT.

Whatever PEFT can be configured to do goes into its `LoraConfig`; where the optimiser differs, into `make_optimizer`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import peft.optimizers
import torch
import transformers

from jaxlora.config.schema import Config
from jaxlora.data.batches import Batches
from jaxlora.lora.peft import load_peft
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import resolve_model
from tests.parity.compared import Trained, flat

transformers.utils.logging.disable_progress_bar()  # a bar a model would bury what the tests print


def peft_config(config: Config, **changed: Any) -> peft.LoraConfig:
    """PEFT's own words for the config's adapter; more of its settings by name."""
    chosen = config.lora
    targets = chosen.targets
    settings = {
        "r": chosen.rank,
        "lora_alpha": chosen.alpha,
        "lora_dropout": chosen.dropout,
        "target_modules": targets if targets == "all-linear" else [*targets],
        "use_rslora": chosen.scaling == "rslora",
        "use_dora": chosen.use_dora,
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**settings | changed)


def start_by_peft(config: Config, lora: peft.LoraConfig) -> peft.PeftModel:
    """The base with PEFT's new adapter on it, which is also saved at `lora.init_from`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.path, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(config.seed)
    model = peft.get_peft_model(model, lora)
    model.save_pretrained(config.lora.init_from)
    return model.train()


def adamw(model: peft.PeftModel, config: Config) -> torch.optim.Optimizer:
    """torch's AdamW over every trainable parameter, as the Trainer builds it for an adapter; PEFT's for LoRA+."""
    chosen = config.optim
    settings = {"lr": chosen.learning_rate, "betas": (chosen.b1, chosen.b2), "eps": chosen.eps}
    if chosen.loraplus_lr_ratio != 1.0:
        return peft.optimizers.create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            loraplus_lr_ratio=chosen.loraplus_lr_ratio,
            loraplus_weight_decay=chosen.weight_decay,
            **settings,
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=chosen.weight_decay, **settings)


def micro_batches(config: Config, batches: Batches, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """A step's examples as transformers wants them, each a right-padded row of its own.

    input_ids, attention_mask and labels, which stand where their ids do (-100: not trained): not jaxlora's layout.
    """
    examples, size = batches.examples_in(step), config.train.micro_batch_size
    for at in range(0, len(examples), size):
        group = [batches.examples[e] for e in examples[at : at + size]]
        shape = (len(group), max(len(ids) for ids, _ in group))
        fillings = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        rows = {name: torch.full(shape, filling) for name, filling in fillings.items()}
        for row, (ids, trained) in enumerate(group):
            rows["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
            rows["attention_mask"][row, : len(ids)] = 1
            rows["labels"][row, : len(ids)] = torch.from_numpy(np.where(trained, ids, -100))
        yield rows


@contextlib.contextmanager
def one_thread():
    """Matrices this small are made slower by more threads: many times slower where the cores are not idle."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train_by_peft(
    config: Config,
    batches: Batches,
    lora: peft.LoraConfig | None = None,
    make_optimizer: Callable[[peft.PeftModel, Config], torch.optim.Optimizer] = adamw,
    read: Callable[[Config, peft.PeftModel, Mapping[str, Sequence[float]]], Trained] | None = None,
) -> Trained:
    """The whole training in torch: transformers' forward pass and schedule, PEFT's adapter, clipping by global norm.

    Args:
        config: what to do; `lora.init_from` is the folder that PEFT's start is saved into.
        batches: the examples of each step.
        lora: None is that of `peft_config`.
        make_optimizer: for what is no setting of the adapter.
        read: what is made of the trained model and its curves; None is `trained_by_peft`.
    """
    chosen, steps = config.optim, config.train.max_steps
    model = start_by_peft(config, lora or peft_config(config))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, config)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, chosen.warmup_steps, steps)
    curves: dict[str, list[float]] = {"objective": [], "nll": [], "grad_norm": []}
    for step in range(1, steps + 1):
        rows = list(micro_batches(config, batches, step))
        weight = sum(int((one["labels"][:, 1:] != -100).sum()) for one in rows)
        objective = nll = 0.0
        for one in rows:
            labels = one.pop("labels")[:, 1:].flatten()
            logits = model(**one, use_cache=False).logits[:, :-1].flatten(0, 1)
            cross_entropy = functools.partial(
                torch.nn.functional.cross_entropy, logits, labels, ignore_index=-100, reduction="sum"
            )
            loss = cross_entropy(label_smoothing=chosen.label_smoothing) / weight
            loss.backward()
            objective += loss.item()
            nll += cross_entropy().item() / weight
        norm = torch.nn.utils.clip_grad_norm_(parameters, chosen.clip_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for name, value in (("objective", objective), ("nll", nll), ("grad_norm", norm.item())):
            curves[name].append(value)
    return (read or trained_by_peft)(config, model, curves)


@one_thread()
def train_by_trainer(config: Config, batches: Batches, folder: Path) -> Trained:
    """The same by transformers' own Trainer: its loss, accumulation, smoothing, decay, clipping and schedule.

    It counts micro-batches, not examples: every step must have train.batch_size of these.
    """
    chosen, train = config.optim, config.train
    steps = range(1, train.max_steps + 1)
    rows = [one for step in steps for one in micro_batches(config, batches, step)]
    pieces = train.batch_size // train.micro_batch_size
    assert len(rows) == train.max_steps * pieces

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(rows, batch_size=None)  # pyright: ignore[reportArgumentType]

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=train.max_steps,
        gradient_accumulation_steps=pieces,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=chosen.warmup_steps,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.clip_norm,
        label_smoothing_factor=chosen.label_smoothing,
        adam_beta1=chosen.b1,
        adam_beta2=chosen.b2,
        adam_epsilon=chosen.eps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = start_by_peft(config, peft_config(config))
    trainer = InOrder(model, arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    curves = {
        "objective": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
    }
    return trained_by_peft(config, model, curves)


def pairs_by_peft(config: Config, model: peft.PeftModel, curves: Mapping[str, Sequence[float]]) -> Trained:
    """The end of a training as it is in memory, for adapters that PEFT saves with its own idea of a base."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight
            *_, block, module, leaf, _, _ = name.split(".")
            path = f"layers/{block}/{module}/{leaf[-1].lower()}"
            stacks.setdefault(path, []).append(parameter.detach().numpy().T.astype(np.float64))
    adapter = {path: np.stack(layers) for path, layers in stacks.items()}
    return Trained({name: np.array(values) for name, values in curves.items()}, {}, adapter)


def trained_by_peft(config: Config, model: peft.PeftModel, curves: Mapping[str, Sequence[float]]) -> Trained:
    """The start and the end of a training, both as PEFT saved them."""
    end = f"{config.lora.init_from}-trained"
    model.save_pretrained(end)
    spec = DecoderSpec.from_hf(resolve_model(config.model.path).config)
    start, adapter = (flat(load_peft(folder, spec)[0]) for folder in (config.lora.init_from, end))
    return Trained({name: np.array(values) for name, values in curves.items()}, start, adapter)
