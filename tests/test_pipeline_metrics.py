"""wandb for real, offline."""

from tests.conftest import run_python


def test_wandb_keeps_one_run_over_a_resume_without_a_network(recipe_file, shards, tmp_path):
    run = tmp_path / "run"
    words = ["-m", "pipeline.train", recipe_file, f"data.shards={shards}", f"run.dir={run}", "log.wandb=offline"]
    (run / "control").mkdir(parents=True)
    (run / "control/stop").touch()
    names = []
    for environment in ("1", ""):
        done = run_python(*words, "steps=2", SLURM_JOB_ID=environment) if environment else run_python(*words, "steps=2")
        assert done.returncode == 0, done.stderr
        names.append((run / "wandb_id").read_text())
    assert names[0] == names[1]
    offline = list(run.glob("wandb/offline-run-*"))
    assert offline
    assert all(folder.name.endswith(names[0]) for folder in offline)
