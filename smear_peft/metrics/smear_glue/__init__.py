"""GLUE's metrics as an `evaluate` module: see smear_glue.py."""
