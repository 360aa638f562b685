"""One study per file: whatever ``Study`` a module here defines, ``python -m model_zoo list`` shows and ``run`` runs."""
