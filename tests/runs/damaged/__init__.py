"""Damages the files of a run and counts how the commands react."""
