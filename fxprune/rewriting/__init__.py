"""Rewrite: a plan and the recorded graph give the smaller graph.

``slicing`` cuts parameters and buffers, ``literals`` repairs every argument that named an old size, ``rewrite``
composes them, ``check`` proves that every node of the result carries the channels that the analysis promised.
"""

from fxprune.rewriting.check import check_rewrite
from fxprune.rewriting.literals import UnrepairableError
from fxprune.rewriting.rewrite import rewrite

__all__ = ["UnrepairableError", "check_rewrite", "rewrite"]
