"""How many floating-point operations a decoder takes: its matrix products, two for each multiplication.

XLA counts the body of a loop once, however often it turns, so what it says of a scan over layers is of no use; this
count is exact for the products, and leaves out all that is not one (norms, softmax, the optimiser: a percent or two).
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxlora.models.spec import DecoderSpec


class Flops(NamedTuple):
    """Of a training step, or of anything that computes tokens; whole, over all devices.

    Attributes:
        base: products with frozen matrices. lora: with A and B. attention: scores, and their sums of values.
        head: logits, and the gradient of the hidden states.
        again: of base, lora and attention, what the backward pass computes a second time (`model.remat`).
    """

    base: float
    lora: float
    attention: float
    head: float
    again: float

    @property
    def total(self) -> float:
        """All that the devices do."""
        return self.base + self.lora + self.attention + self.head

    @property
    def model(self) -> float:
        """Without what is computed twice: what a utilisation of model FLOPs (MFU) goes by."""
        return self.total - self.again


def kernels(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """The projections of a layer: (inputs, outputs)."""
    wide, narrow = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    model, inner = spec.hidden_size, spec.intermediate_size
    return {
        "q_proj": (model, wide),
        "k_proj": (model, narrow),
        "v_proj": (model, narrow),
        "o_proj": (wide, model),
        "gate_proj": (model, inner),
        "up_proj": (model, inner),
        "down_proj": (inner, model),
    }


def training(spec: DecoderSpec, ranks: Mapping[str, int], rows: int, length: int, remat: str) -> Flops:
    """A step of LoRA over a frozen base.

    A token costs, in each projection [I, O], 2 I O forward and 2 I O for the gradient of its input (the frozen kernel
    needs none of its own); in each pair of rank r, 2 r (I + O) forward, and as much again for the input's gradient and
    for those of A and B. Attention is counted over all length x length pairs, as the plain formula computes them: 4 T
    H h a token forward, twice that backward.

    Args:
        ranks: by the name of the projection; those that have no adapter are left out.
        rows: in a step, over all devices. length: T.
        remat: `model.remat`, settled: not "auto".
    """
    tokens, layers = float(rows * length), spec.num_layers
    base = lora = 0.0  # forward, a token and layer
    for name, (i, o) in kernels(spec).items():
        base += 2.0 * i * o
        lora += 2.0 * ranks.get(name, 0) * (i + o)
    attention = 4.0 * length * spec.num_heads * spec.head_dim
    # Nothing in the backward pass asks for what a layer's last product handed out.
    i, o = kernels(spec)["down_proj"]
    whole_layer = (base - 2.0 * i * o, lora - 2.0 * ranks.get("down_proj", 0) * o, attention)
    again = {
        "none": (0.0, 0.0, 0.0),
        # The formula's output is kept: its weights are made again, and are not multiplied with the values.
        "dots": (0.0, 0.0, attention / 2),
        "full": whole_layer,
        "offload": whole_layer,
    }[remat]
    everywhere = layers * tokens
    return Flops(
        base=(2 * base + again[0]) * everywhere,
        lora=(3 * lora + again[1]) * everywhere,
        attention=(3 * attention + again[2]) * everywhere,
        head=2 * 2.0 * spec.vocab_size * spec.hidden_size * tokens,
        again=sum(again) * everywhere,
    )
