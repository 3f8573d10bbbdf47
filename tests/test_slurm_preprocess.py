"""slurm/preprocess.sh as a job on a real SLURM cluster, with Ray inside the allocation."""

import pytest

from preprocess.shards.manifest import Manifest
from tests.support.tiny_data import write_byte_tokenizer

SCRIPT = "slurm/preprocess.sh"


@pytest.fixture
def submit(slurm, raw_mix, tmp_path):
    def submit(*words: str, **environment: str) -> str:
        tokenizer = write_byte_tokenizer(tmp_path / "tokenizer")
        where = ("--root", raw_mix.parent, "--out", tmp_path / "shards", "--tokenizer", tokenizer)
        # Although sbatch exports only two variables, the script must pass all its own variables to Ray.
        options = ("--cpus-per-task=2", "--export=EMMA_ENV,EMMA_SRUN")
        return slurm.submit(*options, SCRIPT, raw_mix, "--model", "tiny_v2", *where, *words, **environment)

    return submit


def test_a_preprocessing_job_builds_a_complete_shard_set(slurm, submit, tmp_path):
    """The job has a proxy that does not exist, and its output folder has a name that a shell would split."""
    proxy = "; for name in http_proxy HTTP_PROXY https_proxy ALL_PROXY; do export $name=http://127.0.0.1:9; done"
    words = ("--samples-per-shard", "16", "--out", f"{tmp_path}/my $shards; set")
    job = submit(*words, EMMA_SRUN="--label", EMMA_ENV=slurm.environment["EMMA_ENV"] + proxy)
    assert slurm.wait_for(job) == "COMPLETED", slurm.log(job)
    assert Manifest.load(tmp_path / "my $shards; set").counts["samples"] == 35
    assert "35/35 dialogues (100%)" in slurm.log(job)
    assert "\n0: " in slurm.log(job), "EMMA_SRUN did not reach srun"


def test_a_preprocessing_job_fails_if_the_build_fails(slurm, submit, tmp_path):
    job = submit("--model", "no_such_model")
    assert slurm.wait_for(job) == "FAILED"
    assert "no_such_model" in slurm.log(job)
    assert not (tmp_path / "shards").exists()


def test_a_preprocessing_job_with_a_relative_output_path_fails(slurm, submit):
    job = submit("--out", "shards")
    assert slurm.wait_for(job) == "FAILED"
    assert "--out shards: give an absolute path" in slurm.log(job)
