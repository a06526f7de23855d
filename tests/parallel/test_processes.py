"""Processes: how many hosts a TPU has is found out quickly, or is one; what cannot be joined does not end a run."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator

import jax
import pytest

from jaxlora.core.errors import InputError
from jaxlora.parallel import processes
from jaxlora.parallel.processes import tpu_hosts


@contextlib.contextmanager
def metadata(answer: str | None) -> Iterator[str]:
    """A metadata server that says which workers there are; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.path.endswith("/instance/attributes/worker-network-endpoints")
            good = asked and self.headers["Metadata-Flavor"] == "Google" and answer is not None
            self.send_response(200 if good else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"localhost:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "hosts"),
    [("unknown:unknown:10.0.0.2", 1), ("a:b:10.0.0.2,a:b:10.0.0.3", 2), ("w-0,w-1,w-2,w-3", 4), (None, 1)],
)
def test_a_tpu_vm_asks_its_metadata_server(answer, hosts):
    with metadata(answer) as address:
        assert tpu_hosts({"GCE_METADATA_IP": address}) == hosts


def test_what_the_environment_says_goes_first():
    with metadata("a,b,c") as address:
        server = {"GCE_METADATA_IP": address}
        assert tpu_hosts(server) == 3
        assert tpu_hosts(server | {"TPU_WORKER_HOSTNAMES": "one"}) == 1
        assert (
            tpu_hosts(server | {"TPU_WORKER_HOSTNAMES": "one", "TPU_PROCESS_ADDRESSES": "one:1,two:1"}) == 2
        )
        assert tpu_hosts(server | {"TPU_SKIP_MDS_QUERY": "1"}) == 1


def test_without_a_metadata_server_there_is_one_host():
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))
        assert tpu_hosts({"GCE_METADATA_IP": f"localhost:{nobody.getsockname()[1]}"}) == 1


def test_nothing_is_joined_without_cause(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    assert processes.join(pytest.fail) is None


@pytest.mark.parametrize("hosts", ["one", "one,two"])
def test_a_tpu_of_one_host_does_not_wait_to_be_found(monkeypatch, hosts):
    """JAX's own search takes minutes without a network; it is left to slices that need it."""
    joined = []
    monkeypatch.setattr(processes, "_on_tpu_vm", lambda: True)
    monkeypatch.setattr(processes, "_take_sigterm", lambda: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **named: joined.append((*a, named)))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
    processes.join(pytest.fail)
    ((*address, named),) = joined
    if hosts == "one":
        assert address[0].startswith("localhost:")
        assert named == {"num_processes": 1, "process_id": 0, "coordinator_bind_address": address[0]}
    else:
        assert address == []
        assert named.keys() == {"heartbeat_timeout_seconds", "initialization_timeout"}


def test_one_process_goes_on_without_what_cannot_be_started(monkeypatch):
    """JAX refuses here, since this process has touched its devices long ago."""
    jax.devices()
    said = []
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    assert processes.join(said.append) is None
    assert "jax.distributed could not be started (port 1: " in said[0]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(RuntimeError):  # two cannot
        processes.join(said.append)


def test_a_port_that_is_taken_is_not_offered_to_jax(monkeypatch):
    """It crashes there, one time in three."""
    said = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("offered"))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{port}")
        assert processes.join(said.append) is None
    assert f"jax.distributed could not be started (port {port}: [Errno 98] Address already in use)" in said[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_COORDINATOR_ADDRESS", "localhost"), ("JAX_NUM_PROCESSES", "two"), ("JAX_PROCESS_ID", "")],
)
def test_numbers_that_are_none_are_refused(monkeypatch, name, value):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=f"{name} is '{value}'.*no number; give JAX_COORDINATOR_ADDRESS=HOST:PORT"
    ):
        processes.join(pytest.fail)
