"""Entrypoints: python -m experiments.NAME --config=... --workdir=..."""
