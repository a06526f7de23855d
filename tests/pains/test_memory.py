"""Pains of memory: what the programs of a run hold, as the compiler that made them says."""

import functools
import gc

import jax
import jax.numpy as jnp
import pytest

from jaxlora.config.build import programs
from jaxlora.config.build.inputs import Model
from jaxlora.config.schema import Config
from jaxlora.data.batches import EvalBatches
from jaxlora.lora import tree as lora
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.parallel.mesh import make_mesh
from jaxlora.training.evaluate import Evaluator
from jaxlora.training.losses import cross_entropy
from jaxlora.training.metrics import METRICS
from jaxlora.training.step import make_eval_step


def compile_run(length: int, rows: int, rank: int = 4, **sizes: int):
    """A run's own programs, compiled from shapes alone: (programs, shapes of the base, shapes of the state)."""
    numbers = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, **sizes,
    }  # fmt: skip
    spec = DecoderSpec(
        model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, tie_word_embeddings=True,
        sliding_window=None, max_position_embeddings=length, **numbers,
    )  # fmt: skip
    config = Config.from_dict(
        {
            "model": {"path": "nowhere"},
            "data": {"train": "nowhere", "max_length": length},
            "lora": {"rank": rank},
            "optim": {"label_smoothing": 0.1},
            "train": {"batch_size": 2 * rows, "micro_batch_size": rows},
            "eval": {"batch_size": rows, "metrics": tuple(METRICS)},
        }
    )
    decoder = Decoder(spec, remat=config.model.remat, dtype=jnp.dtype(config.model.dtype))
    model = Model(None, spec, decoder, make_mesh((1, 1, 1), jax.devices()[:1]))  # type: ignore[arg-type]
    state = programs.state_shapes(config, model, steps=10)
    return programs.compile_programs(config, model, state), model.shapes(), state


def size(tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.usefixtures("usual_fusions")
def test_evaluating_with_metrics_runs_out_of_memory():
    """compiled eval memory <= compiled train-step memory with every metric on, and the same for 10 and for 10,000
    eval rows
    """
    vocabulary, length, rows = 32_768, 256, 8
    compiled, _, _ = compile_run(length, rows, vocab_size=vocabulary)

    def all_bytes(program) -> int:
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return held - memory.alias_size_in_bytes

    assert all_bytes(compiled.evaluate) <= all_bytes(compiled.train)
    assert all_bytes(compiled.train) < rows * length * vocabulary * 4  # one array of logits alone


def test_evaluating_with_metrics_runs_out_of_memory_however_many_rows(make_tiny, drawn, monkeypatch):
    """compiled eval memory <= compiled train-step memory with every metric on, and the same for 10 and for 10,000
    eval rows
    """
    tiny, batch_size, length = make_tiny(), 200, 8
    step = jax.jit(make_eval_step(tiny.decoder))
    held: list[int] = []

    def put(batch):
        held.append(sum(x.nbytes for x in jax.live_arrays()))
        return jax.device_put(batch)

    peaks, counts = [], []
    for count in (10, 10_000):
        data = EvalBatches(drawn(count, length), batch_size, length, packing=False)
        gc.collect()
        held.clear()
        found = Evaluator(step, data, put, tuple(METRICS))(lora.scale(tiny.state.adapter, 2.0), tiny.base)
        peaks.append(max(held) - held[0])
        counts.append((len(held), len(found.per_example["example"])))
    assert counts == [(1, 10), (50, 10_000)]
    assert step._cache_size() == 1  # one program, and so one amount of memory
    a_batch = 5 * batch_size * length * 4
    assert peaks[1] <= 3 * a_batch  # one under way, one being summed, one being placed


@pytest.mark.usefixtures("usual_fusions")
def test_label_smoothing_crashes_or_takes_three_vocabulary_sized_tensors():
    """chunked smoothed loss = dense formula, masks respected, peak memory within 10 % of no smoothing"""
    rows, time, width, vocabulary = 4, 512, 32, 32_768
    shapes = (
        jax.ShapeDtypeStruct((rows, time, width), jnp.float32),
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, time), jnp.int32),
        jax.ShapeDtypeStruct((rows, time), jnp.float32),
    )

    def peak(smoothing: float) -> int:
        loss = functools.partial(cross_entropy, label_smoothing=smoothing)
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(0.1) <= 1.1 * peak(0.0)
    assert peak(0.1) < rows * time * vocabulary * 4  # not one array of all logits, let alone three


@pytest.mark.usefixtures("usual_fusions")
def test_lora_scan_copies_the_base():
    """compiled train step: argument bytes = base + state + batch; temporary bytes don't contain the base"""
    length, rows = 16, 1
    compiled, base, state = compile_run(
        length, rows, rank=1, hidden_size=128, intermediate_size=512, num_layers=48, head_dim=32
    )
    memory = compiled.train.memory_analysis()
    batch = 2 * rows * length * 5 * 4
    assert memory.argument_size_in_bytes == size(base) + size(state) + batch
    assert memory.alias_size_in_bytes == size(state)  # donated: the new state takes the old one's place
    # With so few tokens the activations are small; what could be large is a copy of the base, or its gradient.
    assert memory.temp_size_in_bytes < 0.25 * size(base)
