"""The demo: the whole pipeline on a CPU, from raw data to answers."""
