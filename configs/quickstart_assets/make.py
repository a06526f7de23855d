"""Makes everything that the quickstart ships: tokenizer, pretrained base, train.jsonl and eval.jsonl.

    python -m configs.quickstart_assets.make

What it does, all of it seeded:
1. writes a tokenizer of single bytes (no merges) with Qwen's three special tokens and a ChatML template;
2. pretrains a Qwen2 decoder of a million parameters, all of them trained, from random weights on the primitive tasks
   of tasks.py, then rounds it to bfloat16;
3. asks the rounded base every primitive task about held-out words, and the taught task, which it must fail;
4. writes base/, train.jsonl and eval.jsonl beside this file, or into --out.

It took 23 minutes of CPU time on two cores of an AMD EPYC (40 by the clock, since others shared them; alone, about
half of the CPU time). The base then answers 93 to 100 % of a primitive task's held-out questions exactly (97 % or
more in 13 of 16), and no pig latin.

The data files come out byte for byte the same anywhere; weights may differ in their last bits between processors.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.flax import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from configs.quickstart_assets import tasks
from configs.quickstart_assets.words import held_out, made_up
from jaxlora.core import prng, tree
from jaxlora.core.products import contract
from jaxlora.models.decoder import Decoder, unembedding
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import param_shapes, tensor_table

HERE = Path(__file__).parent

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

END_OF_TEXT, IM_START, IM_END = 256, 257, 258
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 264,  # 256 bytes and 3 special tokens, rounded up to a multiple of eight
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": IM_END,
    "pad_token_id": END_OF_TEXT,
    "torch_dtype": "bfloat16",
}

STEPS, ROWS, ROW_LENGTH = 1600, 32, 192
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 3e-3, 100, 0.01
CHECKED = 200  # held-out questions a task

Batch = dict[str, np.ndarray]


# ---------------------------------------------------------------------------------------------------- tokenizer


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges: one token a byte, so that the model sees letters.

    It has the form of Qwen2's own tokenizer: every loader of that one (transformers picks it for model_type qwen2
    whatever the file says) reads it as it is.
    """
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }


# ---------------------------------------------------------------------------------------------------- batches


def encode(tokenizer: Tokenizer, turns: list[tasks.Turn]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation in ChatML, and which of them the model learns to say: each answer and its <|im_end|>."""
    ids: list[int] = []
    trained: list[bool] = []
    for turn in turns:
        newline = "\n" if ids else ""  # after the <|im_end|> of the turn before
        question = f"{newline}<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        for text, learned in ((question, False), (f"{turn.answer}<|im_end|>", True)):
            new = tokenizer.encode(text).ids
            ids += new
            trained += [learned] * len(new)
    return ids, trained


def batches(tokenizer: Tokenizer, conversations: Iterator[list[tasks.Turn]], rows: int) -> Iterator[Batch]:
    """Packs conversations, in their order, into batches of [rows, ROW_LENGTH]; the last one is padded."""
    encoded = (encode(tokenizer, turns) for turns in conversations)
    encoded = ((ids, trained) for ids, trained in encoded if len(ids) <= ROW_LENGTH)
    waiting = next(encoded, None)
    while waiting is not None:
        batch = {
            name: np.zeros((rows, ROW_LENGTH), np.float32 if name == "weights" else np.int32)
            for name in ("tokens", "targets", "weights", "positions", "segments")
        }
        for row in range(rows):
            start, segment = 0, 1
            while waiting is not None and start + len(waiting[0]) - 1 <= ROW_LENGTH:
                ids, trained = waiting
                here = slice(start, start + len(ids) - 1)
                batch["tokens"][row, here], batch["targets"][row, here] = ids[:-1], ids[1:]
                batch["weights"][row, here] = trained[1:]
                batch["positions"][row, here], batch["segments"][row, here] = range(len(ids) - 1), segment
                start, segment, waiting = here.stop, segment + 1, next(encoded, None)
        yield batch


# ---------------------------------------------------------------------------------------------------- pretraining


def initial(key: jax.Array, spec: DecoderSpec) -> dict[str, Any]:
    """Random float32 parameters: kernels ~ N(0, 1 / fan_in), so that a model this narrow starts with a signal."""

    def leaf(path: tree.Path, shape: tuple[int, ...]) -> jax.Array:
        if path[-1] in ("scale", "bias"):
            return jnp.full(shape, float(path[-1] == "scale"))
        deviation = 0.05 if path[-1] == "embedding" else shape[-2] ** -0.5
        if path[-2] in ("o_proj", "down_proj"):  # what is added to the residual stream, 2 L times (GPT-2)
            deviation /= (2 * spec.num_layers) ** 0.5
        return deviation * jax.random.normal(prng.named(key, *path), shape)

    return tree.unflatten({path: leaf(path, shape) for path, shape in param_shapes(spec).items()})


def logits(decoder: Decoder, params: dict[str, Any], batch: Batch) -> jax.Array:
    """[B, T, V] float32; the vocabulary is small enough to have them whole."""
    params = jax.tree.map(lambda x: x.astype(decoder.dtype), params)
    hidden: Any = decoder.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])
    return contract("BTD,VD->BTV", hidden, unembedding(params))


def pretrain(decoder: Decoder, stream: Iterator[Batch], steps: int, seed: int) -> dict[str, Any]:
    """Trains all parameters with AdamW, float32 master weights under bfloat16 products."""
    params = initial(jax.random.key(seed), decoder.spec)
    print(f"{tree.count(params):,} parameters")
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps // 2), steps)
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=WEIGHT_DECAY)
    )

    def loss(params: dict[str, Any], batch: Batch) -> jax.Array:
        nll = optax.softmax_cross_entropy_with_integer_labels(
            logits(decoder, params, batch), batch["targets"]
        )
        return jnp.sum(nll * batch["weights"]) / jnp.sum(batch["weights"])

    @jax.jit
    def step(params, moments, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = transform.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, recent, start = transform.init(params), [], time.perf_counter()
    for number in range(1, steps + 1):
        params, moments, value = step(params, moments, next(stream))
        recent.append(float(value))
        if number % 100 == 0 or number == steps:
            mean, seconds = np.mean(recent), time.perf_counter() - start
            print(f"step {number:5d} of {steps}  nll {mean:.4f}  {seconds:.0f} s", flush=True)
            recent.clear()
    return params


# ---------------------------------------------------------------------------------------------------- checks


def exact_match(
    decoder: Decoder, params: dict[str, Any], tokenizer: Tokenizer, turns: list[tasks.Turn]
) -> float:
    """The share of questions that greedy decoding answers exactly.

    A greedy answer is the right one if and only if, given the right answer so far, the likeliest token is the next
    right one at every place: one forward pass instead of a decoding loop.
    """
    likeliest = jax.jit(lambda params, batch: jnp.argmax(logits(decoder, params, batch), axis=-1))
    right = 0
    for batch in batches(tokenizer, ([turn] for turn in turns), ROWS):
        wrong = (np.asarray(likeliest(params, batch)) != batch["targets"]) & (batch["weights"] > 0)
        for row, segments in zip(wrong, batch["segments"], strict=True):
            right += segments.max() - len(np.unique(segments[row]))
    return float(right) / len(turns)


def held_out_turns(name: str) -> list[tasks.Turn]:
    """Questions of a primitive task about held-out made-up words."""
    rng = random.Random(f"check {name}")
    words = [word for word in (made_up(rng) for _ in range(20 * CHECKED)) if held_out(word)][:CHECKED]
    return [tasks.primitive(name, word, rng) for word in words]


def never_taught(conversations: Iterator[list[tasks.Turn]]) -> Iterator[list[tasks.Turn]]:
    """Passes conversations on, and fails if one gives the taught task away or uses a held-out word."""
    for turns in conversations:
        for turn in turns:
            assert "pig latin" not in turn.question, turn
            assert turn.answer != tasks.pig_latin(turn.word), turn
            assert not held_out(turn.word), turn
        yield turns


# ---------------------------------------------------------------------------------------------------- files


def hugging_face(params: dict[str, Any], spec: DecoderSpec) -> dict[str, jax.Array]:
    """The parameters as Hugging Face stores them: a tensor a layer, matrices [out, in]."""
    tensors: dict[str, jax.Array] = {}
    leaves = dict(tree.leaves(params))
    for path, stored in tensor_table(spec).items():
        parts = leaves[path] if stored.stacked else [leaves[path]]
        for name, part in zip(stored.names, parts, strict=True):
            tensors[name] = part.T if stored.transposed else part
    return tensors


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def write_data(folder: Path) -> None:
    """train.jsonl and eval.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", tasks.train_rows()), ("eval", tasks.eval_rows())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, params: dict[str, Any], spec: DecoderSpec) -> None:
    """config.json, generation_config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    ends = {"eos_token_id": IM_END, "pad_token_id": END_OF_TEXT, "do_sample": False}
    write_json(folder / "generation_config.json", ends)
    save_file(hugging_face(params, spec), folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the quickstart's base, tokenizer and data.")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder to write (default: where this script is)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"pretraining steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the pretraining (default 0)")
    arguments = parser.parse_args()

    write_tokenizer(arguments.out / "base")
    write_data(arguments.out)
    tokenizer = make_tokenizer()
    decoder = Decoder(DecoderSpec.from_hf(CONFIG), remat="none", dtype=jnp.bfloat16)
    stream = batches(tokenizer, never_taught(tasks.pretraining(arguments.seed)), ROWS)
    params = pretrain(decoder, stream, arguments.steps, arguments.seed)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    write_model(arguments.out / "base", params, decoder.spec)

    scores = {
        name: exact_match(decoder, params, tokenizer, held_out_turns(name)) for name in tasks.PRIMITIVES
    }
    for name, score in scores.items():
        print(f"{name:16s} {score:6.1%}  {held_out_turns(name)[0]}")
    taught = exact_match(decoder, params, tokenizer, tasks.eval_turns())
    print(f"{'pig latin':16s} {taught:6.1%}")
    assert taught < 0.05, "the base must not know the taught task"
    assert min(scores.values()) > 0.9, "the base must know its primitives"


if __name__ == "__main__":
    main()
