"""Label: which channel does every position of every tensor belong to?

In reading order: ``classes`` (union-find over atoms), ``factors`` (labels of one tensor and how they move), ``records``
(what is found out, as plain data), ``propagation`` (the verbs: join, lock, approximate ...), ``positions`` and
``contract`` (the two verbs that most ops need), ``parameters`` (labels before a run), ``usage`` (what the example made
no use of, which must stay), ``apply`` (one op: its record is asked), ``run`` (a whole graph), ``blocks`` (channels that
keep equal counts). What single ops do is told in ``fxprune.ops``.
"""
