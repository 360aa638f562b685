"""The papers' experiments, one script each: ``python -m model_zoo.recipes.NAME --data DIR``, or ``--smoke``."""
