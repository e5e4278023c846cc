"""The paper's protocol: subjects × methods × seeds, judged, with bytes, seconds and memory.

``python -m bench.paper --help``. :mod:`.methods` says what is compared, :mod:`.subjects` on what,
:mod:`.trial` does one subject by one method, :mod:`.plan` says how much of it.
"""
