"""The networks of whole libraries as ``Subject``s: timm, torchvision, transformers, ultralytics and diffusers."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.recording.inputs import describe_inputs, image_size, make_inputs, resized
from model_zoo import networks
from model_zoo.networks import transformers_inputs, transformers_list
from model_zoo.networks.random_weights import randomise
from model_zoo.networks.subject import Inputs, Make, Subject, normal, whole

BATCH = 2
SIDE, OTHER_SIDES = 64, ((96, 64), (128, 128))
WIDER = ((64, 32), (32, 32), (64, 64))  # added to an image's height and width, in this order of preference
ULTRALYTICS = """
    yolov3-tinyu yolov5n yolov6n yolov8n yolov8n-cls yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-ghost yolov9t yolov10n
    yolo11n yolo11n-cls yolo11n-seg yolo11n-pose yolo11n-obb yolo12n yolo26n yolo26n-seg rtdetr-resnet50
"""
TORCHVISION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_0 swin_t swin_v2_t vgg11_bn vit_b_32 deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50
    lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fcos_resnet50_fpn
    keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn retinanet_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large
    r3d_18 s3d swin3d_t mvit_v1_b raft_small
"""


# -- timm and torchvision ---------------------------------------------------------------------------------------------


def pictures(spec: str) -> Subject:
    """A network of timm or torchvision; it is given one image, or what its task takes."""
    model = networks.load(spec).eval()
    args, kwargs = networks.example_inputs(model)
    if isinstance(args[0], list):
        return _detector(model, args[0][0])
    record = describe_inputs(args, kwargs)
    here = image_size(record)
    if here is None:
        return Subject(model, lambda batch, size, seed: make_inputs(record, batch=batch, seed=seed), 1, None)

    def make(batch: int, size: tuple[int, int], seed: int) -> Inputs:
        return make_inputs(resized(record, size), batch=batch, seed=seed)

    return Subject(model, make, 1, here, [(here[0] + high, here[1] + wide) for high, wide in WIDER])


def _detector(model: nn.Module, image: Tensor) -> Subject:
    """A list of images, one for each sample of the batch."""

    def make(batch: int, size: tuple[int, int], seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return ([torch.rand(3, *size, generator=generator) for _ in range(batch)],), {}

    high, wide = image.shape[-2:]
    return Subject(model, make, 1, (high, wide), [(high, wide + 64)])


# -- ultralytics and diffusers ----------------------------------------------------------------------------------------


def ultralytics(name: str) -> Subject:
    """A network of ultralytics in eval mode, from its configuration file."""
    from ultralytics import RTDETR, YOLO

    network = RTDETR(f"{name}.yaml") if name.startswith("rtdetr") else YOLO(f"{name}.yaml", verbose=False)
    return Subject(network.model.float().eval(), _noisy(3), 1, (SIDE, SIDE), OTHER_SIDES)


def _noisy(channels: int, **others: Any) -> Make:
    """Images, and what else is given: the shape of one sample of a tensor, or a limit for whole numbers."""

    def make(batch: int, size: Any, seed: int) -> Inputs:
        given: dict[str, Any] = {}
        for i, (key, value) in enumerate(others.items()):
            number = isinstance(value, int)
            given[key] = whole(0, value, (batch,), seed + i) if number else normal((batch, *value), seed + 10 + i)
        return (normal((batch, channels, *size), seed),), given

    return make


_BLOCK: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 8}
_DOWN = {
    **_BLOCK, "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 24, "attention_head_dim": 4,
}  # fmt: skip
_CODER = _BLOCK | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_TEXT = {"timestep": 1000, "encoder_hidden_states": (7, 24)}  # a step, and what the text became
DIFFUSERS: dict[str, tuple[dict[str, Any], Make]] = {
    "UNet2DModel": ({
        **_BLOCK, "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    }, _noisy(3, timestep=1000)),
    "UNet2DConditionModel": (_DOWN | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, _noisy(4, **_TEXT)),
    "AutoencoderKL": (_CODER, _noisy(3)),
    "AutoencoderTiny": ({}, _noisy(3)),
    "AutoencoderDC": ({}, _noisy(3)),
    "VQModel": (_CODER, _noisy(3)),
    "DiTTransformer2DModel": (
        {**_HEADS, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000},
        _noisy(4, timestep=1000, class_labels=10),
    ),
    "PixArtTransformer2DModel": ({
        **_HEADS, "sample_size": 32, "cross_attention_dim": 32, "caption_channels": 24,
        "use_additional_conditions": False,
    }, _noisy(4, **_TEXT)),
    "SD3Transformer2DModel": ({
        **_HEADS, "sample_size": 64, "joint_attention_dim": 24, "caption_projection_dim": 32,
        "pooled_projection_dim": 40, "pos_embed_max_size": 96, "in_channels": 4, "out_channels": 4,
    }, _noisy(4, **_TEXT, pooled_projections=(40,))),
    "SanaTransformer2DModel": ({
        **_HEADS, "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
        "cross_attention_dim": 32, "caption_channels": 24, "sample_size": 32,
    }, _noisy(4, **_TEXT)),
    "AuraFlowTransformer2DModel": ({
        "num_attention_heads": 2, "attention_head_dim": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "sample_size": 64, "joint_attention_dim": 24, "caption_projection_dim": 32, "pos_embed_max_size": 2304,
    }, _noisy(4, **_TEXT)),
    "WanTransformer3DModel": (
        {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 32, "ffn_dim": 64},
        _noisy(4, **_TEXT),
    ),
    "PriorTransformer": (
        {**_HEADS, "embedding_dim": 24, "num_embeddings": 7, "additional_embeddings": 4},
        _noisy(24, timestep=1000, proj_embedding=(24,), encoder_hidden_states=(7, 24)),
    ),
    "ControlNetModel": (_DOWN, _noisy(4, **_TEXT, controlnet_cond=(3, 256, 256))),
}  # fmt: skip
_SIZES: dict[str, tuple[Any, Any]] = {
    "WanTransformer3DModel": ((3, 16, 16), [(3, 32, 16)]),
    "PriorTransformer": ((), []),
}


def diffusers(name: str) -> Subject:
    """A network of diffusers of this class, from a small configuration."""
    import diffusers as library

    config, make = DIFFUSERS[name]
    size, others = _SIZES.get(name, ((32, 32), [(64, 32), (64, 64)]))
    return Subject(getattr(library, name)(**config).eval(), make, BATCH, size, others)


# -- all of them ------------------------------------------------------------------------------------------------------

GROUPS: dict[str, tuple[Callable[[str], Subject], Callable[[], list[str]]]] = {
    "transformers": (transformers_inputs.subject, transformers_list.names),
    "ultralytics": (ultralytics, lambda: [f"ultralytics:{name}" for name in ULTRALYTICS.split()]),
    "diffusers": (diffusers, lambda: [f"diffusers:{name}" for name in DIFFUSERS]),
    "timm": (lambda name: pictures(f"timm:{name}"), networks.families),
    "torchvision": (
        lambda name: pictures(f"torchvision:{name}"),
        lambda: [f"torchvision:{name}" for name in TORCHVISION.split()],
    ),
}
PRELOAD = (  # by studies that fork a process for every network
    "torchvision", "timm", "fxprune.api", "model_zoo.networks.libraries", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "ultralytics.nn.tasks", "diffusers.models.unets",
)  # fmt: skip


LEFT_OUT = "transformers, ultralytics, diffusers: what is missing is left out"  # what studies of all of them need


def group_option(add: Callable[..., Any]) -> None:
    """``--group``, by which a study takes some of the libraries."""
    add("--group", nargs="+", action="extend", default=[], choices=[*GROUPS], help="libraries")


def names(groups: Sequence[str] = ()) -> Iterator[str]:
    """Every network of these libraries, or of all that are installed."""
    for group, (_, listed) in GROUPS.items():
        if group in groups or (not groups and importlib.util.find_spec(group)):
            yield from listed()


def load(spec: str) -> Subject:
    """The network named ``LIBRARY:NAME``, or made by ``FILE.py:FACTORY`` as a ``Subject``, with random weights."""
    group, _, name = spec.rpartition(":")
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    if group in GROUPS:
        subject = GROUPS[group][0](name)
    else:
        made = importlib.util.spec_from_file_location("subjects", group)
        assert made is not None
        assert made.loader is not None
        module = importlib.util.module_from_spec(made)
        made.loader.exec_module(module)
        subject = getattr(module, name)()
    randomise(subject.model, subject.example)
    return subject
