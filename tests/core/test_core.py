"""Paths, named keys, exit codes."""

import jax
import pytest

from jaxlora.core import cli, tree
from jaxlora.core.errors import InputError
from jaxlora.core.prng import named


def test_unflatten_is_the_inverse_of_leaves():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = dict(tree.leaves(nested))
    assert flat == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert tree.unflatten(flat) == nested


def test_named_keys_depend_on_the_names_alone():
    key = jax.random.key(0)

    def bits(*names):
        return tuple(jax.random.key_data(named(key, *names)).tolist())

    assert bits("adapter", "q_proj") == bits("adapter", "q_proj")
    assert len({bits("a"), bits("b"), bits("a", "b"), bits("b", "a"), bits("a", 0), bits("a", 1)}) == 6
    # A stable hash: this value may never change, or a resumed run would draw other numbers.
    assert bits("dropout", 3) == tuple(
        jax.random.key_data(jax.jit(lambda i: named(key, "dropout", i))(3)).tolist()
    )


@pytest.mark.parametrize(("outcome", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_exits_with_its_code(outcome, code):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda argv: outcome)
    assert exit_.value.code == code


def test_wrong_input_is_one_line_and_exit_code_2(capsys):
    def main(argv):
        raise InputError("optim.learning_rate = -1; it must be above 0.")

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: optim.learning_rate = -1; it must be above 0.\n"


def test_an_interrupted_command_leaves_without_a_traceback(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0)
