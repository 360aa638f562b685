"""``save`` and ``load``: a pruned network as one file.

``.safetensors`` holds data only: the tensors under their names in the state_dict, and in the header's metadata, as
JSON, the plan, what the network is called with, a sample of what it returns, versions and a digest over all of it.
Loading records a fresh instance of the class, applies the plan and puts the tensors in. ``.pt2`` is a program of
torch.export with the same metadata beside it: it needs no class.

``header`` is what a file says of itself, ``sample`` tells whether a network still computes what it did, ``packing`` is
for tensors that are mostly zeros; ``saving`` and ``loading`` write and read.
"""

from fxprune.io.artifact.header import KEY, Artifact, check_path, digest_of
from fxprune.io.artifact.loading import load, read_artifact
from fxprune.io.artifact.sample import SAMPLE_TOLERANCE, sample_of
from fxprune.io.artifact.saving import save

__all__ = [
    "KEY",
    "SAMPLE_TOLERANCE",
    "Artifact",
    "check_path",
    "digest_of",
    "load",
    "read_artifact",
    "sample_of",
    "save",
]
