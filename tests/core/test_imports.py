"""Commands do without torch, which transformers would import; nobody else has it taken away."""

import subprocess
import sys

import pytest

TOLD = """
import sys

def main(argv):
    from jaxlora.config.build import dataplan  # and with it all of jaxlora.data
    from transformers import AutoTokenizer
    before = "torch" in sys.modules
    import torch
    print(before, torch.zeros(2).numel())

{}
"""


@pytest.mark.parametrize(
    ("how", "torch_too"),
    [("from jaxlora.core import cli; cli.run(main)", "False"), ("main([])", "True")],
    ids=["command", "library"],
)
def test_who_imports_torch(how, torch_too):
    pytest.importorskip("torch")
    ran = subprocess.run([sys.executable, "-c", TOLD.format(how)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, [torch_too, "2"], "")
