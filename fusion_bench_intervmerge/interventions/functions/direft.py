from .nodireft import NodiReFT


class DiReFT(NodiReFT):
    """z + R'(W1 z + b) with orthonormal rows of R (Table 7 of the paper).

    R, W1: (r, k), b: (r). An activation acts on W1 z + b.
    """

    second = "R"
