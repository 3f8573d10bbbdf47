"""What Linux tells of other processes."""

from pathlib import Path

TELLING_STATES = {"T": "stopped", "Z": "dead", "D": "waiting for a disk"}  # of /proc/PID/stat


def state_of(pid: int) -> str:
    """A letter of Linux's, as T for stopped; nothing for a process that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
