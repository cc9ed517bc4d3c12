"""Running a span of a model's layers: the port, the torch backend, KV cache, sampling."""
