"""Global Sparse Momentum (Ding et al., NeurIPS 2019), and what a compiler can do with its zeros.

The network is trained with ``fxprune.optim.GSM``; the largest weights stay, the others become zero. A channel that no
weight reads any more is then cut. That is exact, whatever makes the channel: if all its weights in the layers that read
it are zero, its values count for nothing. A channel that is read but whose own weights became zero stays: it still is
a constant, its bias, which later layers use. What was cut reads nothing itself, so the search is repeated until nothing
is found. All other zeros stay where they are. The report tells how many weights were above 1e-4 before the cut, beside
how many it left: where they are many more, the cut is not free.

``structured=True`` ranks whole channels by the same rule, ``|sum gradient * weight|`` over all that a channel owns:
those that a plan within the budget would keep are active. Here weight decay acts on biases and norms too, or the scale
and shift of a passive channel would stay; and in the end the channels with the smallest norms go, to meet the budget.

``pattern="2:4"`` is not of the paper: a step chooses the active weights among those that the pattern allows, and the
cut leaves no others. It lies along the dim of a kernel that its layers read, as the channel graph tells; kernels that
it does not fit are named in the report. Channels that no weight reads stay: without them the pattern would shift.

``freeze=`` departs from the paper: see ``fxprune.optim.GSM.freeze``. Of channels those with the largest norms are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from fxprune.errors import InputError, check_number, is_real
from fxprune.groups.channels import Parameter
from fxprune.io.text import some
from fxprune.methods import optim
from fxprune.methods.learner import Hooks, Outcome, Parameters, Site
from fxprune.methods.patterns import Pattern
from fxprune.methods.registry import register
from fxprune.methods.state import ModelState, Scores, first_order, kept_entries, places_of, sums_in_places

Keep = npt.NDArray[np.bool_]
_COMPRESSION = 10.0


@register("gsm")
@dataclass(frozen=True)
class GSM:
    """Sparse momentum zeroes weights, and channels that none reads go exactly (Ding et al. 2019); needs data.

    Without a budget single weights are ranked, and ``compression`` says how many stay; with one, and no compression,
    whole channels are. The numbers are those of the paper's ResNet-56; with another optimizer than its own this is
    magnitude pruning.

    Args:
        compression: of ``N`` weights that are trained and have two or more dims ``int(N / compression)`` stay. None:
            10, without a budget; as many as a pattern allows.
        structured: rank whole channels, within the budget that ``prune`` must be given.
        lr: learning rate, divided by ten after 2/3 and 5/6 of the epochs.
        momentum: see ``fxprune.optim`` for how it, the rate and the weight decay must go with the number of steps.
        weight_decay: of passive weights all that moves them, but for momentum.
        nesterov: Nesterov's momentum.
        freeze: after which share of the epochs the active set is held, so that what is out of it can vanish before the
            rate falls. None: never, as in the paper. Epochs are those of fxprune's loop; in a loop of your own call
            ``optimizer.freeze()``.
        pattern: ``"2:4"``: of every 4 consecutive weights along what a layer reads at most 2 stay. Not in the paper. An
            optimizer of your own needs it too, see ``fxprune.optim``.
    """

    compression: float | None = None
    structured: bool = False
    lr: float = 5e-3
    momentum: float = 0.98
    weight_decay: float = 1e-4
    nesterov: bool = False
    freeze: float | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, getattr(self, name))
        if self.freeze is not None and not (is_real(self.freeze) and 0 <= self.freeze < 1):
            raise InputError(f"freeze={self.freeze!r} is a share of the epochs: at least 0 and below 1, or None.")
        if self.pattern is not None:
            Pattern.parse(self.pattern)
            if self.structured:
                raise InputError(
                    f"pattern={self.pattern!r} is of single weights; structured=True ranks channels: leave one out."
                )
        if self.compression is None:
            return
        optim.active_count(0, self.compression)
        if self.structured:
            raise InputError(
                f"compression={self.compression} counts single weights; structured=True ranks channels for a budget: "
                "leave one of them out."
            )

    @property
    def decides(self) -> bool:
        """Whether ``compression`` takes the place of a budget."""
        return not self.structured

    def within_budget(self) -> GSM | None:
        """The structured variant, which meets a budget; None where a compression or a pattern was asked for."""
        return replace(self, structured=True) if self.compression is None and self.pattern is None else None

    def attach(self, site: Site) -> Hooks:
        return _Structured(self, site) if self.structured else _Unstructured(self, site)


class _Run(Hooks):
    def __init__(self, options: GSM, site: Site):
        self._options, self._site = options, site
        self._epochs = 0  # that are over
        self._held: tuple[optim.GSM, int] | None = None  # what is frozen, and after how many epochs

    def begins(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        if self._options.freeze is None:
            return
        if not isinstance(optimizer, optim.GSM):
            raise InputError(
                f"freeze={self._options.freeze} holds the active set of fxprune.optim.GSM; {type(optimizer).__name__} "
                "has none. Leave freeze out, or the optimizer."
            )
        self._held = optimizer, round(self._options.freeze * epochs)
        self._hold()

    def after_epoch(self, accuracy: float | None) -> None:
        self._epochs += 1
        self._hold()

    def _hold(self) -> None:
        if self._held is not None and self._epochs == self._held[1]:
            self._held[0].freeze()

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self._epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epochs = state["epochs"]

    def held(self) -> tuple[str, ...]:
        """For the report: what came of ``freeze``."""
        if self._options.freeze is None:
            return ()
        if self._held is None:
            return (f"freeze={self._options.freeze} held nothing: it counts epochs of fxprune's own loop",)
        if self._epochs <= self._held[1]:
            return (f"the training ended before the active set was held, after {self._epochs} epochs",)
        return (f"the active set was held after {self._held[1]} of {self._epochs} epochs",)

    def trained(self) -> Parameters:
        """A weight that is frozen, or that nothing uses, cannot vanish: it is not ranked, and stays."""
        named = self._site.model.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in self._site.idle]

    def frozen(self) -> tuple[str, ...]:
        """For the report: which weights stay as they are."""
        kernels = {name: p for name, p in self._site.model.named_parameters() if optim.is_kernel(p)}
        unused = self._site.idle & {*kernels}
        kinds = {
            "frozen weights": [name for name, p in kernels.items() if not p.requires_grad and name not in unused],
            "weights that the network does not use": sorted(unused),
        }
        return tuple(f"{kind} stay as they are: {some(names)}" for kind, names in kinds.items() if names)

    def schedule(self, optimizer: torch.optim.Optimizer, epochs: int) -> LRScheduler | None:
        return MultiStepLR(optimizer, sorted({max(1, epochs * 2 // 3), max(1, epochs * 5 // 6)}))


class _Unstructured(_Run):
    def __init__(self, options: GSM, site: Site):
        super().__init__(options, site)
        alone = _COMPRESSION if options.pattern is None else 1.0
        self._compression = alone if options.compression is None else options.compression
        self.support: list[int] = []
        self._patterns: dict[Tensor, Pattern] = {}
        self._without: list[str] = []  # why a kernel has no pattern
        if options.pattern is not None:
            self._place(options.pattern)

    def _place(self, text: str) -> None:
        """Which kernels have the pattern, and along which dim."""
        graph, named = self._site.graph, self._site.parameters
        read: dict[str, set[int]] = {}
        for member in (member for group in graph.groups for member in group.members if member.as_is):
            read.setdefault(graph.by_name[member.name].name, set()).add(member.dim)
        names = {named[name]: name for name in reversed([*named])}
        for kernel in (p for p in self.trained() if optim.is_kernel(p)):
            name = names[kernel]
            dims = read.get(graph.by_name[name].name, set()) if name in graph.by_name else set()
            if len(dims) != 1:
                self._without.append(f"{name} (read along {len(dims) or 'no'} dims)")
                continue
            pattern = Pattern.parse(text, *dims)
            if pattern.fits(kernel):
                self._patterns[kernel] = pattern
            else:
                self._without.append(f"{name} ({kernel.shape[pattern.dim]} inputs)")
        if not self._patterns:
            of = Pattern.parse(text).of
            raise InputError(
                f"pattern={text!r} fits no layer, whose inputs must be a multiple of {of}: {', '.join(self._without)}."
            )

    def optimizer(self) -> torch.optim.Optimizer:
        o = self._options
        groups: dict[int | None, dict[str, Any]] = {}
        for parameter in self.trained():
            pattern = self._patterns.get(parameter)
            own = {} if pattern is None else {"pattern": str(pattern), "input_dim": pattern.dim}
            groups.setdefault(None if pattern is None else pattern.dim, {"params": [], **own})["params"].append(
                parameter
            )
        return optim.GSM([*groups.values()], o.lr, o.momentum, o.weight_decay, self._compression, o.nesterov)

    def after_epoch(self, accuracy: float | None) -> None:
        """How many weights count after every epoch: in the end they should be as many as the cut leaves."""
        super().after_epoch(accuracy)
        self.support.append(optim.support(self.trained()))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"support": self.support}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.support = list(state["support"])

    def outcome(self) -> Outcome:
        alive = optim.support(self.trained())
        first = f" ({self.support[0]} after the first epoch)" if self.support else ""
        trained = [*self.trained()]
        optim.magnitude_cut(trained, self._compression, [self._patterns.get(p) for p in trained])
        kernels = [p for p in self.trained() if optim.is_kernel(p)]
        kept, total = sum(int(p.count_nonzero()) for p in kernels), sum(p.numel() for p in kernels)
        unread = _unread(self._site)
        notes = (
            f"{alive} of {total} weights were above {optim.SUPPORT:g} in size before the cut{first}",
            f"{kept} of {total} weights are not zero; no weight reads {int(unread.sum())} channels",
            *self._placed(),
            *self.frozen(),
            *self.held(),
        )
        if self._patterns:
            unread[:] = False
        graph = self._site.graph
        scores = [np.where(unread[group.channels], 0.0, 1.0) for group in graph.groups]
        return Outcome(scores, threshold=0.0, notes=notes)

    def _placed(self) -> tuple[str, ...]:
        """For the report: what has the pattern, and what not."""
        if not self._patterns:
            return ()
        where = f"{self._options.pattern} along the inputs of {len(self._patterns)} kernels, of which all channels stay"
        return (f"{where}; without it: {', '.join(self._without)}" if self._without else where,)


def _unread(site: Site) -> Keep:
    """Per channel, whether its values count for nothing, since every weight that reads it is zero.

    So do those that only such channels are made of.
    """
    graph = site.graph
    reading: dict[tuple[str, int], Keep] = {}
    known = np.zeros(graph.channel_count, dtype=bool)
    for group in graph.prunable:
        for entry in (site.readers(group) or ()) if group.exact else ():
            reading.setdefault(entry, np.zeros(graph.channel_count, dtype=bool))[group.channels] = True
            known[group.channels] = True
    parameters = [graph.by_name[name] for name in dict.fromkeys(name for name, _ in reading)]
    tensors = site.tensors()
    nonzero = {p.name: tensors[p.name].detach() != 0 for p in parameters}
    unread = np.zeros(graph.channel_count, dtype=bool)
    while True:
        reads = np.zeros(graph.channel_count)
        for parameter in parameters:
            left = nonzero[parameter.name]
            left &= kept_entries(parameter, ~unread).to(left.device)
            for place in places_of(parameter):
                if (entry := (parameter.name, place.dim)) in reading:
                    reads[place.channels] += place.sums(left) * reading[entry][place.channels]
        found = known & (reads == 0)
        if (found == unread).all():
            return unread
        unread = found


class _Structured(_Run):
    def __init__(self, options: GSM, site: Site):
        super().__init__(options, site)
        named = dict(site.parameters)
        owned = [p for p in site.graph.parameters if p.trainable and p.labels and p.name in named]
        self._owned = [(named[p.name], p, places_of(p)) for p in owned]
        self._ids: dict[str, list[Tensor]] = {}
        self._active: Keep | None = None
        self._frozen = False

    def hold(self) -> None:
        """From now on the channels with the largest norms are active, as many as the budget keeps."""
        self._active, self._frozen = self._site.select(self._norms()), True

    def state_dict(self) -> dict[str, Any]:
        active = None if self._active is None or not self._frozen else torch.from_numpy(self._active)
        return super().state_dict() | {"active": active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if state["active"] is not None:
            self._active, self._frozen = state["active"].cpu().numpy(), True

    def optimizer(self) -> torch.optim.Optimizer:
        return _OfChannels(self, self._options)

    def masked(self, gradients: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The gradients of active channels; zero elsewhere."""
        owned = [entry for entry in self._owned if entry[0] in gradients]
        if self._active is None or not self._frozen:
            self._active = self._largest(gradients)
        active = self._active
        moved = {device: torch.from_numpy(~active).to(device) for device in {tensor.device for tensor, _, _ in owned}}
        passive: dict[Tensor, Tensor] = {
            tensor: reduce(torch.logical_or, (moved[tensor.device][ids] for ids in self._ids_of(tensor, parameter)))
            for tensor, parameter, _ in owned
        }
        return {t: g.masked_fill(passive[t], 0) if t in passive else g for t, g in gradients.items()}

    def _largest(self, gradients: Mapping[Tensor, Tensor]) -> Keep:
        """Which channels a plan within the budget keeps, by ``|sum gradient * weight|``."""
        graph, total = self._site.graph, np.zeros(self._site.graph.channel_count)
        owned = [entry for entry in self._owned if entry[0] in gradients]
        products = [(first_order(tensor.detach(), gradients[tensor]), places) for tensor, _, places in owned]
        places = [place for _, _, found in owned for place in found]
        for place, sums in zip(places, sums_in_places(products), strict=True):
            total[place.channels] += sums
        total = np.abs(total)
        return self._site.select([None if g.locked else total[g.channels] for g in graph.groups])

    def _ids_of(self, tensor: Tensor, parameter: Parameter) -> list[Tensor]:
        """The channels along the dims of a parameter, on its device."""
        if (found := self._ids.get(parameter.name)) is None or found[0].device != tensor.device:
            found = self._ids[parameter.name] = [factor.tensor().to(tensor.device) for factor in parameter.labels]
        return found

    def alive(self) -> Keep | None:
        return self._active

    def _norms(self) -> list[Scores | None]:
        state = ModelState(self._site.graph, self._site.tensors())
        groups = self._site.graph.groups
        return [None if g.locked else np.asarray(np.sqrt(state.power_sums(g, 2))) for g in groups]

    def outcome(self) -> Outcome:
        return Outcome(self._norms(), notes=self.held())


class _OfChannels(optim.GSM):
    """The rule of GSM for whole channels."""

    def __init__(self, run: _Structured, o: GSM):
        self._run = run
        super().__init__(run.trained(), o.lr, o.momentum, o.weight_decay, 1.0, o.nesterov, vector_decay=o.weight_decay)

    def __getstate__(self) -> dict[str, Any]:
        """torch's knows only what every optimizer has; a copy, made beside the learner's, ranks with that one's."""
        return {**super().__getstate__(), "_run": self._run}

    def gradients(self) -> dict[Tensor, Tensor]:
        return self._run.masked(super().gradients())

    def freeze(self) -> None:
        self._run.hold()
