"""What the dynamic masks of a model in training do, and a warning when a head chooses nothing."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback

from ..intervals import KeySelection, mask_rows, sequence_bounds
from .dynamic import dynamic_layers


class SelectionMonitor(TrainerCallback):
    """Looks at the selections every few steps, logs them, and warns of heads that collapsed.

    A head has collapsed if, in texts longer than its window, either no key outlives a sliding
    window of the same size (its scores choose the newest keys, as in a new layer, whose scores are
    all equal), or no later key is ever chosen (it is stuck with the first keys). `history` keeps
    every figure; the means go to the Trainer's log as ``selection/...``.

    Args:
        every: Steps from one look to the next. A look waits for the GPU.
        patience: Looks in a row at which a head has to be found collapsed before the warning. New
            layers begin as sliding windows.

    Attributes:
        history: One dict for each look, layer and KV head: ``step``, ``layer``, ``head``,
            ``outlive`` (part of the keys that outlive a sliding window), ``chosen`` (part of the
            later keys that are chosen by score at any time), ``age`` (mean distance in tokens from
            a query to the keys it sees).
    """

    def __init__(self, every: int = 100, patience: int = 10) -> None:
        self.every, self.patience = every, patience
        self.history: list[dict[str, Any]] = []
        self._found: dict[tuple[int, int], int] = defaultdict(int)
        self._warned: set[tuple[int, int]] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the layers to keep their next selection."""
        if state.global_step % self.every == 0:
            for layer in dynamic_layers(kwargs["model"]):
                if layer.mesh is not None:
                    raise ValueError(
                        "SelectionMonitor: expected layers without mesh: no rank has the selection "
                        "of a whole text; look at a model without mesh"
                    )
                layer.keep_selection = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what was kept."""
        for layer in dynamic_layers(kwargs["model"]):
            if not layer.keep_selection:
                continue
            selection, layer.keep_selection, layer.watched = layer.watched, False, None
            if selection is None:
                continue
            for head, figures in enumerate(head_statistics(selection)):
                row = {"step": state.global_step, "layer": layer.layer_idx, "head": head, **figures}
                self.history.append(row)
                self._judge(row)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Add the means of the latest look, also to the history, which has its copy already."""
        if logs is None or not self.history:
            return
        latest = self.history[-1]["step"]
        rows = [row for row in self.history if row["step"] == latest]
        for name in ("outlive", "chosen", "age"):
            logs[f"selection/{name}"] = sum(row[name] for row in rows) / len(rows)
        if state.log_history:
            state.log_history[-1].update(logs)

    def _judge(self, row: dict[str, Any]) -> None:
        place = (row["layer"], row["head"])
        stuck = row["chosen"] == 0.0
        self._found[place] = self._found[place] + 1 if stuck or row["outlive"] == 0.0 else 0
        if self._found[place] >= self.patience and place not in self._warned:
            self._warned.add(place)
            what = (
                "keeps its first keys and never chooses a later one"
                if stuck
                else "chooses the newest keys only, like a sliding window"
            )
            warnings.warn(
                f"layer {place[0]}, KV head {place[1]} {what}, at {self._found[place]} looks in a "
                "row: its selection has collapsed; a higher learning rate for A and dt_proj, or a "
                "larger keep_recent, may help",
                stacklevel=2,
            )


def head_statistics(selection: KeySelection) -> list[dict[str, float]]:
    """``outlive``, ``chosen`` and ``age`` of each KV head; empty if no text exceeds the window.

    Args:
        selection: A causal one, of ``[B, Hkv, K]`` or packed ``[Hkv, total]``.
    """
    first, end = sequence_bounds(
        selection.cu_seqlens, selection.start.shape[-1], selection.start.device
    )
    position = torch.arange(len(first), device=first.device) - first
    life = (torch.minimum(selection.expiry.long(), end - first) - position).clamp(min=0)
    window = max(selection.window_size, selection.keep_recent)  # of equal scores
    counted = (end - first > window + selection.keep_first) & (position >= selection.keep_first)
    counted = counted.expand(life.shape)
    if selection.key_mask is not None:
        counted = counted & mask_rows(selection.key_mask, life.shape)
    if not bool(counted.any()):
        return []
    later = counted & (position >= selection.keep_first + selection.window_size)
    seen = life.double() * counted
    rows = []
    for head in range(life.shape[-2]):
        own, mine = life[..., head, :], counted[..., head, :]
        weight = seen[..., head, :]
        born, late = own[mine], own[later[..., head, :]]
        rows.append(
            {
                "outlive": float((born > window).double().mean()),
                "chosen": float((late > selection.keep_recent).double().mean()),
                "age": float((weight * (weight - 1) / 2).sum() / weight.sum().clamp(min=1)),
            }
        )
    return rows
