"""``save_pretrained`` and ``load_pretrained``: a pruned network as a folder, as model hubs have them.

The folder holds what ``fxprune.save`` writes, as ``model.safetensors``, or, of a class of transformers, what its own
``save_pretrained`` writes; the plan, ``plan.json``; and a model card, ``README.md``, made from the report.

``folder`` writes and reads it, ``card`` is what the card says, ``remote`` goes through ``huggingface_hub``.
"""

from fxprune.io.hub.folder import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "save_pretrained"]
