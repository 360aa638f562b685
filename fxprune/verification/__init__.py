"""Verify: the pruned model against the dense one with the same channels masked, and the recording against the model.

``oracle`` runs the masked model; ``masks`` are the ops over kept channels, ``noise`` the random ops, ``double``
the same in double precision, ``compare`` how far outputs are apart, ``answers`` whether they are one and the same
whatever goes in. ``probes`` checks the recording on what the example did not show, with the probes that ``prober``
makes, of the ``sizes`` that are tried; ``places``: whether channels lie there where they do for the example;
``deciding``: which functions decide on what layers computed; ``proof`` is what came of it, as data.
"""

from fxprune.verification.compare import DOUBLE_TOLERANCE, TOLERANCE, Agreement, Compared, compared, relative_error
from fxprune.verification.oracle import Inputs, ReplayError, mask_oracle, masked_output, zero_slices

__all__ = [
    "DOUBLE_TOLERANCE",
    "TOLERANCE",
    "Agreement",
    "Compared",
    "Inputs",
    "ReplayError",
    "compared",
    "mask_oracle",
    "masked_output",
    "relative_error",
    "zero_slices",
]
