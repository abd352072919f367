"""What works where, as a table of tests: a cell is what the named tests show, and nothing else.

    python scripts/support.py    print the table

`scripts/tables.py` writes it into docs/integration.md. A test in tests/gpu runs on a GPU, any other
on a CPU. Where a line is about values, such as head dimensions, they are those the test is run
with, read from its source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


@dataclass(frozen=True)
class Feature:
    """One line of the table.

    Attributes:
        name: What it is about.
        tests: ``FILE::FUNCTION`` below tests/.
        parameter: If given, cells hold the values of this parameter of the tests.
        refused: Whether the tests show that it is an error with a reason.
    """

    name: str
    tests: tuple[str, ...]
    parameter: str = ""
    refused: bool = False


FEATURES = (
    Feature(
        "dtypes",
        (
            "test_acceptance.py::test_03_head_dimensions_and_dtypes",
            "gpu/test_gpu_attention.py::test_output_and_gradients",
        ),
        parameter="dtype",
    ),
    Feature(
        "head dimensions",
        (
            "test_acceptance.py::test_03_head_dimensions_and_dtypes",
            "gpu/test_gpu_attention.py::test_output_and_gradients",
        ),
        parameter="dim",
    ),
    Feature(
        "grouped-query attention",
        (
            "test_acceptance.py::test_04_grouped_heads",
            "gpu/test_gpu_attention.py::test_output_and_gradients",
        ),
    ),
    Feature(
        "any strides",
        ("test_acceptance.py::test_05_strided_inputs", "gpu/test_gpu_attention.py::test_strides"),
    ),
    Feature(
        "packed sequences",
        (
            "test_attention.py::test_packed_selections_equal_a_loop_over_sequences",
            "gpu/test_gpu_attention.py::test_packed_sequences_equal_single_ones",
        ),
    ),
    Feature(
        "`torch.compile`",
        (
            "test_attention.py::test_compiled_calls_give_the_same_results",
            "test_transformers_doge.py::test_compiled_training",
            "gpu/test_gpu_ops.py::test_compiled_without_a_graph_break",
        ),
    ),
    Feature(
        "`torch.compile` once for all lengths",
        ("gpu/test_gpu_ops.py::test_dynamic_lengths_compile_once",),
    ),
    Feature(
        "CUDA graphs, selection and backward included",
        ("gpu/test_gpu_ops.py::test_captured_in_a_graph_with_selection_and_backward",),
    ),
    Feature(
        "CUDA graphs of decoding",
        (
            "gpu/test_gpu_decode.py::test_a_captured_step_is_an_eager_step",
            "gpu/test_gpu_decode.py::test_a_captured_call_reads_lengths_from_the_device",
        ),
    ),
    Feature(
        "no synchronisation with the host",
        ("gpu/test_gpu_ops.py::test_no_synchronisation_with_the_host",),
    ),
    Feature(
        "autocast: casts query, key, value; neither scores nor bias",
        (
            "test_attention.py::test_under_autocast_the_scores_keep_their_precision",
            "test_nn.py::test_scores_stay_exact_under_autocast",
            "gpu/test_gpu_ops.py::test_autocast_casts_query_key_value_and_leaves_scores",
        ),
    ),
    Feature(
        "activation checkpointing",
        (
            "test_attention.py::test_checkpointing_gives_the_same_gradients",
            "test_nn.py::test_gradient_checkpointing_gives_the_same_bits",
            "gpu/test_gpu_ops.py::test_checkpointing_repeats_the_selection",
        ),
    ),
    Feature(
        "determinism: the same bits again, gradients included",
        (
            "test_attention.py::test_deterministic_calls_repeat_bit_for_bit",
            "gpu/test_gpu_attention.py::test_runs_repeat_bit_for_bit",
        ),
    ),
    Feature(
        "no row depends on later tokens, bit for bit",
        (
            "test_attention.py::test_a_changed_token_leaves_earlier_rows_bit_identical",
            "gpu/test_gpu_attention.py::test_later_tokens_change_nothing_before",
        ),
    ),
    Feature(
        "FSDP2",
        (
            "test_transformers_training.py::test_fully_sharded_training_equals_plain",
            "test_distributed.py::test_layer_with_sharded_parameters",
        ),
    ),
    Feature(
        "LoRA in models of Transformers",
        (
            "test_transformers_training.py::test_lora",
            "test_transformers_training.py::test_lora_with_trained_scores",
        ),
    ),
    Feature(
        "one text on several ranks",
        (
            "test_distributed.py::test_one_text_on_many_ranks",
            "gpu/test_gpu_distributed.py::test_on_several_gpus",
        ),
    ),
    Feature(
        "caches in 8 bits",
        (
            "test_window_cache.py::test_eight_bit_state",
            "test_kvcache.py::test_eight_bits",
            "gpu/test_gpu_decode.py::test_window_of_eight_bits",
            "gpu/test_gpu_decode.py::test_full_caches_of_eight_bits",
        ),
    ),
    Feature(
        "second derivatives",
        ("gpu/test_gpu_ops.py::test_second_derivatives_are_refused",),
        refused=True,
    ),
    Feature(
        "attention dropout",
        ("test_transformers.py::test_dropout_is_refused",),
        refused=True,
    ),
)


def table() -> tuple[list[str], list[list[str]]]:
    """Header and lines: the feature, a cell for CPUs and one for GPUs, and the tests."""
    lines = []
    for feature in FEATURES:
        cells = [_cell(feature, on_gpu) for on_gpu in (False, True)]
        tests = ", ".join(f"`tests/{test}`" for test in feature.tests)
        lines.append([feature.name, *cells, tests])
    return ["feature", "on CPUs", "on GPUs", "shown by"], lines


def _cell(feature: Feature, on_gpu: bool) -> str:
    """What the tests of one kind of device show; empty if there are none."""
    tests = [test for test in feature.tests if test.startswith("gpu/") is on_gpu]
    for test in tests:
        find(test)
    if not tests or not feature.parameter:
        return ("refused" if feature.refused else "yes") if tests else ""
    return ", ".join(dict.fromkeys(v for test in tests for v in values(test, feature.parameter)))


def find(test: str) -> ast.FunctionDef:
    """The function of ``FILE::FUNCTION``.

    Raises:
        ValueError: There is none, or it is never run, or expected to fail.
    """
    file, _, name = test.partition("::")
    path = TESTS / file
    nodes = _module(path).body if path.is_file() else []
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name == name and name.startswith("test_"):
            for decorator in map(ast.unparse, node.decorator_list):
                if decorator.startswith(("pytest.mark.skip(", "pytest.mark.xfail")):
                    raise ValueError(f"tests/{test}: expected a test that runs, got @{decorator}")
            return node
    raise ValueError(f"tests/{test}: expected a test, got none of this name; see FEATURES")


def values(test: str, parameter: str) -> list[str]:
    """The values of a parameter that a test is run with, numbers in order.

    Read from ``pytest.mark.parametrize``; else, for a test over a table of cases, from the keywords
    and the default of that name in its file.

    Raises:
        ValueError: There are none.
    """
    node, module = find(test), _module(TESTS / test.partition("::")[0])
    found = list(_parametrized(node, parameter)) or list(_in_cases(module, parameter))
    if not found:
        raise ValueError(f"tests/{test}: expected values of {parameter!r}, got none")
    constants = dict(_constants(module))

    def entries(value: ast.expr) -> Iterator[str]:
        value = constants.get(ast.unparse(value), value)
        if isinstance(value, (ast.List, ast.Tuple)):
            for entry in value.elts:
                yield from entries(entry)
        else:
            yield ast.unparse(value).removeprefix("torch.")

    flat = list(dict.fromkeys(entry for value in found for entry in entries(value)))
    return sorted(flat, key=int) if all(entry.isdigit() for entry in flat) else sorted(flat)


def _parametrized(node: ast.FunctionDef, parameter: str) -> Iterator[ast.expr]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            name, given = decorator.args[:2]
            if isinstance(name, ast.Constant) and name.value == parameter:
                yield given


def _in_cases(module: ast.Module, parameter: str) -> Iterator[ast.expr]:
    for node in ast.walk(module):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == parameter and node.value:
            yield node.value
        # Of calls of Case(...) alone: other functions have other parameters of that name.
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Case":
            yield from (k.value for k in node.keywords if k.arg == parameter)


def _constants(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names that a file assigns, one by one or several at once."""
    for node in module.body:
        if isinstance(node, ast.Assign):
            (target, *_), value = node.targets, node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(map(ast.unparse, target.elts), value.elts, strict=True)
            else:
                yield ast.unparse(target), value


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    header, lines = table()
    for line in (header, *lines):
        print(" | ".join(line))
