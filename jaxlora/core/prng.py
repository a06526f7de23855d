"""Random keys handed out by name, never by order of calls."""

import hashlib

import jax


def named(key: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Derives a key from `key` and a path of names.

    The same names give the same key in every process and Python version (`hash` of a str would not), and adding a
    new consumer of randomness leaves all others as they were. Integers, traced ones included, are folded in as they
    are, so that `named(key, "dropout", step)` works inside a compiled step.

    Args:
        key: a JAX random key.
        *names: strings, or integers (Python's or traced).
    Returns:
        A random key.
    """
    for name in names:
        if isinstance(name, str):
            name = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        key = jax.random.fold_in(key, name)
    return key
