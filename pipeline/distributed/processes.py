"""The state of another process on this machine, as Linux reports it in /proc."""

from pathlib import Path

PROBLEM_STATES = {"T": "stopped", "Z": "dead", "D": "waiting for a disk"}  # letters of /proc/PID/stat


def process_state(pid: int) -> str:
    """Return the letter of a process's state, such as T for stopped, or "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
