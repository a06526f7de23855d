"""Processes that train together end together.

In each of them a thread gives a sign of life every second, by way of JAX's coordination service, which lives in process
0. Process 0 looks at everyone's; the others look at whether it still answers. Whoever ends before its time says so
there first, if it still can. All others then leave within seconds, whatever their main threads are waiting for: a
collective operation with a process that is gone never returns.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from jaxlora.core import cli
from jaxlora.core.errors import InputError
from jaxlora.parallel import exchange

_PERIOD = 1.0  # seconds between signs of life
_FAREWELL = 10.0  # seconds that process 0 waits for the others to have heard why all leave
_ALIVE, _END, _HEARD = "jaxlora/alive/", "jaxlora/end/", "jaxlora/heard/"


class Watch:
    """The thread, and the two ways out of a run of several processes.

    Args:
        address: HOST:PORT of process 0.
        lost_after: seconds without a sign of life after which a process counts as dead.
    Attributes:
        outlook: what a person can do when one has died: the last line that is printed.
        tidy: called before this process says that it leaves early: takes a live line off the terminal.
        on_end: called in process 0, with the reason, before it leaves early.
    """

    def __init__(self, address: str, lost_after: float):
        self.outlook: Callable[[], str] = lambda: "The same command starts it again."
        self.tidy: Callable[[], None] = lambda: None
        self.on_end: Callable[[str], None] = lambda reason: None
        self._client, self._address, self._lost_after = exchange.client(), address, lost_after
        self._me, self._count = exchange.index(), exchange.count()
        self._answered = time.monotonic()
        self._leaving, self._over = threading.Lock(), threading.Event()
        self._take_abort()
        for work in (self._beat, self._check_answers):
            threading.Thread(target=work, name=f"watch {work.__name__}", daemon=True).start()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While open, an exception in this process ends all of them; what happens to others, ends this one.

        At its end all wait for all, so that none is missed by the others.
        """
        try:
            yield
            exchange.gathered("done")
        except InputError as error:
            self._end(self._me, cli.EXIT_INPUT, str(error))
        except KeyboardInterrupt:
            self._end(self._me, cli.EXIT_INTERRUPTED, "interrupted")
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                # Most often the consequence of another's death, which the thread will know of by then.
                told, wait = f"{error}".splitlines()[0][:200], self._lost_after + 3 * _PERIOD
                print(
                    f"process {self._me} of {self._count}: a computation has failed ({told}); waiting up to {wait:g} s "
                    "to hear whether another process has died",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(wait)
            traceback.print_exc()
            self._end(self._me, cli.EXIT_FAILED, f"{type(error).__name__}: {error}".splitlines()[0])
        self._over.set()
        self._install(signal.SIGABRT, None)

    # ---- the threads -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        number = 0
        while not self._over.wait(_PERIOD):
            try:
                self._client.key_value_set(
                    f"{_ALIVE}{self._me}", str(number := number + 1), allow_overwrite=True
                )
                told = self._client.key_value_dir_get(_END)
                alive = dict(self._client.key_value_dir_get(_ALIVE)) if self._me == 0 else {}
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is busy, or gone: see `_check_answers`
            self._answered = now = time.monotonic()
            if told:
                self._leave(**json.loads(told[0][1]))
            for name, value in alive.items():
                if seen.get(name, ("", 0.0))[0] != value:
                    seen[name] = value, now
                elif now - seen[name][1] > self._lost_after:
                    self._end(int(name.rpartition("/")[2]), cli.EXIT_FAILED, "")

    def _check_answers(self) -> None:
        """Apart from `_beat`, whose requests may hang for minutes."""
        while not self._over.wait(_PERIOD):
            if time.monotonic() - self._answered > self._lost_after:
                self._leave(0, cli.EXIT_FAILED, "")

    def _take_abort(self) -> None:
        """JAX aborts a process whose connection to process 0 breaks, in C++; this says in a line what that means."""
        self._install = install = ctypes.CDLL(None).signal
        install.argtypes, install.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

        def aborted(number: int) -> None:
            install(signal.SIGABRT, None)  # as it was: this one is for once
            if self._me and not self._over.is_set() and not self._reachable():
                self._leave(0, cli.EXIT_FAILED, "")

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # kept, or it would be collected
        install(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def _reachable(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            return False
        return True

    # ---- leaving ---------------------------------------------------------------------------------------------------

    def _end(self, process: int, code: int, reason: str) -> NoReturn:
        """Tells all processes that they end, and leaves. The first reason that is told is everyone's."""
        told = json.dumps({"process": process, "code": code, "reason": reason})
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_END}reason", told)
        self._leave(process, code, reason)

    def _leave(self, process: int, code: int, reason: str) -> NoReturn:
        """Says why, once, and ends this process at once.

        Args:
            process: whose affair it was.
            code: to exit with.
            reason: what it said; empty where it died without a word.
        """
        if not self._leaving.acquire(blocking=False):
            while True:  # another thread is about it
                time.sleep(1)
        name = f"process {process} of {self._count}"
        if code == cli.EXIT_INPUT:
            line = f"error: {reason}"
        elif reason:
            line = f"{name} has failed: {reason}. All others stop.\n{self._told_outlook()}"
        else:
            line = (
                f"{name} has died, or cannot be reached (--lost-after {self._lost_after:g} s). All others stop.\n"
                f"{self._told_outlook()}"
            )
        _try(self.tidy)
        print(line, file=sys.stderr, flush=True)
        if self._me == 0:
            _try(lambda: self.on_end(line.splitlines()[0]))
            self._wait_until_heard(process)
        else:
            self._say_heard()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)

    def _told_outlook(self) -> str:
        try:
            return self.outlook()
        except Exception:  # whatever it is, it must not keep the process here
            return "The same command goes on."

    def _say_heard(self) -> None:
        """For process 0 to wait for."""
        _try(lambda: self._client.key_value_set(f"{_HEARD}{self._me}", "", allow_overwrite=True))

    def _wait_until_heard(self, dead: int) -> None:
        """When process 0 ends, so does the service, and JAX aborts whoever is connected to it."""
        missing = {str(i) for i in range(1, self._count) if i != dead}
        patience = time.monotonic() + _FAREWELL
        while missing and time.monotonic() < patience:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                missing -= {name.rpartition("/")[2] for name, _ in self._client.key_value_dir_get(_HEARD)}
            time.sleep(0.1)


def _try(work: Callable[[], object], seconds: float = 3.0) -> None:
    """Does something that may fail or hang, while everything comes to its end."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
