"""A channel graph, shown: as rows of tables, as text, as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fxprune.groups.channels import ChannelGraph
from fxprune.groups.cost import Keep
from fxprune.io.text import quantity, table
from fxprune.labels.classes import Ids
from fxprune.labels.factors import cut_sizes
from fxprune.reports.page import Figure, write_page
from fxprune.reports.rows import GroupRow, Row, row_of


def rows(graph: ChannelGraph, keep: Keep, locked: Mapping[str, str]) -> tuple[Row, ...]:
    """One row per layer with a weight of at least two dimensions, in graph order; unused ones come last.

    Args:
        keep: per channel.
        locked: group name -> why a group that could be cut is not.
    """
    read = {(m.name, m.dim) for group in graph.groups for m in group.members if m.read}
    place = {name: index for index, name in enumerate(graph.lines)}
    found = []
    for parameter in graph.parameters:
        if not parameter.trainable or len(parameter.shape) < 2:
            continue
        path = parameter.name.rpartition(".")[0]
        used = next((name for name in (path, parameter.name) if name in place), None)
        # An embedding makes channels along its last dim, a transposed convolution along its second.
        made = [f for f in parameter.labels if (parameter.name, f.dim) not in read]
        out = made[-1].dim if made else 0
        after = tuple(cut_sizes(parameter.shape, parameter.labels, keep))
        local = parameter.groups if out == 1 else 1
        found.append((
            len(place) if used is None else place[used],
            Row(
                row_of(parameter.name), graph.kinds.get(path, "parameter"), parameter.shape, after,
                _why(graph, made[-1].ids if made else None, parameter.shape[out], locked),
                graph.lines[used] if used is not None else "",
                (parameter.shape[out] * local, after[out] * local),
            ),
        ))  # fmt: skip
    return tuple(row for _, row in sorted(found, key=lambda each: each[0]))


def _why(graph: ChannelGraph, channels: Ids | None, size: int, locked: Mapping[str, str]) -> str:
    """Why all of these stay, or ''."""
    if channels is None:
        return "makes no channels" if size > 1 else ""
    groups = [graph.groups[g] for g in np.unique(graph.group_of[channels])]
    reasons = {str(group.locked or locked.get(group.name, "")) for group in groups}
    return "" if "" in reasons else "; ".join(sorted(reasons))


def group_rows(graph: ChannelGraph, keep: Keep, locked: Mapping[str, str]) -> tuple[GroupRow, ...]:
    """One row per group; arguments as of ``rows``."""
    return tuple(
        GroupRow(
            group.name, group.channels.size, int(keep[group.channels].sum()), group.blocks, group.exact,
            str(group.locked or locked.get(group.name, "")),
            tuple((member.name, member.dim, member.read) for member in group.members),
        )
        for group in graph.groups
    )  # fmt: skip


def with_removed(left: Sequence[Row], whole: ChannelGraph) -> tuple[Row, ...]:
    """Rows, and those of layers that ``whole`` has beside them; of these nothing is left."""
    known = {row.name: row for row in left}
    every = rows(whole, whole.everything(), {})
    if len(known) == len(every):
        return tuple(left)
    return tuple(known.get(row.name, replace(row, after=(), width=(row.width[0], 0), locked="")) for row in every)


def groups_with_removed(left: Sequence[GroupRow], whole: ChannelGraph) -> tuple[GroupRow, ...]:
    """The same of groups: those of which no parameter is left."""
    there = {member[:2] for row in left for member in row.members}
    every = group_rows(whole, whole.everything(), {})
    gone = [row for row in every if row.members and not there & {member[:2] for member in row.members}]
    return (*left, *(replace(row, after=0) for row in gone))


def write_html(graph: ChannelGraph, path: str | Path) -> None:
    """Write a page: every layer in graph order, the groups that run through it, what is locked and why.

    Raises:
        InputError: ``path`` cannot be written.
    """
    free = sum(group.channels.size for group in graph.prunable)
    every = graph.everything()
    write_page(
        path,
        title=graph.kinds.get("", "model"),
        subtitle="what can be cut",
        figures=[
            Figure("MACs", quantity(graph.macs())),
            Figure("parameters", quantity(graph.params())),
            Figure("prunable channels", f"{free} of {graph.channel_count}"),
            Figure("prunable MACs", f"{graph.prunable_share:.1%}"),
        ],
        held=graph.held,
        rows=rows(graph, every, {}),
        groups=group_rows(graph, every, {}),
        notes=graph.notes,
    )


def text_of(graph: ChannelGraph) -> str:
    """A table of the groups."""
    lines = [("group", "channels", "state", "why", "runs through")]
    for group in graph.groups:
        size = f"{group.size}" if group.blocks == 1 else f"{group.size} x {group.blocks} blocks"
        state = "locked" if group.locked else "exact" if group.exact else "approximate"
        layers = list(dict.fromkeys(m.name.rpartition(".")[0] or m.name for m in group.members))
        shown = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
        lines.append((group.name, size, state, str(group.locked or group.approximate or ""), shown))
    total = sum(g.channels.size for g in graph.groups)
    free = sum(g.channels.size for g in graph.prunable)
    head = f"{len(graph.groups)} groups, {free} of {total} channels can be cut; {quantity(graph.macs())} MACs"
    notes = ["", "notes:", *(f"  {note}" for note in graph.notes)] if graph.notes else []
    return "\n".join([head, "", *table(lines), *notes])
