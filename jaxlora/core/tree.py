"""Nested dicts of arrays seen as flat mappings from paths to leaves."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[str, ...]


def leaves(tree: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) of a nested mapping, depth first, in the mapping's own order."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from leaves(child, (*prefix, name))
        else:
            yield (*prefix, name), child


def unflatten(items: Mapping[Path, Any]) -> dict[str, Any]:
    """Builds the nested dict whose `leaves` are `items`."""
    tree: dict[str, Any] = {}
    for path, leaf in items.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def map_leaves(function: Callable[[Path, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `function(path, leaf)` to every leaf of a nested mapping."""
    return unflatten({path: function(path, leaf) for path, leaf in leaves(tree)})


def count(tree: Mapping[str, Any]) -> int:
    """The number of scalars in all leaves."""
    return sum(leaf.size for _, leaf in leaves(tree))
