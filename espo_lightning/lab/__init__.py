"""What notebooks, tests and programs measure with: exact enumeration, gradients, counted costs, evaluation, figures.

Nothing that trains imports it.
"""
