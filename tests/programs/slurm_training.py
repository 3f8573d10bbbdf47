"""Stands for `pipeline.train` in a batch job of the tests, and starts at once.

It trains until it is told to stop, or until SLURM has restarted it `restarts` times; before, it may `end` otherwise.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.run.control import Control

told = dict(word.split("=", 1) for word in sys.argv[2:])
run, rank, end = Path(told["run.dir"]), int(os.environ["SLURM_PROCID"]), told.get("end", "")
control, latest = Control(run), run / "checkpoints/latest"
control.stop_on_signals()  # from a preemption, a person, or because another rank died; then all collectives hang
began = int(latest.read_text()[5:]) if latest.exists() else 0


def checkpoint(step):
    if rank == 0:
        latest.parent.mkdir(exist_ok=True)
        latest.with_name("new").write_text(f"step-{step:08d}\n")
        latest.with_name("new").replace(latest)


def leave(outcome, code, step, reason=""):
    if rank == 0:
        word = {"outcome": outcome, "step": step, "from_step": began, "reason": reason}
        (run / "outcome.json").write_text(json.dumps(word))
        control.clear("stop")
    time.sleep(float(told.get("goodbye_s", 0)))  # wandb's
    sys.exit(code)


def main():
    step = began
    if end == "environment":
        told_by_slurm = " ".join(f"{name}={os.environ[name]}" for name in told["names"].split(","))
        (run / f"environment-{rank:02}").write_text(told_by_slurm + "\n")
    if rank == 0:
        (run / "outcome.json").unlink(missing_ok=True)
    (run / f"running-{rank}").touch()
    until = time.monotonic() + 300  # should the cluster be gone
    while len(list(run.glob("running-*"))) < int(os.environ["SLURM_STEP_NUM_TASKS"]) and time.monotonic() < until:
        time.sleep(0.05)
    while time.monotonic() < until and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(told.get("restarts", 99)):
        time.sleep(0.1)
        step += "stuck" not in told
        if "stuck" not in told and end in ("killed", "lost"):
            checkpoint(step)
        if rank == 1 and end == "killed":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "lost":
            leave("lost", 4, step, "step 2 took 900 s")
        if end == "failed":
            leave("failed", 3, step)
        if end == "refused":
            if rank == 1:
                time.sleep(9)  # and is killed by then
            control.record_refusal("micro_batch is 3")
            sys.exit(2)
        stop, save = control.stop_requested(), control.save_requested()
        if save and rank == 0:
            checkpoint(step)
            control.clear("save")
        if stop and end not in ("deaf", "killed"):
            time.sleep(0.3)
            (run / f"running-{rank}").unlink()
            checkpoint(step)
            leave("stopped", 0, step, control.stop_reason())
    checkpoint(step)
    leave("done", 0, step)


if __name__ == "__main__":
    main()
