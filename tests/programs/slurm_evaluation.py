"""A fast stand-in for `pipeline.evaluate` in test batch jobs; it writes journal lines and evaluates nothing.

It ends with success if SLURM has restarted the job `--restarts` times, and otherwise as `--end` says.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--restarts", type=int, default=1)
parser.add_argument("--end", choices=("wait", "killed", "refused"), default="wait")
args = parser.parse_args()

if args.end == "refused":
    sys.exit(2)
if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < args.restarts:
    journal = args.out / "journal"
    journal.mkdir(parents=True, exist_ok=True)
    with (journal / f"pope.{os.environ['SLURM_PROCID']}.jsonl").open("a") as file:
        file.write("an answer\n")
    if args.end == "killed":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)  # ends this process if the cluster no longer exists
