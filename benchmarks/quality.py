"""Quality at equal steps: full attention, a sliding window and dynamic masks on two tasks.

Usage: PYTHONPATH=src python benchmarks/quality.py {recall,text,plot} [--help]
"""

import sys

from flash_sparse_attn.quality.cli import main

if __name__ == "__main__":
    sys.exit(main())
