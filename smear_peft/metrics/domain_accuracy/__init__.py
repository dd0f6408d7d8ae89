"""Accuracy over several domains as an `evaluate` module: see domain_accuracy.py."""
