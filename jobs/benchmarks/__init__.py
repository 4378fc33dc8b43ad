"""What `jobs/benchmark.py` measures."""
