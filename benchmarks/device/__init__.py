"""What benchmarks/gpu.py measures, a module for each of its sections."""
