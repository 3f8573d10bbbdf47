"""Selective scan of Mamba-1 on a GPU with channels last, and the training pass of a mixer that uses the scan."""
