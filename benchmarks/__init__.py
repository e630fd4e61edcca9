"""Tailrace beside its peers on this machine. Nothing here is imported by the product."""
