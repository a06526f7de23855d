"""What accelerators have: memory, peak arithmetic and bandwidth, as their makers publish them."""

from typing import NamedTuple

GIB = 2**30
_CLOUD = "https://cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"


class Chip(NamedTuple):
    """One kind of accelerator; a device of JAX is one of it.

    Attributes:
        name: for a person.
        kinds: what JAX's `device_kind` says, or how it begins.
        memory: bytes that a program may take. Of a TPU: what its compiler (libtpu 0.0.42) says is available when a
            program does not fit, which is a quarter to one and a quarter GiB less than what is built in.
        peak: dense bfloat16 products, FLOP/s.
        bandwidth: of its memory, bytes/s.
        source: of the published numbers.
    """

    name: str
    kinds: tuple[str, ...]
    memory: int
    peak: float
    bandwidth: float
    source: str


CHIPS = (
    Chip("TPU v4", ("TPU v4",), int(30.75 * GIB), 275e12, 1.2e12, f"{_CLOUD}/v4"),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), 197e12, 819e9, f"{_CLOUD}/v5e"),
    Chip("TPU v5p", ("TPU v5", "TPU v5p"), int(95.74 * GIB), 459e12, 2765e9, f"{_CLOUD}/v5p"),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), int(31.25 * GIB), 918e12, 1640e9, f"{_CLOUD}/v6e"),
    Chip("A100 40 GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40 * GIB, 312e12, 1555e9, f"{_NVIDIA}/a100"),
    Chip("A100 80 GB", ("NVIDIA A100-SXM4-80GB",), 80 * GIB, 312e12, 2039e9, f"{_NVIDIA}/a100"),
    Chip("A100 80 GB PCIe", ("NVIDIA A100 80GB PCIe",), 80 * GIB, 312e12, 1935e9, f"{_NVIDIA}/a100"),
    Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 80 * GIB, 756e12, 2e12, f"{_NVIDIA}/h100"),
    Chip("H100", ("NVIDIA H100",), 80 * GIB, 989e12, 3.35e12, f"{_NVIDIA}/h100"),
    Chip("H200", ("NVIDIA H200",), 141 * 10**9, 989e12, 4.8e12, f"{_NVIDIA}/h200"),
)  # fmt: skip
"""Where several kinds begin alike, the longest that fits counts."""


def find(device_kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for one that is not in the table (a CPU, for example)."""
    found = [
        (len(kind), chip)
        for chip in CHIPS
        for kind in chip.kinds
        if device_kind == kind or device_kind.startswith(f"{kind} ")
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None
