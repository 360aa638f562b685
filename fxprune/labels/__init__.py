"""Label: which channel does every position of every tensor belong to?

In reading order: ``classes`` (union-find over atoms), ``factors`` (labels of one tensor and how they move),
``propagate`` (the run that carries them through a graph), ``rules`` (one file per kind of op), ``blocks`` (channels
that keep equal counts), ``unknown`` (how many rows a mask gives: the recorded run knows), ``usage`` (what the example
made no use of, which must stay).
"""
