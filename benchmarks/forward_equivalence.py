"""The output of every backend against fp64, on the 72 configurations of the predecessors.

Usage: PYTHONPATH=src python benchmarks/forward_equivalence.py [--help]
"""

import sys

from flash_sparse_attn.bench.equivalence import main

if __name__ == "__main__":
    sys.exit(main("Compare outputs with fp64, on every element.", backward=False))
