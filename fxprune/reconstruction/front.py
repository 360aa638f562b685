"""``reconstruct``: what users call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from fxprune.errors import ExampleInputsError, InputError, ModelError, check_count, is_real
from fxprune.pipeline import recorded, recorded_of_shares
from fxprune.reconstruction.data import Piece, checksum, on_item, pieces_of
from fxprune.reconstruction.lanes import Lane
from fxprune.reconstruction.noise import noise_for, noise_is_taken, refit_on_noise
from fxprune.reconstruction.refit import Ridge, refit
from fxprune.reconstruction.tune import tune as tuned
from fxprune.recording import Options, evaluated
from fxprune.recording.checks import check_model
from fxprune.recording.inputs import RECORD_KEY, device_of, map_tensors, only_batch
from fxprune.recording.leaf_functions import leaf_functions_of
from fxprune.recording.shards import check_same as check_processes
from fxprune.recording.shards import check_shares, is_sharded, resharded, without_hooks
from fxprune.recording.together import called_as
from fxprune.reports.report import Report, pruned_part
from fxprune.rewriting.into import check_same
from fxprune.rewriting.slicing import CUTS_KEY, Cuts
from fxprune.training.batches import does_not_run
from fxprune.training.distributed import process_count
from fxprune.training.randomness import seeded
from fxprune.verification.probes import prove


def reconstruct(
    small: nn.Module,
    model: nn.Module,
    data: Any = None,
    *,
    ridge: Ridge = "auto",
    samples: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    tune: int | None = None,
) -> Any:
    """A copy of a pruned network, its weights refitted in closed form to what the dense one computes on ``data``.

    No labels, one pass in graph order, and no training but for ``tune``. At every convolution, linear layer or other
    product with a weight the inputs ``X`` are what the network refitted so far gives, and ``Y`` the dense outputs of
    the channels that stay: ``W = argmin |X W - Y|^2 + ridge |W - W_cut|^2``. A fifth of the data is held out: there the
    ridge of every layer is chosen, and a layer that did not get better keeps the weights that it has.

    Args:
        small: from ``fxprune.prune``, ``apply`` or ``load``, fine-tuned or not; it is not changed.
        model: the network that ``small`` was made from, unpruned. Where ``fully_shard`` has spread it and ``small``
            over processes, one layer is gathered at a time, and the call is the same in all of them.
        data: a tensor ``[N, ...]`` of N samples; a list of inputs; or a loader of inputs or of ``(inputs, target)``.
            Targets are not read. Inputs of several tensors are a tuple, or a dict of keyword inputs. None: there are
            no data. Then the inputs are noise, and batch norms stand in for what it is not: with their statistics
            measured on the noise, what the layers after them read has the mean and the variance of real data. That
            gives back a part of what real data do, and no held-out data say how much: measure before you rely on it. A
            network without batch norms needs data.
        ridge: relative to the mean eigenvalue of the layer's Gram matrix ``X^T X``; ``"auto"``: chosen per layer.
        samples: use so many samples at most; all of them if None, of noise 256.
        memory: keep so many bytes of activations at most, and compute again what is not kept; half of what is free if
            None.
        seed: of the noise, of the positions that are drawn where there are more than a weight needs, and of the order
            in ``tune``.
        tune: afterwards train the scales and shifts of norms and the biases, and nothing else, for so many steps on
            what is not held out, to bring the outputs closer to the dense ones: Adam, with a rate that falls from 0.003
            to 0 along a cosine. What was best on the held-out data stays, so that the outputs never get worse there.

    Returns:
        What ``small`` is. ``meta["fxprune"].reconstruction`` says what was done, layer by layer.

    Raises:
        InputError: an argument that cannot be used, data that the network does not take, NaN in it, or too little.
        PlanError: ``small`` was made from another model.
        ModelError: weights on the meta device.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> fitted = fxprune.reconstruct(small, model, torch.randn(64, *x.shape[1:]))
        >>> told = fitted.meta["fxprune"].reconstruction
        >>> told.output_after < told.output_before
        True
    """
    return refitted(small, model, data, ridge=ridge, samples=samples, memory=memory, seed=seed, tune=tune)


@torch.inference_mode(False)
def refitted(
    small: nn.Module,
    model: nn.Module,
    data: Any = None,
    recording: fx.GraphModule | None = None,
    *,
    ridge: Ridge = "auto",
    samples: int | None = None,
    memory: int | None = None,
    seed: int = 0,
    tune: int | None = None,
) -> Any:
    """``reconstruct``. ``recording``: the dense graph that ``small`` was made from, if the caller has it still."""
    check_model(model, shares=True)
    name, part = pruned_part(small)
    shared = is_sharded(model)
    if shared:
        _check_shares(model, small, name, data, tune)
        part = without_hooks(part)
    cuts = part.meta.get(CUTS_KEY)
    if not isinstance(cuts, Cuts):
        raise InputError(
            "small was loaded as a program, whose cuts are not known: pass one that load(..., model) made."
        )
    if not (ridge == "auto" or (is_real(ridge) and 0 <= float(ridge) < float("inf"))):
        raise InputError(f"ridge={ridge!r} must be 'auto' or a number of at least 0.")
    samples = None if samples is None else check_count("samples", samples, least=2)
    memory = None if memory is None else check_count("memory", memory, least=0)
    seed = check_count("seed", seed, least=0)
    steps = 0 if tune is None else check_count("tune", tune, least=0)
    try:
        original = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"The model has no part {name!r}, which is what was pruned in small.") from error
    check_same(original, part)
    original = called_as(part, original)
    if any(t.is_meta for t in (*model.parameters(), *small.parameters())):
        raise ModelError("The weights are on the meta device, where nothing can be fitted. Load them first.")
    device = device_of(part)
    if any(t.device != device for t in model.parameters()):
        raise InputError(f"small is on {device} and the model is not: move one of them to the other's device.")
    if data is None:
        if steps:
            raise InputError("tune= trains on data, of which there are none: pass data=, or leave tune= out.")
        pieces = noise_for(part, samples, seed, device)
    else:
        record = None if name else part.meta[RECORD_KEY]
        batch = None if record is None else only_batch(part, record)
        pieces = pieces_of(data, record, samples, device, batch)
        pieces = inside(model, original, pieces) if name else pieces
    if shared or (recording is not None and process_count() > 1):  # who prunes here waits for the others anyway
        settings = {"ridge": ridge, "samples": samples, "memory": memory, "seed": seed}
        check_processes({"data=": checksum(pieces), **{f"{key}=": value for key, value in settings.items()}})
    fit = partial(refit, ridge=ridge, memory=memory, seed=seed)
    if data is None:
        fit = partial(refit_on_noise, fit)
    with noise_is_taken() if data is None else nullcontext():
        dense = _recording(original, part, pieces[0]) if recording is None else recording
        with seeded(seed):  # of what forward draws
            fitted, told = fit(dense, part, pieces, cuts)
    if steps and told.output_after is None:
        told = replace(told, notes=(*told.notes, "not tuned: no output can be compared"))
    elif steps:
        with seeded(seed):
            tuning = tuned(dense, fitted, pieces, steps, memory=memory, seed=seed)
        told = replace(told, output_after=tuning.after, tuning=tuning)
    report: Report = part.meta["fxprune"]
    fitted.meta["fxprune"] = replace(report, reconstruction=told)
    if not name:
        return resharded(fitted, small)
    result = copy.deepcopy(small)
    result.set_submodule(name, fitted)
    return result


def _check_shares(model: nn.Module, small: nn.Module, name: str, data: Any, tune: int | None) -> None:
    """Whether that can be done of which every process holds a share. ``name``: of the pruned part in ``small``.

    Raises:
        InputError, ModelError: it cannot.
    """
    if not is_sharded(small):
        raise InputError("Of the model every process holds a share, and of small not: shard both, or neither.")
    asked = {"data=None": data is None, "tune=": bool(tune), "a network that was pruned in a part": bool(name)}
    for what, given in asked.items():
        if given:
            raise InputError(f"{what} needs the whole model in one process, of which every process holds a share.")
    check_shares(model)
    check_shares(small)


def _recording(model: nn.Module, pruned: fx.GraphModule, piece: Piece) -> fx.GraphModule:
    """The dense graph that the pruned one was made from: the plain recording, or the one that proving leads to.

    ``piece``: of the data, which the model may tell from other inputs.
    """
    args, kwargs = piece.copied()
    try:
        if is_sharded(model):
            return recorded_of_shares(model, args, kwargs)
        options = Options(leaf_functions=frozenset(leaf_functions_of(pruned.graph)))
        module, runs = recorded(model, args, kwargs, options)
    except ExampleInputsError as error:
        raise InputError(does_not_run(error, piece.item)) from error
    if not set(Lane(pruned).named) <= set(Lane(module).named):
        module, _ = prove(
            model, module, args, kwargs, lambda o: recorded(model, args, kwargs, o)[0], runs, options=options
        )
    return module


def inside(model: nn.Module, part: nn.Module, pieces: Sequence[Piece]) -> list[Piece]:
    """What a part of the model is given when the model runs on these.

    Raises:
        InputError: the model does not run on them, or calls the part on none.
    """
    found: list[Piece] = []
    current: list[Piece] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = map_tensors(lambda tensor: tensor.detach().clone(), (args, kwargs))
        found.append(replace(current[0], args=given[0], kwargs=given[1]))

    hook = part.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluated(model):
            for piece in pieces:
                current[:] = [piece]
                with on_item(piece.item):
                    model(*piece.args, **piece.kwargs)
    finally:
        hook.remove()
    return found
