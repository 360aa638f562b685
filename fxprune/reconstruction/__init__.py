"""Reconstruction: the weights of a pruned network refitted, in closed form, to what the dense network computes.

What an op is for it, the table of ops says (``ops.refit``). ``entries`` follows parameters to where they are read,
``survey`` runs a graph once to learn where that is, ``sites`` pairs pruned with dense, ``lanes`` runs a graph in
steps and ``walk`` both side by side, ``solve`` is the algebra, and ``refit`` puts them together. ``tune`` trains
scales and shifts afterwards, if asked to. ``data`` makes pieces of what users pass, ``noise`` does without; ``result``
is what is told, ``reads`` what criteria that know of the refit measure, ``front`` what users call.
"""

from fxprune.reconstruction.data import Piece, checksum, inputs_of, pieces_of
from fxprune.reconstruction.entries import spread
from fxprune.reconstruction.reads import measure_reads
from fxprune.reconstruction.refit import Ridge, refit
from fxprune.reconstruction.result import LayerFit, Reconstruction, Tuning

__all__ = [
    "LayerFit",
    "Piece",
    "Reconstruction",
    "Ridge",
    "Tuning",
    "checksum",
    "inputs_of",
    "measure_reads",
    "pieces_of",
    "refit",
    "spread",
]
