"""A train step of transformers + PEFT, in a process of its own; started by `benchmarks.train_vs_peft`.

As TRL's trainer does it with `bf16=True`: the base in bfloat16, the adapter in float32 under autocast, sdpa attention,
AdamW, clipping by global norm, each batch padded to its longest conversation.
"""

import gc
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import peft
import torch
import transformers

from benchmarks.children import Side, serve
from benchmarks.shapes import ALPHA, CLIP_NORM, LEARNING_RATE, RANK, SHAPES, WEIGHT_DECAY


def build(job: dict[str, Any]) -> Side:
    side = built(job)
    if job["remat"] == "full" or not torch.cuda.is_available():
        return side
    try:
        side.run()
        return side
    except torch.OutOfMemoryError as error:
        print(f"without computing layers again: {error}", file=sys.stderr)
    del side
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return built(job | {"remat": "full"})


def built(job: dict[str, Any]) -> Side:
    """The model, and a round of its steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = adapted(job, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    forward = torch.compile(model) if job["compile"] == "whole" else model
    if job["compile"] == "layers":
        decoder: Any = model.get_base_model()
        for layer in decoder.model.layers:
            layer.compile()
        decoder.loss_function = torch.compile(decoder.loss_function)
    batches = padded(job) if job["examples"] else filled(job)

    def run() -> int:
        tokens = 0
        for _ in range(job["steps"]):
            batch, useful = next(batches)
            tokens += useful
            given = {name: array.to(device, non_blocking=True) for name, array in batch.items()}
            with torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
                loss = forward(**given, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return tokens

    def device_peak() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    facts = {"device": name, "threads": torch.get_num_threads(), "remat": job["remat"]}
    return Side(run, device_peak, facts)


def adapted(job: dict[str, Any], device: str) -> Any:
    """The base with random weights, and PEFT's adapter on it."""
    shape = dict(SHAPES[job["shape"]])
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
        )
    if job["remat"] == "full":
        # Renamed between transformers 5.17 and 5.24.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    lora = peft.LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora).train()


def filled(job: dict[str, Any]) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """The same batch again and again, every token trained; and its tokens."""
    shape = (job["rows"], job["length"])
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, SHAPES[job["shape"]]["vocab_size"], shape))
    while True:
        yield {"input_ids": ids, "labels": ids}, ids.numel()


def padded(job: dict[str, Any]) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Batches of as many conversations as there are rows, each padded to its longest; and the positions that count.

    A conversation has a position fewer than it has ids, as on our side: the last id is only predicted.
    """
    with np.load(job["examples"]) as stored:
        ids, trained, offsets = stored["ids"], stored["trained"], stored["offsets"]
    epoch = 0
    while True:
        order = np.random.default_rng(epoch).permutation(len(offsets) - 1)
        epoch += 1
        for start in range(0, len(order) - job["rows"] + 1, job["rows"]):
            spans = [slice(offsets[e], offsets[e + 1]) for e in order[start : start + job["rows"]]]
            longest = max(span.stop - span.start for span in spans)
            batch = {
                name: torch.full((len(spans), longest), filling)
                for name, filling in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
            }
            for row, span in enumerate(spans):
                count = span.stop - span.start
                batch["input_ids"][row, :count] = torch.from_numpy(ids[span])
                batch["attention_mask"][row, :count] = 1
                batch["labels"][row, :count] = torch.from_numpy(np.where(trained[span], ids[span], -100))
            yield batch, sum(int(span.stop - span.start) - 1 for span in spans)


if __name__ == "__main__":
    serve(build)
