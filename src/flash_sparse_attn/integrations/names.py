"""The names under which Transformers knows this attention."""

NAMES = ("fsa", "fsa_deterministic")
"""The attention implementations; the second is bitwise repeatable, gradients included.

None contains "flash", "sdpa" or "flex_attention": Transformers takes such names for its own.
"""
