"""From prompts to completions: masked and causal decoding, orders, schedules, published settings.

Everything random is keyed; a completion depends on its key and its prompt only.
"""
