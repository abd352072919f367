"""Refuse to run beside a predecessor, whose packages have the same names and would be mixed with these."""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "dynamic-mask-attention"
# The distributions that also bring a package named flash_sparse_attn or flash_dmattn.
PREDECESSORS = ("flash-sparse-attn", "flash-dmattn")


def check_for_predecessors() -> None:
    """Raise ImportError if a distribution with the same package names is installed in this environment.

    Looks the names up instead of searching all distributions, which would cost every import some 0.1 s.
    """
    found = []
    for name in PREDECESSORS:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    if found:
        names = " and ".join(f"{name} {number}" for name, number in found)
        raise ImportError(
            f"{DISTRIBUTION} cannot be used beside {names}: both bring packages named flash_sparse_attn and "
            f"flash_dmattn, so their files mix. Run `pip uninstall {' '.join(name for name, _ in found)}`, then "
            f"reinstall {DISTRIBUTION}; or keep them in separate environments."
        )
