from .nodireft import NodiReFT


class NoReFT(NodiReFT):
    """z + W2'(W1 z + b - W2 z), IntervMerge's default (eq 3.4 of the paper).

    W1, W2: (r, k), b: (r). The published code gives both maps a bias and subtracts one from the
    other; a single b is the same class of functions. An activation acts on W1 z + b.
    """

    subtracts = True
