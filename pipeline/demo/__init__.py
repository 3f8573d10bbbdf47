"""The demo: the whole chain on a CPU, from raw data to answers."""
