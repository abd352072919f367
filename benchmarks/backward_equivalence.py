"""Output and gradients of every backend against fp64, on 72 configurations.

Usage: PYTHONPATH=src python benchmarks/backward_equivalence.py [--help]
"""

import sys

from flash_sparse_attn.bench.equivalence import main

if __name__ == "__main__":
    sys.exit(main("Compare outputs and gradients with fp64, on every element.", backward=True))
