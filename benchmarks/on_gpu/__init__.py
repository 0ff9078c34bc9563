"""What benchmarks/gpu.py is made of: how a product is timed, ours, other libraries', whole models, tables."""
