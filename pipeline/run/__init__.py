"""Supervision of a run: preflight checks, the run folder, stop and save requests, the watchdog, and exits on errors."""
