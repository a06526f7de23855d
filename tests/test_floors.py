"""The floors hold: who may import whom, and what may lie where, read from the sources themselves."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

COMMANDS = {"train", "sweep", "evaluate", "generate", "export", "plan", "journal"}

FLOORS = (
    {"jaxlora.core"},
    {"jaxlora.training.metrics"},  # the names that a config may ask for
    {
        "jaxlora.config.keys",
        "jaxlora.config.profiled",
        "jaxlora.config.contradictions",
        "jaxlora.config.schema",
        "jaxlora.models",
        "jaxlora.data",
        "jaxlora.training.losses",
        "jaxlora.experiments",
    },
    {"jaxlora.config.load", "jaxlora.lora", "jaxlora.parallel", "jaxlora.training.optimizer"},
    {"jaxlora.runs"},
    {"jaxlora.training"},
    {"jaxlora.sweeps"},
    {"jaxlora.config.sweep"},
    {"jaxlora.config.build"},
    {f"jaxlora.{command}" for command in COMMANDS},
    {"configs", "launch"},
)

# package -> the only modules that may import it
ONLY_IN = {
    "flax": ("jaxlora.models.decoder",),
    "ml_collections": ("jaxlora.config", "configs"),
    "orbax": ("jaxlora.runs.checkpoints",),
    "clu": ("jaxlora.runs.writers",),
    "tensorflow": ("jaxlora.runs.writers",),
    "optuna": ("jaxlora.sweeps.search",),
    "torch": (),
}

# module or room -> what it must not reach, not even through other modules of jaxlora
TRAINING = tuple(
    f"jaxlora.training.{name}"
    for name in "answers evaluate events guard loop losses optimizer recording state step stopping".split()
)
NEVER_REACHES = {
    "jaxlora.data": ("jax", "jaxlib", "flax", "optax"),
    "jaxlora.experiments": ("jax", "jaxlib", "flax", "optax"),
    "jaxlora.models": ("jaxlora.lora", "optax"),
    "jaxlora.lora.tree": ("flax",),
    "jaxlora.config.schema": ("jaxlora.models", "jaxlora.data", *TRAINING, "ml_collections"),
    "jaxlora.config.load": ("jaxlora.models", "jaxlora.data", *TRAINING),
}

# Too slow to load before --help has been answered; commands import these inside functions.
SLOW = (
    "jax", "flax", "optax", "orbax", "transformers", "datasets", "clu", "tensorflow", "torch", "rich", "scipy",
    "matplotlib", "optuna",
)  # fmt: skip
QUICK = (
    "jaxlora.config.schema",
    "jaxlora.config.load",
    "jaxlora.config.sweep",
    *(f"jaxlora.{command}" for command in sorted(COMMANDS)),
)

LONGEST_FILE = 420
TOUCHES_DEVICES = {"devices", "local_devices", "device_count", "local_device_count", "default_backend"}


def within(module: str, room: str) -> bool:
    """Whether a dotted name is the room or lies in it."""
    return module == room or module.startswith(f"{room}.")


def read_sources(root: Path) -> dict[str, str]:
    """Dotted module name -> source, of everything under jaxlora/, configs/ and launch/."""
    files = [
        file for room in ("jaxlora", "configs", "launch") for file in sorted((root / room).rglob("*.py"))
    ]
    return {".".join(file.relative_to(root).with_suffix("").parts): file.read_text() for file in files}


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The dotted names that the nodes of a tree import; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions and of `if TYPE_CHECKING`: what runs when a module is imported."""

    class Drop(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            node.body = [ast.Pass()]
            return self.generic_visit(node)

        visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

        def visit_If(self, node):
            if ast.unparse(node.test).endswith("TYPE_CHECKING"):
                node.body = [ast.Pass()]
            return self.generic_visit(node)

        def visit_Lambda(self, node):
            return ast.copy_location(ast.Constant(None), node)

    return Drop().visit(tree)


def graph(sources: Mapping[str, str], quick: bool = False) -> dict[str, set[str]]:
    """Module -> what it imports; the package of each module of jaxlora that it names counts too."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        names = set(imports(module, at_import(tree) if quick else tree))
        for name in list(names):
            if f"{name}.__init__" in sources:
                names.add(f"{name}.__init__")
        found[module] = names - {module}
    return found


def reached(start: str, edges: Mapping[str, set[str]]) -> dict[str, str]:
    """Everything that a module imports, directly or through others -> the module that imports it."""
    seen: dict[str, str] = {}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        for name in edges.get(module, ()):
            if name not in seen:
                seen[name] = module
                waiting.append(name)
    return seen


def floor(module: str) -> int | None:
    """The floor of a module of ours: that of the longest name in the table that it lies in."""
    found = [
        (len(room), level) for level, rooms in enumerate(FLOORS) for room in rooms if within(module, room)
    ]
    return max(found)[1] if found else None


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def floor_problems(sources: Mapping[str, str]) -> Iterator[str]:
    for module, names in graph(sources).items():
        if module.endswith("__init__"):
            continue
        own = floor(module)
        if own is None:
            yield f"{module} lies on no floor"
            continue
        for name in sorted(names & set(sources)):
            other = floor(name)
            if not name.endswith("__init__") and other is not None:
                upward = other > own
                sideways = other == own and room_of(name) != room_of(module)
                if upward or sideways:
                    yield f"{module} (floor {own}) imports {name} (floor {other})"


def package_problems(sources: Mapping[str, str]) -> Iterator[str]:
    for module, names in graph(sources).items():
        for package, allowed in ONLY_IN.items():
            if any(within(name, package) for name in names) and not any(
                within(module, room) for room in allowed
            ):
                yield f"{module} imports {package}, which only {allowed or 'tests'} may"


def reach_problems(sources: Mapping[str, str]) -> Iterator[str]:
    everything, quick = graph(sources), graph(sources, quick=True)
    rules = [(room, banned, everything) for room, banned in NEVER_REACHES.items()]
    rules += [(room, SLOW, quick) for room in QUICK]
    for room, banned, edges in rules:
        for module in filter(lambda module, room=room: within(module, room), sources):
            for name, through in reached(module, edges).items():
                if any(within(name, package) for package in banned):
                    yield f"{module} must not reach {name}, but does through {through}"


def device_problems(sources: Mapping[str, str]) -> Iterator[str]:
    for module, source in sources.items():
        for node in ast.walk(at_import(ast.parse(source))):
            if isinstance(node, ast.Call):
                called = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if called in TOUCHES_DEVICES:
                    yield f"{module}, line {node.lineno}: {called}() is called at import"


def layout_problems(sources: Mapping[str, str]) -> Iterator[str]:
    for module, source in sources.items():
        parts = module.split(".")
        if parts[0] == "jaxlora" and len(parts) == 2 and parts[1] not in COMMANDS | {"__init__"}:
            yield f"{module} is no command, and nothing else lies directly inside jaxlora/"
        if parts[-1] in ("utils", "util", "helpers", "misc"):
            yield f"{module} is named after nothing"
        if source.count("\n") > LONGEST_FILE:
            yield f"{module} has {source.count(chr(10))} lines, more than {LONGEST_FILE}"
        if parts[-1] == "__init__":
            for node in ast.parse(source).body:
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                version = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
                if not docstring and not version:
                    yield f"{module}, line {node.lineno}: an __init__ holds a docstring and nothing else"


RULES = (floor_problems, package_problems, reach_problems, device_problems, layout_problems)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_sources_keep_the_rule(rule, repository):
    assert list(rule(read_sources(repository))) == []


def test_test_files_are_short_too(repository):
    lengths = {file.name: file.read_text().count("\n") for file in (repository / "tests").rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_everything_is_read(repository):
    """A rule over no sources would always hold."""
    sources = read_sources(repository)
    assert {
        "jaxlora.core.errors",
        "jaxlora.config.schema",
        "jaxlora.models.decoder",
        "configs.qwen05b",
    } <= set(sources)


CORE = {"jaxlora.__init__": "", "jaxlora.core.__init__": "", "jaxlora.core.prng": "import jax\n"}
PLANTED = {
    "upward": (
        floor_problems,
        {"jaxlora.models.x": "from jaxlora.training import step", "jaxlora.training.step": ""},
    ),
    "upward, inside a function": (
        floor_problems,
        {"jaxlora.core.x": "def f():\n    import jaxlora.data.chat", "jaxlora.data.chat": ""},
    ),
    "sideways": (floor_problems, {"jaxlora.models.x": "import jaxlora.data.y", "jaxlora.data.y": ""}),
    "relative": (floor_problems, {"jaxlora.core.x": "from ..data import y", "jaxlora.data.y": ""}),
    "one command from another": (
        floor_problems,
        {"jaxlora.train": "from jaxlora import plan", "jaxlora.plan": ""},
    ),
    "losses from the step": (
        floor_problems,
        {"jaxlora.training.losses": "from jaxlora.training.step import f", "jaxlora.training.step": ""},
    ),
    "no floor": (floor_problems, {"jaxlora.attic.x": ""}),
    "flax elsewhere": (package_problems, {"jaxlora.lora.tree": "from flax import linen"}),
    "ml_collections inside": (
        package_problems,
        {"jaxlora.training.loop": "import ml_collections.config_dict"},
    ),
    "orbax elsewhere": (package_problems, {"jaxlora.train": "import orbax.checkpoint as ocp"}),
    "torch": (package_problems, {"jaxlora.models.weights": "def f():\n    from torch import load"}),
    "jax in data": (reach_problems, {"jaxlora.data.x": "import jax.numpy as jnp"}),
    "jax in data, through core": (reach_problems, {"jaxlora.data.x": "from jaxlora.core.prng import named"}),
    "jax in experiments": (reach_problems, {"jaxlora.experiments.x": "from jax import Array"}),
    "optax in models": (reach_problems, {"jaxlora.models.x": "import optax"}),
    "lora in models": (reach_problems, {"jaxlora.models.x": "from jaxlora.lora.tree import init"}),
    "a slow command, unless types are checked": (
        reach_problems,
        {"jaxlora.train": "if TYPE_CHECKING:\n    x = 1\nelse:\n    import jax"},
    ),
    "a slow command": (reach_problems, {"jaxlora.train": "from jaxlora.core.prng import named"}),
    "devices at import": (device_problems, {"jaxlora.parallel.mesh": "import jax\nN = len(jax.devices())"}),
    "devices in a default": (
        device_problems,
        {"jaxlora.parallel.mesh": "import jax\ndef f(n=jax.device_count()): ..."},
    ),
    "a module among the commands": (layout_problems, {"jaxlora.common": ""}),
    "utils": (layout_problems, {"jaxlora.core.utils": ""}),
    "a long file": (layout_problems, {"jaxlora.core.x": "\n" * (LONGEST_FILE + 1)}),
    "logic in __init__": (layout_problems, {"jaxlora.data.__init__": "from jaxlora.data import x"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_caught(name):
    rule, planted = PLANTED[name]
    assert list(rule(CORE)) == []
    assert len(list(rule(CORE | planted))) >= 1


def test_what_is_allowed_is_not_reported():
    allowed = {
        "jaxlora.train": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\n"
        "def main(argv):\n    import jax\n    from jaxlora.training import loop\n    jax.devices()",
        "jaxlora.training.loop": "import jax\nfrom jaxlora.training.step import f\nfrom jaxlora.runs import x",
        "jaxlora.training.step": "import jax\ndef f(): return jax.devices()",
        "jaxlora.runs.x": "from jaxlora.core.prng import named",
        "configs.a": "from ml_collections import ConfigDict\nfrom jaxlora.config.load import base_config",
        "jaxlora.config.load": "import ml_collections",
    }
    assert [problem for rule in RULES for problem in rule(CORE | allowed)] == []
