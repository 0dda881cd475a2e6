"""What a model writes behind prompts, in batches: a causal one behind them, an encoder-decoder as
its target; behind its soft prompt where it has one."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from pipeline.model.attention import start_token
from pipeline.model.positions import longest_input
from pipeline.model.prompt import prompt_of

# (row, the ids so far) -> what may follow
Allowed = Callable[[int, torch.Tensor], list[int]]


def padded(
    texts: Sequence[Sequence[int] | np.ndarray], pad: int, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, 1 where they are real), both int64 [texts, length of the longest]; left: padding
    stands before a text."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad)
    real = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), longest) if left else slice(0, len(text))
        ids[row, place] = torch.as_tensor(text, dtype=torch.long)
        real[row, place] = 1
    return ids, real


def room_behind(
    model: Any, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int
) -> list[int]:
    """How many ids the model can write behind each prompt, at most `max_new_tokens`."""
    limit, soft = longest_input(model), prompt_of(model)
    if limit is None:
        return [max_new_tokens] * len(prompts)
    before = soft.tokens if soft is not None else 0
    taken = [1 if model.config.is_encoder_decoder else before + len(p) for p in prompts]
    return [max(0, min(max_new_tokens, limit - n)) for n in taken]


@torch.inference_mode()
def written(
    model: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    allowed: Callable[[int], Allowed] | None = None,
    stopping: Callable[[int], StoppingCriteria] | None = None,
    **how: Any,
) -> list[list[int]]:
    """The ids behind each prompt, without what ends the text, one of `ends`; as many as there is
    room for (`room_behind`) where nothing ends it.

    Args:
        prompts: int [n] each, with all special tokens.
        allowed: given how many ids stand before what is written, says what may be written.
        stopping: given the same, says which texts are done; padding follows them.
        how: further arguments of `generate`; default: greedily.
    """
    paired = model.config.is_encoder_decoder
    soft = prompt_of(model)
    whole = [np.append(soft.ids, p) for p in prompts] if soft is not None else prompts
    room = room_behind(model, prompts, max_new_tokens)
    # The model's own settings (a repetition penalty, say) would fill in what is not given here.
    model.generation_config = GenerationConfig(eos_token_id=list(ends) or None, pad_token_id=pad)
    said: list[list[int]] = [[]] * len(prompts)
    for tokens in sorted({*room} - {0}):  # a prompt near the limit shortens its own answer alone
        rows = [i for i, r in enumerate(room) if r == tokens]
        # a decoder goes on behind the last token
        ids, attended = padded([whole[i] for i in rows], pad, left=not paired)
        before = 1 if paired else ids.shape[1]
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=attended.to(model.device),
            max_new_tokens=tokens,
            **{"do_sample": False, **how},
            **({"decoder_start_token_id": start_token(model.config)} if paired else {}),
            **({"prefix_allowed_tokens_fn": allowed(before)} if allowed else {}),
            stopping_criteria=StoppingCriteriaList([stopping(before)] if stopping else []),
        )
        for i, row in zip(rows, output[:, before:].tolist(), strict=True):
            said[i] = list(takewhile(lambda i: i not in ends, row))
    return said
