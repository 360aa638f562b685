"""An optimizer goes on after pruning: its state is what it was, without the channels that went."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Attentive, Shuffled, Small, Unchanged, chain, image, make
from torch import nn

import fxprune
from fxprune.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
    "plain": lambda params: torch.optim.SGD(params, lr=0.1),
}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model.train()(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("kind", [Small, Shuffled, Attentive])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_like_the_parameters(kind: type[nn.Module], name: str) -> None:
    """Where the moments are copies of the weights, they must still be so afterwards."""
    model = make(kind)
    optimizer = OPTIMIZERS[name](model.parameters())
    trained(model, optimizer)
    for p in model.parameters():
        for value in optimizer.state[p].values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                value.copy_(p.detach())
    small = fxprune.prune(model, image(), channels=0.6, method="random", progress=False)
    mine = fxprune.carry_over(optimizer, model, small)
    assert type(mine) is type(optimizer)
    assert mine.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    held = [p for group in mine.param_groups for p in group["params"]]
    assert all(p is q for p, q in zip(held, small.parameters(), strict=True))
    for p, old in zip(small.parameters(), model.parameters(), strict=True):
        assert mine.state[p].keys() == optimizer.state[old].keys()
        for key, value in mine.state[p].items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                assert torch.equal(value, p), key
            else:
                assert value == optimizer.state[old][key]
                assert value is None or value is not optimizer.state[old][key]


def test_a_step_is_the_dense_step_on_the_kept_channels() -> None:
    """Linear layers whose cut inputs are zero anyway: gradients agree, so must the steps with momentum."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        model[0].weight[2:5] = 0  # weight, and gradient through it, of what will be cut
        model[2].weight[:, 2:5] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x = torch.randn(16, 4)

    def step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()

    step(model, optimizer)
    kept = [0, 1, 5, 6, 7]
    small = fxprune.prune(model, x, channels=5 / 8, progress=False)
    mine = fxprune.carry_over(optimizer, model, small)
    assert small.meta["fxprune"].plan.kept["0.weight"][0] == kept
    for _ in range(3):
        step(model, optimizer)
        step(small, mine)
    assert torch.allclose(model[0].weight[kept], small.get_parameter("0.weight"), atol=1e-6)
    assert torch.allclose(model[2].weight[:, kept], small.get_parameter("2.weight"), atol=1e-6)


def test_groups_and_options_stay_and_the_given_one_is_untouched() -> None:
    model = make(Small)
    biases = [p for p in model.parameters() if p.ndim == 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights, "lr": 0.5}], lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    trained(model, optimizer)
    scheduler.step()
    before = copy.deepcopy(optimizer.state_dict())
    with Unchanged(model):
        small = fxprune.prune(model, image(), flops=0.5, progress=False)
        mine = fxprune.carry_over(optimizer, model, small)
    options = [{k: v for k, v in g.items() if k != "params"} for g in mine.param_groups]
    assert options == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert [len(g["params"]) for g in mine.param_groups] == [len(biases), len(weights)]
    trained(small, mine)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i]["exp_avg"], s["exp_avg"]) for i, s in before["state"].items())


def test_tied_frozen_and_partial_parameters() -> None:
    model = make(Small)
    model.stem[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.up.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    small = fxprune.prune(model, image(), flops=0.5, progress=False)
    held = {id(p) for g in fxprune.carry_over(optimizer, model, small).param_groups for p in g["params"]}
    assert held == {id(p) for n, p in small.named_parameters() if n.startswith("up.")}


def test_factored_state_follows_where_it_has_the_dimension() -> None:
    model = make(Small)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    trained(model, optimizer)
    small = fxprune.prune(model, image(), flops=0.5, progress=False)
    mine = fxprune.carry_over(optimizer, model, small)
    old, new = optimizer.state[model.head.weight], mine.state[small.get_parameter("head.weight")]
    kept = small.meta["fxprune"].plan.kept["head.weight"][1]
    assert torch.equal(new["col_var"], old["col_var"][:, kept])
    assert torch.equal(new["row_var"], old["row_var"])
    trained(small, mine)


def test_a_part_of_a_model() -> None:
    model = nn.Sequential(nn.Flatten(), chain(192, 16, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    whole = fxprune.prune_submodule(model, "1", image(), params=0.5, progress=False)
    mine = fxprune.carry_over(optimizer, model, whole)
    assert {id(p) for g in mine.param_groups for p in g["params"]} == {id(p) for p in whole.parameters()}
    trained(whole, mine)


def message(optimizer: Any, model: nn.Module, small: nn.Module) -> str:
    with pytest.raises(InputError) as caught:
        fxprune.carry_over(optimizer, model, small)
    return str(caught.value)


def test_what_does_not_fit() -> None:
    model = make(Small)
    small = fxprune.prune(model, image(), flops=0.5, progress=False)
    assert message("adam", model, small) == (
        "optimizer is 'adam'; pass a torch.optim.Optimizer over the model's parameters."
    )
    other = torch.optim.SGD(make(Small).parameters(), lr=0.1)
    assert message(other, model, small) == (
        "the optimizer holds a parameter of shape [16, 3, 3, 3] that is not part of the model; pass the model that its "
        "parameters were taken from."
    )
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    assert message(mine, model, model) == "pruned is a Small that fxprune.prune did not return."
    assert message(mine, model, nn.DataParallel(small)) == "DataParallel wraps the pruned module: pass its .module."
    mine.state[model.head.weight]["odd"] = torch.ones(7)
    assert message(mine, model, small) == (
        "the optimizer's odd of head.weight has the shape [7], which does not follow [10, 16]; start a new optimizer "
        "for the pruned model."
    )
    with pytest.warns(DeprecationWarning, match="optimizer="), pytest.raises(InputError, match="not part of the model"):
        fxprune.prune(model, image(), flops=0.5, optimizer=other, progress=False)
    with (
        pytest.warns(DeprecationWarning, match="optimizer="),
        pytest.raises(InputError, match="scratch trains other weights than the optimizer's state is for"),
    ):
        fxprune.prune(model, image(), flops=0.5, method="scratch", optimizer=mine, progress=False)
