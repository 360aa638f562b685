"""Group: label a recorded graph until nothing new is found, and freeze what was found as a ``ChannelGraph``.

``analyse`` composes; ``shadow`` stands labelled meta tensors in for the weights, ``order`` finds movements that
interleave channels, ``freeze`` numbers the channels and groups them.
"""

from fxprune.analysis.analyse import analyse_graph
from fxprune.analysis.shadow import placeholder_values, replay

__all__ = ["analyse_graph", "placeholder_values", "replay"]
