"""Implementations of the attention that `reference.py` defines; `dispatch.py` chooses."""
