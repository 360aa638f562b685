"""Pruning methods: a registry, and one file per kind of method."""

from fxprune.methods.criteria import L1, L2, BNScale, Random
from fxprune.methods.registry import Criterion, ModelState, available, method, resolve, score_groups

__all__ = ["L1", "L2", "BNScale", "Criterion", "ModelState", "Random", "available", "method", "resolve", "score_groups"]
