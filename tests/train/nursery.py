"""Starts train commands as processes of their own, forked from one that has done the slow imports.

Each line on stdin is a JSON object, or a list of them for commands at the same time: `arguments` of the command,
`output` (the file for what it prints), `errors` (likewise of stderr, if apart) and, for one that shall be killed,
`die`: [where, n] or [where, n, signals]. It then sends itself SIGKILL, or those signals, as it reaches its n-th call of
`where` ("jaxlora.module:function" or "jaxlora.module:Class.method"), or, where that is a path, as it is about to open,
make, rename or delete for the n-th time something whose path begins so. Likewise it stops itself, until somebody sends
SIGCONT, at each [where, n] of `stop`, dies at any path of `never`, and raises at the [where, n, "module:Error"] of
`fail`. `environment` holds variables to be set, `module` is another command than train. A command that ends by itself
also prints how many programs it found in JAX's persistent cache. Answers on stdout: the process id, then how it ended;
of several, all ids, then how each ended, in their order.
"""

import atexit
import collections
import functools
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence

IMPORTED = """
    jaxlora.runs.writers tensorflow clu.metric_writers orbax.checkpoint jaxlora.config.build.wiring
    jaxlora.training.recording
""".split()
TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def send_at(where: str, n: int, signals: Sequence[int] = (signal.SIGKILL,), error: str = "") -> None:
    left = n

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0 and error:
            module, _, name = error.partition(":")
            raise getattr(importlib.import_module(module), name)("as it was planned")
        if left == 0:
            for number in signals:
                os.kill(os.getpid(), number)

    if os.path.isabs(where):
        sys.addaudithook(
            lambda event, args: count() if event in TOUCHES and str(args[0]).startswith(where) else None
        )
        return
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, name)
    setattr(owner, name, lambda *args, **named: (count(), function(*args, **named))[1])


def command(order: dict) -> None:
    """In the child: becomes `python -m jaxlora.train`, or another `module`."""
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if "errors" in order else output
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, errors)):
        os.dup2(file, stream)
    os.environ.update(order.get("environment", {}))
    import jax

    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
    atexit.register(lambda: print("found in the cache:", events["/jax/compilation_cache/cache_hits"]))
    module = order.get("module", "jaxlora.train")
    sys.argv = [module, *order["arguments"]]
    if "die" in order:
        send_at(*order["die"])
    for where, n in order.get("stop", ()):
        send_at(where, n, [signal.SIGSTOP])
    if "fail" in order:
        where, n, error = order["fail"]
        send_at(where, n, error=error)
    for where in order.get("never", ()):
        send_at(where, 1)
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for line in iter(sys.stdin.readline, ""):
        orders, children = json.loads(line), []
        for order in orders if isinstance(orders, list) else [orders]:
            children.append(os.fork())
            if children[-1] == 0:
                command(order)  # ends by SystemExit, as any command
            print(children[-1], flush=True)
        for child in children:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
