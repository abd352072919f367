"""The command line: ``python -m flash_sparse_attn {info,bench,demo}``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments; default those of the process.

    Returns:
        The exit status.
    """
    from . import demo, info
    from .bench import cli

    parser = argparse.ArgumentParser(
        prog="python -m flash_sparse_attn", description="Trainable sparse attention at O(N W) cost."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="versions, device, which backends work and why the others do not"
    ).set_defaults(run=lambda _: print(info.report()) or 0)
    cli.add_arguments(commands.add_parser("bench", help="measure time, memory and error"))
    demo.add_arguments(commands.add_parser("demo", help="the main job: tables and a figure"))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; no file was left half-written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
