"""Config files, parameters, overrides, and the shared front of the commands."""

import argparse
import subprocess
import sys

import pytest

from jaxlora.config.load import (
    CommandParser,
    add_config_argument,
    base_config,
    config_name,
    keys_help,
    load_config,
    parse_arguments,
)
from jaxlora.config.schema import KEYS, Config
from jaxlora.core.errors import InputError

HEAD = "from jaxlora.config.load import base_config\n"
GOOD = """
def get_config(suffix=""):
    config = base_config()
    config.model.path = "m" + suffix
    config.data.train = ("a.jsonl", "b.jsonl")
    config.optim.learning_rate = 1
    return config
"""


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(source, name="mine.py"):
        path = tmp_path / name
        path.write_text(source)
        return str(path)

    return write


@pytest.fixture
def good(write):
    return write(HEAD + GOOD)


def refusal(argument, *overrides):
    with pytest.raises(InputError) as caught:
        load_config(argument, overrides)
    said = str(caught.value)
    assert said.count("\n") <= 1
    return said


def test_a_file_states_what_differs_from_the_defaults(good):
    config = load_config(good, ())
    assert (config.model.path, config.data.train) == ("m", ("a.jsonl", "b.jsonl"))
    assert config.optim.learning_rate == 1.0
    assert config.lora == Config.from_dict({"model": {"path": "x"}, "data": {"train": "y"}}).lora


def test_base_config_has_every_key_at_its_default():
    flat = {f"{name}.{key}": value for name, child in base_config().to_dict().items() if name != "seed"
            for key, value in child.items()} | {"seed": base_config().seed}  # fmt: skip
    assert flat == {path: "" if key.required else key.default for path, key in KEYS.items()}


def test_a_parameter_reaches_get_config(good):
    assert load_config(f"{good}:-large").model.path == "m-large"
    assert load_config(f"{good}:").model.path == "m"


def test_a_plain_dict_will_do(write):
    path = write('def get_config():\n    return {"model": {"path": "m"}, "data": {"train": "d"}, "seed": 3}')
    assert load_config(path, ["--config.lora.rank=4"]).seed == 3


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("optim.learning_rate=1e-4", 1e-4),
        ("optim.learning_rate=1", 1.0),
        ("lora.rank=8", 8),
        ("data.packing=false", False),
        ("data.packing=0", False),
        ("data.shuffle=True", True),
        ("stop.patience=3", 3),
        ("stop.patience=None", None),
        ("lora.targets=q_proj,v_proj", ("q_proj", "v_proj")),
        ("lora.targets=('q_proj', 'v_proj')", ("q_proj", "v_proj")),
        ("lora.targets=(q_proj,v_proj)", ("q_proj", "v_proj")),
        ("lora.targets=all-linear", "all-linear"),
        ("eval.metrics=nll", ("nll",)),
        ("data.train=mine.jsonl", "mine.jsonl"),
        ("data.eval=", ""),
        ("journal.hypothesis=a = b, and so on", "a = b, and so on"),
        ("model.path=123", "123"),
        ("seed=7", 7),
    ],
)
def test_an_override_is_read_in_its_keys_type(good, flag, value):
    found = load_config(good, [f"--config.{flag}"])
    for name in flag.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_counts(good):
    assert load_config(good, ["--config.seed=1", "--config.seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--config.optim.learning_rat=1",
            "unknown config key optim.learning_rat: did you mean optim.learning_rate?",
        ),
        (
            "--config.optim.learning_rate=fast",
            "optim.learning_rate = 'fast' (str) is not allowed: it must be a number",
        ),
        (
            "--config.optim.learning_rate=-1",
            "optim.learning_rate = -1.0 is not allowed: it must be a number above 0",
        ),
        (
            "--config.lora.rank=8.5",
            "lora.rank = '8.5' (str) is not allowed: it must be an integer of at least 1",
        ),
        (
            "--config.data.packing=maybe",
            "data.packing = 'maybe' (str) is not allowed: it must be True or False",
        ),
        ("--config.lora=8", "--config.lora=8: lora is a group of keys"),
        ("--config.lora.rank", "--config.lora.rank is no override"),
        ("--lora.rank=8", "--lora.rank=8 is no override"),
        (
            "--config.train.batch_size=100",
            "train.batch_size = 100 is not divisible by train.micro_batch_size = 8",
        ),
    ],
)
def test_a_wrong_override_is_refused(good, flag, said):
    assert refusal(good, flag).startswith(said)


def test_a_missing_file_is_answered_with_the_nearest(good, tmp_path):
    assert refusal(str(tmp_path / "mien.py")).endswith(f"Did you mean {good}?")
    assert "In " in refusal(str(tmp_path / "zzz.py"))
    assert "There are no configs in" in refusal(str(tmp_path / "nowhere" / "zzz.py"))


def test_what_is_no_python_file_is_refused(tmp_path):
    assert "a config is a Python file" in refusal("configs/qwen05b")
    (tmp_path / "folder.py").mkdir()
    assert "cannot read the config" in refusal(str(tmp_path / "folder.py"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def get_config(:", "line 1 failed: SyntaxError: invalid syntax"),
        ("import no_such_module", "line 1 failed: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "def get_config():\n    x = 1\n    return x / 0",
            "line 3 failed: ZeroDivisionError: division by zero",
        ),
        ("def get_config():\n    raise ValueError('a\\nb')", "line 2 failed: ValueError: a b"),
        ("def get_config():\n    raise ValueError", "line 2 failed: ValueError: no message"),
        (
            HEAD + "def get_config():\n    base_config().modl.path = 3",
            'Did you mean "model" instead of "modl"?',
        ),
        ("config = 3", "has no function get_config"),
        ("def get_config():\n    pass", "returned NoneType, not a ConfigDict"),
        ("def get_config(run):\n    pass", "needs a parameter: --config"),
        (HEAD + "def get_config():\n    return base_config()", "model.path is not set"),
        (
            HEAD + GOOD.replace("learning_rate", "lerning_rate"),
            "optim.lerning_rate: did you mean optim.learning_rate?",
        ),
        (HEAD + GOOD.replace("= 1", "= '1'"), "optim.learning_rate = '1' (str) is not allowed"),
        (HEAD + GOOD.replace("optim.learning_rate = 1", "lora = 8"), "lora = 8: lora is a group of keys"),
    ],
)
def test_a_file_that_fails_is_answered_in_a_line_or_two(write, source, said):
    assert said in refusal(write(source))


def test_a_parameter_that_nobody_takes_is_refused(write):
    path = write(HEAD + GOOD.replace('suffix=""', "").replace('"m" + suffix', '"m"'))
    assert refusal(f"{path}:x") == f"{path} takes no parameter, so :x means nothing.\nUse --config {path}."


def test_a_files_own_refusal_is_handed_on(write):
    source = "from jaxlora.core.errors import InputError\ndef get_config(run=''):\n    raise InputError('which run?')"
    assert refusal(write(source)) == "which run?"


def test_a_file_leaves_nothing_behind(good, tmp_path):
    before = set(sys.modules)
    load_config(good)
    assert set(sys.modules) - before == set()
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("configs/qwen05b.py", "qwen05b"),
        ("configs/notebook.py:Nov22_10-57", "notebook-Nov22_10-57"),
        ("configs/mistral7b.py:0.3", "mistral7b-0.3"),
        ("a.py:b/c d", "a-b_c_d"),
    ],
)
def test_a_config_gives_its_run_a_name(argument, name):
    assert config_name(argument) == name


@pytest.fixture
def parser():
    parser = CommandParser(prog="train", description="Fine-tune one adapter.", epilog="Ends so.")
    add_config_argument(parser)
    parser.add_argument("--workdir", default="")
    return parser


def test_the_front_parts_options_from_overrides(parser):
    words = [
        "--config.seed",
        "3",
        "--config",
        "c.py",
        "--config.data.packing",
        "--workdir",
        "w",
        "--config.lora.rank=4",
    ]
    namespace, overrides = parse_arguments(parser, words)
    assert namespace == argparse.Namespace(config="c.py", workdir="w")
    assert overrides == ("--config.seed=3", "--config.data.packing=true", "--config.lora.rank=4")


def test_a_negative_or_empty_value_may_stand_alone(parser):
    words = ["--config", "c.py", "--config.mesh.data", "-1", "--config.data.eval", ""]
    assert parse_arguments(parser, words)[1] == ("--config.mesh.data=-1", "--config.data.eval=")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "c.py", "--workdri", "x"], "there is no option --workdri: did you mean --workdir?"),
        (["--config", "c.py", "--optim.learning_rate=3"], "did you mean --config.optim.learning_rate?"),
        (
            ["--config", "c.py", "--config.lora.rank"],
            "--config.lora.rank has no value: it must be an integer",
        ),
        (
            ["--config", "c.py", "--config.lora.rnk", "3"],
            "unknown config key lora.rnk: did you mean lora.rank?",
        ),
        (["--workdir", "x"], "the following arguments are required: --config"),
        (["--config"], "expected one argument"),
        (["--conf", "c.py"], "--config"),
    ],
)
def test_a_wrong_command_line_is_answered_in_a_line_or_two(parser, words, said):
    with pytest.raises(InputError) as caught:
        parse_arguments(parser, words)
    assert said in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_help_shows_every_key_with_its_default_and_meaning(parser):
    text = parser.format_help()
    assert "Ends so." in text
    assert keys_help() in text
    for path, key in KEYS.items():
        assert key.meaning in text
        assert (f"  {path} " if key.required else f"  {path} = {key.default!r}") in text


COMMAND = """
import sys
from jaxlora.config.load import CommandParser, add_config_argument, load_config, parse_arguments
from jaxlora.core.cli import run

def main(argv):
    parser = CommandParser(prog="train")
    add_config_argument(parser)
    namespace, overrides = parse_arguments(parser, argv)
    print(load_config(namespace.config, overrides).lora.rank)
    slow = {"jax", "flax", "transformers", "datasets", "tensorflow"} & set(sys.modules)
    return len(slow)

run(main)
"""


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["--config.lora.rank", "4"], 0, "4\n", ""),
        (["--config.lora.rank", "0"], 2, "", "error: lora.rank = 0 is not allowed"),
        (["--config.lora.rnk", "0"], 2, "", "error: unknown config key lora.rnk: did you mean lora.rank?"),
        (["--frobnicate"], 2, "", "error: there is no option --frobnicate"),
        (["--help"], 0, "usage: train", ""),
    ],
)
def test_a_command_leaves_with_the_right_code_and_no_traceback(
    good, write, repository, words, code, out, err
):
    command = [sys.executable, write(COMMAND, "command.py"), "--config", good, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=repository, env={"PYTHONPATH": str(repository)}
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(out)
    assert done.stderr.startswith(err)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 2
