"""A toy training loop over the run folder and its checkpoints, run and killed by test_killed_and_resumed.py.

State is a walk whose step depends on (seed, step) alone, so a resumed run can equal an undisturbed one.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.runs.checkpoints import Checkpoints
from jaxlora.runs.directory import RunDirectory

STEPS, EVALUATE, SAVE = 60, 3, 4


@jax.jit
def advance(state, step):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), state["w"].shape)
    return {"w": 0.9 * state["w"] + noise, "step": step}


def main(folder: str, pace: float) -> None:
    with RunDirectory.open(folder, {"seed": 0}) as run, Checkpoints(run.checkpoints, keep=2) as checkpoints:
        state = {"w": jnp.zeros((20, 50)), "step": jnp.zeros((), jnp.int32)}
        host = {"best": None}
        restored = checkpoints.restore(state)
        if restored is not None:
            state, host = restored.state, restored.host
        start = int(state["step"])
        run.truncate(after_step=start)
        run.update_record(status="running", resumed_from=start)
        print(f"from {start}", *checkpoints.skipped, flush=True)
        for step in range(start + 1, STEPS + 1):
            time.sleep(pace)
            print(step, flush=True)
            state = advance(state, jnp.asarray(step, jnp.int32))
            run.append_metrics(step, {"train/nll": state["w"].mean()})
            if step % EVALUATE == 0:
                losses = np.abs(np.asarray(state["w"])).mean(axis=1)
                run.write_evaluation(step, {"example": range(len(losses)), "nll": losses})
                run.append_metrics(step, {"eval/nll": losses.mean()})
                best = host["best"] is None or float(losses.mean()) < host["best"][1]
                if best:
                    host = {"best": [step, float(losses.mean())]}
                    run.update_record(best={"step": step, "eval/nll": losses.mean()})
            if step % SAVE == 0 or step == STEPS:
                checkpoints.save(step, state, host, kept=host["best"][:1] if host["best"] else ())
        checkpoints.wait()
        assert checkpoints.problems() == run.problems() == []
        run.update_record(status="finished", resumed_from=0, last={"sum": state["w"].sum()})


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
