"""The trained model behind an OpenAI-compatible HTTP API.

The way of a request: ``api`` (HTTP: keys, limits, errors, server-sent events) asks a :class:`~.protocol.Service`, which
is either ``service`` (the models of this process: template, token ids, stop strings) or, on a cluster, ``app`` (Ray
Serve: replicas whose own service it calls). A service asks an :class:`~.protocol.Engine` for tokens. Only ``app`` knows
Ray.
"""
