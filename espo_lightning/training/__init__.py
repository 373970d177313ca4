"""Lightning, and only here: the modules, their data, metrics, checkpoints, run folders, strategies, command line.

The science is imported from `objectives`, `scoring` and `decoding`; nothing of it is written here.
"""
