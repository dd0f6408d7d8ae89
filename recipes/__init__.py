"""Recipes: jobs that run from the repository's root with `python -m recipes.<name>`, each to be read top to bottom."""

import os

# Before torch is imported: waiting threads that spin slow a busy machine down by orders of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
