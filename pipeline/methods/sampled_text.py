"""Text that a language model writes by itself, from nothing (arXiv 2605.26097, 2505.13811)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from pipeline import signals
from pipeline.data.sequences import Sequence
from pipeline.data.span_corruption import SPAN, sentinels
from pipeline.data.tokenizer import never_drawn, vocabulary_size
from pipeline.errors import UserError
from pipeline.model.attention import start_token
from pipeline.progress import say
from pipeline.recipe import Recipe

BLOCK = 64  # sequences that are drawn together, from a seed of their own
FILLED_AT_ONCE = 1 / 8  # of the masked positions, in a random order
ROUNDS = 4  # then so many times, drawn anew ...
REDRAWN = 1 / 4  # ... this share of the positions


def sampled_sequences(
    text: str,
    model: Callable[[], nn.Module],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    count: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, Sequence]]:
    """The numbered sequences of a share (r, n) of `count`: the blocks r, r + n, ... They are the
    same however the work is shared.

    text: "self": written by the model; "random": without sense. model: asked for "self" only.
    """
    length, objective = recipe.data.sequence_length, recipe.model.objective
    what = "own text" if text == "self" else "random text"
    blocks = tqdm(
        range(share[0], math.ceil(count / BLOCK), share[1]),
        desc=what,
        unit="block",
        leave=False,
        disable=None if share[0] == 0 else True,
    )
    if blocks.disable and share[0] == 0:  # no bar in a file
        say(f"{what}: {count} sequences of {length} tokens")
    for block in blocks:
        signals.check()
        seed = recipe.seed * 1_000_003 + block
        if text == "self":
            ids, real = sample_block(model(), tokenizer, length, objective, seed)
        else:
            ids, real = random_block(tokenizer, length, objective, seed)
        for i, (row, known) in enumerate(zip(ids.numpy(), real.numpy(), strict=True)):
            number = block * BLOCK + i
            if number < count:
                yield number, one_document(row, known, objective == "masked")


def one_document(ids: np.ndarray, real: np.ndarray, masked: bool) -> Sequence:
    """A sampled row as if it were packed: one document, then padding."""
    segments = np.where(real, 0, -1).astype(np.int16)
    words = np.arange(len(ids), dtype=np.int32)
    if masked:
        words[[0, -1]] = -1  # the special tokens of the row are not predicted
    return Sequence(ids.astype(np.int32), words, segments, real, segments)


def start_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token from which a causal model writes a text of its own.

    Raises:
        UserError: there is none.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # GPT-2 has one for both
        if token is not None:
            return token
    raise UserError(
        "text: self needs a token from which the model begins a text, and this tokenizer "
        "has neither bos nor eos; name a domain instead (anchor.text=DOMAIN, ssu.text=DOMAIN)"
    )


@torch.no_grad()
def sample_block(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, length: int, objective: str, seed: int
) -> tuple[Tensor, Tensor]:
    """BLOCK sequences drawn at temperature 1, the same for a seed wherever they are drawn.

    Returns (int64 [BLOCK, length] on the CPU; bool [BLOCK, length], True on real tokens): a causal
    model ends some texts early.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = SAMPLE[objective](model, tokenizer, length, device)
    ids = ids.cpu()
    if objective != "causal":
        return ids, torch.ones_like(ids, dtype=torch.bool)
    end = (ids[:, 1:] == tokenizer.eos_token_id).long()
    behind = end.cumsum(1) - end > 0  # the first end of text is real
    real = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), ~behind], dim=1)
    return ids, real


def random_block(
    tokenizer: PreTrainedTokenizerFast, length: int, objective: str, seed: int
) -> tuple[Tensor, Tensor]:
    """As `sample_block`, of tokens that are drawn uniformly: text without sense."""
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([i for i in range(vocabulary_size(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = plain[torch.randint(len(plain), (BLOCK, length), generator=generator)]
    if objective == "masked":
        ids[:, 0], ids[:, -1] = _ends(tokenizer)
    elif objective == "causal":
        ids[:, 0] = start_of_text(tokenizer)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _ends(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """The tokens around a masked model's text.

    Raises:
        UserError: there are none.
    """
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    if None in ends:
        raise UserError(
            "text: self needs the tokens that begin and end a text of a masked model, and "
            "this tokenizer lacks cls or sep; name a domain instead (anchor.text=DOMAIN, "
            "ssu.text=DOMAIN)"
        )
    return ends


def _sample_causal(
    model: Any, tokenizer: PreTrainedTokenizerFast, length: int, device: torch.device
) -> Tensor:
    start = torch.full((BLOCK, 1), start_of_text(tokenizer), device=device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,  # the model's own generation settings may say otherwise
        max_length=length,
        min_length=0,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return torch.nn.functional.pad(drawn, (0, length - drawn.shape[1]), value=pad)


def _sample_masked(
    model: Any, tokenizer: PreTrainedTokenizerFast, length: int, device: torch.device
) -> Tensor:
    """All positions masked and filled in a random order, an eighth at a time; then some rounds in
    which a quarter is masked and drawn anew."""
    ids = torch.full((BLOCK, length), tokenizer.mask_token_id, device=device)
    ids[:, 0], ids[:, -1] = _ends(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids, device=device)
    inner = length - 2
    order = torch.rand(BLOCK, inner).argsort(1).to(device) + 1
    share = -(-inner // round(1 / FILLED_AT_ONCE))
    for start in range(0, inner, share):
        _fill(model, ids, order[:, start : start + share], special)
    for _ in range(ROUNDS):
        places = torch.rand(BLOCK, inner).argsort(1)[:, : max(1, round(REDRAWN * inner))]
        places = places.to(device) + 1
        ids.scatter_(1, places, tokenizer.mask_token_id)
        _fill(model, ids, places, special)
    return ids


def _sample_spans(
    model: Any, tokenizer: PreTrainedTokenizerFast, length: int, device: torch.device
) -> Tensor:
    """An encoder-decoder writes the span that is missing at the end of what it has written, again
    and again: of as many tokens as the spans of its pretraining have, none of them special."""
    mark, end = sentinels(tokenizer)[0], tokenizer.eos_token_id
    special = {*never_drawn(tokenizer), *sentinels(tokenizer)}
    special |= set(range(vocabulary_size(tokenizer), model.config.vocab_size))
    ids = torch.zeros((BLOCK, 0), dtype=torch.long, device=device)
    asked = torch.tensor([mark, end], device=device).expand(BLOCK, 2)
    start = start_token(model.config)
    begun = torch.tensor([start, mark], device=device).expand(BLOCK, 2)
    for done in range(0, length, SPAN):
        source = torch.cat([ids, asked], dim=1)
        drawn = model.generate(
            source,
            attention_mask=torch.ones_like(source),
            decoder_input_ids=begun,
            decoder_start_token_id=start,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=min(SPAN, length - done),
            suppress_tokens=sorted(special),
        )
        ids = torch.cat([ids, drawn[:, 2:]], dim=1)
    return ids


SAMPLE = {"masked": _sample_masked, "causal": _sample_causal, "seq2seq": _sample_spans}


def _fill(model: Any, ids: Tensor, places: Tensor, special: Tensor) -> None:
    """Draw the tokens at `places` [BLOCK, n] from the model's predictions, in place."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    wanted = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])).float()
    wanted[..., special] = float("-inf")
    drawn = torch.multinomial(wanted.softmax(-1).flatten(0, 1).cpu(), 1).view(places.shape)
    ids.scatter_(1, places, drawn.to(ids.device))
