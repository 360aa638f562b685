"""Group: label a recorded graph until nothing new is found, and freeze what was found as a ``ChannelGraph``.

``analyse`` composes; ``shadow`` stands labelled meta tensors in for the weights, ``order`` finds movements that
interleave channels, ``freeze`` numbers the channels and groups them. ``workload`` lists the ops of a forward pass,
``flow`` says where channels are made and read. ``channels`` is the result as plain data, ``cost`` counts any plan.
"""

from fxprune.groups.analyse import analyse_graph
from fxprune.groups.shadow import ValueInterpreter, placeholder_values, replay
from fxprune.groups.workload import Work, groups_of, workload

__all__ = ["ValueInterpreter", "Work", "analyse_graph", "groups_of", "placeholder_values", "replay", "workload"]
