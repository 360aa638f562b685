"""Global Sparse Momentum (Ding et al., NeurIPS 2019): an optimizer that lets most weights decay to zero.

In every step the ``Q`` weights with the largest ``|gradient * weight|`` of the whole model are active; the others are
passive and get no gradient, only momentum and weight decay (eq. 8 there)::

    Z <- momentum * Z + weight_decay * W + B * gradient        W <- W - lr * Z

``B`` is 1 for active weights. Which ones are is found anew in every step, so a passive weight may come back. With a
constant rate a passive weight shrinks by about ``lr * weight_decay / (1 - momentum)`` of itself per step: a training
must be long enough, and the momentum high enough (the paper takes 0.98 and 0.99), for that to leave nothing. Weights of
16 bits round such steps away and do not shrink: train in float32, with autocast. At the end the passive weights are so
small that ``magnitude_cut`` changes nothing.

*Kernels* are the parameters of two or more dims: only they are ranked and masked, and decay. Biases and norms always
get their whole gradient, as in the paper. ``Q`` is ``int(kernel weights / compression)`` throughout: in a step and in
the cut.

With a ``pattern`` such as ``"2:4"``, which the paper has not, the ``Q`` are the largest among those that the pattern
allows: of every 4 consecutive weights along what a layer reads, the 2 with the largest ``|gradient * weight|``.

Examples:
    >>> optimizer = fxprune.optim.GSM(model.parameters(), lr=0.01, momentum=0.98, weight_decay=1e-3, compression=10)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd
from torch.utils.hooks import RemovableHandle

from fxprune.errors import InputError, check_count, check_number, is_real
from fxprune.methods.patterns import Pattern

MANY = 2**16  # scores; fewer are sorted as they are
SUPPORT = 1e-4  # above it a weight counts
CACHED = 2**20  # entries of all tensors that a series of ops works on at a time

Kernels = Mapping[Tensor, Pattern | None]


def is_kernel(parameter: Tensor) -> bool:
    """Whether a parameter is ranked: it has two or more dims."""
    return parameter.ndim > 1


def active_count(weights: int, compression: float) -> int:
    """``Q = int(weights / compression)``: how many of ``weights`` are active in a step, and stay after the cut.

    Raises:
        InputError: the compression is below 1, or leaves nothing.
    """
    if not is_real(compression) or not compression >= 1:
        raise InputError(f"compression={compression} must be at least 1: 10 keeps a tenth of the weights.")
    count = int(weights / compression)
    if weights and not count:
        raise InputError(f"compression={compression} leaves none of {weights} weights. Pass at most {weights}.")
    return count


class GSM(Optimizer):
    """SGD with momentum in which only the globally most important weights get their gradient.

    With ``compression=1`` bit-equal to ``torch.optim.SGD``. Everything happens in ``step()``, on what is in ``.grad``:
    accumulate, unscale (``GradScaler.step`` does) and clip gradients before. With several processes every one must
    have the same gradients, as ``DistributedDataParallel`` leaves them; then all of them rank alike. ``.grad`` is left
    as it is.

    Ranking keeps memory for one more copy of the kernels.

    Args:
        params: parameters or parameter groups. A group may have a compression of its own; kernels of equal compression
            are ranked together, and with ``"compression": 1`` all of them are active.
        lr: learning rate.
        momentum: the paper takes 0.98 for ResNet-56, 0.99 for LeNets.
        weight_decay: of kernels.
        compression: ``C``; of ``N`` kernel weights exactly ``int(N / C)`` are active. Among equal products the first
            ones are (in the order of the parameters), those of exact zeros too.
        nesterov: Nesterov's momentum, as in the paper's lottery tickets.
        vector_decay: weight decay of the other parameters: none in the paper.
        foreach: as in ``torch.optim.SGD``.
        pattern: of kernels whose dim ``input_dim`` is a multiple of 4, at most 2 of every 4 weights along it are
            active (``"2:4"``), and in all at most ``int(N / C)``: alone with ``compression=1``. Not in the paper. A
            group may have one of its own.
        input_dim: along which layers read: 1 of linear ones and convolutions, 0 of transposed ones.

    Raises:
        InputError: a value out of range; a pattern that fits no kernel; a complex kernel.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        momentum: float = 0.98,
        weight_decay: float = 1e-4,
        compression: float = 10.0,
        nesterov: bool = False,
        vector_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        pattern: str | None = None,
        input_dim: int = 1,
    ):
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "compression": compression,
            "nesterov": nesterov, "vector_decay": vector_decay, "foreach": foreach, "pattern": pattern,
            "input_dim": input_dim,
        }  # fmt: skip
        self._scratch: dict[float, Tensor] = {}
        super().__init__(params, defaults)
        if pattern is not None:
            _check_fits(pattern, input_dim, [p for group in self.param_groups for p in group["params"]])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups that SGD has saved lack what is only here."""
        super().__setstate__(state)
        self._scratch = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's.

        Raises:
            InputError: a value out of range; a pattern of its own that fits no kernel in it; a complex kernel.
        """
        own = param_group.get("pattern")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "momentum", "weight_decay", "vector_decay"):
            value = group[name]
            check_number(name, float(value) if isinstance(value, Tensor) else value)
        if group["nesterov"] and not group["momentum"] > 0:
            raise InputError("nesterov=True needs a momentum.")
        check_count("input_dim", group["input_dim"], least=0)
        if own is not None:
            _check_fits(own, group["input_dim"], group["params"])
        if group["compression"] != 1 or group["pattern"] is not None:
            _check_real(group["params"])
        active_count(_count(self._kernels(group["compression"])), group["compression"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss.

        Raises:
            InputError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self.gradients()
        for group in self.param_groups:
            params = [p for p in group["params"] if p in gradients]
            self._update(group, [p for p in params if is_kernel(p)], gradients, group["weight_decay"])
            self._update(group, [p for p in params if not is_kernel(p)], gradients, group["vector_decay"])
        return loss

    @torch.no_grad()
    def gradients(self) -> dict[Tensor, Tensor]:
        """What every parameter with a gradient moves by, ``B * gradient``: zero at passive weights.

        Those of kernels are valid until the next step.

        Raises:
            InputError: a gradient is sparse.
        """
        found = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        if any(gradient.is_sparse for gradient in found.values()):
            raise InputError("GSM ranks dense gradients, and one is sparse. Use nn.Embedding(..., sparse=False).")
        for compression in self._compressions():
            kernels = self._kernels(compression)
            count = active_count(_count(kernels), compression)
            ranked = {p: pattern for p, pattern in kernels.items() if p in found}
            gradients = [found[p] for p in ranked]
            if self._held(kernels):
                found.update(zip(ranked, self._kept_active(gradients, ranked), strict=True))
            elif _count(ranked) > min(count, _room(ranked)):
                found.update(zip(ranked, self._masked(gradients, ranked, count, compression), strict=True))
        return found

    @torch.no_grad()
    def freeze(self) -> None:
        """Hold the active set: from now on the ``Q`` weights that are largest now are active in every step.

        With a pattern they are the largest that it allows.

        Beside the paper's rule, where weights take turns in the set, and each that has been in it a while ago is
        still there when the magnitude cut comes. Held out, a weight shrinks as every passive one does, and does not
        come back: the cut costs nothing if the rates that are still to come sum up to well over
        ``7 * (1 - momentum) / weight_decay`` (from 0.1 to 1e-4). Call it again to choose anew; it is kept in
        ``state_dict()``.

        Raises:
            InputError: a kernel holds NaN.
        """
        for compression in self._compressions():
            kernels = self._kernels(compression)
            count = active_count(_count(kernels), compression)
            for parameter, mask in zip(kernels, _largest(kernels, count), strict=True):
                self.state[parameter]["active"] = mask

    def _compressions(self) -> list[float]:
        """Of the groups of which some weights are passive."""
        groups = [g for g in self.param_groups if g["compression"] != 1 or g["pattern"] is not None]
        return [*dict.fromkeys(group["compression"] for group in groups)]

    def _held(self, kernels: Kernels) -> bool:
        """Whether ``freeze`` has said which weights are active.

        Raises:
            InputError: of some kernels it has not.
        """
        held = ["active" in self.state[p] for p in kernels]
        if any(held) and not all(held):
            raise InputError("Parameters were added after freeze(). Call freeze() again, to choose among all.")
        return any(held)

    def _kept_active(self, gradients: list[Tensor], weights: Iterable[Tensor]) -> list[Tensor]:
        masks = [self.state[p]["active"] for p in weights]
        return [gradient * mask.to(gradient.dtype) for gradient, mask in zip(gradients, masks, strict=True)]

    def _masked(self, gradients: list[Tensor], kernels: Kernels, count: int, compression: float) -> list[Tensor]:
        """The gradients, zero but for the ``count`` largest ``|gradient * weight|``; they lie where the scores were."""
        weights = [*kernels]
        scores = self._memory(weights, compression)
        parts = _parts(scores, weights)
        for some in _together(weights):
            torch._foreach_copy_(parts[some], gradients[some])
            torch._foreach_mul_(parts[some], [w.to(scores.device) for w in weights[some]])
            torch._foreach_abs_(parts[some])
        _mark_active(scores, kernels, count)
        torch._foreach_mul_(parts, [g.to(scores.device) for g in gradients])
        return [part.to(gradient) for part, gradient in zip(parts, gradients, strict=True)]

    def _memory(self, weights: Sequence[Tensor], compression: float) -> Tensor:
        """For one number per weight. Kept: to ask for so much anew in every step takes longer than the step."""
        size, dtype, device = sum(w.numel() for w in weights), _wide(weights), weights[0].device
        memory = self._scratch.get(compression)
        if memory is None or (memory.dtype, memory.device) != (dtype, device) or len(memory) < size:
            memory = self._scratch[compression] = torch.empty(size, dtype=dtype, device=device)
        return memory[:size]

    def _kernels(self, compression: float) -> dict[Tensor, Pattern | None]:
        """Those of this compression, and the pattern of each."""
        found: dict[Tensor, Pattern | None] = {}
        for group in self.param_groups:
            if group["compression"] == compression:
                kernels = [p for p in group["params"] if is_kernel(p)]
                found |= dict(zip(kernels, patterns_of(kernels, group["pattern"], group["input_dim"]), strict=True))
        return found

    def _update(
        self, group: dict[str, Any], params: list[Tensor], gradients: dict[Tensor, Tensor], weight_decay: float
    ) -> None:
        """A step of SGD. Masked gradients are nobody's: the decay is added in place, which saves a copy of them."""
        momentum = group["momentum"]
        for some in map(params.__getitem__, _together(params)):
            moves = [gradients[p] for p in some]
            if own := weight_decay != 0 and all(move is not p.grad for p, move in zip(some, moves, strict=True)):
                torch._foreach_add_(moves, some, alpha=weight_decay)
            buffers = [self.state[p].get("momentum_buffer") for p in some] if momentum else [None] * len(some)
            sgd(
                some, moves, buffers, weight_decay=0 if own else weight_decay, momentum=momentum, lr=group["lr"],
                dampening=0, nesterov=group["nesterov"], maximize=False, foreach=group["foreach"],
            )  # fmt: skip
            if momentum:
                for parameter, buffer in zip(some, buffers, strict=True):
                    self.state[parameter]["momentum_buffer"] = buffer


def magnitude_cut(
    params: Iterable[Tensor], compression: float, pattern: str | Sequence[Pattern | None] | None = None
) -> list[Tensor]:
    """Zero all kernel weights but the ``int(N / compression)`` largest of all ``N`` together, in place.

    Where the paper's code keeps ``N - int(N - N / compression)`` weights and all that are equal to the smallest, this
    keeps as many as are active in a step, exactly; of equal ones the first.

    Args:
        params: of the whole model.
        compression: ``C``.
        pattern: of kernels whose dim 1 is a multiple of 4, at most 2 of every 4 weights along it stay (``"2:4"``), the
            largest: just as many with ``compression=1``, if they are not zero yet. Or one for each of ``params``.

    Returns:
        Which entries stay: a boolean mask for every parameter, of its shape; all True for biases and norms.

    Raises:
        InputError: the compression is below 1, or leaves nothing; the pattern fits no kernel; a kernel is complex, or
            holds NaN.
    """
    params = [p.detach() for p in params]
    _check_real(params)
    if isinstance(pattern, str):
        _check_fits(pattern, 1, params)
    patterns = patterns_of(params, pattern) if pattern is None or isinstance(pattern, str) else pattern
    kernels = {p: own for p, own in zip(params, patterns, strict=True) if is_kernel(p)}
    count = active_count(_count(kernels), compression)
    masks = {p: torch.ones_like(p, dtype=torch.bool) for p in params}
    if min(count, _room(kernels)) < _count(kernels):
        for p, mask in zip(kernels, _largest(kernels, count), strict=True):
            masks[p] = mask
            p.masked_fill_(~mask, 0)
    return [masks[p] for p in params]


def patterns_of(params: Iterable[Tensor], text: str | None, dim: int = 1) -> list[Pattern | None]:
    """The pattern of every parameter: this one where it is a kernel that the pattern fits.

    Raises:
        InputError: the text is no pattern.
    """
    pattern = None if text is None else Pattern.parse(text, dim)
    return [pattern if pattern is not None and is_kernel(p) and pattern.fits(p) else None for p in params]


def _check_real(params: Iterable[Tensor]) -> None:
    shape = next((list(p.shape) for p in params if is_kernel(p) and p.is_complex()), None)
    if shape is not None:
        raise InputError(
            f"Single weights are ranked as real numbers, and a kernel of shape {shape} is complex: leave it out, or "
            "rank channels (methods.GSM(structured=True))."
        )


def _check_fits(pattern: str, dim: int, params: Iterable[Tensor]) -> None:
    if not any(patterns_of(params, pattern, dim)):
        of = Pattern.parse(pattern).of
        raise InputError(f"pattern={pattern!r} fits no kernel: of none dim {dim} is there and a multiple of {of}.")


def _count(kernels: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in kernels)


def _room(kernels: Kernels) -> int:
    """How many weights the patterns let be active."""
    return sum(p.numel() if pattern is None else pattern.room(p) for p, pattern in kernels.items())


def _largest(kernels: Kernels, count: int) -> list[Tensor]:
    """Boolean masks of the ``count`` largest weights of all kernels together, or of as many as their patterns allow.

    Raises:
        InputError: a weight is NaN, than which none is larger nor smaller.
    """
    tensors = [p.detach() for p in kernels]
    if (shape := next((list(p.shape) for p in tensors if bool(p.isnan().any())), None)) is not None:
        raise InputError(f"A kernel of shape {shape} holds NaN, which cannot be ranked: did the training diverge?")
    scores = torch.cat([p.flatten().to(tensors[0].device, _wide(tensors)) for p in tensors])
    parts = _parts(_mark_active(scores.abs_(), kernels, count), tensors)
    return [part.to(p.device, torch.bool) for p, part in zip(tensors, parts, strict=True)]


def support(params: Iterable[Tensor]) -> int:
    """How many kernel weights are above 1e-4 in size: those that training has not driven to zero.

    Where these are more than ``magnitude_cut`` leaves, the cut is not free.
    """
    return sum(int((p.detach().abs() > SUPPORT).count_nonzero()) for p in params if is_kernel(p))


def hold_zero(params: Iterable[Tensor], masks: Iterable[Tensor]) -> list[RemovableHandle]:
    """Zero what the masks leave out, and keep it zero in any training that starts now, whatever the optimizer.

    Gradients of the others are zero from now on, and so are momentum and weight decay of a zero. With the masks of
    ``magnitude_cut`` on a network's first weights this is the retraining of a lottery ticket; on its trained weights,
    fine-tuning what was cut. Copies of the model do not have this.

    Args:
        params: of the model.
        masks: for every one of them, of its shape: True where it is trained.

    Returns:
        Handles; ``remove()`` of each lets its parameter go.

    Raises:
        InputError: there are not as many masks as parameters, or one is not boolean or of another shape.
    """
    params, masks, handles = [*params], [*masks], []
    if len(params) != len(masks):
        raise InputError(f"There are {len(masks)} masks for {len(params)} parameters: give one for each.")
    for place, (parameter, mask) in enumerate(zip(params, masks, strict=True)):
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise InputError(
                f"Mask {place} is {list(mask.shape)} of {mask.dtype}; its parameter is {list(parameter.shape)}, and "
                "masks are boolean."
            )
    for parameter, mask in zip(params, masks, strict=True):
        if not bool(mask.all()):
            parameter.detach().masked_fill_(~mask, 0)
            out = ~mask
            handles.append(parameter.register_hook(lambda gradient, out=out: gradient.masked_fill(out, 0)))
    return handles


def _mark_active(scores: Tensor, kernels: Kernels, count: int) -> Tensor:
    """``scores [n]`` of the weights of kernels, overwritten with 1 at the ``count`` largest that the patterns allow."""
    for part, pattern in zip(_parts(scores, [*kernels]), kernels.values(), strict=True):
        if pattern is not None:
            pattern.confine(part)
    return scores.ge_(0) if count >= _room(kernels) else _mark_largest(scores, count)


def _mark_largest(scores: Tensor, count: int) -> Tensor:
    """``scores [n]``, ``count < n``, overwritten with 1 at the ``count`` largest, exactly, and 0 elsewhere.

    Of equal ones the first are taken. Compared with the largest that is left out, so that in the usual case, without
    equal ones there, nothing has to be counted.
    """
    threshold, missing = largest_left_out(scores, count)
    ties = (scores == threshold).nonzero().squeeze(1)[:missing] if missing else None
    scores.gt_(threshold)
    if ties is not None:
        scores[ties] = 1
    return scores


def largest_left_out(scores: Tensor, count: int) -> tuple[Tensor, int]:
    """The largest of ``scores [n]`` that is not among the ``count < n`` largest, and how many of these equal it.

    ``torch.topk`` of millions takes many times as long as a step. A sample says between which bounds the value lies
    (Floyd and Rivest 1975); it is then found, exactly, among the few scores between them; or among all, if the sample
    was unlike them.
    """
    above, candidates = 0, scores
    if len(scores) > MANY:
        low, high = _bounds(scores, count)
        over, between = _between(scores, low, high)
        if over <= count < over + len(between):
            above, candidates = over, between
    largest = torch.topk(candidates, count + 1 - above, sorted=False).values
    threshold = largest.min()
    return threshold, int((largest == threshold).count_nonzero()) - 1


def _bounds(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Between which the ``count``-th largest is: five standard deviations to both sides of where a sample has it."""
    sample = _sorted(scores[:: stride(len(scores))])
    share = 1 - count / len(scores)
    place, error = share * len(sample), 5 * (share * (1 - share) * len(sample)) ** 0.5 + 1
    last = len(sample) - 1
    return sample[max(0, int(place - error))], sample[min(last, int(place + error))]


def _between(scores: Tensor, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """How many scores are above ``high``, and those from ``low`` to it; on a CPU by numpy, which is faster there."""
    if not scores.is_cpu:
        larger = scores > high
        return int(larger.count_nonzero()), scores[larger.logical_xor_(scores >= low)]
    values = scores.numpy()
    above = values > high.numpy()
    return int(np.count_nonzero(above)), torch.from_numpy(values[np.flatnonzero(above ^ (values >= low.numpy()))])


def _sorted(values: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(values.numpy())) if values.is_cpu else values.sort().values


def stride(size: int) -> int:
    """Of a sample of about ``size ** (2 / 3)``, as large as what is left to sort; no multiple of usual kernel sizes."""
    result = int(size ** (1 / 3))
    while math.gcd(result, 2 * 3 * 5 * 7) > 1:
        result -= 1
    return result


def _together(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Tensors that are small enough together for a processor's cache: there an op finds what the last one wrote."""
    start = size = 0
    for number, tensor in enumerate(tensors):
        if size and size + tensor.numel() > CACHED:
            yield slice(start, number)
            start, size = number, 0
        size += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to rank them in: float32 at least, since products of small halves would be zero."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` with these shapes."""
    sizes = [t.numel() for t in like]
    return [part.view(t.shape) for part, t in zip(flat.split(sizes), like, strict=True)]
