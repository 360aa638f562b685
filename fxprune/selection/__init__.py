"""Select: scores and a ``budget`` give the channels that stay; the ``plan`` is those as data, JSON in and out."""
