"""python -m model_zoo.networks: writes ``families.txt``; every architecture of timm is made on the meta device."""

from __future__ import annotations

import sys
import warnings

import timm
import torch

from model_zoo.networks import FAMILIES


def main() -> None:
    """The smallest architecture of the module of every model's class."""
    warnings.simplefilter("ignore")
    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception as error:  # an architecture that needs data to be made
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        family, size = type(model).__module__.rpartition(".")[2], sum(p.numel() for p in model.parameters())
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    lines = [f"timm:{name}  # {family}, {size / 1e6:.1f} M" for family, (size, name) in sorted(smallest.items())]
    head = f"# The smallest architecture of every model module of timm {timm.__version__}; python -m model_zoo.networks"
    FAMILIES.write_text("\n".join([head, *lines]) + "\n")
    print(f"{len(lines)} families")


if __name__ == "__main__":
    main()
