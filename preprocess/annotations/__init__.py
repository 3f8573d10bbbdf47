"""Annotation files: mixes, the reader, annotation formats, and the worklist."""
