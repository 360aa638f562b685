"""``consume=True``: the dense weights go as they are cut."""

import pytest
import torch
from nets import Small
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.rewriting import slicing

X = torch.zeros(1, 3, 8, 8)
CONSUME = fxprune.Options(consume=True)


def test_the_result_is_the_same_and_the_report_says_what_was_not_proven() -> None:
    model = Small().eval()
    kept = fxprune.prune(model, X, flops=0.5, progress=False)
    consumed = fxprune.prune(model, X, flops=0.5, options=CONSUME, progress=False)
    for (name, one), other in zip(kept.state_dict().items(), consumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    report = consumed.meta["fxprune"]
    assert report.oracle_error is None
    assert any("consume=True released its weights" in note for note in report.notes)


def test_dense_weights_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a tensor is cut, those that were cut before it have no memory any more."""
    model = Small().eval()
    cut, before, alive = slicing.cut, [], []

    def watched(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        alive.append([name for name in before if tensor_bytes(model, name)])
        before.extend(n for n, t in [*model.named_parameters(), *model.named_buffers()] if t is tensor and t.ndim)
        return cut(tensor, *args, **kwargs)

    monkeypatch.setattr(slicing, "cut", watched)
    fxprune.prune(model, X, flops=0.5, options=CONSUME, progress=False)
    assert len(before) > 8
    assert not any(alive)
    assert sum(tensor_bytes(model, name) for name in before) == 0


def tensor_bytes(model: nn.Module, name: str) -> int:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return tensors[name].untyped_storage().nbytes()


def test_nothing_is_released_before_the_plan_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small().eval()
    monkeypatch.setattr("fxprune.pipeline.check_rewrite", lambda *args: pytest.fail("checked"))
    with pytest.raises(pytest.fail.Exception):
        fxprune.prune(model, X, flops=0.5, options=CONSUME, progress=False)
    assert all(p.numel() for p in model.parameters())


def test_what_reads_the_dense_model_afterwards_is_refused() -> None:
    model = Small()
    with pytest.raises(InputError, match="consume=True empties the model, and a copy of all of it is returned here"):
        fxprune.prune_submodule(model, "up", X, flops=0.5, options=CONSUME, progress=False)
    with pytest.raises(InputError, match="latency= measures the dense model"):
        fxprune.prune(model, X, latency=0.5, options=CONSUME, progress=False)
    with pytest.raises(InputError, match="slimming trains a copy"):
        fxprune.attach(model, X, method="slimming", flops=0.5, options=CONSUME, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(DeprecationWarning, match="optimizer= of fxprune.prune has moved"),
        pytest.raises(InputError, match="optimizer= compares its state with the dense parameters"),
    ):
        fxprune.prune(model, X, flops=0.5, options=CONSUME, optimizer=optimizer, progress=False)
