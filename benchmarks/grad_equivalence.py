"""The gradients of the score's projection against a loop over rows, fp32 on a CPU.

Usage: PYTHONPATH=src python benchmarks/grad_equivalence.py [--help]
"""

import sys

from flash_sparse_attn.bench.equivalence import gradients_main

if __name__ == "__main__":
    sys.exit(gradients_main("Compare the gradients of a learned score with a loop over rows."))
