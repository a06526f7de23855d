"""Variants of LoRA in whole runs: on many devices, in bfloat16, and beside a plain run."""

import json

import pytest

pytestmark = pytest.mark.slow

VARIANTS = {
    "lora__use_dora": True,
    "lora__init": "pissa",
    "lora__rank_pattern": "q_proj=7,mlp.*=2",
    "optim__loraplus_lr_ratio": 4.0,
}


def curve(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_eight_devices_as_on_one(dtype, project, call, tmp_path, devices):
    alone = call(project.arguments(tmp_path / "one", model__dtype=dtype, **VARIANTS))
    assert alone.code == 0, alone.err
    assert "DoRA of rank by module: q_proj (rank 7, scale 1.14), k_proj (rank 4, scale 2)" in alone.out
    devices(8)
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    assert call(project.arguments(tmp_path / "eight", model__dtype=dtype, **VARIANTS, **mesh)).code == 0
    losses = curve(tmp_path / "one", "eval/nll")
    assert losses[6] < 0.95 * losses[0]
    assert curve(tmp_path / "eight", "eval/nll") == pytest.approx(
        losses, rel=1e-5 if dtype == "float32" else 1e-2
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__use_dora": True},
        {"lora__init": "pissa"},
        {"lora__init": "pissa_niter_4"},
        {"lora__rank_pattern": "mlp.*=2"},
    ],
    ids=lambda changes: "=".join(map(str, *changes.items())),
)
def test_each_starts_from_the_bases_loss_and_learns(changes, project, call, tmp_path):
    assert call(project.arguments(tmp_path / "plain")).code == 0
    assert call(project.arguments(tmp_path / "run", **changes)).code == 0
    plain, found = (curve(tmp_path / name, "eval/nll") for name in ("plain", "run"))
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found[6] < 0.95 * found[0]
    assert found[6] != pytest.approx(plain[6], rel=1e-4)
