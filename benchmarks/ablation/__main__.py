"""The paper's ablation (Tab. 5) at a small size, on generated scenes full of fine detail.

    python -m benchmarks.ablation prepare runs/ablation                 # make data and vision towers, once
    python -m benchmarks.ablation calibrate runs/ablation --seconds 12  # measure steps per second only
    python -m benchmarks.ablation search runs/ablation --seconds 500    # try settings for every variant; resumes
    python -m benchmarks.ablation test runs/ablation --seconds 500      # train five seeds of every variant; resumes
    python -m benchmarks.ablation report runs/ablation                  # print Markdown about all runs ever started

Every variant sees the same data for the same number of steps, behind the same frozen vision towers. `search` chooses
the learning rate and the weight of the alignment loss by the validation questions, for every variant alike. Only `test`
asks the test questions. docs/ablation.md explains the measures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.ablation.configs import SIZES, VARIANTS, search_runs
from benchmarks.ablation.report import best_settings, final_runs, report
from benchmarks.ablation.runner import Workspace, calibrate, default_processes, execute
from model.errors import UserError, run_cli

STAGES = ("prepare", "calibrate", "search", "test", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default %(default)s)"
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path, help="folder of the ablation")
    parser.add_argument("--size", choices=SIZES, default="small", help=f"sizes of models and data {default}")
    parser.add_argument("--processes", type=int, default=4, help=f"runs that train at once on the GPU {default}")
    parser.add_argument("--seconds", type=float, default=540.0, help=f"time of this call {default}")
    parser.add_argument("--seeds", type=int, default=5, help=f"seeds of the test stage {default}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="only these (default: all)")
    args = parser.parse_args()
    for option in ("processes", "seconds", "seeds"):
        if (value := getattr(args, option)) <= 0:
            raise UserError(f"--{option}: found {value}, expected a number above 0")
    workspace = Workspace(folder=args.folder, size=args.size)
    if args.stage == "prepare":
        print(workspace.prepare(default_processes()))
    elif args.stage == "calibrate":
        calibrate(workspace, args.variants, processes=args.processes, seconds=args.seconds)
    elif args.stage == "search":
        runs = search_runs(args.size, tuple(args.variants))
        print(execute(workspace, runs, processes=args.processes, seconds=args.seconds))
    elif args.stage == "test":
        best = {
            name: run for name, run in best_settings(workspace.results()[0], args.size).items() if name in args.variants
        }
        if missing := set(args.variants) - set(best):
            raise UserError(
                f"{args.folder}: the search of {', '.join(sorted(missing))} is not complete. Run search first."
            )
        runs = final_runs(best, args.seeds)
        print(execute(workspace, runs, processes=args.processes, seconds=args.seconds))
    else:
        records, others = workspace.results()
        print(report(records, args.size, others=others))


if __name__ == "__main__":
    run_cli(main)
