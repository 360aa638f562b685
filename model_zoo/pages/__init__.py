"""How the pages and plots of the larger studies are written, ``pages/NAME.py`` of ``studies/NAME.py``.

A page here knows records alone and imports no study. A study that is short with its page keeps it.
"""
