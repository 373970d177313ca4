"""How completions are scored: which of their states (masks, drawn by keys) and the log-probabilities there.

A likelihood is a mask law and one way of scoring; the objectives see its numbers only.
"""
