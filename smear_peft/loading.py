"""`load`: an adapter onto a base model, all or nothing."""


def load(*a, **k):
    raise ValueError
