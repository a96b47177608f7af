"""The commands of `python -m mlpmoe`, a file each."""
