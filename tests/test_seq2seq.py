"""Encoder-decoders: what they read and write, and that the loss is transformers' own."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.data.encode import Encoder
from pipeline.data.instruct import Example
from pipeline.data.mixture import Mixture, Part, Source
from pipeline.data.mlm import collate
from pipeline.data.objective import OBJECTIVES, targets_of
from pipeline.data.packing import Packer, Shape
from pipeline.data.span_corruption import corrupt, sentinels
from pipeline.data.stream import HeldDocuments
from pipeline.data.tokenizer import train_tokenizer
from pipeline.model.attention import separate_documents
from pipeline.model.load import PredictedPositions
from tests.corpora import packed
from tests.reference import tiny_t5

TEXTS = ["a question about frogs", "is it wet?", "yes", "no, it is quite dry there", "frog"]
EXAMPLES = [Example(p, "", r) for p in TEXTS for r in TEXTS[2:]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 400, sentinels=20)


def model_for(tokenizer):
    model = tiny_t5()
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    for p in model.parameters():  # T5's initial attention hardly looks at anything
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def rows_of(documents, tokenizer, length=96, pack=True):
    rng = np.random.default_rng(0)
    row = OBJECTIVES["seq2seq"].row
    sequences = packed(documents, tokenizer, length, "seq2seq", "plain", pack)
    return [row(s, tokenizer, rng, 0.15, False) for s in sequences]


@pytest.mark.parametrize("pack", [True, False])
def test_the_loss_is_that_of_transformers(tokenizer, pack):
    model = model_for(tokenizer)

    def padded(texts):
        ids = [
            torch.tensor([*tokenizer(t, add_special_tokens=False)["input_ids"], 2]) for t in texts
        ]
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)

    source, labels = padded([e.prompt for e in EXAMPLES]), padded([e.response for e in EXAMPLES])
    with torch.no_grad():
        expected = model(
            input_ids=source.clamp_min(0), attention_mask=(source >= 0).long(), labels=labels
        ).loss

        batch = collate(rows_of(EXAMPLES, tokenizer, pack=pack))
        inputs, tokens = separate_documents(model, False, False, "auto", 96).arrange(
            batch, torch.float32
        )
        targets = targets_of(tokens["labels"], "seq2seq")
        head = PredictedPositions(model)
        head.select(targets >= 0)
        loss = F.cross_entropy(model(**inputs).logits, targets[targets >= 0])
        head.close()
    assert len(targets) == len(EXAMPLES)
    assert (targets >= 0).sum() == (labels >= 0).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert tokens["real"].sum() == (source >= 0).sum()  # what the mask counts: no padding
    assert tokens["decoder_real"].sum() == (labels >= 0).sum()


def test_a_corrupted_text_can_be_put_together_again(tokenizer):
    marks = sentinels(tokenizer)
    assert len(marks) == 20
    rng = np.random.default_rng(0)
    for n in [2, 3, 7, 20, 100, 500]:
        ids = rng.integers(200, 300, n)
        lengths = set()
        for _ in range(20):
            source, target = corrupt(ids, rng, 0.15, marks)
            spans = np.split(target, np.flatnonzero(np.isin(target, marks)))[1:]
            by_mark = {span[0]: span[1:].tolist() for span in spans}
            assert all(by_mark.values())
            whole = [t for i in source.tolist() for t in by_mark.get(i, [i])]
            assert whole == ids.tolist()
            assert sum(map(len, by_mark.values())) == max(1, round(0.15 * n))
            lengths.add((len(source), len(target)))
        assert len(lengths) == 1


def test_texts_and_examples_share_a_batch(tokenizer):
    text = " ".join(TEXTS * 3)
    (ids, labels, segments), *more = rows_of([text, EXAMPLES[1]], tokenizer, length=400)
    assert not more
    for segment in (0, 1):  # the source, then the target, both with their end
        here = segments == segment
        learnt = labels[here] >= 0
        assert 0 < learnt.argmax() == len(learnt) - learnt.sum()
        assert ids[here][~learnt][-1] == ids[here][learnt][-1] == tokenizer.eos_token_id
    marks = np.isin(ids, sentinels(tokenizer))
    assert marks[segments == 0].any()
    assert not marks[segments == 1].any()


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    from copy import deepcopy

    from pipeline.errors import UserError

    bare = deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        Encoder.of(bare, "seq2seq", "plain")


@pytest.mark.parametrize("objective", ["seq2seq", "causal"])
def test_without_packing_a_row_has_one_document(tokenizer, objective):
    encoder = Encoder.of(tokenizer, objective, "plain")
    sides = [encoder.encode(documents) for documents in (EXAMPLES, [" ".join(TEXTS * 9)])]
    parts = [
        Part("x", HeldDocuments(dict(enumerate(tokens)), whole))
        for tokens, whole in zip(sides, (True, False), strict=True)
    ]
    source = Source(parts, [0, 1], None, limit=sum(map(len, sides)))
    packer = Packer(Mixture([source], 64), 4, Shape(64, encoder.frame.ends, alone=True), 16)
    rows = [row for step in packer for row in step if row]
    assert all(len(row) == 1 for row in rows)
    read = [sides[p.part][p.place].ids[p.start : p.stop] for (p,) in rows]
    assert sum(map(len, read)) == sum(len(t.ids) for tokens in sides for t in tokens)  # all of it
