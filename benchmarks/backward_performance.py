"""Forward and backward time, memory and error on the configurations of the predecessors.

Usage: PYTHONPATH=src python benchmarks/backward_performance.py [--help]
"""

import sys

from flash_sparse_attn.bench.grids import backward_performance
from flash_sparse_attn.bench.performance import main

if __name__ == "__main__":
    sys.exit(main("Time forward and backward pass.", backward_performance))
