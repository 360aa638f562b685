"""The update rules of the four papers, written down again from their formulas, on a small VGG in double precision.

Each reference is a training of its own: tensors by name, a functional forward, gradients by autograd, and the paper's
update in a few lines. After 20 steps no tensor may differ by more than 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import step
from torch import Tensor, nn

import fxprune
from fxprune.methods import DHP, GSM, Scratch, Slimming
from fxprune.rewriting.hypernetworks import Hypernetwork
from fxprune.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
BLOCKS = (("0", "1"), ("3", "4"), ("7", "8"))  # convolution, norm
Tensors = dict[str, Tensor]


def vgg() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(3, 8), *block(8, 12), nn.MaxPool2d(2), *block(12, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(8, 5))).double()


def forward(p: Mapping[str, Tensor], x: Tensor, gates: Mapping[str, Tensor] | None = None) -> Tensor:
    for conv, norm in BLOCKS:
        x = F.conv2d(x, p[f"{conv}.weight"], padding=1)
        x = F.batch_norm(x, None, None, p[f"{norm}.weight"], p[f"{norm}.bias"], training=True)
        x = F.relu(x if gates is None else x * gates[norm][:, None, None])
        x = F.max_pool2d(x, 2) if conv == "3" else x
    return F.linear(x.mean((2, 3)), p["12.weight"], p["12.bias"])


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 5, (8,), generator=generator)


def begun(method: Any, **budget: float) -> Training:
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    return fxprune.attach(vgg(), x, method=method, round_to=1, progress=False, **budget)


def copied(training: Training) -> Tensors:
    return {name: p.detach().clone().requires_grad_() for name, p in training.model.named_parameters()}


def differentiated(loss: Tensor, p: Mapping[str, Tensor]) -> Tensors:
    return dict(zip(p, torch.autograd.grad(loss, [*p.values()]), strict=True))


def difference(training: Training, p: Mapping[str, Tensor]) -> float:
    found = dict(training.model.named_parameters())
    return max(float((found[name] - value).detach().abs().max()) for name, value in p.items())


def momentum(p: Tensors, moves: Tensors, z: Tensors, rate: float, beta: float, nesterov: bool) -> None:
    """``Z <- beta Z + move``, ``W <- W - rate Z``; Nesterov's: ``W <- W - rate (move + beta Z)``."""
    with torch.no_grad():
        for name, move in moves.items():
            z[name] = beta * z.get(name, torch.zeros_like(move)) + move
            p[name] -= rate * (move + beta * z[name] if nesterov else z[name])


@pytest.mark.parametrize("nesterov", [False, True])
def test_masks_and_momentum_of_sparse_momentum(nesterov: bool) -> None:
    """``Z <- beta Z + eta W + B dL/dW`` with ``B`` 1 at the ``Q`` largest ``|dL/dW W|`` of all kernels (eq. 8)."""
    training = begun(GSM(8, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=nesterov))
    optimizer: Any = training.optimizer()
    p, z = copied(training), Tensors()
    kernels = [name for name, value in p.items() if value.ndim > 1]
    q = int(sum(p[name].numel() for name in kernels) / 8)
    for x, y in batches():
        g = differentiated(F.cross_entropy(forward(p, x), y), p)
        ranked = torch.cat([(g[name] * p[name]).detach().abs().flatten() for name in kernels]).sort().values
        moves = dict(g)
        for name in kernels:
            active = (g[name] * p[name]).abs() >= ranked[-q]
            moves[name] = (1e-2 * p[name] + active * g[name]).detach()
        momentum(p, moves, z, 0.05, 0.9, nesterov)
        optimizer.zero_grad()
        F.cross_entropy(training.model(x), y).backward()
        masks = optimizer.gradients()
        assert sum(int(masks[training.model.get_parameter(name)].count_nonzero()) for name in kernels) == q
        optimizer.step()
        assert difference(training, p) <= 1e-12


def within_the_pattern(t: Tensor) -> Tensor:
    """Whether an entry is of the two largest of its four inputs; all are, where these are no fours."""
    if t.shape[1] % 4:
        return torch.ones_like(t, dtype=torch.bool)
    return torch.cat([four >= four.sort(1, descending=True).values[:, 1:2] for four in t.split(4, 1)], 1)


@pytest.mark.parametrize("compression", [None, 8])
def test_masks_of_sparse_momentum_in_a_pattern(compression: float | None) -> None:
    """Not the paper's: ``B`` is 1 at the ``Q`` largest of those that are of the two largest of every four inputs."""
    training = begun(GSM(compression, lr=0.05, momentum=0.9, weight_decay=1e-2, pattern="2:4"))
    optimizer: Any = training.optimizer()
    p, z = copied(training), Tensors()
    kernels = [name for name, value in p.items() if value.ndim > 1]
    assert [name for name in kernels if p[name].shape[1] % 4] == ["0.weight"]
    for x, y in batches():
        g = differentiated(F.cross_entropy(forward(p, x), y), p)
        product = {name: (g[name] * p[name]).detach().abs() for name in kernels}
        product = {name: t * within_the_pattern(t) for name, t in product.items()}
        ranked = torch.cat([t.flatten() for t in product.values()]).sort().values
        least = ranked[-int(len(ranked) / compression)] if compression else ranked[ranked > 0][0]
        moves = {n: (1e-2 * p[n] + (product[n] >= least) * g[n]).detach() if n in kernels else g[n] for n in p}
        momentum(p, moves, z, 0.05, 0.9, nesterov=False)
        optimizer.zero_grad()
        F.cross_entropy(training.model(x), y).backward()
        optimizer.step()
        assert difference(training, p) <= 1e-12
    small, final = training.finish(), {name: p[name].detach().abs() for name in kernels}
    final = {name: t * within_the_pattern(t) for name, t in final.items()}
    ranked = torch.cat([t.flatten() for t in final.values()]).sort().values
    least = ranked[-int(len(ranked) / compression)] if compression else ranked[ranked > 0][0]
    for name in kernels:
        assert torch.equal(small.get_parameter(name) != 0, final[name] >= least)


def test_sub_gradient_threshold_and_counts_of_slimming() -> None:
    """``dL/dgamma + s sign(gamma)`` through Nesterov's momentum; ``|gamma|`` above the ``int(N share)``-th stay."""
    training = begun(Slimming(strength=1e-2, gamma=0.5, percent=0.4))
    optimizer = training.optimizer()
    p, z = copied(training), Tensors()
    scales = [f"{norm}.weight" for _, norm in BLOCKS]
    for x, y in batches():
        g = differentiated(F.cross_entropy(forward(p, x), y), p)
        penalty = {name: 1e-2 * p[name].sign() if name in scales else 0.0 for name in p}
        momentum(p, {n: (g[n] + penalty[n] + 1e-4 * p[n]).detach() for n in p}, z, 0.1, 0.9, nesterov=True)
        step(training, optimizer, x, y)
        assert difference(training, p) <= 1e-12
    every = torch.cat([p[name].detach().abs() for name in scales]).sort().values
    keep = [(p[name].detach().abs() > every[int(len(every) * 0.4)]).nonzero()[:, 0] for name in scales]
    small = training.finish()
    assert [len(kept) for kept in keep] == [small.get_parameter(name).shape[0] for name in scales]
    before = torch.arange(3)
    for (conv, norm), kept in zip(BLOCKS, keep, strict=True):
        for name, expected in (
            (f"{conv}.weight", p[f"{conv}.weight"][kept][:, before]),
            (f"{norm}.weight", p[f"{norm}.weight"][kept]),
            (f"{norm}.bias", p[f"{norm}.bias"][kept]),
        ):
            torch.testing.assert_close(small.get_parameter(name).detach(), expected.detach(), rtol=0, atol=1e-12)
        before = kept


def test_prox_of_latents_with_hypernetworks() -> None:
    """``O = W2 ((z_out z_in + B0) W1 + B1) + B2``; after a step ``z <- sgn(z) max(|z| - lambda rate, 0)``."""
    training = begun(DHP(strength=0.5, threshold=0.05, minimum=2, classifier="generated"), flops=0.5)
    optimizer, graph = training.optimizer(), training.graph
    bank = training.model.get_submodule("_fxprune_hypernetworks")
    p, z = copied(training), Tensors()
    names = {id(value): name for name, value in training.model.named_parameters()}
    latents = names[id(bank.latents)]
    made = {part.names[0]: part for part in bank.children() if isinstance(part, Hypernetwork)}
    assert set(made) == {"0.weight", "3.weight", "7.weight", "12.weight"}
    vectors = [torch.from_numpy(group.channels.reshape(-1)) for group in graph.prunable]

    def generated() -> Tensors:
        result = {}
        for name, part in made.items():
            w1, w2, b0, b1, b2 = (
                p[names[id(t)]] for t in (part.weight1, part.weight2, part.bias0, part.bias1, part.bias2)
            )
            ids = {factor.dim: torch.from_numpy(factor.ids.reshape(-1)) for factor in graph.by_name[name].labels}
            outer = p[latents][ids[0]][:, None] * p[latents][ids[1]][None]
            inner = (outer + b0)[..., None] * w1 + b1
            result[name] = ((w2 * inner[:, :, None]).sum(-1) + b2).reshape(graph.by_name[name].shape)
        return result

    for x, y in batches():
        g = differentiated(F.cross_entropy(forward(p | generated(), x), y), p)
        momentum(p, {name: (g[name] + 1e-4 * p[name]).detach() for name in p}, z, 0.1, 0.9, nesterov=False)
        with torch.no_grad():
            for places in vectors:
                old = p[latents][places]
                if int((old.abs() >= 0.05).sum()) > 2:
                    p[latents][places] = old.sign() * (old.abs() - 0.5 * 0.1).clamp(min=0)
        optimizer.zero_grad()
        F.cross_entropy(training.model(x), y).backward()
        optimizer.step()
        training.after_step(optimizer)
        assert difference(training, p) <= 1e-12
    assert any(bool((p[latents][places] == 0).any()) for places in vectors), "nothing was shrunk to zero"


def test_gates_with_a_clamp() -> None:
    """``L + strength (mean |gate| - r)^2``, Adam on the gates alone, and then each is clamped to [0, 1]."""
    training = begun(Scratch(strength=0.5, sparsity=0.9, lr=0.2), flops=0.5)
    optimizer, graph = training.optimizer(), training.graph
    p = {name: value.detach() for name, value in copied(training).items()}
    (bank,) = (value for value in training.model.parameters() if value.requires_grad)
    place = {int(c): n for n, c in enumerate(c for group in graph.prunable for c in group.channels.reshape(-1))}
    index = {
        norm: torch.tensor([place[int(c)] for c in graph.by_name[f"{norm}.weight"].labels[0].ids.reshape(-1)])
        for _, norm in BLOCKS
    }
    gates, first, second = torch.ones(28, dtype=torch.float64), torch.zeros(28).double(), torch.zeros(28).double()
    for count, (x, y) in enumerate(batches(), 1):
        gates.requires_grad_()
        loss = F.cross_entropy(forward(p, x, {norm: gates[places] for norm, places in index.items()}), y)
        (g,) = torch.autograd.grad(loss + 0.5 * (gates.abs().mean() - 0.9) ** 2, gates)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        corrected = first / (1 - 0.9**count), (second / (1 - 0.999**count)).sqrt()
        gates = (gates.detach() - 0.2 * corrected[0] / (corrected[1] + 1e-8)).clamp(0, 1)
        step(training, optimizer, x, y)
        assert float((bank.detach() - gates).abs().max()) <= 1e-12
    assert bool((gates == 0).any() and (gates == 1).any()), "no gate was clamped"
    assert all(torch.equal(training.model.get_parameter(name), p[name]) for name in p if p[name].ndim > 1)
