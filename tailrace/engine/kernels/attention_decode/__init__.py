"""Attention of one new token a sequence over its cached blocks.

A step prepares `DecodeRows` once for each kind of layer (full, windowed); every layer of the kind uses them.
"""

from tailrace.engine.kernels.attention_decode.gathered import DecodeRows, attention_decode, decode_rows

__all__ = ["DecodeRows", "attention_decode", "decode_rows"]
