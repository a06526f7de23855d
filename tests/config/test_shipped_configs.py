"""Every config that is shipped loads, and the notebook's eighteen runs say what was written down about them."""

import re

import pytest

from jaxlora.config.load import load_config
from jaxlora.config.schema import KEYS
from jaxlora.config.sweep import load_sweep
from jaxlora.core.errors import InputError
from jaxlora.sweeps.trials import flat as flat_config
from jaxlora.sweeps.trials import groups

SHIPPED = {
    "configs/qwen05b.py": "Qwen/Qwen2.5-0.5B-Instruct",
    "configs/qwen7b.py": "Qwen/Qwen2.5-7B-Instruct",
    "configs/mistral7b.py": "mistralai/Mistral-7B-Instruct-v0.3",
    "configs/mistral7b.py:0.1": "mistralai/Mistral-7B-Instruct-v0.1",
    "configs/mistral7b.py:0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "configs/mistral7b.py:0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "configs/smollm2_135m.py": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

QWEN_05B, QWEN_7B, MISTRAL = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "mistralai/Mistral-7B-Instruct-v0.3",
)
RATE, WARMUP, BATCH = "optim.learning_rate", "optim.warmup_steps", "train.batch_size"
DECAY, SMOOTHING, EPOCHS = "optim.weight_decay", "optim.label_smoothing", "train.epochs"
BASELINE = {RATE: 2e-4, WARMUP: 2200, BATCH: 128, DECAY: 0.01, SMOOTHING: 0.0, EPOCHS: 3.0}

# Row by row: the model, the rank, and what was changed from the baseline.
NOTEBOOK = {
    "Nov22_10-57": (QWEN_05B, 128, {}),
    "Nov22_14-28": (QWEN_05B, 128, {RATE: 1e-4, WARMUP: 1000, "data.shuffle": True}),
    "Nov22_18-58": (QWEN_05B, 128, {BATCH: 64}),
    "Nov22_21-31": (QWEN_05B, 128, {DECAY: 0.1, SMOOTHING: 0.1}),
    "Nov22_22-20": (QWEN_05B, 128, {DECAY: 0.1, SMOOTHING: 0.0}),
    "Nov23_15-59": (QWEN_05B, 128, {BATCH: 64, SMOOTHING: 0.05}),
    "Nov23_19-53": (QWEN_05B, 128, {RATE: 2e-3}),
    "Nov23_21-37": (QWEN_05B, 128, {RATE: 2e-5}),
    "Nov23_23-30": (QWEN_05B, 128, {RATE: 5e-5, EPOCHS: 5.0}),
    "Nov24_23-30": (QWEN_05B, 16, {RATE: 5e-4, EPOCHS: 5.0}),
    "Nov25_09-19": (QWEN_05B, 16, {RATE: 1e-4}),
    "Nov25_12-25": (QWEN_05B, 16, {RATE: 3e-4}),
    "Nov22_23-06": (QWEN_7B, 16, {}),
    "Nov23_08-13": (QWEN_7B, 128, {"eval.every": 500, "checkpoint.every": 500, EPOCHS: 3.0}),
    "Nov24_02-27": (QWEN_7B, 128, {RATE: 5e-5, EPOCHS: 5.0}),
    "Nov24_22-17": (QWEN_7B, 128, {RATE: 5e-4, EPOCHS: 5.0}),
    "Nov24_10-49": (MISTRAL, 128, {RATE: 5e-5}),
    "Nov25_02-30": (MISTRAL, 128, {RATE: 5e-4}),
}


# Sweeps: the base's model, and how many trials there are in each group.
SWEEPS = {
    "quickstart_lr.py": (None, [8]),
    "smollm2_lr.py": ("HuggingFaceTB/SmolLM2-135M-Instruct", [8]),
    "qwen05b_lr.py": (QWEN_05B, [9]),
    "qwen05b_notebook.py": (QWEN_05B, [9, 1, 2]),
    "qwen7b_notebook.py": (QWEN_7B, [4]),
    "mistral7b_notebook.py": (MISTRAL, [2]),
}


@pytest.fixture(autouse=True)
def _at_the_root(repository, monkeypatch):
    monkeypatch.chdir(repository)


def flat(argument):
    config = load_config(argument)
    return {
        path: getattr(getattr(config, path.partition(".")[0]), key.name) if "." in path else config.seed
        for path, key in KEYS.items()
    }


@pytest.mark.parametrize("argument", SHIPPED)
def test_a_shipped_config_loads(argument):
    config = load_config(argument)
    assert config.model.path == SHIPPED[argument]
    assert config.lora.alpha / config.lora.rank == 2.0


def test_no_shipped_config_is_forgotten(repository):
    files = {file.name for file in (repository / "configs").glob("*.py")} - {"notebook.py", "quickstart.py"}
    assert files == {re.sub(r"configs/|:.*", "", argument) for argument in SHIPPED}


@pytest.mark.parametrize("file", sorted({argument.partition(":")[0] for argument in SHIPPED}))
def test_a_shipped_config_is_a_lab_note(file, repository):
    text = (repository / file).read_text()
    assert f"--config {file}" in text  # the command
    assert re.search(r"^Hardware: ", text, re.MULTILINE)
    assert re.search(r"# (Apache-2\.0|CC BY 4\.0)", text)  # the data's licence
    assert "Your own data" in text
    for time in re.findall(r"^Time: .*", text, re.MULTILINE):
        assert "estimate, not measured" in time


def test_mistral_knows_its_versions():
    with pytest.raises(InputError, match=r"no such version.*\nKnown are 0\.1, 0\.2, 0\.3\."):
        load_config("configs/mistral7b.py:0.4")


@pytest.mark.parametrize("run", NOTEBOOK)
def test_a_notebook_run_says_what_was_written_down(run):
    model, rank, changes = NOTEBOOK[run]
    found = flat(f"configs/notebook.py:{run}")
    expected = BASELINE | {"data.shuffle": False} | changes
    assert {path: found[path] for path in expected} == expected
    assert (found["model.path"], found["lora.rank"]) == (model, rank)


@pytest.mark.parametrize("run", NOTEBOOK)
def test_a_notebook_run_differs_from_its_baseline_only_by_what_was_changed(run):
    model, rank, _ = NOTEBOOK[run]
    found = flat(f"configs/notebook.py:{run}")
    if not found["journal.baseline"]:
        assert run in ("Nov22_10-57", "Nov22_23-06", "Nov24_10-49")
        return
    baseline = NOTEBOOK[found["journal.baseline"]]
    assert baseline[0] == model
    base = flat(f"configs/notebook.py:{found['journal.baseline']}")
    written = BASELINE | {"data.shuffle": False, "eval.every": 500, "checkpoint.every": 500}
    ours, theirs = written | NOTEBOOK[run][2], written | baseline[2]
    changed = {path for path in written if ours[path] != theirs[path]}
    changed |= {"lora.rank", "lora.alpha"} if rank != baseline[1] else set()
    differing = {path for path in KEYS if found[path] != base[path] and not path.startswith("journal.")}
    assert differing == changed


def test_the_notebooks_hypotheses_are_kept():
    hypotheses = {run: load_config(f"configs/notebook.py:{run}").journal.hypothesis for run in NOTEBOOK}
    assert {run for run, hypothesis in hypotheses.items() if hypothesis} == {"Nov23_23-30", "Nov24_23-30"}


@pytest.mark.parametrize("argument", ["configs/notebook.py", "configs/notebook.py:Nov22"])
def test_an_unknown_run_is_answered_with_the_known_ones(argument):
    with pytest.raises(InputError) as caught:
        load_config(argument)
    assert re.findall(r"Nov\d\d_\d\d-\d\d", str(caught.value)) == list(NOTEBOOK)
    assert str(caught.value).count("\n") == 1


def test_no_shipped_sweep_is_forgotten(repository):
    assert {file.name for file in (repository / "configs/sweeps").glob("*.py")} == set(SWEEPS)


@pytest.mark.parametrize("file", SWEEPS)
def test_a_shipped_sweep_loads_into_its_groups(file):
    sweep = load_sweep(f"configs/sweeps/{file}")
    model, sizes = SWEEPS[file]
    assert [len(group) for group in groups(sweep.trials)] == sizes
    assert model in (None, *{trial.config.model.path for trial in sweep.trials})


@pytest.mark.parametrize("file", SWEEPS)
def test_a_shipped_sweep_is_a_lab_note(file, repository):
    text = (repository / "configs/sweeps" / file).read_text()
    assert f"python -m jaxlora.sweep --config configs/sweeps/{file}" in text
    assert re.search(r"^Hardware: ", text, re.MULTILINE)
    for time in re.findall(r"^Time: .*", text, re.MULTILINE):
        assert "estimate, not measured" in time
    if SWEEPS[file][0]:
        assert re.search(r"# (Apache-2\.0|CC BY 4\.0)", text)  # the data's licence
        assert "Your own data" in text


def test_the_notebooks_sweeps_are_its_eighteen_runs(repository):
    """Each trial is the very config of the run whose name it has."""
    found = {
        trial.name: trial.config
        for file in SWEEPS
        if "notebook" in file
        for trial in load_sweep(f"configs/sweeps/{file}").trials
    }
    assert set(found) == set(NOTEBOOK)
    for run, config in found.items():
        assert flat_config(config) == flat_config(load_config(f"configs/notebook.py:{run}")), run


def test_a_quickstart_sweep_trains_the_quickstart_at_other_rates():
    base = flat_config(load_config("configs/quickstart.py"))
    for trial in load_sweep("configs/sweeps/quickstart_lr.py").trials:
        differing = {key for key, value in flat_config(trial.config).items() if value != base[key]}
        assert differing <= {"optim.learning_rate", "eval.every", "eval.generate"}
