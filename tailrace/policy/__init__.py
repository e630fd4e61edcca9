"""Decisions as pure functions: values in, values out. No sockets, no clock, no tensors."""
