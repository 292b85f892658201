"""The commands of the command line that work on models and data of the user's; parsed in :mod:`idap.cli`."""
