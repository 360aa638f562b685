"""How a model is recorded: liberties that are given up where they fail, and other ways to record the same model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a second attempt gives up when the first one fails.

    ``clear_caches``: empty the dicts in which the model keeps tensors it computed earlier. ``traced_flags``: let
    functional dropout follow train and eval. ``traced_builtins``: let sizes keep their memory through ``int()`` and
    ``len()``, and beside floats. ``traced_numpy``: let them keep it through functions of NumPy. ``inlined_scripts``:
    follow functions compiled by ``torch.jit.script`` as the Python code that they were made of. ``own_hashes``: a size
    is found in a dict or set only under its own expression, so that functions that memoise by sizes are run.

    The others are other ways to record the same model, of which the one that agrees with it is taken (see
    ``fxprune.verification.probes``). ``exporting``: the model is told that it is being exported, where most libraries
    take their general branch. ``flipped``: source lines where a branch on a tensor's value goes the other way.
    ``unequal``: source lines where sizes that are equal count as unequal, so that what is done for unequal ones is
    recorded: a padding by nothing, a resize to the same size. ``cleared``: (name of a module, attribute) that the model
    keeps for one size, as good as never set. ``training``: modules that say, where Python code asks
    them, that they train. ``leaf_functions``: functions of the model's, by ``package.module:name``, which the graph
    calls in place of what they do.
    """

    clear_caches: bool = True
    traced_flags: bool = True
    traced_builtins: bool = True
    traced_numpy: bool = True
    inlined_scripts: bool = True
    own_hashes: bool = True
    exporting: bool = False
    flipped: frozenset[str] = frozenset()
    unequal: frozenset[str] = frozenset()
    cleared: frozenset[tuple[str, str]] = frozenset()
    training: frozenset[str] = frozenset()
    leaf_functions: frozenset[str] = frozenset()
