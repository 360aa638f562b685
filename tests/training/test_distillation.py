"""Knowledge distillation, against the definition written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxprune
from fxprune.errors import InputError


def test_it_is_the_weighted_sum_of_the_paper() -> None:
    student, teacher, target = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    soft = 9 * (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.25 * soft + 0.75 * F.cross_entropy(student, target)
    found = fxprune.distill_loss(student, teacher, target, temperature=3, alpha=0.25)
    assert torch.allclose(found, expected)
    assert torch.allclose(fxprune.distill_loss(student, teacher, temperature=3, alpha=1), soft)


def test_dense_predictions_average_over_positions() -> None:
    student, teacher, target = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5))
    flat = [t.movedim(1, -1).reshape(-1, 4) for t in (student, teacher)]
    expected = fxprune.distill_loss(*flat, target.reshape(-1))
    assert torch.allclose(fxprune.distill_loss(student, teacher, target), expected)


def test_the_gradient_of_soft_targets_hardly_depends_on_the_temperature() -> None:
    """What the factor T^2 is for: at high temperature it tends to (student - teacher) / C, for centred logits."""
    student, teacher = (t - t.mean(1, keepdim=True) for t in (torch.randn(3, 6), torch.randn(3, 6)))
    student.requires_grad_(True)
    fxprune.distill_loss(student, teacher, temperature=1000, alpha=1).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student - teacher).detach() / 6 / 3, atol=1e-3)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    fxprune.distill_loss(student, teacher, torch.tensor([0, 1])).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_what_it_refuses() -> None:
    one, target = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"logits \[N, C, \.\.\.\] of one shape, not \[2, 3\] and \[2, 4\]"):
        fxprune.distill_loss(one, torch.randn(2, 4), target)
    with pytest.raises(InputError, match="temperature=0 must be above 0"):
        fxprune.distill_loss(one, one, target, temperature=0)
    with pytest.raises(InputError, match=r"alpha=2 must be in \[0, 1\]"):
        fxprune.distill_loss(one, one, target, alpha=2)
    with pytest.raises(InputError, match="Without target there are soft targets only: pass target=, or alpha=1"):
        fxprune.distill_loss(one, one)
