"""Models that something else was made of, and states of torch that pruning is called in."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ExampleInputsError, GuardError, InputError, ModelError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + torch.arange(x.shape[0])[:, None])


def _prune(model: nn.Module, x: Tensor, channels: float = 0.5) -> torch.fx.GraphModule:
    return fxprune.prune(model, x, channels=channels, round_to=1, progress=False)


def test_a_program_of_torch_export_is_refused_with_the_remedy() -> None:
    exported = torch.export.export(Net().eval(), (torch.randn(2, 4),)).module()
    holder = nn.Sequential(nn.Linear(4, 4), exported)
    for model, name in ((exported, "The model"), (holder, "1")):
        with pytest.raises(ModelError, match=f"{name} is the module of a program of torch.export.* Pass the nn.Module"):
            _prune(model, torch.randn(2, 4))


def test_meta_as_the_default_device_is_refused() -> None:
    model, x = Net().eval(), torch.randn(2, 4)
    with torch.device("meta"), pytest.raises(InputError, match="The default device is meta"):
        _prune(model, x)


def test_sparse_inputs_are_refused() -> None:
    with pytest.raises(ExampleInputsError, match="hold a sparse tensor"):
        _prune(Net().eval(), torch.randn(2, 4).to_sparse())


@pytest.mark.parametrize("surrounding", [torch.inference_mode, torch.no_grad, lambda: torch.device("cpu")])
def test_the_surroundings_do_not_matter(surrounding) -> None:  # type: ignore[no-untyped-def]
    model, x = Net().eval(), torch.randn(2, 4)
    with surrounding():
        small = _prune(model, x, 1.0)
    x = torch.randn(3, 4)
    torch.testing.assert_close(small(x), model(x))


def test_guards_are_found_again_in_what_was_pruned() -> None:
    """The form of the inputs among them, at the same place in the model's code."""
    first = _prune(Net().eval(), torch.randn(2, 4))
    second = _prune(first, torch.randn(2, 4), 1.0)
    for model in (first, second):
        with pytest.raises(GuardError, match=r"x of .*test_wrappers.py:\d+ in forward: it has 3 dims"):
            model(torch.randn(2, 3, 4))
    torch.testing.assert_close(second(torch.ones(3, 4)), first(torch.ones(3, 4)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_what_several_processes_do_for_each_other_is_not_recorded(tmp_path: Path) -> None:
    """DistributedDataParallel puts all buffers together in one tensor, in forward; so batch norms kept their width."""
    net, x = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net)
        small = _prune(parallel, x)
        assert parallel.require_forward_param_sync
        assert parallel.require_backward_grad_sync
    finally:
        torch.distributed.destroy_process_group()
    assert not small.meta["fxprune"].notes
    assert small.get_parameter("module.1.weight").shape == (4,)
    assert torch.allclose(small.eval()(x), _prune(net, x).eval()(x), atol=1e-6)


def test_a_compiled_module_is_pruned_as_the_one_that_it_was_made_from() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    small = _prune(compiled, x)  # type: ignore[arg-type]
    assert small.get_parameter("_orig_mod.0.weight").shape == (4, 4)
    assert torch.allclose(small(x), _prune(net, x)(x), atol=1e-6)
