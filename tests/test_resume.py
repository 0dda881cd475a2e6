"""What the ranks hold of a stage is saved by weight: any engine on any ranks goes on from it."""

import errno
import io
import itertools
import json
import os
import re
from collections import defaultdict
from contextlib import redirect_stdout

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors.torch import load_file

from pipeline.errors import UserError
from pipeline.method_settings import Ema as EmaSettings
from pipeline.method_settings import Ewc as EwcSettings
from pipeline.method_settings import L2ToStart as L2Settings
from pipeline.method_settings import PublishAverage
from pipeline.methods.method import Start
from pipeline.migu.gradient_mask import GradientMask
from pipeline.ranks import meet, rank, world_size
from pipeline.recipe import Resume
from pipeline.run import saver as saving
from pipeline.run.methods import methods_of
from pipeline.run.resume import Attempt
from pipeline.run.saver import Saver, newest
from pipeline.run.stage_state import STATE, StageState
from pipeline.run.train import StageResult, train_stage
from tests.reference import MODELS, micro_batches
from tests.spawn import run_ranks
from tests.test_engine import BUILDS, EVERYTHING, start
from tests.test_optimizer import small_roberta
from tests.test_parity import ENGINES, recipe_for, zero_engine

STEPS = 2  # before a checkpoint and behind it
BATCH = 2  # micro-batches of a step


def train(engine, settings, name, first, steps):
    """Train steps [first, first + steps) of the same documents on any number of ranks."""
    mask = GradientMask(engine.module, settings.mask, seed=0)
    rows = micro_batches(name, 8, BATCH)[first : first + steps]
    mine = iter([row[rank() :: world_size()] for row in rows])
    train_stage(engine, mask, mine, settings, 1, steps, None)
    mask.close()


def engine_of(name, kind, precision):
    engine, settings = start(name, kind, precision)
    settings.train.batch_size = 2 * BATCH
    return engine, settings


class Position:
    """Of data that needs none."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def save(folder, engine, step):
    saver = Saver(folder, Resume(), StageState(engine, Position()))
    saver.save(step)
    assert saver.finish() is None


def moved(name, kinds, precision, folder):
    """Train STEPS in each of `kinds` in turn, each from the checkpoint of the one before; the
    largest difference of a weight, of what the module holds, and of a moment from one engine of the
    last kind that trained all the steps."""
    one, settings = engine_of(name, kinds[-1], precision)
    for i in range(len(kinds)):  # as the others: in goes of STEPS
        train(one, settings, name, STEPS * i, STEPS)
    for i, kind in enumerate(kinds):
        engine, settings = engine_of(name, kind, precision)
        found = newest(folder)
        assert (found is None) == (i == 0)
        if found:
            assert StageState(engine, Position()).load(found) == STEPS * i
        train(engine, settings, name, STEPS * i, STEPS)
        save(folder, engine, STEPS * (i + 1))
        if i < len(kinds) - 1:
            engine.close()
    expected, got = dict(one.full_weights()), dict(engine.full_weights())
    worst = max(float((w - expected[n]).abs().max()) for n, w in got.items())
    for a, b in zip(one.state_shards(), engine.state_shards(), strict=True):
        assert a.step == b.step == STEPS * len(kinds)
        for moment, m in a.moments.items():
            worst = max(worst, float((m - b.moments[moment]).abs().max()))
    names = list(expected)
    for x, y in zip(
        one.shards.weight_shards(names), engine.shards.weight_shards(names), strict=True
    ):
        worst = max(worst, float((x.tensor - y.tensor).float().abs().max()))
    one.close()
    engine.close()
    return worst


def in_the_same_engine(folder):
    names = list(MODELS)
    return {
        (name, kind, precision): moved(
            name, [kind, kind], precision, folder / f"{name} {kind} {precision} {world_size()}"
        )
        for name, kind, precision in itertools.product(MODELS, BUILDS, ("fp32", "bf16"))
        if EVERYTHING
        or (
            (precision == "fp32" or kind in ("zero1", "zero3"))
            and names.index(name) == list(BUILDS).index(kind) % 4
        )
    }


def test_a_new_engine_goes_on_with_the_same_bits(results):
    for found in results["same"]:
        assert {kind for _, kind, _ in found} == set(BUILDS)
        assert {case: d for case, d in found.items() if d != 0.0} == {}


def across_engines(folder):
    """From each engine to the next, around."""
    kinds = list(BUILDS)
    return {
        (one, other): moved(name, [one, other], "fp32", folder / f"{one} to {other}")
        for name, one, other in zip(
            itertools.cycle(MODELS), kinds, [*kinds[1:], kinds[0]], strict=False
        )
    }


def test_another_engine_goes_on_within_a_millionth(results):
    for found in results["across"]:
        assert {case: d for case, d in found.items() if d > 1e-6} == {}


def as_it_was(engine):
    return [t.tensor.clone() for _, t in StageState(engine, Position()).pieces()]


def damaged(folder):
    """What is said of three checkpoints of which two are damaged, and of another model."""
    engine, _ = engine_of("roberta", "zero2", "fp32")
    saver = Saver(folder, Resume(keep=3), StageState(engine, Position()))
    shapes = [s.shape for s in engine.shards.weight_shards([n for n, _ in engine.full_weights()])]
    assert len(shapes) > 10
    states = []
    for step in (1, 2, 3):
        for shard in engine.shards.master_shards([n for n, _ in engine.full_weights()]):
            shard.tensor.add_(step)
        saver.save(step)
        states.append(as_it_was(engine))
    assert saver.finish() is None
    if rank() == 0:
        path = folder / "step-000003" / "rank-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        path = folder / "step-000002" / "rank-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    meet()
    said = io.StringIO()
    with redirect_stdout(said):
        found = newest(folder)
    assert found == folder / "step-000001"
    assert StageState(engine, Position()).load(found) == 1
    assert all(torch.equal(a, b) for a, b in zip(as_it_was(engine), states[0], strict=True))
    other, _ = engine_of("llama", "zero1", "fp32")
    with pytest.raises(UserError, match="is trained now and was not when it was saved"):
        StageState(other, Position()).load(found)
    other.close()
    engine.close()
    return said.getvalue()


def test_a_damaged_checkpoint_is_passed_over_and_another_models_refused(results):
    said, _ = results["damaged"]
    assert "step-000003/rank-00001.safetensors: differs from its SHA-256" in said
    assert "step-000002/rank-00000.safetensors: differs from its SHA-256" in said


def when_saved(folder, settings):
    """The steps of 7 whose checkpoints are there after each step."""
    engine, _ = engine_of("roberta", "zero0", "fp32")
    attempt = Attempt(folder, settings, StageState(engine, Position()), 7)
    there = []
    for step in range(1, 8):
        attempt.after_step(step)
        attempt.finish()
        meet()
        there.append(sorted(int(p.name[5:]) for p in folder.glob("step-*")))
    engine.close()
    return there


def in_every_way(folder):
    return [
        when_saved(folder / "none", None),
        when_saved(folder / "steps", Resume(steps=2, minutes=None, keep=2)),
        when_saved(folder / "one", Resume(steps=2, minutes=None, keep=1)),
        when_saved(folder / "every", Resume(steps=1, minutes=None, keep=1, keep_every=3)),
        when_saved(folder / "at once", Resume(steps=None, minutes=1e-9))[3],
        when_saved(folder / "minutes", Resume(steps=None, minutes=60))[3],
    ]


def test_a_stage_is_saved_when_the_recipe_says(results):
    none, steps, one, every, at_once, minutes = results["when"][0]
    assert none == [[]] * 7
    assert steps == [[], [2], [2], [2, 4], [2, 4], [4, 6], [4, 6]]  # the last step is published
    assert one == [[], [2], [2], [4], [4], [6], [6]]
    assert every == [[1], [2], [3], [3, 4], [3, 5], [3, 6], [3, 6]]
    assert (at_once, minutes) == ([3, 4], [])


def one_rank_cannot_write(folder):
    """What both policies do where the disk of rank 1 is full behind the second step of four: the
    checkpoints that are there at the end, and the message."""
    engine, _ = engine_of("roberta", "zero2", "fp32")
    write, out = saving.write_pieces, {}

    def full(path, pieces):
        if rank() == 1 and "step-000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, pieces)

    saving.write_pieces = full
    for policy in ("go_on", "stop"):
        settings = Resume(steps=1, minutes=None, keep=1, on_error=policy)
        attempt = Attempt(folder / policy, settings, StageState(engine, Position()), 9)
        message = None
        try:
            for step in range(1, 5):
                attempt.after_step(step)
            attempt.finish()
        except UserError as error:
            message = str(error)
        meet()
        out[policy] = sorted(p.name for p in (folder / policy).iterdir()), message
    own = folder / f"node-{rank()}"  # two machines, the second of which has no room
    attempt = Attempt(own, Resume(steps=1, minutes=None, keep=1), StageState(engine, Position()), 9)
    for step in (1, 2):
        attempt.after_step(step)
    attempt.finish()
    out["nodes"] = newest(own), sorted(p.name for p in own.glob("step-*"))
    saving.write_pieces = write
    engine.close()
    return out


def test_a_machine_keeps_its_older_checkpoint_until_all_have_the_newer(results):
    (first, has), (second, has_not) = (found["nodes"] for found in results["full"])
    assert (first.name, second.name) == ("step-000001", "step-000001")
    assert (has, has_not) == (["step-000001", "step-000002"], ["step-000001"])


def test_where_one_rank_cannot_write_all_go_on_or_all_stop(results):
    for found in results["full"]:
        assert found["go_on"] == (["step-000004"], None)
        there, message = found["stop"]
        assert there == ["step-000001"]
        assert re.search(r"no resume checkpoint was written: rank 1: .*No space left", message)


def eight_bits_go_on(folder):
    """AdamW with 8-bit moments: by engine, the largest difference of a moment in a new engine, as a
    share of the largest there is: weights share the blocks of 8 bits. The fp32 weights are those
    that were saved."""
    out = {}
    for kind in ENGINES if EVERYTHING else ("zero2", "zero3"):
        settings = recipe_for("roberta", 2 * world_size())
        settings.optimizer.name, settings.mask.update = "adamw8bit", "strict"
        one, other = (zero_engine(small_roberta(), settings, ENGINES[kind]) for _ in range(2))
        train(one, settings, "roberta", 0, STEPS)
        save(folder / kind, one, STEPS)
        StageState(other, Position()).load(newest(folder / kind))
        worst: dict[str, float] = defaultdict(float)
        largest: dict[str, float] = defaultdict(float)
        for a, b in zip(one.state_shards(), other.state_shards(), strict=True):
            assert (a.step, b.step) == (STEPS, STEPS)
            assert torch.equal(a.master.tensor, b.master.tensor)
            for name, m in a.moments.items():
                if m.numel():
                    difference = float((m - b.moments[name]).abs().max())
                    worst[name] = max(worst[name], difference)
                    largest[name] = max(largest[name], float(m.abs().max()))
        out[kind] = max(worst[name] / largest[name] for name in largest)
        one.close()
        other.close()
    return out


def test_moments_of_eight_bits_are_rounded_once_more(results):
    for found in results["eight"]:
        assert found
        assert all(moment < 0.02 for moment in found.values())  # a step of the 8 bits


def loss_scale_goes_on(folder):
    """A CPU does not train in fp16, so the scale is DeepSpeed's own beside an engine in fp32."""
    scales = []
    for first in (True, False):
        engine, _ = engine_of("gpt2", "zero1", "fp32")
        scaler = engine._scaler = DynamicLossScaler(2**16, 50, 1, 1, False)
        assert scaler.cur_scale == 2**16
        if first:
            for overflow in (True, False, False, True, True, False):
                scaler.update_scale(overflow)
            save(folder, engine, 1)
        else:
            StageState(engine, Position()).load(newest(folder))
        for _ in range(49):  # when it grows depends on when it last shrank
            scaler.update_scale(False)
        scales.append(vars(scaler))
        engine.close()
    return scales


def test_the_loss_scale_goes_on(results):
    for one, other in results["scale"]:
        assert one == other
        assert one["cur_scale"] < 2**16


def masks_go_on(_folder):
    """Largest weight difference of a stage whose mask goes on from its state, by what it keeps."""
    out = {}
    for refresh, backward in ((3, "dense"), (3, "row_sparse"), (1, "previous")):
        weights = []
        for parts in ((4,), (2, 2)):
            engine, settings = engine_of("llama", "zero1", "fp32")
            settings.mask.refresh, settings.mask.backward = refresh, backward
            state, first = None, 0
            for steps in parts:
                mask = GradientMask(engine.module, settings.mask, seed=0)
                if state is not None:
                    mask.load_state_dict(json.loads(state))
                rows = micro_batches("llama", 8, BATCH)[first : first + steps]
                mine = iter([row[rank() :: world_size()] for row in rows])
                train_stage(
                    engine, mask, mine, settings, 1, first + steps, None, done=StageResult(first)
                )
                state, first = json.dumps(mask.state_dict()), first + steps
                mask.close()
            weights.append(dict(engine.full_weights()))
            engine.close()
        one, other = weights
        out[refresh, backward] = max(float((w - other[n]).abs().max()) for n, w in one.items())
    return out


def test_a_mask_goes_on_with_the_rows_that_it_keeps(results):
    for found in results["masks"]:
        assert len(found) == 3
        assert set(found.values()) == {0.0}


def a_stage_goes_on(folder):
    """A stage with dropout and all methods that keep something by weight, saved behind its second
    step; and in an engine that begins with rounded weights, from there: what differs of the weights
    that are published and of this rank's Fisher information; the seconds and tokens of both.
    """
    found, counted = [], []
    for goes_on in (False, True):
        settings = recipe_for("roberta", 2 * BATCH)
        settings.l2_to_start, settings.ewc = L2Settings(weight=0.5), EwcSettings()
        settings.ema, settings.publish_average = EmaSettings(0.5), PublishAverage(0.2)
        engine = zero_engine(MODELS["roberta"]().train(), settings, ENGINES["zero2"])
        for part in engine.module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.2
        if goes_on:
            engine.load_weights((n, w.bfloat16()) for n, w in engine.full_weights())
        methods, kept = methods_of(settings), folder / f"kept {goes_on}"
        for method in methods:
            method.prepare(Start(1, settings, None, None, None, kept, kept, None, engine))
        state = StageState(engine, Position(), None, methods)
        saver = Saver(folder, Resume(), state)
        done, rows = StageResult(), micro_batches("roberta", 4, BATCH)
        if goes_on:
            done.steps = state.load(newest(folder))
        else:
            torch.manual_seed(rank())

        def after_step(step, state=state, saver=saver, goes_on=goes_on):
            if step == 2 and not goes_on:
                state.seconds, state.tokens = 77.5, 55
                saver.save(step)
                assert saver.finish() is None

        mine = iter([row[rank() :: world_size()] for row in rows[done.steps :]])
        train_stage(
            engine, None, mine, settings, 1, 4, None, after_step, methods=methods, done=done
        )
        for method in methods:
            method.finish(engine, 1)
        fisher = load_file(kept / f"ewc/stage-01/rank-{rank():04d}.safetensors")
        found.append(fisher | {n: w.clone() for n, w in engine.full_weights()})
        counted.append((state.seconds, state.tokens))
        engine.close()
    one, other = found
    return [n for n, w in one.items() if not torch.equal(w, other[n])], counted


def test_methods_and_dropout_go_on_as_if_nothing_had_been(results):
    assert results["stage"] == [([], [(77.5, 55)] * 2)] * 2


def drawn_by_other_ranks(folder):
    """What this rank draws where three ranks saved: behind two steps, twice, and behind three."""
    engine, _ = engine_of("roberta", "zero2", "fp32")
    state, out = StageState(engine, Position(), seed=5), []
    for step in (2, 3):
        save(folder, engine, step)
        path = newest(folder) / STATE
        content = json.loads(path.read_text())
        meet()
        if rank() == 0:
            path.write_text(json.dumps({**content, "ranks": 3}))
        meet()
        for _ in range(2):
            state.load(path.parent)
            out.append(torch.rand(3).tolist())
    engine.close()
    return out


def test_other_ranks_draw_numbers_of_their_own(results):
    first, second = results["drawn"]
    for two, again, three, once_more in (first, second):
        assert two == again
        assert three == once_more
    assert len({tuple(d) for d in (*first, *second)}) == 4


def without_a_shared_folder(folder):
    """Two nodes that do not see each other's files: what one wrote reaches the other."""
    own = folder / f"node-{rank()}" / "resume"
    engine, settings = engine_of("gpt2", "zero3", "fp32")
    train(engine, settings, "gpt2", 0, 1)
    save(own, engine, 1)
    assert len(list(own.glob("step-000001/*.safetensors"))) == 1
    before = as_it_was(engine)
    train(engine, settings, "gpt2", 1, 1)
    found = newest(own)
    assert StageState(engine, Position()).load(found) == 1
    assert len(list(own.glob("step-000001/*.safetensors"))) == 2
    return all(torch.equal(a, b) for a, b in zip(as_it_was(engine), before, strict=True))


def test_nodes_without_a_shared_folder_exchange_their_parts(results):
    assert results["nodes"] == [True, True]


def everything(folder):
    parts = {
        "same": in_the_same_engine, "across": across_engines, "damaged": damaged,
        "when": in_every_way, "nodes": without_a_shared_folder,
        "full": one_rank_cannot_write, "eight": eight_bits_go_on, "scale": loss_scale_goes_on,
        "masks": masks_go_on, "stage": a_stage_goes_on, "drawn": drawn_by_other_ranks,
    }  # fmt: skip
    return {name: part(folder / name) for name, part in parts.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of each part, what each of two ranks found."""
    found = run_ranks(everything, 2, tmp_path_factory.mktemp("resume"))
    return {name: [one[name] for one in found] for name in found[0]}


@pytest.mark.skipif(not EVERYTHING, reason="RUN_EVERYTHING=1: the same on one rank")
def test_on_one_rank_too(tmp_path):
    [found] = run_ranks(in_the_same_engine, 1, tmp_path)
    assert {case: d for case, d in found.items() if d != 0.0} == {}
