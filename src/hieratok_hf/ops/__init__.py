"""Compute the pyramid of tokens and scale-causal attention over it, on torch and triton alone."""
