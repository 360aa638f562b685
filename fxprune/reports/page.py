"""A network's layers and channel groups as one HTML page (``page.html``) that asks nobody for anything.

Everything is in the page: its style, its script, and content that is there without the script as well. Every text that
comes from a model is escaped on its way in.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from fxprune.io.files import replacing
from fxprune.reports.rows import GroupRow, Row, row_of
from fxprune.version import __version__

_BAR_HEIGHT = 150  # of the chart of widths, in pixels; so are the others
_BAR = 9
_LINE = 20
_LANE = 14
_CHARACTER = 7.3
_LONGEST_NAME = 44  # characters

_STATES = {
    "cut": "channels were cut",
    "whole": "may be cut, all stay",
    "locked": "may not be cut",
}


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page. ``share``: in [0, 1], drawn as a bar."""

    label: str
    value: str
    detail: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Section:
    """A table of two columns: a name and a value. ``shares``: of each row, drawn as bars."""

    title: str
    lines: Sequence[tuple[str, str]]
    shares: Sequence[float] = ()


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str,
    figures: Sequence[Figure],
    held: Mapping[str, float],
    rows: Sequence[Row],
    groups: Sequence[GroupRow],
    sections: Sequence[Section] = (),
    notes: Sequence[str] = (),
    versions: str = "",
) -> None:
    """Write the page.

    Groups are listed in the order of the first layer that they run through.

    Args:
        path: of the file; it appears only when it is complete.
        title: the model.
        subtitle: what was done with it.
        figures: shown first.
        held: why MACs cannot be lowered -> their share of all.
        rows: layers, in graph order.
        groups: of channels.
        sections: shown after the tables.
        notes: what a reader should know.
        versions: of what the figures come from, besides fxprune's.

    Raises:
        InputError: ``path`` cannot be written.
        WriteError: writing failed on the way.
    """
    pruned = any(row.before != row.after for row in rows)
    runs = _runs(rows, groups)
    first = [min(run, default=len(rows)) for run in runs]
    order = sorted(range(len(groups)), key=first.__getitem__)
    groups, runs = [groups[index] for index in order], [runs[index] for index in order]
    template = Template(files("fxprune.reports").joinpath("page.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        figures="".join(map(_figure, figures)),
        notes=_list("Notes", map(escape, notes)),
        chart=_chart(rows, pruned),
        legend=_legend(rows, pruned),
        lanes=_lanes(rows, groups, runs),
        locked=_locked(rows, held),
        layers=_layers(rows, pruned),
        groups=_groups(rows, groups, runs, pruned),
        sections="".join(map(_section, sections)),
        versions=escape(", ".join(filter(None, (f"fxprune {__version__}", versions)))),
    )
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


# -- what the parts are made of ---------------------------------------------------------------------------------------


def _state(before: int, after: int, why: str) -> str:
    return "locked" if why else "cut" if after < before else "whole"


def _row_state(row: Row) -> str:
    return _state(*row.width, row.locked)


def _group_state(group: GroupRow) -> str:
    return _state(group.before, group.after, group.why)


def _runs(rows: Sequence[Row], groups: Sequence[GroupRow]) -> list[dict[int, str]]:
    """For every group: places in ``rows`` that it runs through -> ``makes`` or ``reads`` (or both: ``makes``)."""
    place = {row.name: index for index, row in enumerate(rows)}
    found = []
    for group in groups:
        run: dict[int, str] = {}
        for parameter, _, read in sorted(group.members, key=lambda member: not member[2]):
            if row_of(parameter) in place:
                run[place[row_of(parameter)]] = "reads" if read else "makes"
        found.append(dict(sorted(run.items())))
    return found


def _columns(spans: Sequence[tuple[int, int]]) -> list[int]:
    """For every span of rows, in order of their first: the leftmost column that is free over all of it."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # (last row, column)
    taken = 0
    columns = []
    for first, last in spans:
        while busy and busy[0][0] < first:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            column = heapq.heappop(free)
        else:
            column, taken = taken, taken + 1
        heapq.heappush(busy, (last, column))
        columns.append(column)
    return columns


def _change(before: object, after: object) -> str:
    return escape(str(before)) if before == after else f"{escape(str(before))} → {escape(str(after))}"


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _shorter(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _list(title: str, items: Iterable[str]) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f"<section><h2>{title}</h2><ul>{lines}</ul></section>" if lines else ""


def _figure(figure: Figure) -> str:
    bar = "" if figure.share is None else f'<div class="meter"><i style="width:{figure.share:.1%}"></i></div>'
    detail = f"<p>{escape(figure.detail)}</p>" if figure.detail else ""
    return f"<div><dt>{escape(figure.label)}</dt><dd>{escape(figure.value)}{bar}{detail}</dd></div>\n"


def _section(section: Section) -> str:
    cells = [f"<th scope=row>{escape(name)}</th><td>{escape(value)}</td>" for name, value in section.lines]
    if section.shares:
        meters = (f'<div class="meter"><i style="width:{share:.1%}"></i></div>' for share in section.shares)
        cells = [f'{cell}<td class="bar">{meter}</td>' for cell, meter in zip(cells, meters, strict=True)]
    lines = "".join(f"<tr>{cell}</tr>" for cell in cells)
    return f'<section><h2>{escape(section.title)}</h2><table class="facts">{lines}</table></section>'


# -- the chart of widths ----------------------------------------------------------------------------------------------


def _chart(rows: Sequence[Row], pruned: bool) -> str:
    """A bar per layer in graph order: its dense width, and in it the pruned one."""
    largest = max((row.width[0] for row in rows), default=1)
    bars = []
    for index, row in enumerate(rows):
        before, after = (_BAR_HEIGHT * width / largest for width in row.width)
        told = f"{row.name}: {_change(*row.width)} channels" + (f", {row.locked}" if row.locked else "")
        x = index * _BAR
        bars.append(
            f'<g class="{_row_state(row)}" data-row="{index}"><title>{escape(told)}</title>'
            f'<rect class="reach" x="{x}" y="0" width="{_BAR}" height="{_BAR_HEIGHT}"/>'
            f"{_bar('before', x, before)}{_bar('after', x, after)}</g>"
        )
    width = max(len(rows), 1) * _BAR
    told = f"Output channels of {len(rows)} layers in graph order" + (", dense and pruned" if pruned else "")
    return (
        f'<div class="axis" aria-hidden="true"><span>{largest}</span><span>{largest // 2}</span><span>0</span></div>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{told}"><svg id="chart" role="img" '
        f'aria-label="{told}; the table of layers has the numbers" viewBox="0 0 {width} {_BAR_HEIGHT}" '
        f'preserveAspectRatio="none" style="min-width:{min(width, len(rows) * 4)}px;max-width:{4 * width}px">'
        f"{''.join(bars)}</svg></div>"
    )


def _bar(kind: str, x: int, height: float) -> str:
    y = _BAR_HEIGHT - height
    return f'<rect class="{kind}" x="{x + 1}" y="{y:.1f}" width="{_BAR - 2}" height="{height:.1f}"/>'


def _legend(rows: Sequence[Row], pruned: bool) -> str:
    """Only of the states that occur."""
    present = {_row_state(row) for row in rows}
    names = {**_STATES, "whole": _STATES["whole"] if pruned else "may be cut"}
    shown = [f'<span class="{state}"><i></i>{text}</span>' for state, text in names.items() if state in present]
    return "".join([*shown, '<span class="gone"><i></i>cut away</span>' if pruned else ""])


# -- the map of groups ------------------------------------------------------------------------------------------------


def _lanes(rows: Sequence[Row], groups: Sequence[GroupRow], runs: Sequence[Mapping[int, str]]) -> str:
    """Layers as lines in graph order; a group is a lane beside them, from the first layer it runs through to the last.

    A lane ends where its group does, and its column is used again: as many columns as groups are alive at a time.
    """
    drawn = [index for index, run in enumerate(runs) if run]
    columns = _columns([(min(runs[index]), max(runs[index])) for index in drawn])
    labels = [(_shorter(row.name), _change(*row.width)) for row in rows]
    names = 12 + _CHARACTER * max((len(name) for name, _ in labels), default=0)
    left = names + 12 + _CHARACTER * max((len(width) for _, width in labels), default=0)
    width = left + 12 + _LANE * (max(columns, default=0) + 1)
    height = _LINE * max(len(rows), 1)
    lines = [
        f'<g class="line {_row_state(row)}" data-row="{index}"><title>{escape(row.name)}</title>'
        f'<rect x="0" y="{_LINE * index}" width="{width:.0f}" height="{_LINE}"/>'
        f'<text x="6" y="{_LINE * index + 14}">{escape(name)}</text>'
        f'<text class="width" x="{names:.0f}" y="{_LINE * index + 14}">{size}</text></g>'
        for index, (row, (name, size)) in enumerate(zip(rows, labels, strict=True))
    ]
    lanes = []
    for index, column in zip(drawn, columns, strict=True):
        group, run = groups[index], runs[index]
        x = left + 6 + _LANE * column
        way = f"M{x:.0f} {_middle(min(run))}V{_middle(max(run))}"
        dots = "".join(f'<circle class="{role}" cx="{x:.0f}" cy="{_middle(row)}" r="4"/>' for row, role in run.items())
        lanes.append(
            f'<g class="lane {_group_state(group)}" data-group="{index}" data-rows="{" ".join(map(str, run))}">'
            f"<title>{escape(group.name)}: {_change(group.before, group.after)} channels</title>"
            f'<path class="reach" d="{way}"/><path d="{way}"/>{dots}</g>'
        )
    told = f"{len(drawn)} groups of channels as lanes beside {len(rows)} layers; the table of groups says the same"
    return (
        f'<svg id="lanes" role="img" aria-label="{told}" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}">{"".join(lines)}{"".join(lanes)}</svg>'
    )


def _middle(row: int) -> int:
    return _LINE * row + _LINE // 2


# -- the tables -------------------------------------------------------------------------------------------------------


def _locked(rows: Sequence[Row], held: Mapping[str, float]) -> str:
    """What cannot be cut, by reason."""
    layers: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.locked:
            layers[row.locked].append(row.name)
    items = [
        f"<b>{escape(reason)}</b><br>{len(names)} layer{'s' if len(names) > 1 else ''}: " + _names(names)
        for reason, names in layers.items()
    ]
    items += [f"{share:.1%} of the MACs cannot be lowered: <b>{escape(reason)}</b>" for reason, share in held.items()]
    return "".join(f"<li>{item}</li>" for item in items) or "<li>Nothing: every layer's outputs may be cut.</li>"


def _names(names: Sequence[str], limit: int = 6) -> str:
    """Names in a row; those beyond the limit folded away."""
    shown = ", ".join(f"<code>{escape(name)}</code>" for name in names[:limit])
    if len(names) <= limit:
        return shown
    rest = ", ".join(f"<code>{escape(name)}</code>" for name in names[limit:])
    return f"{shown} <details><summary>and {len(names) - limit} more</summary>{rest}</details>"


def _head(columns: Sequence[tuple[str, bool]]) -> str:
    """Column heads that sort; of each its name, and whether numbers start with the largest."""
    cells = (
        f'<th scope="col"{" class=number" if number else ""}><button type="button">{name}</button></th>'
        for name, number in columns
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _number(value: float, text: str) -> str:
    """A cell that is sorted by its value."""
    return f'<td class="number" data-value="{value}">{text}</td>'


def _counts(before: int, after: int, state: str, pruned: bool) -> str:
    """The cells of the number of channels: dense, and of a pruned network what stays, and its share."""
    dense = _number(before, str(before))
    if not pruned:
        return dense
    share = after / before
    meter = f'<div class="meter"><i style="width:{share:.1%}"></i></div><span>{share:.0%}</span>'
    return f'{dense}{_number(after, str(after))}<td class="bar {state}" data-value="{share:.6f}">{meter}</td>'


def _layers(rows: Sequence[Row], pruned: bool) -> str:
    head = [("#", True), ("layer", False), ("kind", False), ("outputs", True)]
    head += [("stay", True), ("share", True)] if pruned else []
    head += [("weight", True), ("outputs locked because", False)]
    lines = []
    for index, row in enumerate(rows):
        state = _row_state(row)
        source = f"<small>{escape(row.source)}</small>" if row.source else ""
        weight = _number(math.prod(row.before), _change(_shape(row.before), _shape(row.after)))
        lines.append(
            f'<tr data-row="{index}" data-state="{state}">{_number(index, str(index + 1))}'
            f'<th scope="row"><code>{escape(row.name)}</code>{source}</th><td>{escape(row.kind)}</td>'
            f"{_counts(*row.width, state, pruned)}{weight}<td>{escape(row.locked)}</td></tr>\n"
        )
    return f'<table id="layers" class="data">{_head(head)}<tbody>{"".join(lines)}</tbody></table>'


def _groups(rows: Sequence[Row], groups: Sequence[GroupRow], runs: Sequence[Mapping[int, str]], pruned: bool) -> str:
    head = [("group", False), ("channels", True)]
    head += [("stay", True), ("share", True)] if pruned else []
    head += [("state", False), ("made by", False), ("read by", False), ("why", False)]
    layers = {row.name for row in rows}
    lines = []
    for index, (group, run) in enumerate(zip(groups, runs, strict=True)):
        state = _group_state(group)
        makes, reads = (
            [rows[row].name for row, role in run.items() if role == wanted] for wanted in ("makes", "reads")
        )
        paths = (name.rpartition(".")[0] or name for name, _, _ in group.members if row_of(name) not in layers)
        others = [path for path in dict.fromkeys(paths) if path not in layers]
        blocks = f" in {group.blocks} blocks" if group.blocks > 1 else ""
        exact = "" if group.exact else ", approximate"
        cells = [
            f'<th scope="row"><button type="button" class="pick" aria-pressed="false"><code>{escape(group.name)}</code>'
            "</button></th>",
            _counts(group.before, group.after, state, pruned),
            f"<td>{state}{exact}{blocks}</td>",
            f"<td>{_names(makes)}" + (f"<small>and {_names(others, 3)}</small>" if others else "") + "</td>",
            f"<td>{_names(reads)}</td><td>{escape(group.why)}</td>",
        ]
        run_through = " ".join(map(str, run))
        lines.append(f'<tr data-group="{index}" data-state="{state}" data-rows="{run_through}">{"".join(cells)}</tr>\n')
    return f'<table id="groups" class="data">{_head(head)}<tbody>{"".join(lines)}</tbody></table>'
