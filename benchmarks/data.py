"""How fast corpora are prepared: tokens a second of one core, by file type, beside `datasets.map`.

python benchmarks/data.py preparing

Processor time, so that other programs on the machine matter less. The text is that of the embedded
corpora, repeated with a number before each document.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.data import prepare as preparing_module
from pipeline.data.embedded import embedded_documents
from pipeline.data.encode import Encoder
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.recipe import Data, Domain, Model, Recipe, Stage


def write_corpora(folder: Path, megabytes: int) -> list[str]:
    """The same documents as .jsonl.zst, .parquet and .txt; their texts."""
    once = [str(d) for name in ("prose", "python") for d in embedded_documents(name)]
    size = sum(len(t.encode()) for t in once)
    texts = [f"{i} {t}" for i in range(max(1, megabytes * 1_000_000 // size)) for t in once]
    rows = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(rows))
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    lines = "\n\n".join("\n".join(x for x in t.splitlines() if x.strip()) for t in texts)
    (folder / "a.txt").write_text(lines, encoding="utf-8")
    return texts


def preparing(megabytes: int, tokenizer_path: str | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = write_corpora(folder, megabytes)
        tokenizer = (
            load_tokenizer(tokenizer_path) if tokenizer_path else train_tokenizer(texts, 32_000)
        )
        preparing_module._cores = lambda: 1
        preparing_module.SMALL = 0
        encode_plain = Encoder.speed_up
        baseline = with_datasets(folder, tokenizer)
        print(f"{'datasets.map':<44}{baseline:>12,.0f} tokens/s")
        for objective in ("causal", "masked"):
            for core in ("tiktoken", "tokenizers")[objective == "masked" :]:
                Encoder.speed_up = encode_plain if core == "tiktoken" else lambda self: None
                for kind in ("jsonl.zst", "parquet", "txt"):
                    speed = prepared_speed(
                        folder, kind, objective, f"{core}-{objective}", tokenizer
                    )
                    print(
                        f"{objective:<7} {kind:<10} {core:<25}{speed:>12,.0f} tokens/s, "
                        f"{speed / baseline:.1f} times as fast"
                    )


def prepared_speed(folder: Path, kind: str, objective: str, name: str, tokenizer) -> float:
    domain = Domain(files=[str(folder / f"a.{kind}")])
    recipe = Recipe(
        name="benchmark",
        model=Model(path="unused", objective=objective),
        data=Data(domains={"a": domain}, prepared=str(folder / f"prepared-{name}-{kind}")),
        stages=[Stage("a", steps=1)],
    )
    start = time.process_time()
    prepared = prepare(recipe, "a", tokenizer)
    return (prepared.train.tokens + prepared.heldout.tokens) / (time.process_time() - start)


def with_datasets(folder: Path, tokenizer) -> float:
    """Tokens a second of the usual `map` over the same .jsonl.zst in one process."""
    import datasets

    datasets.disable_progress_bars()
    start = time.process_time()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / "a.jsonl.zst"), split="train", cache_dir=str(folder / "hf")
    )
    mapped = rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]},
        batched=True,
        remove_columns=["text"],
    )
    seconds = time.process_time() - start
    return sum(len(ids) for ids in mapped["input_ids"]) / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["preparing"])
    parser.add_argument("--megabytes", type=int, default=20, help="of text (default: %(default)s)")
    parser.add_argument("--tokenizer", help="folder or hub id; default: 32,000 tokens, trained")
    args = parser.parse_args()
    preparing(args.megabytes, args.tokenizer)
