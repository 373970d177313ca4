"""What a policy is: one forward pass over transformers' networks, the formats that it is read from and written to.

Loading, low-rank adapters, frozen references, causal models made to denoise, and tiny policies from scratch.
"""
