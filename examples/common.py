"""What the examples share: real text, a tokeniser made from it, training, and reports.

The text is the Python source code that is installed here, so that nothing is downloaded. Every
tenth file is held out.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from flash_sparse_attn import info
from flash_sparse_attn.bench.console import write_whole

END = "<|end of file|>"


@dataclass(frozen=True)
class Text:
    """Tokens of source files.

    Attributes:
        tokenizer: Trained on the part that is not held out.
        train, held_out: int64 ``[sequences, length]``; files one after another, each with an end.
        files: Number of files.
        bytes_per_token: Of the held-out part, to make losses comparable.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Tensor
    held_out: Tensor
    files: int
    bytes_per_token: float


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    options.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    options.add_argument("--out", type=Path, default=Path("example_output"), help="results go here")
    return options


def device_of(options: argparse.Namespace) -> torch.device:
    """Where to compute."""
    return torch.device(options.device) if options.device else info.default_device()


def dtype_of(device: torch.device) -> torch.dtype:
    """What is computed in: fp32 on CPUs, bf16 on GPUs."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def precision(device: torch.device) -> torch.autocast:
    """Computes in `dtype_of` the device, with fp32 weights."""
    dtype = dtype_of(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    """As tables say it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def read_text(megabytes: float, vocabulary: int, length: int) -> Text:
    """Read source files, train a byte-level BPE tokeniser on them, and cut the tokens up."""
    contents = list(_sources(int(megabytes * 1e6)))
    kept = [text for index, text in enumerate(contents) if index % 10 != 9]
    held_out = contents[9::10]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(kept, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
    train, test = (_tokens(backend, part) for part in (kept, held_out))
    size = sum(len(text.encode()) for text in held_out)
    return Text(
        tokenizer,
        train[: len(train) // length * length].view(-1, length),
        test[: len(test) // length * length].view(-1, length),
        len(contents),
        size / len(test),
    )


def _sources(limit: int) -> Iterator[str]:
    """Files of the standard library, then of installed packages, until `limit` bytes."""
    paths = sysconfig.get_paths()
    folders = [
        Path(paths["stdlib"]),
        *(Path(paths["purelib"], n) for n in ("torch", "transformers")),
    ]
    total = 0
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if "site-packages" in parts or any("test" in part for part in parts):
                continue
            try:
                content = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            total += len(content)
            yield content
            if total > limit:
                return


def _tokens(backend: Tokenizer, contents: list[str]) -> Tensor:
    end = backend.token_to_id(END)
    rows = backend.encode_batch(contents, add_special_tokens=False)
    return torch.tensor([token for row in rows for token in (*row.ids, end)])


def parameter_groups(model: nn.Module, rate: float, score_factor: float) -> list[dict[str, Any]]:
    """For AdamW: the parameters of the scores have a rate of their own and no decay."""
    scores = [p for n, p in model.named_parameters() if n.endswith(".A") or ".dt_proj." in n]
    chosen = {id(parameter) for parameter in scores}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": rest, "lr": rate, "weight_decay": 0.1},
        {"params": scores, "lr": rate * score_factor, "weight_decay": 0.0},
    ]


def warm_up_and_decay(steps: int) -> Callable[[int], float]:
    """A factor of the rate for every step: up over a tenth of them, then down along a cosine."""
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    return factor


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text, sequences: int, batch: int) -> float:
    """Mean nats per token over the first held-out sequences."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    rows = text.held_out[:sequences]
    total = 0.0
    for part in rows.split(batch):
        part = part.to(device)
        with precision(device):
            total += float(model(part, labels=part, use_cache=False).loss) * len(part)
    model.train(training)
    return total / len(rows)


def write_report(
    folder: Path, name: str, numbers: dict[str, Any], draw: Callable[[Any], None]
) -> None:
    """Write ``NAME.json`` and, where matplotlib is installed, ``NAME.png``.

    Args:
        folder: Made if need be.
        name: Of the files.
        numbers: Of JSON's types.
        draw: Called with a matplotlib figure.
    """
    facts = {"hardware": info.hardware(), "versions": info.versions(), "commit": info.commit()}
    write_whole(folder / f"{name}.json", json.dumps(facts | numbers, indent=1).encode())
    print(f"\n  numbers  {folder / f'{name}.json'}")
    try:
        import matplotlib
    except ImportError:
        print("  no figure: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 4.5), layout="constrained")
    draw(figure)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    pyplot.close(figure)
    write_whole(folder / f"{name}.png", target.getvalue())
    print(f"  figure   {folder / f'{name}.png'}")
