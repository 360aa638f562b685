"""Tell: what came out, for people and programs.

``report`` is what ``prune`` leaves behind, ``rows`` the lines of its tables, ``graph`` a channel graph in such lines,
``page`` (with ``page.html``) all this as one HTML page, ``plots`` matplotlib, ``study`` how alike several plans are.
"""
