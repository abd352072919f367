"""Time and memory of a Doge-320M-shaped model on a GPU: training steps, and generation.

    PYTHONPATH=src python tests/gpu/time_transformers.py [train] [generate] [--lengths N ...]
        [--layers L] [--out FILE]

Random weights, bf16, keep_window_size 2048, hidden size 1024, 32 layers, 8 heads, 4 KV heads. A
training step is forward and backward of the whole model over one text with gradient checkpointing,
without the optimizer, whose time is the same for all: `apply_to_doge`, Doge in ``eager`` (where its
masks fit), and the same model with dense causal SDPA in place of the attention. Medians of seconds
after a warm-up, peak memory from the allocator. Scores are drawn so that keys differ. What is timed
is compared before, at a length where eager fits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DogeConfig, DogeForCausalLM, DynamicCache
from transformers.models.doge.modeling_doge import DogeAttention, apply_rotary_pos_emb

from flash_sparse_attn import info
from flash_sparse_attn.integrations.transformers import apply_to_doge, register

DEVICE = torch.device("cuda")
VOCABULARY = 32768


class DenseAttention(DogeAttention):
    """Doge's projections, norms and rotation, and dense causal SDPA without scores."""

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Any, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def make_model(kind: str, layers: int) -> DogeForCausalLM:
    """The model in bf16 with one of three attentions: ours, eager, dense."""
    config = DogeConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1 << 19,
        keep_window_size=2048,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = DogeForCausalLM(config)
    for layer in model.model.layers:
        attention = layer.self_attn
        torch.nn.init.uniform_(attention.A, -1, 1)
        torch.nn.init.normal_(attention.dt_proj.weight, std=0.2)
        if kind == "dense":
            attention.__class__ = DenseAttention
    model = model.to(torch.bfloat16)
    if kind == "dense":  # a mask function that makes none for a causal text
        register()
        model.set_attn_implementation("fsa")
    return apply_to_doge(model) if kind == "ours" else model


def step(model: DogeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Forward and backward over a text; the loss is over the last 1024 tokens.

    Logits of all tokens are gigabytes at these lengths, for every kind the same.
    """
    hidden = model.model(tokens, use_cache=False).last_hidden_state[:, -1025:]
    loss = F.cross_entropy(model.lm_head(hidden[0, :-1]).float(), tokens[0, -1024:])
    loss.backward()
    return loss.detach()


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median seconds and peak GiB above what is held before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() - held
    return {"seconds": statistics.median(times), "peak_gib": peak / 2**30}


def compare(layers: int) -> None:
    """Ours and eager agree on a text longer than the window, as far as bf16 lets near-ties.

    Both are compared with eager in fp64's stead: fp32. Eager in bf16 rounds its scores, and so
    keeps other keys; its error is the yardstick.
    """
    torch.manual_seed(1)
    tokens = torch.randperm(VOCABULARY, device=DEVICE)[None, :3000]
    losses = {}
    for name, kind, dtype in (
        ("truth", "eager", torch.float32),
        ("eager", "eager", torch.bfloat16),
        ("ours", "ours", torch.bfloat16),
    ):
        model = make_model(kind, layers).to(dtype)
        with torch.no_grad():
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        losses[name] = hidden.float()
        del model
    scale = losses["truth"].norm()
    errors = {n: float((losses[n] - losses["truth"]).norm() / scale) for n in ("eager", "ours")}
    print(f"  relative error of hidden states against fp32 eager: {errors}", flush=True)
    assert errors["ours"] <= 2 * errors["eager"] + 1e-2, errors


def train(lengths: list[int], layers: int, rows: list[dict[str, Any]]) -> None:
    """A row for every length and kind."""
    for kind in ("ours", "dense", "eager"):
        model = make_model(kind, layers).train()
        model.gradient_checkpointing_enable()
        for length in lengths:
            tokens = torch.randint(VOCABULARY, (1, length), device=DEVICE)
            row: dict[str, Any] = {"what": "training step", "kind": kind, "length": length}
            try:
                row |= measure(lambda t=tokens, m=model: step(m, t), repeats=3)
            except torch.cuda.OutOfMemoryError:
                row |= {"seconds": None, "peak_gib": None, "note": "out of memory"}
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            rows.append(row)
            print("  " + json.dumps(row), flush=True)
        del model
        torch.cuda.empty_cache()


@torch.no_grad()
def generate(contexts: list[int], layers: int, rows: list[dict[str, Any]]) -> None:
    """Tokens a second after contexts of these lengths: `generate`, and steps in a CUDA graph."""
    model = make_model("ours", layers).eval()
    for context in contexts:
        tokens = torch.randint(VOCABULARY, (1, context), device=DEVICE)
        for what in ("generate", "steps in a CUDA graph"):
            times, reads = [], []
            for _ in range(4 if what == "generate" else 1):  # the first one compiles and records
                cache = DynamicCache(config=model.config)
                begin = time.perf_counter()
                for piece in tokens[:, :-1].split(8192, dim=1):
                    model(piece, past_key_values=cache, logits_to_keep=1)
                torch.cuda.synchronize()
                reads.append(time.perf_counter() - begin)
                if what == "generate":
                    times.append(generate_seconds(model, tokens, cache, 64))
                else:
                    times.append(decode_in_a_graph(model, tokens[:, -1:], cache, 64))
            row = {
                "what": what,
                "length": context,
                "tokens_per_second": 1 / statistics.median(times[1:] or times),
                "read_tokens_per_second": context / statistics.median(reads[1:] or reads),
                "cache_mib": sum(layer.nbytes for layer in cache.layers) / 2**20,
            }
            rows.append(row)
            print("  " + json.dumps(row), flush=True)


def generate_seconds(
    model: DogeForCausalLM, tokens: torch.Tensor, cache: DynamicCache, count: int
) -> float:
    """Seconds of a token of `generate` after a text that was read but for its last token."""
    begin = time.perf_counter()
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def decode_in_a_graph(
    model: DogeForCausalLM, token: torch.Tensor, cache: DynamicCache, count: int
) -> float:
    """Seconds of a greedy step that is captured once and replayed: shapes never change."""
    token, position = token.clone(), cache.get_seq_length().clone()[None, None]

    def one() -> None:
        logits = model(token, past_key_values=cache, position_ids=position).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("parts", nargs="*", default=["train", "generate"])
    options.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    options.add_argument("--contexts", type=int, nargs="+", default=[8192, 65536, 262144])
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--out", type=Path)
    choice = options.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    print(info.hardware(DEVICE), info.versions(), flush=True)
    compare(min(choice.layers, 4))
    if "train" in choice.parts:
        train(choice.lengths, choice.layers, rows)
    if "generate" in choice.parts:
        generate(choice.contexts, choice.layers, rows)
    if choice.out:
        choice.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
