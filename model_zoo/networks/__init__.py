"""Which networks there are, and what they are given.

A network is named as in ``fxprune.io.specs.load_model``; ``NAME@PART`` is a submodule of one, pruned where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fxprune.errors import ExampleInputsError
from fxprune.io.specs import load_model
from fxprune.recording.inputs import image_like, infer_inputs

NETWORKS = (
    *(
        f"timm:{name}"
        for name in """
        resnet50 resnext50_32x4d ecaresnet50t resnetv2_50 densenet121 efficientnet_b0 mobilenetv3_large_100 regnety_008
        hrnet_w18_small ghostnet_100 dla34 inception_v4 vgg16_bn convnext_tiny vit_small_patch16_224
        deit_tiny_distilled_patch16_224 swin_tiny_patch4_window7_224 mobilevit_s mixer_s16_224 coat_tiny
        """.split()
    ),
    *(f"torchvision:{name}" for name in "shufflenet_v2_x1_0 googlenet vit_b_16 deeplabv3_resnet50".split()),
)
DETECTION_SIZE = 320  # pixels
LARGE, SMALLER = 448, 224  # images above the one are taken at the other, by networks that take it
FAMILIES = Path(__file__).parent / "families.txt"


def families() -> list[str]:
    """The smallest architecture of each of timm's model modules, as listed in ``families.txt``."""
    return read_list(FAMILIES)


def everything() -> list[str]:
    """Every architecture of timm."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def torchvision() -> list[str]:
    """Everything in torchvision. Detectors choose boxes by their values: of these the backbone is pruned."""
    from torchvision import models

    detectors = {*models.list_models(module=models.detection)}
    return [
        f"torchvision:{name}@backbone" if name in detectors else f"torchvision:{name}" for name in models.list_models()
    ]


def split_part(spec: str) -> tuple[str, str]:
    """The network and the submodule of ``NETWORK@SUBMODULE``, which is "" for a whole network."""
    network, _, part = spec.partition("@")
    return network, part


def load(spec: str) -> nn.Module:
    """The network, with random weights. Detectors take their images as they are, instead of enlarging them to 800."""
    model = load_model(spec)
    resize = getattr(model, "transform", None)
    if isinstance(resize, GeneralizedRCNNTransform):
        resize.min_size, resize.max_size = (DETECTION_SIZE,), 2 * DETECTION_SIZE
    return model


def example_inputs(model: nn.Module, size: Sequence[int] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a network of timm or torchvision: one of ``size``, or what fxprune infers, or what its task takes."""
    if size is not None:
        return (image_like(model, size),), {}
    try:
        return _smaller(model, *infer_inputs(model))
    except ExampleInputsError:
        _, _, task, *rest = *type(model).__module__.split("."), ""
    match task:
        case "detection":  # a list of images
            return ([image_like(model, (3, DETECTION_SIZE, DETECTION_SIZE))[0]],), {}
        case "optical_flow":  # two images; the correlation pyramid needs 16 positions of stride 8
            return (image_like(model, (3, 128, 128)), image_like(model, (3, 128, 128)).flip(-1)), {}
        case "video":  # clips; these have the sizes that their published accuracies were measured with
            side, frames = (112, 16) if rest[0] == "resnet" else (224, 16)
            return (image_like(model, (3, frames, side, side)),), {}
    return infer_inputs(model)


def _smaller(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, or a smaller image in place of a single large one, where the network takes any size."""
    if kwargs or len(args) != 1 or args[0].ndim != 4 or args[0].shape[-1] <= LARGE or args[0].is_meta:
        return args, kwargs
    image = image_like(model, (args[0].shape[1], SMALLER, SMALLER))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    except Exception:  # made for one size
        return args, kwargs
    finally:
        model.train(training)
    return (image,), kwargs


def read_list(path: Path) -> list[str]:
    """One specification per line; what follows a ``#`` is a remark."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]
