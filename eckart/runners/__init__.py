"""Runners walk a plan: the whole model at once, or (to come) block by block."""
