"""Which networks there are: the 24 of the first table, the smallest of every timm family, everything.

python -m model_zoo.networks         writes model_zoo/families.txt: every architecture of timm is made on meta
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

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
FAMILIES = Path(__file__).parent / "families.txt"


def families() -> list[str]:
    """The smallest architecture of each of timm's model modules, as listed in ``families.txt``."""
    return read_list(FAMILIES)


def everything() -> list[str]:
    """Every architecture of timm."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def read_list(path: Path) -> list[str]:
    """One specification per line; what follows a ``#`` is a remark."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def sizes() -> Iterator[tuple[str, str, int]]:
    """(module of the model's class, architecture, parameters) of everything in timm, made on the meta device."""
    import timm

    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception as error:  # an architecture that needs data to be made
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        yield type(model).__module__.rpartition(".")[2], name, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Write ``families.txt``."""
    warnings.simplefilter("ignore")
    smallest: dict[str, tuple[int, str]] = {}
    for family, name, size in sizes():
        if family not in smallest or (size, name) < smallest[family]:
            smallest[family] = (size, name)
    import timm

    lines = [f"timm:{name}  # {family}, {size / 1e6:.1f} M" for family, (size, name) in sorted(smallest.items())]
    head = f"# The smallest architecture of every model module of timm {timm.__version__}; python -m model_zoo.networks"
    FAMILIES.write_text("\n".join([head, *lines]) + "\n")
    print(f"{len(lines)} families")


if __name__ == "__main__":
    main()
