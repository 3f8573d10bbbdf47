"""A fast stand-in for `pipeline.train` in test batch jobs; it trains nothing.

It runs until a stop is requested or until SLURM has restarted the job `restarts` times. The option `end` selects
another way to end, such as `end=killed` or `end=refused`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.run.control import Control

options = dict(word.split("=", 1) for word in sys.argv[2:])
run, rank, end = Path(options["run.dir"]), int(os.environ["SLURM_PROCID"]), options.get("end", "")
control, checkpoints = Control(run), run / "checkpoints"
control.stop_on_signals()
began = max((int(path.parent.name[5:]) for path in checkpoints.glob("step-*/manifest.json")), default=0)


def checkpoint(step):
    if rank == 0:
        folder = checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()


def finish(outcome, code, step, reason=""):
    if rank == 0:
        content = {"outcome": outcome, "step": step, "from_step": began, "reason": reason}
        (run / "outcome.json").write_text(json.dumps(content))
        control.clear("stop")
    time.sleep(float(options.get("exit_delay_s", 0)))  # simulates an exit that is slow, for example because of wandb
    sys.exit(code)


def main():
    step = began
    if end == "environment":
        variables = " ".join(f"{name}={os.environ[name]}" for name in options["names"].split(","))
        (run / f"environment-{rank:02}").write_text(variables + "\n")
    if rank == 0:
        (run / "outcome.json").unlink(missing_ok=True)
    (run / f"running-{rank}").touch()
    until = time.monotonic() + 300  # ends this process if the cluster no longer exists
    while len(list(run.glob("running-*"))) < int(os.environ["SLURM_STEP_NUM_TASKS"]) and time.monotonic() < until:
        time.sleep(0.05)
    while time.monotonic() < until and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(options.get("restarts", 99)):
        time.sleep(0.1)
        step += "stuck" not in options
        if "stuck" not in options and end in ("killed", "lost"):
            checkpoint(step)
        if rank == 1 and end == "killed":
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if end == "garbage":
            checkpoint(step)
            (run / "outcome.json").write_bytes(b"{\xff")
            sys.exit(1)
        if end == "lost":
            finish("lost", 4, step, "step 2 took 900 s")
        if end == "failed":
            finish("failed", 3, step)
        if end == "refused":
            if rank == 1:
                time.sleep(9)  # srun kills this rank before the sleep ends
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
            finish("stopped", 0, step, control.stop_reason())
    checkpoint(step)
    finish("done", 0, step)


if __name__ == "__main__":
    main()
