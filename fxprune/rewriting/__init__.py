"""Rewrite: a plan and the recorded graph give the smaller graph.

``slicing`` cuts parameters and buffers, ``literals`` repairs every argument that named an old size, ``rewrite``
composes them, ``check`` proves that every node of the result carries the channels that the analysis promised.
``on_meta`` runs a graph without data. ``gates`` and ``hypernetworks`` put into the dense graph what methods train,
``selections`` what lets blocks read a part of a stream. ``carry_over`` takes an optimizer along, ``into`` the model's
own class: ``held`` are numbers that its modules keep, and its attentions keep their ``scales``. ``pretrained`` has
classes of transformers save and load such a network, by the file ``modeling_pruned``.
"""

from fxprune.ops.repair import UnrepairableError
from fxprune.rewriting.check import check_rewrite
from fxprune.rewriting.gates import insert_gates
from fxprune.rewriting.hypernetworks import Hypernetworks, classifiers, insert_hypernetworks
from fxprune.rewriting.literals import REPAIRED, RESIZED
from fxprune.rewriting.on_meta import MetaRun, OnMeta, is_equal
from fxprune.rewriting.rewrite import Draft, draft
from fxprune.rewriting.slicing import CUTS_KEY, Cuts, adapt, adapts_by_itself

__all__ = [
    "CUTS_KEY",
    "REPAIRED",
    "RESIZED",
    "Cuts",
    "Draft",
    "Hypernetworks",
    "MetaRun",
    "OnMeta",
    "UnrepairableError",
    "adapt",
    "adapts_by_itself",
    "check_rewrite",
    "classifiers",
    "draft",
    "insert_gates",
    "insert_hypernetworks",
    "is_equal",
]
