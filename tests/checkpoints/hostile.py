"""Objects for checkpoints that run code, use too much memory, or never end."""


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def laughs(levels: int = 60):
    """Returns nested lists whose text would have 2^60 words."""
    value = ['ha']
    for _ in range(levels):
        value = [value, value]
    return value
