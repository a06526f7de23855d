"""A train step of ours, in a process of its own; started by `benchmarks.train_vs_peft`."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from benchmarks.children import Side, serve
from benchmarks.shapes import spec
from jaxlora.core.compilation import use_persistent_cache
from jaxlora.core.imports import without_torch

if TYPE_CHECKING:  # what asks for torch is imported once commands would have hidden it
    from jaxlora.data.batches import Batches


def build(job: dict[str, Any]) -> Side:
    with without_torch():  # as every command does, and the cache too
        from benchmarks.ours import OurStep, filled, random_base
    use_persistent_cache()

    shape = spec(job["shape"])
    remat = "auto" if job["remat"] == "none" else job["remat"]  # where one may keep all, it need not
    at_once = min(job["rows"], job["at_once"])
    batches = conversations(job) if job["examples"] else None
    most = batches.most_segments if batches else 1
    ours = OurStep(
        shape, job["rows"], job["length"], job["dtype"], remat,
        at_once=at_once, examples=most, scan_layers=job.get("scan_layers", True),
    )  # fmt: skip
    if ours.compiled is None:
        raise MemoryError("the compiled step does not fit the device")
    step = ours.starter(random_base(shape, job["dtype"]))
    drawn, done = ours.put(filled(job["rows"], job["length"], shape.vocab_size)), 0

    def run() -> int:
        nonlocal done
        tokens, sums = 0, None
        for _ in range(job["steps"]):
            done += 1
            given = drawn
            if batches is None:
                tokens += job["rows"] * job["length"]
            else:
                host = batches.batch(done)
                tokens += int(np.count_nonzero(host["segments"]))
                given = ours.put(host)
            sums = step(given)
        jax.block_until_ready(sums)
        return tokens

    def device_peak() -> int | None:
        found = jax.devices()[0].memory_stats()
        return found["peak_bytes_in_use"] if found else None

    memory: Any = ours.compiled.memory_analysis()
    facts = {
        "remat": ours.remat,
        "scan_layers": ours.config.model.scan_layers,
        "device": jax.devices()[0].device_kind,
        "temporaries": memory.temp_size_in_bytes if memory else None,
    }
    return Side(run, device_peak, facts)


def conversations(job: dict[str, Any]) -> "Batches":
    """The packed batches of conversations that the parent has encoded."""
    from jaxlora.data.batches import Batches, Examples

    with np.load(job["examples"]) as stored:
        arrays = {name: stored[name] for name in ("ids", "trained", "offsets", "source_rows")}
    examples = Examples(
        **arrays, conversations=len(arrays["source_rows"]), truncated=0, dropped=0, max_length=job["length"],
        name="conversations",
    )  # fmt: skip
    return Batches(examples, job["rows"], job["length"])


if __name__ == "__main__":
    serve(build)
