from .nodireft import NodiReFT


class LoReFT(NodiReFT):
    """z + R'(W1 z + b - R z) with orthonormal rows of R (Table 7 of the paper).

    R, W1: (r, k), b: (r). An activation acts on W1 z + b.
    """

    second = "R"
    subtracts = True
