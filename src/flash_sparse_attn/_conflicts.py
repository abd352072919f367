"""Refuse to run beside a predecessor: its packages have the same names, and files would mix."""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "dynamic-mask-attention"
# The distributions that also bring a package named flash_sparse_attn or flash_dmattn.
PREDECESSORS = ("flash-sparse-attn", "flash-dmattn")


def check_for_predecessors() -> None:
    """Raise ImportError if a distribution with the same package names is installed here.

    Looks the names up: searching what every distribution brings would slow each import.
    """
    found = []
    for name in PREDECESSORS:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    if found:
        names = " and ".join(f"{name} {number}" for name, number in found)
        remedy = " ".join(name for name, _ in found)
        raise ImportError(
            f"{DISTRIBUTION} cannot be used beside {names}: their packages have the same names, so "
            f"files mix. Run `pip uninstall {remedy}`, then reinstall {DISTRIBUTION}; or use "
            "separate environments"
        )
