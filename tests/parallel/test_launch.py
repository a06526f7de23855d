"""How a command was started: flags go before the environment, and numbers that don't go together are refused."""

import argparse

import pytest

from jaxlora.core.errors import InputError
from jaxlora.parallel import launch

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-4]"}


def given(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "environment", "found"),
    [
        ((), {}, None),
        (("--coordinator", "a:1", "--processes", "2", "--process", "1"), {}, ("a:1", 2, 1)),
        (("--process", "1"), {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3"}, ("b:2", 3, 1)),
        (("--coordinator", "a:1"), {"JAX_COORDINATOR_ADDRESS": "b:2"}, ("a:1", 1, 0)),
        ((), {"JAX_COORDINATOR_ADDRESS": "[::1]:2"}, ("[::1]:2", 1, 0)),
        ((), SLURM, (None, 4, 3)),
        ((), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((), {k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # a batch script, outside of srun
        ((), {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (None, 2, 1)),
        ((), SLURM | {"JAX_COORDINATOR_ADDRESS": "b:2"}, ("b:2", 1, 0)),
    ],
)
def test_flags_then_jax_then_the_cluster(flags, environment, found):
    launched = launch.of(given(*flags), environment)
    assert (launched and launched[:3]) == found
    if launched:
        assert launched.lost_after == launch.LOST_AFTER
        assert launched.port == int((launched.address or ":0").rpartition(":")[2])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--processes", "2"), "go with --coordinator HOST:PORT; give all three, or none"),
        (("--coordinator", "a", "--processes", "2"), "the port of --coordinator is 'a', which is no number"),
        (("--coordinator", "a:1", "--processes", "two"), "--processes is 'two', which is no number"),
        (
            ("--coordinator", "a:1", "--processes", "2", "--process", "2"),
            "process 2 of 2.*--process 0 to N - 1",
        ),
        (("--lost-after", "1"), "--lost-after is 1; give 5 to 3600 seconds"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, said):
    with pytest.raises(InputError, match=said):
        launch.of(given(*flags), {})


def test_what_was_typed_can_be_typed_again():
    flags = ["--coordinator", "a:1", "--processes", "2", "--process", "1", "--lost-after", "30"]
    assert launch.typed(given(*flags)) == flags
    assert launch.typed(given()) == []
