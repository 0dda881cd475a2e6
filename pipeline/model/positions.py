"""Which positions a model has: where they begin, and how many tokens it takes."""

from typing import Any

from torch import nn


def first_position(net: nn.Module) -> int:
    """The position of the first token: behind the padding index where the model's own table of
    positions has one (RoBERTa and its kin), else 0."""
    return max((padding + 1 for padding, _ in _tables(net)), default=0)


def longest_input(net: nn.Module) -> int | None:
    """How many tokens the model takes; None where it sets no limit."""
    config: Any = net.config
    config = config.get_text_config()
    limits = [rows - padding - 1 for padding, rows in _tables(net)]
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            limits.append(limit)
    return min(limits, default=None)


def _tables(net: nn.Module) -> list[tuple[int, int]]:
    """(padding index, rows) of each table of position embeddings with a padding index. They need
    not be nn.Embedding: I-BERT has its own."""
    found = []
    for name, module in net.named_modules():
        table: Any = module
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            found.append((table.padding_idx, table.weight.shape[0]))
    return found
