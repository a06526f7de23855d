"""Checkpoints of a run's state, saved while training goes on, and proved intact before they are used.

Orbax writes them: in the background, aside first, put into place when complete. Added here is proof. Every leaf's
digest, and a checksum over all that is no array, are saved with the state; what is read back must match, or the
checkpoint is passed over for the one before.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.core.errors import InputError
from jaxlora.parallel import exchange
from jaxlora.parallel.rows import placed
from jaxlora.runs.digests import digests

_DAMAGED, _SUPERSEDED = ".damaged", ".superseded"
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's own


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` found.

    Attributes:
        step: the step the state was saved at.
        state: the pytree, leaf for leaf the saved bits.
        host: the JSON dict saved with it.
        skipped: one line for each newer checkpoint that was damaged.
    """

    step: int
    state: Any
    host: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The newest few checkpoints of a run, and those that its caller still needs.

    Args:
        folder: where they are kept, one subfolder a step.
        keep: how many of the newest stay. Those that `save` is told to keep stay besides.
        read_only: whether nothing in the folder is changed, for a look at a run that may be alive: a damaged checkpoint
            stays where it is.
    """

    def __init__(self, folder: str | Path, keep: int = 2, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
        self.folder = Path(folder).absolute()
        self.skipped: list[str] = []
        self._keep, self._read_only = keep, read_only
        self._manager: Any = None
        self._kept: frozenset[int] = frozenset()
        self._previously_kept: frozenset[int] = frozenset()
        self._pending: int | None = None
        self._problems: list[str] = []

    def save(
        self, step: int, state: Any, host: Mapping[str, Any] | None = None, kept: Collection[int] = ()
    ) -> None:
        """Starts saving `state` and returns when it may be donated or changed; the writing goes on behind.

        A step that is saved already is left alone when it holds the same, and replaced when not. A save that fails,
        now or behind, is told by `problems`, harms no earlier checkpoint, and may be repeated.

        Args:
            step: the number of optimizer steps done.
            state: a pytree of JAX arrays, sharded or not.
            host: a small dict of JSON values (tuples come back as lists).
            kept: the steps whose checkpoints stay besides the newest few, as far as they are there: the best ones, the
                one to roll back to. Whatever is in none of the two goes when this save is complete.
        Raises:
            TypeError: a leaf is no JAX array, or `host` no JSON.
        """
        self.wait()
        leaves = _named_leaves(state)
        sums = dict(zip(leaves, digests(list(leaves.values())), strict=True))
        described = {name: [str(leaf.dtype), list(leaf.shape), sums[name]] for name, leaf in leaves.items()}
        content = {"host": dict(host or {}), "leaves": described}
        _checksum(content)  # a host dict that is no JSON is the caller's mistake, not a failed save
        failure = ""
        self._previously_kept, self._kept = self._kept, frozenset(kept)
        try:
            manager = self._open()
            content["kept"] = sorted(self._kept)
            content["checksum"] = _checksum(content)
            if step in manager.all_steps():
                held = self._holds(step, content)
                # What process 0 says: the time that a run took, for one, differs from process to process.
                if exchange.from_first(lambda: held):
                    return
                self._set_aside(step, _SUPERSEDED)
            import orbax.checkpoint as ocp

            self._pending = step
            arrays = ocp.args.StandardSave(_not_empty(leaves))
            manager.save(
                step, args=ocp.args.Composite(state=arrays, host=ocp.args.JsonSave(content)), force=True
            )
        except Exception as error:  # whatever stops a save must not stop the run
            failure = _first_line(error)
        if failure := _anywhere(failure):
            self._failed(step, failure)

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """Reads the newest intact checkpoint back.

        A damaged one is passed over, told in `skipped`, and renamed to `<step>.damaged`, so that the step can be saved
        again; the next good save removes it.

        Args:
            like: a pytree of the saved structure; its leaves are arrays or `jax.ShapeDtypeStruct`s and say shape,
                dtype and sharding of what comes back (without a sharding: on the first device).
            step: only this one.
        Returns:
            The state, or None when no checkpoint is intact (`self.skipped` then says which were tried).
        Raises:
            InputError: the checkpoint is intact but holds other arrays than `like`.
        """
        self.wait()
        manager = self._open()
        self.skipped = []
        found = sorted(manager.all_steps(), reverse=True)
        for candidate in found if step is None else [s for s in found if s == step]:
            reason, state, host = "", None, {}
            try:
                state, host = self._load(candidate, like)
            except (InputError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # damaged files fail in as many ways as there are bytes
                reason = _first_line(error)
            if not (reason := _anywhere(reason)):
                return Restored(candidate, state, host, list(self.skipped))
            self.skipped.append(
                f"checkpoint {self.folder / str(candidate)} is damaged ({reason}): passed over"
            )
            if not self._read_only:
                self._set_aside(candidate, _DAMAGED)
            _sweep()
        return None

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        self.wait()
        return sorted(self._open().all_steps())

    def truncate(self, after_step: int) -> None:
        """Deletes the checkpoints of later steps, for a run that goes on from `after_step`."""
        for step in self.steps():
            if step > after_step:
                self._open().delete(step)

    def problems(self) -> list[str]:
        """The saves that failed since the last call, one line each. Never waits for a save in progress.

        One of several processes tells of a save at the next one: they have to hear of it together.
        """
        if exchange.alone() and self._pending is not None and not self._open().is_saving_in_progress():
            self.wait()
        found, self._problems = self._problems, []
        return found

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes are to save after this step and leave, since one was told that its machine will go.

        JAX carries the notice to all of them and agrees on a step later than any they are at, so it has to be asked
        about every step, in order. Needs jax.distributed; False without.

        Source: jax.experimental.multihost_utils.reached_preemption_sync_point.
        """
        manager = self._open()
        return type(manager).reached_preemption(manager, step)

    def wait(self) -> None:
        """Waits for the save in progress, if any."""
        if self._pending is None:
            return
        step = self._pending
        failure = ""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            failure = _first_line(error)
        if failure := _anywhere(failure):
            self._failed(step, failure)
            return
        self._pending = None
        # Of a save that failed, threads may have gone on writing after its folder was removed.
        self._remove(f"*{_DAMAGED}", f"*{_SUPERSEDED}", f"*{_UNFINISHED}*")

    def close(self) -> None:
        """Waits for the save in progress and ends the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # An exception in one of several processes ends them all: the others are not here to be waited for.
        if error is None or exchange.alone():
            self.close()

    def _open(self) -> Any:
        """The Orbax manager; made at first use, since importing Orbax takes its time."""
        if self._manager is None:
            _quiet()
            import orbax.checkpoint as ocp
            from orbax.checkpoint import checkpoint_managers

            if not self._read_only:
                exchange.from_first(self._put_back)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_newest_and_kept(checkpoint_managers, self._keep, lambda: self._kept),
                    cleanup_tmp_directories=not self._read_only,
                    read_only=self._read_only,
                    save_root_metadata=False,
                    # Otherwise a folder that cannot be made is waited for, minutes long, by whatever would fill it.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )
            # For its statistics Orbax asks again about the step just saved, from a thread and late: JAX would count
            # from there, and agree on a step that has gone by.
            self._manager.reached_preemption = lambda step: False
        return self._manager

    def _put_back(self) -> None:
        """Undoes a replacement that was never completed: the process was killed, or the save failed."""
        for aside in self.folder.glob(f"*{_SUPERSEDED}"):
            place = aside.with_suffix("")
            if not place.exists():
                aside.rename(place)

    def _failed(self, step: int, reason: str) -> None:
        self._problems.append(
            f"the checkpoint of step {step} could not be saved to {self.folder} ({reason}); "
            "the ones before are untouched, and the next save tries again"
        )
        self._pending = None
        self._kept = self._previously_kept
        manager, self._manager = self._manager, None  # its list of steps no longer tells what is on disk
        with contextlib.suppress(Exception):  # it fails with the error just told
            if manager is not None:
                manager.close()
        del manager
        _sweep()
        self._remove(f"{step}{_UNFINISHED}*")  # a full disk needs the room

    def _set_aside(self, step: int, suffix: str) -> None:
        def rename() -> None:
            aside = self.folder / f"{step}{suffix}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)

        exchange.from_first(rename)
        self._open().reload()

    def _remove(self, *patterns: str) -> None:
        if exchange.first():
            for leftover in [path for pattern in patterns for path in self.folder.glob(pattern)]:
                shutil.rmtree(leftover, ignore_errors=True)

    def _content(self, step: int) -> dict[str, Any]:
        """All of a checkpoint that is no array, proved by its checksum."""
        import orbax.checkpoint as ocp

        content = self._open().restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore())).host
        if _checksum({key: content[key] for key in content if key != "checksum"}) != content["checksum"]:
            raise ValueError("its checksum does not match")
        return content

    def _holds(self, step: int, content: Mapping[str, Any]) -> bool:
        try:
            return self._content(step)["checksum"] == content["checksum"]
        except Exception:  # damaged, then: it is to be replaced
            return False

    def _load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        content = self._content(step)
        targets = {name: _abstract(leaf) for name, leaf in _named_leaves(like).items()}
        wanted = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in targets.items()}
        saved = {name: [dtype, shape] for name, (dtype, shape, _) in content["leaves"].items()}
        if saved != wanted:
            raise InputError(_other_arrays(self.folder / str(step), saved, wanted))
        arrays = ocp.args.StandardRestore(_not_empty(targets))
        leaves = self._open().restore(step, args=ocp.args.Composite(state=arrays)).state
        empty = {name: leaf for name, leaf in targets.items() if not leaf.size}
        leaves |= {
            name: placed(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in empty.items()
        }
        for name, digest in zip(targets, digests([leaves[name] for name in targets]), strict=True):
            if digest != content["leaves"][name][2]:
                raise ValueError(f"the digest of {name} does not match")
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in targets]), content[
            "host"
        ]


def _newest_and_kept(policies: Any, keep: int, kept: Callable[[], Collection[int]]) -> Any:
    class Kept(policies.PreservationPolicy):
        def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
            return [checkpoint.step in kept() for checkpoint in checkpoints]

    return policies.AnyPreservationPolicy([policies.LatestN(n=keep), Kept()])


@functools.cache
def _quiet() -> None:
    """Keeps Orbax from telling on stderr what `problems` and `skipped` tell in a line.

    It logs each step of its work, and the tracebacks of failed ones, through absl. A failed read moreover leaves
    others behind whose answers come when nobody waits any more, each with a traceback of its own: from a coroutine, or
    as an error that asyncio logs for a future.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    told = logging.Formatter()  # with the traceback
    logging.getLogger("asyncio").addFilter(
        lambda record: not re.search("orbax|tensorstore", told.format(record))
    )
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        file = getattr(getattr(unraisable.object, "cr_code", None), "co_filename", "")
        if str(unraisable.exc_value) != "Event loop is closed" and "orbax" not in file:
            before(unraisable)

    sys.unraisablehook = hook


def _anywhere(failure: str) -> str:
    """What failed in the first process in which something did; empty for nothing. All processes ask together."""
    return next(filter(None, exchange.gathered(failure)), "")


def _first_line(error: Exception) -> str:
    """The heart of an error: Orbax's and TensorStore's go on for pages, with the system's words far inside."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _sweep() -> None:
    """Collects the coroutines a failure left unawaited, which would warn whenever they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their path, "opt_state.0.mu.layers.a": independent of the containers' Python types."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or jnp.issubdtype(
            leaf.dtype, jax.dtypes.extended
        ):
            raise TypeError(f"{name} is {type(leaf).__name__}; a checkpoint holds JAX arrays of numbers only")
        if name in named:
            raise TypeError(f"two leaves are both called {name}")
        named[name] = leaf
    return named


def _not_empty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that have elements; Orbax saves no others, and their shapes say all."""
    return {name: leaf for name, leaf in leaves.items() if leaf.size}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _other_arrays(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in dict.fromkeys((*saved, *wanted)) if saved.get(name) != wanted.get(name)]

    def told(value: Any) -> str:
        return f"{value[0]}{value[1]}" if value else "missing"

    shown = "; ".join(f"{n} is {told(saved.get(n))} there and {told(wanted.get(n))} here" for n in names[:3])
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"the checkpoint {folder} holds another state: {shown}{more}.\nGive another --workdir to start anew."
    )
