"""A stage's steps: the same for any number of ranks and any split, and resumable on any other."""

import json
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batches import frame_of, training_batches
from pipeline.data.encode import Frame
from pipeline.data.heldout import heldout_sequences
from pipeline.data.stage import domains_of, plan_stage
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.recipe import Data, Domain, Instruction, Model, Recipe, Stage, Train
from pipeline.run.problems import mixture_problems, streaming_problems
from tests.corpora import MemoryCorpus

LENGTH = 24
TOKENIZER = train_tokenizer(["a few words"] * 20, 300)


def recipe_of(stages, domains, objective="causal", batch_size=12, seed=0, **data):
    config = {"model_type": "llama" if objective == "causal" else "roberta"}
    return Recipe(
        name="stages",
        model=Model(config=config, train_tokenizer=300, objective=objective),
        data=Data(domains=domains, sequence_length=LENGTH, prefetch=0, **data),
        stages=stages,
        train=Train(batch_size=batch_size),
        seed=seed,
    )


def text(**settings):
    return Domain(embedded="prose", **settings)


@st.composite
def runs(draw):
    """(recipe, corpora): a stage of epochs on texts, or examples, or both."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    objective = draw(st.sampled_from(["causal", "masked"]))
    domains, corpora = {}, {}
    for i in range(draw(st.integers(1, 3))):
        whole = objective == "causal" and draw(st.booleans())
        lengths = rng.integers(0, LENGTH + 2 if whole else 90, draw(st.integers(1, 40)))
        domains[f"d{i}"] = text(instruction=Instruction() if whole else None)
        corpora[f"d{i}"] = MemoryCorpus([*lengths, 5], 1000 + 10_000 * i, whole)
    epochs = draw(st.floats(0.3, 2.7))
    stages = [Stage(domain=list(domains), epochs=epochs)]
    prefetch = draw(st.sampled_from([0, 2]))
    recipe = recipe_of(stages, domains, objective, seed=draw(st.integers(0, 5)))
    recipe.data.prefetch = prefetch
    return recipe, corpora


def batches_of(recipe, corpora, ranks, micro=None, state=None):
    """Each rank's iterator over the first stage's steps, from a position on."""
    recipe.train.micro_batch_size = micro
    found = [training_batches(recipe, 1, TOKENIZER, corpora, r, ranks) for r in range(ranks)]
    for batches in found:
        if state is not None:
            batches.load_state_dict(json.loads(json.dumps(state)))
    return found


def step_of(ranks):
    """The rows of a step in order, each (input_ids, labels, segments, ...) as bytes, without the
    padding, which is as long as the micro-batch's longest row needs."""
    per_rank = []
    for micro_batches in ranks:
        per_rank.append(
            [
                tuple(
                    batch[key][i][batch["segments"][i] >= 0].numpy().tobytes()
                    for key in sorted(batch)
                    if key != "real"
                )
                for batch in micro_batches
                for i in range(len(batch["labels"]))
            ]
        )
    return [row for rows in zip(*per_rank, strict=True) for row in rows]


@settings(max_examples=25, deadline=None)
@given(runs(), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 3]), st.data())
def test_steps_depend_neither_on_ranks_nor_on_the_split_and_resume_anywhere(
    run, ranks, micro, data
):
    recipe, corpora = run
    reference = [step_of([step]) for step in batches_of(recipe, corpora, 1)[0]]
    plan = plan_stage(recipe, 1, corpora, frame_of(recipe, TOKENIZER))
    assert len(reference) == plan.steps
    at = data.draw(st.integers(0, plan.steps))
    before = batches_of(recipe, corpora, ranks, micro)
    steps = [step_of(step) for step in islice(zip(*before, strict=True), at)]
    states = [batches.state_dict() for batches in before]
    assert all(state == states[0] for state in states)
    for batches in before:
        batches.close()
    others = data.draw(st.sampled_from([1, 2, 3, 4]))
    after = batches_of(recipe, corpora, others, state=states[0])
    steps += [step_of(step) for step in zip(*after, strict=True)]
    assert steps == reference


@settings(max_examples=25, deadline=None)
@given(runs())
def test_an_epoch_of_batches_holds_every_document_once(run):
    recipe, corpora = run
    if recipe.model.objective == "masked":  # whose ids are hidden; the packing is tested elsewhere
        return
    documents = sum(c.documents for c in corpora.values())
    drawn = max(1, round(recipe.stages[0].epochs * documents))
    read = Counter()
    for (batch,) in batches_of(recipe, corpora, 1)[0]:
        real = batch["domains"] >= 0 if "domains" in batch else batch["input_ids"] >= 1000
        read.update(batch["input_ids"][real].tolist())
    times = []
    for corpus in corpora.values():
        first = corpus.first
        for length in corpus.all_lengths:
            seen = {read.pop(i, 0) for i in range(first, first + length)}
            if length and not (corpus.whole and length > LENGTH):
                times += seen
                assert len(seen) == 1  # all of it, as often
            first += length
    assert not read
    assert set(times) <= {drawn // documents, -(-drawn // documents)}


@pytest.mark.parametrize("other", ["seed", "stage"])
def test_another_seed_or_stage_has_another_order_and_no_two_rows_have_one_mask(other):
    """Each row is one document, so that a mask's places depend on its draws alone."""
    ends = frame_of(recipe_of([], {}, "masked"), TOKENIZER).ends
    corpora = {"d": MemoryCorpus([LENGTH - ends] * 120)}
    orders, masks = [], set()
    for change in (0, 1):
        recipe = recipe_of(
            [Stage(domain="d", epochs=0.29)] * 2, {"d": text()}, "masked",
            seed=change * (other == "seed"), masking=0.5, whole_word=False,
        )  # fmt: skip
        stage = 1 + change * (other == "stage")
        batches = training_batches(recipe, stage, TOKENIZER, corpora, 0, 1)
        rows = torch.cat([batch["labels"] for (batch,) in batches])
        rows = rows[(rows >= 0).any(1)]  # the last step has some without a document
        masks |= {tuple(row.tolist()) for row in rows >= 0}
        orders.append(((rows.max(1).values - 100) // (LENGTH - ends)).tolist())
        assert len(orders[-1]) == len(set(orders[-1])) == 35  # 34.8 documents
    assert orders[0] != orders[1]
    assert len(masks) == 70


def test_a_position_is_small_and_speaks_of_what_was_taken_not_of_what_is_prepared():
    corpora = {"d": MemoryCorpus(np.random.default_rng(0).integers(2, 500, 1000))}
    recipe = recipe_of(
        [Stage(domain="d", steps=100)],
        {"d": text()},
        batch_size=64,
    )
    recipe.data.prefetch = 8
    (batches,) = batches_of(recipe, corpora, 1)
    for step in range(20):
        assert batches.state_dict()["step"] == step
        next(batches)
    assert len(json.dumps(batches.state_dict())) < 4096
    with pytest.raises(ValueError, match="before the first step"):
        batches.load_state_dict(batches.state_dict())
    batches.close()


@pytest.mark.parametrize("prefetch", [0, 8])
def test_what_the_end_of_a_stage_cuts_is_said_by_domain(prefetch):
    rng = np.random.default_rng(0)
    corpora = {n: MemoryCorpus(rng.integers(2, 90, 60), 9000 * i) for i, n in enumerate("ab", 1)}
    recipe = recipe_of([Stage(domain=["a", "b"], steps=7)], {"a": text(), "b": text()})
    recipe.data.prefetch = prefetch
    (batches,) = batches_of(recipe, corpora, 1)
    read = {int(i) for (batch,) in islice(batches, 7) for i in batch["input_ids"].flatten()}
    cut = {}
    for name, corpus in corpora.items():
        ends = corpus.first + np.cumsum(corpus.all_lengths)
        documents = [range(e - n, e) for e, n in zip(ends, corpus.all_lengths, strict=True)]
        left = [len(set(d) - read) for d in documents if d[0] in read and d[-1] not in read]
        cut[name] = (len(left), sum(left))
    assert sum(n for n, _ in cut.values()) > 5
    assert batches.unfinished() == cut
    batches.close()


@pytest.mark.parametrize("change", ["length", "seed", "documents", "weights"])
def test_a_position_of_other_data_is_refused_by_name(change):
    corpora = {"d": MemoryCorpus([30] * 50), "e": MemoryCorpus([30] * 50)}

    def recipe(weights=(0.5, 0.5), seed=0):
        mix = dict(zip("de", weights, strict=True))
        return recipe_of([Stage(domain=mix, steps=9)], {"d": text(), "e": text()}, seed=seed)

    (batches,) = batches_of(recipe(), corpora, 1)
    next(batches)
    state = batches.state_dict()
    other = recipe((0.4, 0.6) if change == "weights" else (0.5, 0.5), seed=change == "seed")
    other.data.sequence_length += change == "length"
    if change == "documents":
        corpora["d"] = MemoryCorpus([30] * 51)
    named = {"length": "sequence_length", "weights": "domains"}.get(change, change)
    with pytest.raises(UserError, match=f"(?s){named}.* was .* is now"):
        batches_of(other, corpora, 1, state=state)


def test_replay_reads_a_share_of_the_earlier_stages_beside_every_new_document():
    corpora = {n: MemoryCorpus([20] * 400, 1000 + 10_000 * i) for i, n in enumerate("abc")}
    stages = [Stage(domain="a", epochs=1), Stage(domain="b", epochs=1)]
    stages += [Stage(domain="c", epochs=1, replay=0.1)]
    recipe = recipe_of(stages, {n: text() for n in "abc"})
    assert domains_of(recipe, 3) == ["c", "a", "b"]
    batches = training_batches(recipe, 3, TOKENIZER, corpora, 0, 1)
    tokens = Counter()
    for (batch,) in batches:
        tokens.update(batch["domains"].flatten().tolist())
    assert tokens[0] == 400 * 20
    assert abs((tokens[1] + tokens[2]) / (tokens[0] + tokens[1] + tokens[2]) - 0.1) < 0.01
    assert min(tokens[1], tokens[2]) > 200
    plan = plan_stage(recipe, 3, corpora, frame_of(recipe, TOKENIZER))
    assert plan.steps == -(-sum(tokens[i] for i in range(3)) // (12 * LENGTH))

    stages[2] = Stage(domain="c", epochs=1, replay={"a": 0.2})
    named = training_batches(recipe, 3, TOKENIZER, corpora, 0, 1)
    assert named.domains == ["c", "a"]
    tokens = Counter(i for (b,) in named for i in b["domains"].flatten().tolist() if i >= 0)
    assert abs(tokens[1] / tokens.total() - 0.2) < 0.01


def test_a_stage_that_wants_more_than_its_repetitions_give_is_refused():
    corpora = {"legal": MemoryCorpus([20] * 400), "general": MemoryCorpus([20] * 4000)}
    stage = Stage(domain={"legal": 0.5, "general": 0.5}, tokens=80_000, max_repetitions=4)
    recipe = recipe_of([stage], {"legal": text(), "general": text()})
    frame = frame_of(recipe, TOKENIZER)
    with pytest.raises(
        UserError, match=r"max_repetitions: legal has 8,000 tokens.* 5 times as many"
    ):
        plan_stage(recipe, 1, corpora, frame)
    stage.tokens = 60_000
    plan = plan_stage(recipe, 1, corpora, frame)
    assert plan.repetitions == pytest.approx({"legal": 3.75, "general": 0.375}, rel=0.01)
    assert "legal 3.7" in plan.describe(LENGTH)[0]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(domain={"a": 1, "b": 2}, epochs=1), "have no common epoch"),
        (Stage(domain=["a", "b", "a"], epochs=1), "'a' is named twice"),
        (Stage(domain="a", epochs=1, max_repetitions=2), "has no effect beside `epochs`"),
        (Stage(domain="a", steps=1, max_repetitions=0), "must be positive"),
        (Stage(domain="a", epochs=1, replay=0.1), "no stage before it reads other domains"),
        (Stage(domain="a", epochs=1, replay={"c": 0.1}), "'c' is not in data.domains"),
        (Stage(domain="a", epochs=1, replay={"a": 0.1}), "a domain of the stage itself"),
        (Stage(domain="a", epochs=1, replay={"b": 1.1}), r"1.1 is outside \(0, 1\)"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(stage, message):
    recipe = recipe_of([stage], {"a": text(), "b": text()})
    (problem,) = mixture_problems(recipe, 0)
    assert re.search(message, problem)
    assert problem.startswith("stages[0].")


def test_a_stream_is_read_a_whole_number_of_times():
    recipe = recipe_of([Stage(domain="a", steps=1, max_repetitions=1.5)], {"a": text()})
    recipe.data.prepare = False
    (problem,) = streaming_problems(recipe)
    assert "stages[0].max_repetitions" in problem
    assert "give 1 or 2" in problem


def test_epochs_of_examples_are_counted_not_estimated():
    lengths = np.random.default_rng(0).integers(3, LENGTH + 1, 120).tolist()
    corpora = {"code": MemoryCorpus([*lengths, 500], whole=True)}
    stage = Stage(domain="code", epochs=2.5, evaluate_every=1)
    recipe = recipe_of([stage], {"code": text(instruction=Instruction())}, batch_size=4)
    plan = plan_stage(recipe, 1, corpora, frame_of(recipe, TOKENIZER))
    assert (plan.examples.examples, plan.examples.too_long, plan.examples.longest) == (120, 1, 500)
    assert plan.examples.tokens == sum(lengths)
    assert plan.examples.response_tokens == sum(n - n // 2 for n in lengths)
    tokens = sum(
        int((batch["input_ids"] >= 100).sum())
        for (batch,) in training_batches(recipe, 1, TOKENIZER, corpora, 0, 1)
    )
    assert plan.padding == pytest.approx(1 - tokens / (plan.steps * 4 * LENGTH))
    assert 0 < plan.padding < 0.1
    assert list(plan.pauses(1).values()) == [1, 2]
    assert f"rows {1 - plan.padding:.1%} full" in plan.describe(LENGTH)[0]
    recipe.data.sequence_length = 2
    with pytest.raises(UserError, match="none of the 121 examples of code"):
        plan_stage(recipe, 1, corpora, frame_of(recipe, TOKENIZER))


def test_padding_is_no_text_that_was_read():
    """Rows of one example each, a third full, and a source with examples that never fit."""
    corpora = {"a": MemoryCorpus([8] * 120, whole=True),
               "b": MemoryCorpus([8] * 120 + [500] * 3, 5000, whole=True)}  # fmt: skip
    domains = {n: text(instruction=Instruction()) for n in corpora}

    def plan(stage):
        stages = [Stage(domain="a", epochs=1), stage]
        recipe = recipe_of(stages, domains, packing=False)
        return plan_stage(recipe, 2, corpora, frame_of(recipe, TOKENIZER))

    replayed = plan(Stage(domain="b", epochs=1, replay=0.2))
    assert replayed.repetitions == pytest.approx({"b": 1, "a": 0.25}, abs=0.02)
    mixed = {"a": 0.5, "b": 0.5}
    half = plan(Stage(domain=mixed, steps=10, max_repetitions=1))
    assert half.repetitions == pytest.approx({"a": 0.5, "b": 0.5}, rel=0.02)
    with pytest.raises(
        UserError, match=r"b has 960 tokens, and the stage wants 1,920 of it, 2 times"
    ):
        plan(Stage(domain="b", steps=20, max_repetitions=1))
    assert plan(Stage(domain="b", tokens=960)).steps == 10


class HeldOut(MemoryCorpus):
    def digests(self):
        return np.arange(self.documents, dtype=np.uint64)


def test_a_corpus_without_a_held_out_document_is_one_message():
    recipe = recipe_of([{"domain": "a", "steps": 1}], ["a"])
    with pytest.raises(UserError, match="law: no held-out document"):
        heldout_sequences(recipe, "law", HeldOut([]), Frame([], [], 0))
