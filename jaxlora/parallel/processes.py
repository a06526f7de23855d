"""This process among those that train together, and the notice that a machine will be taken away.

Whoever takes a machine away (a preempted or maintained TPU VM, a cluster that is drained) sends SIGTERM to what runs
there. jax.distributed carries that notice to all processes and lets them agree on the step after which all save and
leave; `runs.checkpoints.Checkpoints.reached_preemption` asks for it, through Orbax.
"""

import ctypes
import os
import signal
import socket
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlora.core.errors import InputError
from jaxlora.parallel import exchange
from jaxlora.parallel.launch import LOST_AFTER, Launch, from_environment
from jaxlora.parallel.watch import Watch

_METADATA = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
_ARRIVAL = 300  # seconds that the first process waits for the last
_PATIENCE = 5  # seconds for a metadata server that is a part of the machine's own host


def join(say: Callable[[str], None], launch: Launch | None = None) -> Callable[[], None] | None:
    """Joins the other processes by jax.distributed, where there is cause: before the first touch of a device.

    That is where a launch says so, and on a Cloud TPU VM. One host that cannot goes on without, and says so.

    Args:
        say: takes a line for the person.
        launch: as the command's flags and the environment have it; None for the environment alone.
    Returns:
        What tells all processes, this one too, that one of them is asked to leave; None without jax.distributed.
        SIGTERM does what it did before.
    Raises:
        InputError: a variable that should be a number is none, or the others cannot be found.
    """
    if jax.distributed.is_initialized():
        return None  # by whoever called us, whose affair its signals are then
    launch = launch or from_environment(os.environ)
    before, port = signal.getsignal(signal.SIGTERM), 0
    arguments: dict[str, Any] = {}  # on a TPU and under Slurm, JAX finds the other hosts by itself
    if launch:
        count, port = launch.count, launch.port
        if launch.address:
            numbers = {"num_processes": count, "process_id": launch.index}
            arguments = {"coordinator_address": launch.address, **numbers}
    elif _on_tpu_vm():
        count = tpu_hosts(os.environ)
    else:
        return None
    if count > 1:
        _join_others(arguments, launch)
    elif problem := _join_nobody(port or _free_port()):
        say(
            f"jax.distributed could not be started ({problem}): going on without; SIGTERM is heeded all the same"
        )
        return None
    notifier = _take_sigterm()
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return notifier


def watch(launch: Launch | None) -> Watch | None:
    """Begins to watch over the other processes; None where there are none."""
    if exchange.alone():
        return None
    from jax._src import distributed

    address = distributed.global_state.coordinator_address or ""
    return Watch(address, launch.lost_after if launch else LOST_AFTER)


def _join_others(arguments: Mapping[str, Any], launch: Launch | None) -> None:
    """Waits for all processes.

    A process that JAX itself misses for its heartbeats makes it abort all; `Watch` says it first, and in a line.
    """
    lost_after = launch.lost_after if launch else LOST_AFTER
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=max(100, round(2 * lost_after)),
            initialization_timeout=_ARRIVAL,
        )
    except ValueError as error:  # JAX detects no address, or not the numbers
        raise InputError(
            f"jax.distributed cannot find the other processes ({error}); name them with --coordinator HOST:PORT, "
            "--processes N and --process I."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise InputError(
            f"not all processes came within {_ARRIVAL} s: start all of them, and let them reach the port of process 0."
        ) from error


def _join_nobody(port: int) -> str:
    """Starts jax.distributed for this process alone; returns what went wrong, or nothing.

    Nobody has to find this process. What JAX does to be found takes minutes where there is no network, and it aborts,
    without an exception, a process that cannot reach its own address, or would only by way of a proxy.
    """
    if any("_proxy" in name.lower() for name in os.environ):
        own, common = "no_grpc_proxy", "no_proxy"  # in lower case: gRPC reads no other
        unproxied = os.environ.get(own) or os.environ.get(common)
        os.environ[own] = ",".join(filter(None, (unproxied, "localhost")))
        jax.config.update("jax_check_proxy_envs", False)  # it warns of what has just been dealt with
    address = f"localhost:{port}"
    try:
        with socket.socket() as probe:  # JAX crashes, now and then, where its port is taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("localhost", port))
        jax.distributed.initialize(address, num_processes=1, process_id=0, coordinator_bind_address=address)
    except Exception as error:  # whatever it is, it is not worth the run
        return f"port {port}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


def tpu_hosts(environment: Mapping[str, str]) -> int:
    """How many hosts the TPU slice of this machine has; 1 where nobody says.

    GKE names them in the environment; on a TPU VM of Compute Engine the metadata server does, which is looked for at
    GCE_METADATA_IP, if given.
    """
    named = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if named is None and "TPU_SKIP_MDS_QUERY" not in environment:
        server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
        request = urllib.request.Request(
            f"http://{server}/{_METADATA}", headers={"Metadata-Flavor": "Google"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                named = answer.read().decode()
        except OSError:
            return 1
    return len((named or "").split(","))


def _on_tpu_vm() -> bool:
    """Whether JAX will run on the TPU of this machine; touches no device."""
    try:
        from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
    except ImportError:  # not public, and may move
        return False
    platforms: str | None = getattr(jax.config, "jax_platforms", None)
    return running_in_cloud_tpu_vm and (not platforms or "tpu" in platforms)


def _take_sigterm() -> Callable[[], None] | None:
    """Takes SIGTERM away from JAX's notifier, which would swallow every one, and returns what notifies it."""
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler = install(signal.SIGTERM, None)
    if not handler:  # jax_enable_preemption_service is off
        return None
    call = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    return lambda: call(signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
