"""The paper's protocol: subjects × methods × seeds, judged, with bytes, seconds and memory.

``python -m bench.paper --help``. :mod:`.methods` says what is compared, :mod:`.subjects` on whom,
:mod:`.bases` with which model; :mod:`.runs` does the work, :mod:`.plan` says how much of it.
"""
