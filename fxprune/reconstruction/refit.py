"""Refit the weights of a pruned graph to the activations of the dense one, in graph order.

Both graphs run side by side over the calibration data. At a contraction with a weight, ``X`` is what the pruned graph
gives it, with all weights before it already refitted, and ``Y`` the dense graph's outputs, of the channels that stay:
``W = argmin |X W - Y|^2 + ridge |W - W_cut|^2``. Where the product is added to a stream, what the stream lacks by then
is part of ``Y``. Nothing is written to the given modules.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxprune.ops.refit import Product
from fxprune.reconstruction.data import Piece
from fxprune.reconstruction.entries import Counterparts, Entries
from fxprune.reconstruction.result import LayerFit, Reconstruction
from fxprune.reconstruction.sites import Columns, NormSite, Site, sites_of
from fxprune.reconstruction.solve import Change, Sums, solve
from fxprune.reconstruction.survey import Place, by_channel
from fxprune.reconstruction.walk import OutputsError, Stop, Walk
from fxprune.recording import evaluated
from fxprune.recording.shards import all_agree, copied_around_shares, own_part
from fxprune.rewriting.slicing import Cuts

Ridge = float | Literal["auto"]
_ROWS_PER_INPUT = 32
_LEAST_ROWS = 8192
_SAME = 1e-6


@dataclass
class _Open:
    """A site whose sums are being taken. ``change``: what its weight and bias were changed by so far.

    ``odd``: why they cannot be taken, or "".
    """

    fit: Sums
    held: Sums
    change: tuple[Tensor, Tensor]
    ridge: float | None = None
    unchanged: bool = True
    odd: str = ""

    @classmethod
    def of(cls, site: Site, device: torch.device) -> _Open:
        fit, held = (Sums(site.numbers.shape, device) for _ in range(2))
        return cls(fit, held, (torch.zeros_like(fit.cross), torch.zeros_like(fit.r)))


class _Run:
    def __init__(
        self, dense: fx.GraphModule, pruned: fx.GraphModule, pieces: Sequence[Piece], cuts: Cuts, ridge: Ridge,
        memory: int | None, seed: int,
    ):  # fmt: skip
        self._pieces, self._ridge, self._seed = pieces, ridge, seed
        self.walk = Walk(dense, pruned, pieces, memory)
        self.entries, dense_entries = Entries(pruned), Entries(dense)
        counterparts = Counterparts(dense_entries, self.entries, cuts)
        self.sites, self._norms, self.left_alone = sites_of(
            self.walk.pruned, self.walk.facts, self.walk.dense, self.walk.dense_facts, self.entries, counterparts
        )
        self._number = {id(site): number for number, site in enumerate(self.sites)}
        self.layers: list[LayerFit] = []
        self.changed: set[str] = set()

    def run(self) -> None:
        """Visit every stop in graph order."""
        sites = {place: site for site in self.sites for place in site.places}
        norms = {site.norm.place: site for site in self._norms}
        stops = sorted({node for node, _ in (*sites, *norms)}, key=self.walk.position)
        sums: dict[int, _Open] = {}
        for name in stops:
            here = {k: sites[name, k] for k in range(_most(sites, name)) if (name, k) in sites}
            moments = {k: _Moments(norms[name, k]) for k in range(_most(norms, name)) if (name, k) in norms}
            self._visit(name, here, moments, sums)
            for moment in moments.values():
                self._follow(moment)
            for site in {id(s): s for s in here.values()}.values():
                self._solve(site, sums[id(site)])
                if site.places[-1][0] == name:
                    self._close(site, sums.pop(id(site)))

    # -- one stop -----------------------------------------------------------------------------------------------

    def _visit(self, name: str, here: dict[int, Site], moments: dict[int, _Moments], sums: dict[int, _Open]) -> None:
        """Bring every piece to this node, and add up what it is given there."""
        for index, piece in enumerate(self._pieces):
            stop = self.walk.stop(index, name)
            for k, moment in moments.items():
                x, wanted = stop.of_pruned.norms[k].input, stop.of_dense.norms[k].input
                x, wanted = by_channel(x, moment.site.norm.mean.numel()), by_channel(wanted, moment.site.width)
                moment.add(x, wanted[:, moment.site.columns.to(wanted.device)], piece.held)
            for k, site in here.items():
                self._take(site, (name, k), stop, index, sums)

    def _take(self, site: Site, place: Place, stop: Stop, index: int, sums: dict[int, _Open]) -> None:
        number, k = site.places.index(place), place[1]
        columns = site.columns[number]
        dense, pruned = (calls[k] for calls in stop.calls)
        if dense is None or pruned is None:
            return
        seen = dense, pruned
        whole, product = (s.product(site.calls[number].weight) for s in seen)
        rows = self._rows(site, number, index, product.rows).to(seen[1].out.device)
        own = product.outputs(seen[1].out, rows)
        opened = sums.setdefault(id(site), _Open.of(site, own.device))
        if site.numbers.shape[0] > 1 and site.group is not None and len(site.group) != len(own):
            opened.odd = "how many groups share its weights varies with the inputs"
            return
        y = _picked(whole.outputs(seen[0].out, rows), columns)
        lacking = self._lacking(site, place[0], stop, (whole, product), (seen[0].out, seen[1].out), rows, columns)
        if lacking is not None:
            y = y + self._missing(site, lacking)
        self._add(site, opened, partial(product.inputs, rows), own, y, self._pieces[index])

    def _add(
        self, site: Site, opened: _Open, inputs: Callable[[], Tensor], own: Tensor, y: Tensor, piece: Piece
    ) -> None:
        lacking = y - own
        if opened.unchanged and float(lacking.abs().max()) > _SAME * float(y.abs().max()):
            opened.unchanged = False
        if opened.unchanged and len(site.places) == 1:
            return
        (opened.held if piece.held else opened.fit).add(inputs(), lacking, y, site.group)

    def _lacking(
        self, site: Site, name: str, stop: Stop, products: tuple[Product, Product], outs: tuple[Tensor, Tensor],
        rows: Tensor, columns: Columns,
    ) -> Tensor | None:  # fmt: skip
        """What the result of this product would lack of the dense one's, were the products equal, ``[g, R, O]``."""
        branch = site.branch
        if branch is None:
            return None

        def picked(value: Any, side: int) -> Tensor | None:
            if not isinstance(value, Tensor) or value.numel() != outs[side].numel():
                return None
            found = products[side].outputs(value.reshape(outs[side].shape), rows)
            return found if side else _picked(found, columns)

        lacking: Tensor | None = None
        if branch.other is not None and branch.dense_other is not None:
            sides = (stop.dense, self.walk.dense, branch.dense_other), (stop.pruned, self.walk.pruned, branch.other)
            wanted, stream = (
                picked(env.get(lane.named[other]) if other in lane.named else None, side)
                for side, (env, lane, other) in enumerate(sides)
            )
            lacking = None if wanted is None or stream is None else wanted - stream
        if branch.target is None or branch.total is None or (branch.other is not None and lacking is None):
            return lacking
        ahead = self.walk.ahead(stop, name, (branch.total, branch.target))
        total, target = (picked(ahead.get(n), 0) for n in (branch.total, branch.target))
        if total is None or target is None:
            return lacking
        return target - total if lacking is None else lacking + target - total

    def _missing(self, site: Site, lack: Tensor) -> Tensor:
        """What the stream lacks, in the scale of the product: before the norm between them."""
        norm = site.branch.norm if site.branch is not None else None
        if norm is None:
            return lack
        var = self.entries.read(norm.var).double()
        scale = torch.ones_like(var) if norm.scale is None else self.entries.read(norm.scale).double()
        scale = (scale / (var + norm.eps).sqrt()).view(lack.shape[0], 1, -1)
        live = scale.abs() > 1e-3 * scale.abs().median()
        return torch.where(live, lack / torch.where(live, scale, torch.ones_like(scale)), torch.zeros_like(scale)).to(
            lack
        )

    def _rows(self, site: Site, call: int, index: int, rows: int) -> Tensor:
        """Which rows of this piece are looked at."""
        _, inputs, outputs = site.numbers.shape
        share = self._pieces[index].samples / sum(p.samples for p in self._pieces) / len(site.places)
        wanted = max(_ROWS_PER_INPUT * inputs, _LEAST_ROWS, rows / share * outputs / (inputs + outputs))
        count = math.ceil(wanted * share)
        if count >= rows:
            return torch.arange(rows)
        number = (self._number[id(site)] * len(self._pieces) + index) * len(site.places) + call
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        return torch.randperm(rows, generator=generator)[:count].sort().values

    # -- solving ------------------------------------------------------------------------------------------------

    def _solve(self, site: Site, opened: _Open) -> None:
        """Write the new weight, if there is a better one. That of several calls is solved for after each of them."""
        fit, held = opened.fit, opened.held
        change: Change | None = None
        if not opened.odd and not opened.unchanged and fit.is_finite and held.is_finite:
            change = solve(fit, held, site.vector is not None or site.norm is not None, self._ridge)
            if change.after >= held.left(torch.zeros_like(change.weight), torch.zeros_like(change.bias)):
                change = None
        if not all_agree(change is not None, self.walk.pruned.module) or change is None:
            return
        opened.ridge = change.ridge
        opened.change = opened.change[0] + change.weight, opened.change[1] + change.bias
        for sums in (fit, held):
            sums.rebase(change.weight, change.bias)
        self._shift(site.matrix, change.weight)
        if site.vector is not None:
            self._shift(site.vector, change.bias)
        elif site.norm is not None:
            self._shift(site.norm.mean, -change.bias)
        self.walk.changed()

    def _close(self, site: Site, opened: _Open) -> None:
        """Tell what became of a weight whose last call was seen."""
        held, (weight, bias) = opened.held, opened.change
        finite = opened.fit.is_finite and held.is_finite
        why = opened.odd or (
            "nothing before it changed" if opened.unchanged else "" if finite else "its inputs are not finite"
        )
        errors = [held.left(-weight, -bias), held.left(torch.zeros_like(weight), torch.zeros_like(bias))]
        scale = 0.0 if opened.unchanged else 1 / (held.spread or 1.0)
        before, after = (error * scale if finite and not opened.odd else None for error in errors)
        kept, ridge = opened.ridge is not None, opened.ridge if opened.ridge != float("inf") else None
        self.layers.append(LayerFit(site.name, site.op, opened.fit.rows, before, after, ridge, kept, why))
        if kept and len({node for node, _ in site.places}) > 1:
            self.walk.changed(passed=True)

    def _shift(self, numbers: Tensor, by: Tensor) -> None:
        numbers = numbers.reshape(-1)
        self.entries.write(numbers, self.entries.read(numbers).double() + by.reshape(-1))
        self.changed.update(self.entries.names_of(numbers))

    def _follow(self, moment: _Moments) -> None:
        shift = moment.shift()
        if all_agree(shift is not None, self.walk.pruned.module) and shift is not None:
            self._shift(moment.site.norm.mean, shift)
            self.walk.changed()


class _Moments:
    """How far a norm's input is from the dense one's, per channel."""

    def __init__(self, site: NormSite):
        self.site = site
        self._sums = [[0.0, 0.0, 0], [0.0, 0.0, 0]]

    def add(self, x: Tensor, dense: Tensor, held: bool) -> None:
        gap = x.double() - dense.double()
        dims = [d for d in range(gap.ndim) if d != 1]
        sums: list[Any] = self._sums[held]
        sums[0] += gap.sum(dims)
        sums[1] += gap.square().sum(dims)
        sums[2] += gap.numel() // gap.shape[1]

    def shift(self) -> Tensor | None:
        """What the mean has to follow, if that is less than was lacking on held-out data."""
        (gap, _, count), (other, _, rows) = self._sums
        shift: Any = gap / max(count, 1)
        if not isinstance(shift, Tensor) or not bool(shift.isfinite().all()) or not bool(shift.any()):
            return None
        after = (rows * shift**2 - 2 * shift * other).sum()
        return shift if float(after) < 0 else None


def refit(
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    pieces: Sequence[Piece],
    cuts: Cuts,
    *,
    ridge: Ridge = "auto",
    memory: int | None = None,
    seed: int = 0,
) -> tuple[fx.GraphModule, Reconstruction]:
    """A copy of ``pruned`` with refitted weights, and what was done.

    Args:
        dense: the recorded graph that ``pruned`` was made from; runs in eval mode.
        pruned: the pruned graph.
        pieces: calibration data.
        cuts: how ``pruned`` was cut.
        ridge: relative to the mean eigenvalue of a layer's Gram matrix, or ``"auto"``.
        memory: bytes of activations to keep at most; half of what is free if None.
        seed: of the rows that are drawn.

    Raises:
        InputError: a graph does not run on the data.
    """
    start = time.perf_counter()
    working = copy.deepcopy(pruned).eval()
    with evaluated(dense):
        run = _Run(dense, working, pieces, cuts, ridge, memory, seed)
        run.run()
        reference = copied_around_shares(pruned).eval()
        error = run.walk.outputs_error(reference)
    worse = not all_agree(not _is_worse(error), pruned)
    result = copy.deepcopy(pruned)
    own = Entries(result)
    with torch.no_grad():
        for name in () if worse else run.changed:
            own_part(own.tensors[name]).copy_(own_part(run.entries.tensors[name]))
    left_alone = [(", ".join(run.entries.names_of(c.matrix.reshape(-1))), c.op, why) for c, why in run.left_alone]
    left_alone += [(node, op, why) for (node, _), (op, why) in run.walk.facts.odd.items()]
    layers = [_put_back(layer) for layer in run.layers] if worse else run.layers
    layers += [LayerFit(name, op, 0, None, None, None, False, why) for name, op, why in left_alone]
    notes = [f"{error.varying} outputs are not compared: their shapes depend on values"] if error.varying else []
    if worse:
        notes.append(f"all is as it was cut: refitted, the error of the outputs was {error.after:.3g}")
    told = Reconstruction(
        tuple(layers),
        error.before,
        error.before if worse else error.after,
        sum(piece.samples for piece in pieces if not piece.held),
        sum(piece.samples for piece in pieces if piece.held),
        time.perf_counter() - start,
        "" if run.sites else _not_applicable({why for _, _, why in left_alone}),
        tuple(notes),
    )
    return result, told


def _is_worse(error: OutputsError) -> bool:
    """Whether layers that each got better made the outputs worse all the same."""
    if error.before is None or error.after is None or math.isnan(error.before):
        return False
    return not error.after <= error.before


def _put_back(layer: LayerFit) -> LayerFit:
    return replace(layer, after=layer.before, ridge=None, kept=False) if layer.kept else layer


def _not_applicable(reasons: set[str]) -> str:
    return "no weight can be solved for" + (
        f": {'; '.join(sorted(reasons))}" if reasons else ", for none reads channels"
    )


def _picked(y: Tensor, columns: Columns) -> Tensor:
    """Of the dense outputs ``[g, R, O]`` those that stay, ``[g, R, O]`` of the pruned product."""
    groups, outputs = (None if index is None else index.to(y.device) for index in columns)
    assert outputs is not None
    if groups is not None:
        return y.transpose(1, 2)[groups, outputs].transpose(1, 2)
    if len(outputs) == 1:
        return y[:, :, outputs[0]]
    return y.gather(2, outputs.unsqueeze(1).expand(-1, y.shape[1], -1))


def _most(table: Any, name: str) -> int:
    return max((k + 1 for node, k in table if node == name), default=0)
