"""The commands: what `cemg-…` on the command line runs."""
