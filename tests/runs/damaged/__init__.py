"""Damages every file of a run in every way and counts what the commands make of it."""
