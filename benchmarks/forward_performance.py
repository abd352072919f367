"""Forward time, memory and error on the configurations of the predecessors, beside baselines.

Usage: PYTHONPATH=src python benchmarks/forward_performance.py [--help]
"""

import sys

from flash_sparse_attn.bench.grids import forward_performance
from flash_sparse_attn.bench.performance import main

if __name__ == "__main__":
    sys.exit(main("Time the forward pass.", forward_performance))
