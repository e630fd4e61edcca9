"""A folder per op: `naive.py` is the spec in plain torch, `__init__.py` the launcher that picks an implementation,
`kernel.py` the one for CUDA devices, in Triton: nothing else imports it, and no CPU needs Triton.

Ops return new tensors unless they say otherwise, and a new tensor is written completely: the tests run them with
uninitialized memory filled with NaN.
"""
