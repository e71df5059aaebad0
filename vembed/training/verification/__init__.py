"""Proof that gradients are exact: a run's own settings, measured against one graph of the whole.

`verify_gradients` in `verify` is the whole of it; `vembed verify gradients` is its program.
"""
