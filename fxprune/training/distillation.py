"""Fine-tuning against the dense model's outputs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxprune.errors import InputError


def distill_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> Tensor:
    """Knowledge distillation: ``alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) CE``.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2: a weighted average of
    the cross entropy with the soft targets at temperature ``T`` and with the correct labels, the first multiplied by
    ``T^2`` since its gradients scale as ``1 / T^2``. (The divergence differs from their cross entropy by the teacher's
    entropy, which has no gradient.)

    Args:
        student: logits [N, C] or [N, C, ...], of the pruned model.
        teacher: logits of the same shape, of the dense model; no gradient flows into it.
        target: as ``torch.nn.functional.cross_entropy`` takes it; not needed for ``alpha=1``.
        temperature: ``T``, above 0.
        alpha: weight of the soft targets, in [0, 1].

    Returns:
        The mean over N and all positions, a scalar.

    Raises:
        InputError: shapes that differ, a missing target, or a number out of its range.

    Examples:
        >>> small = fxprune.prune(model, example_inputs, flops=0.5, progress=False)
        >>> x, target = next(iter(loader))
        >>> fxprune.distill_loss(small(x), model(x), target).backward()
    """
    if student.shape != teacher.shape or student.ndim < 2:
        raise InputError(
            f"student and teacher are logits [N, C, ...] of one shape, not {list(student.shape)} and "
            f"{list(teacher.shape)}."
        )
    if not temperature > 0:
        raise InputError(f"temperature={temperature!r} must be above 0.")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha!r} must be in [0, 1].")
    if target is None and alpha < 1:
        raise InputError("Without target there are soft targets only: pass target=, or alpha=1.")
    soft = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher.detach() / temperature, 1),
        reduction="none",
        log_target=True,
    )
    loss = alpha * temperature**2 * soft.sum(1).mean()
    return loss if target is None or alpha == 1 else loss + (1 - alpha) * F.cross_entropy(student, target)
