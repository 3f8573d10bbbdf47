"""The run folder: checks before the start, requests while training, the watchdog, the outcome."""
