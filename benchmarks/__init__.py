"""Measurements: speed against the plain formulas and against a plain adapter. Run by hand, never by the tests."""
