"""Files: written whole or not at all (``files``), checked when read (``forms``), in plain words (``text``).

``specs`` finds models and weights by name; ``artifact`` is a pruned network as one file, and ``hub`` as a folder, last
in the pipeline.
"""
