"""Data: documents in, rows of token ids out, once, in an order that nothing but the data and the seed decides.

The way through the room: :mod:`documents` (read) -> a task's ``encode`` -> :mod:`splits`, :mod:`duplicates`,
:mod:`packing` (decide) -> :mod:`card` (tell) -> :mod:`store` (keep, map) -> :mod:`order` (which row when).
:mod:`build` does these in turn; :mod:`prepare` does it once per content.
"""
