"""Depth: residual branches that can go, and the graph without them.

``branches`` finds them from the labels, ``removal`` makes a shallower recording and compares it with the dense one
whose branches are set to zero, ``choice`` says which go, together with how wide the others stay.
"""

from fxprune.depth.branches import Branch, branches_of
from fxprune.depth.removal import STANDS_KEY, compared_with_zeroed, without

__all__ = ["STANDS_KEY", "Branch", "branches_of", "compared_with_zeroed", "without"]
