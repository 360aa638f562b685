"""Every public docstring has one worked example, and it runs."""

from __future__ import annotations

import copy
import doctest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nets import image, make

import fxprune

PUBLIC = [name for name in fxprune.__all__ if name != "__version__"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PUBLIC)
def test_its_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    described: Any = getattr(fxprune, name)
    names: dict[str, Any] = {"fxprune": fxprune, "torch": torch, "copy": copy, "model": make()}
    names |= {"example_inputs": image(), "loader": [(image(), torch.tensor([1, 2]))] * 2}
    example = doctest.DocTestParser().get_doctest(described.__doc__, names, name, None, None)
    assert example.examples, f"fxprune.{name} has no example"
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=told.append)
    assert not told, "".join(told)
    if not isinstance(described, ModuleType):
        assert described.__doc__.count("Examples:") == 1
