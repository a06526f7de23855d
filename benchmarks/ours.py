"""Our train step over random weights, as a run compiles it, for the benchmarks that time or count it."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import ALPHA, CLIP_NORM, LEARNING_RATE, RANK, WEIGHT_DECAY, random_bits
from jaxlora.config.build import memory, programs
from jaxlora.config.build.inputs import Model, attention_platform, told
from jaxlora.config.schema import Config
from jaxlora.core.tree import Path, unflatten
from jaxlora.models.attention import Attention
from jaxlora.models.decoder import Decoder
from jaxlora.models.spec import DecoderSpec
from jaxlora.models.weights import param_shapes
from jaxlora.parallel.mesh import make_mesh


def random_base(spec: DecoderSpec, dtype: str = "bfloat16") -> dict[str, Any]:
    """A base with random weights and norms of one, on the first device."""
    random = np.random.default_rng(0)

    def leaf(path: Path, shape: tuple[int, ...]) -> Any:
        if path[-1] == "scale":
            return jnp.ones(shape, dtype)
        if jax.devices()[0].platform == "cpu":  # whose memory is measured: a program would leave some behind
            return jnp.asarray(random_bits(random, shape), dtype)
        key = jax.random.key(int(random.integers(2**31)))
        return _random_bits_there(key, shape, dtype)

    return unflatten({path: leaf(path, shape) for path, shape in param_shapes(spec).items()})


@partial(jax.jit, static_argnums=(1, 2))
def _random_bits_there(key: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """`random_bits`, drawn on the device; one layer after the other, since its memory is measured too."""

    def drawn(key: Any, size: tuple[int, ...]) -> Any:
        bits = (jax.random.bits(key, size, jnp.uint16) & 0x807F) | 0x3C00
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(dtype)

    if len(shape) < 3:
        return drawn(key, shape)
    return jax.lax.map(lambda one: drawn(one, shape[1:]), jax.random.split(key, shape[0]))


def filled(rows: int, length: int, vocabulary: int, examples: int = 1) -> dict[str, np.ndarray]:
    """A host batch [rows, length] of so many examples a row, every token trained."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    places, each = np.arange(length, dtype=np.int32), length // examples

    def in_rows(row: np.ndarray) -> np.ndarray:
        return np.broadcast_to(row, (rows, length))

    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": in_rows(np.minimum(places // each, examples - 1) + 1),
        "positions": in_rows(places - each * np.minimum(places // each, examples - 1)),
        "weights": np.ones((rows, length), np.float32),
    }


class OurStep:
    """The compiled train step on the first device.

    Args:
        spec: the base. rows, length: of a step's batch. dtype: of the base. remat: a policy of the decoder, or
            "auto" for the first that a run with that value tries on the device.
        attention: its kind. examples: the most that a row of a batch has.
        at_once: rows of a micro-batch; all by default. scan_layers: as model.scan_layers.
    Attributes:
        remat: the policy.
        config, model, compiled: as a run has them. `compiled` is made when it is first asked for; it is None where the
            step does not fit the device.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        rows: int,
        length: int,
        dtype: str = "bfloat16",
        remat: str = "full",
        attention: str = "auto",
        at_once: int | None = None,
        examples: int = 1,
        scan_layers: bool = True,
    ):
        self._micro_batches = rows // (at_once or rows)
        self.config = Config.from_dict(
            {
                "model": {"path": "none", "remat": remat, "dtype": dtype, "scan_layers": scan_layers},
                "lora": {"rank": RANK, "alpha": ALPHA},
                "optim": {
                    "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM,
                    "warmup_steps": 1,
                },
                "data": {"train": "none", "max_length": length},
                "train": {"batch_size": rows, "micro_batch_size": at_once or rows},
            }
        )  # fmt: skip
        device = jax.devices()[0]
        how = told(Attention(attention, attention_platform(device)), device, examples)
        mesh = make_mesh((1, 1, 1), [device])
        self.remat = memory.policies(self.config, mesh)[0]
        decoder = Decoder(spec, remat=self.remat, dtype=jnp.dtype(dtype), attention=how)
        self.model = Model(None, spec, decoder, mesh)  # type: ignore[arg-type]

    _steps = 10_000  # of the schedule; more than any benchmark does

    @cached_property
    def compiled(self) -> Any:
        shapes = programs.state_shapes(self.config, self.model, self._steps)
        (made,) = programs.compile_all(self.model, [programs.lower_train(self.config, self.model, shapes)])
        return made

    def put(self, batch: dict[str, np.ndarray]) -> Any:
        """A host batch on the device, as a run puts it there."""
        return programs.put_batch(self.model, self._micro_batches)(batch)

    def starter(self, base: dict[str, Any]) -> Callable[[Any], Any]:
        """A function that does one step on a placed batch and hands out its sums; the state stays inside."""
        state, compiled = programs.first_state(self.config, self.model, self._steps, base), self.compiled
        assert compiled is not None

        def step(batch: Any) -> Any:
            nonlocal state
            state, sums = compiled(state, base, batch)
            return sums

        return step
