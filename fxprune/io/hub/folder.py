"""A pruned network as a folder: written whole or not at all, and read."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune.errors import ArtifactError, InputError, check_flags, check_installed
from fxprune.io.artifact import load, save
from fxprune.io.artifact.saving import told
from fxprune.io.files import filling
from fxprune.io.forms import Either, FormError, Map, Real, Whole, check, json_of
from fxprune.io.hub.card import Figures, Loader, card, check_accuracy
from fxprune.io.hub.remote import check_repository, download, upload
from fxprune.io.text import some
from fxprune.recording.checks import check_module
from fxprune.reports.report import ORIGIN_KEY, REPORT_KEY, Latency, Report
from fxprune.rewriting.pretrained import auto_classes_of, loads_itself
from fxprune.selection.plan import PruningPlan
from fxprune.version import __version__

_WEIGHTS, _PLAN, _CARD, _CONFIG = "model.safetensors", "plan.json", "README.md", "config.json"
_NUMBER = Either(Whole(-(2**63)), Real())
_SIZES = {
    "attributes": Map(Map(Either(_NUMBER, [_NUMBER]))),
    "shapes": Map([Whole()]),
    "stored": [str],
}


def save_pretrained(
    pruned: nn.Module,
    folder: str | os.PathLike[str],
    *,
    accuracy: Mapping[str, Any] | None = None,
    latency: Latency | None = None,
    validation: Any = None,
    command: str = "",
    push_to_hub: str | None = None,
    private: bool = False,
    **options: Any,
) -> None:
    """Write a pruned network as a folder: weights, plan and a model card; on an error nothing of it appears.

    The weights are a file of ``fxprune.save``. Of a class of transformers (from ``fxprune.into``) they are what its own
    ``save_pretrained`` writes, shards included, so that transformers loads them. A folder that is there keeps what
    else it holds.

    Args:
        pruned: what ``fxprune.prune``, ``apply``, ``load`` or ``into`` returned, fine-tuned or not.
        folder: made if it is not there.
        accuracy: for the card, by name: of the pruned network, ``{"ImageNet top-1": 80.6}``, or of the dense and the
            pruned one, ``{"ImageNet top-1": (81.2, 80.6)}``.
        latency: for the card, from ``fxprune.bench``; the report's, where it was the budget, if not given.
        validation: for the card, from ``fxprune.export`` or ``validate``.
        command: for the card, how the network was made; the call of ``prune`` if not given.
        push_to_hub: a repository, ``"user/name"``, to send what was written to as well.
        private: whether a new repository is.
        options: for the class's own ``save_pretrained``: ``max_shard_size`` ...

    Raises:
        InputError: an argument cannot be used, or what is needed is not installed.
        WriteError: writing failed on the way, on a full disk for instance, or the hub refused.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> fxprune.save_pretrained(small, "half", accuracy={"top-1": (81.2, 80.6)})
        >>> loaded = fxprune.load_pretrained("half", model)  # as a rule a fresh instance, in another process
        >>> bool(torch.equal(loaded.eval()(x), small.eval()(x)))
        True
    """
    figures = _figures(accuracy, latency, validation, command)
    check_flags(private=private)
    if push_to_hub is not None:
        check_repository(push_to_hub)
    check_module("pruned", pruned, "what fxprune.prune, apply, load or into returned")
    own: Any = pruned if loads_itself(pruned) else None
    if own is not None and ORIGIN_KEY not in vars(own):
        raise InputError(
            f"This {type(own).__name__} tells nothing of its pruning, as one that was loaded: its own save_pretrained "
            "writes it, sizes and all; copy plan.json and README.md beside it."
        )
    meta = told(pruned)[2]
    if own is None and options:
        raise InputError(f"{some(sorted(options))}: for a class of transformers only, for its save_pretrained.")
    report: Report = meta[REPORT_KEY]
    packages = {"fxprune": __version__, "torch": torch.__version__, "python": platform.python_version()}
    loader: Loader | None = None
    with filling(folder, replaces="model*.safetensors*") as draft:
        if own is None:
            save(pruned, draft / _WEIGHTS)
        else:
            _save_own(own, draft, options)
            loader = Loader(auto_classes_of(own), (draft / "modeling_pruned.py").is_file())
            packages["transformers"] = version("transformers")
        report.plan.save(draft / _PLAN)
        name = push_to_hub or Path(os.path.realpath(folder)).name
        (draft / _CARD).write_text(card(report, figures, packages, name, loader), encoding="utf-8")
        written = [file.name for file in draft.iterdir()]
    if push_to_hub is not None:
        upload(Path(folder), written, push_to_hub, private)


def _figures(accuracy: Any, latency: Any, validation: Any, command: Any) -> Figures:
    if latency is not None and not isinstance(latency, Latency):
        raise InputError(f"latency is {type(latency).__name__}; pass what fxprune.bench returned.")
    if validation is not None and not hasattr(validation, "max_abs_error"):
        raise InputError(f"validation is {type(validation).__name__}; pass what fxprune.export or validate returned.")
    if not isinstance(command, str):
        raise InputError(f"command={command!r} must be text.")
    return Figures(check_accuracy(accuracy), latency, validation, command)


def _save_own(model: Any, folder: Path, options: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError

    size = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
    if size > shutil.disk_usage(folder).free:  # files are written through memory maps, which a full disk cannot refuse
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        model.save_pretrained(folder, **options)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(str(error)) from error


def load_pretrained(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    revision: str | None = None,
    **options: Any,
) -> nn.Module:
    """Read what ``save_pretrained`` wrote; nothing in the folder is executed.

    Args:
        folder: on this machine; where there is none, a repository on a hub: ``"user/name"``.
        model: a fresh, unpruned instance of the class, with any weights; not changed. None for a class of transformers.
        example_inputs: as for ``fxprune.load``.
        example_kwargs: as for ``fxprune.load``.
        verify: as for ``fxprune.load``.
        revision: of a repository: a branch, tag or commit.
        options: for the ``from_pretrained`` of a class of transformers: ``dtype``, ``device_map`` ...

    Returns:
        What was saved, as ``fxprune.load`` returns it; of a class of transformers an instance in eval mode.

    Raises:
        InputError: there is no such folder, neither here nor on the hub, or an argument cannot be used.
        ArtifactError: it is none that ``save_pretrained`` wrote, or is damaged, or does not fit the model.
        PlanError, ExampleInputsError, ConversionError: see ``fxprune.load``.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> fxprune.save_pretrained(small, "half")
        >>> fxprune.load_pretrained("half", model).meta["fxprune"].macs_after == small.meta["fxprune"].macs_after
        True
    """
    place = _place(folder, revision)
    if (place / _CONFIG).is_file() and (config := _config(place / _CONFIG)) is not None:
        if model is not None or example_inputs is not None or example_kwargs is not None:
            raise InputError(f"{str(folder)!r} holds a network of transformers, which is made of its config: leave out "
                             "the model and its inputs.")  # fmt: skip
        return _load_own(place, config, options)
    if not (place / _WEIGHTS).is_file():
        there = some(sorted(file.name for file in place.iterdir())) or "nothing"
        raise ArtifactError(
            f"{str(folder)!r} is no folder that fxprune.save_pretrained wrote: it has no {_WEIGHTS}. There is {there}."
        )
    if options:
        raise InputError(f"{some(sorted(options))}: for a class of transformers only, for its from_pretrained.")
    plan = PruningPlan.load(place / _PLAN) if (place / _PLAN).is_file() else None
    result = load(place / _WEIGHTS, model, example_inputs, example_kwargs, verify=verify)
    report: Report = told(result)[2][REPORT_KEY]
    if plan not in (None, report.plan):
        raise ArtifactError(f"{str(place / _PLAN)!r} is not the plan of {_WEIGHTS} beside it. Copy the folder again.")
    return result


def _place(folder: str | os.PathLike[str], revision: str | None) -> Path:
    text = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        raise InputError(f"{folder!r} is no folder: pass a path, or the name of a repository, 'user/name'.")
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{text!r} is a file; pass the folder, or the file to fxprune.load.")
    if path.is_absolute() or text.count("/") != 1 or text.startswith((".", "~")):
        raise InputError(f"there is no folder {text!r}")
    return download(text, revision)


def _config(file: Path) -> dict[str, Any] | None:
    """The config of a network of transformers that was pruned; None of anything else.

    Raises:
        ArtifactError: it is damaged.
    """
    try:
        config = json_of(file.read_bytes())
        ours = isinstance(config, dict) and ("fxprune" in config or (file.parent / _PLAN).is_file())
        if not ours or "architectures" not in config:
            return None
        check(config["architectures"], (str,))
        if "fxprune" in config:
            check(config["fxprune"], _SIZES)
    except FormError as error:
        raise ArtifactError(f"{str(file)!r} is damaged: {error}. Save or copy the folder again.") from error
    return dict(config)


def _load_own(place: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    check_installed("zoo", "transformers")
    import transformers

    from fxprune.rewriting.modeling_pruned import class_of

    (name,) = config["architectures"]
    base: Any = getattr(transformers, name, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise ArtifactError(
            f"{str(place)!r} holds a {name}, which transformers {transformers.__version__} does not have: install the "
            "version that its card names."
        )
    own, told = getattr(base, "config_class", None), config.get("model_type")
    if own is None or own.model_type != told:
        raise ArtifactError(
            f"{str(place / _CONFIG)!r} is damaged: it names a {name}, which is no {told}. Save or copy it again."
        )
    kind: Any = class_of(base) if "fxprune" in config else base
    try:
        result, found = kind.from_pretrained(place, output_loading_info=True, **options)
    except (ValueError, RuntimeError, AttributeError, KeyError, OSError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ArtifactError(f"{str(place)!r} does not load as a {name}: {type(error).__name__}: {said}") from error
    amiss = [f"{what.replace('_', ' ')}: {some(sorted(map(str, found[what])))}"
             for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if found.get(what)]  # fmt: skip
    if amiss:
        raise ArtifactError(f"the weights in {str(place)!r} are not those of this {name}; {'; '.join(amiss)}")
    loaded: nn.Module = result
    return loaded.eval()
