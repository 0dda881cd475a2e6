"""What files are is seen from their bytes; what cannot be used costs a row, or is said."""

import gzip
import io
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data.bad_lines import BadLines
from pipeline.data.hub import hub_files
from pipeline.data.reader import document_of, read_documents, read_file
from pipeline.errors import UserError
from pipeline.recipe import Domain, Instruction

TEXTS = [f'Text {i} with an umlaut ä, a quote " and 漢字' for i in range(120)]
LINES = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def read(path, bad=None, **settings):
    return list(read_file(str(path), Domain(files=[str(path)], **settings), bad or BadLines()))


def hub(folder, **settings):
    domain = Domain(hub=str(folder), heldout_fraction=0.001, **settings)
    return [document_of(row) for row in read_documents(domain, "train", BadLines())]


def parquet(array, **other):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": array, **other}), buffer)
    return buffer.getvalue()


def long_window(data):
    """A frame whose window is longer than the 128 MiB that the library takes by default."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("book.txt.jsonl", LINES),
        ("a.jsonl", gzip.compress(LINES)),
        ("a.jsonl.gz", LINES),
        ("a.jsonl.gz", zstandard.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES) + bytes(512)),
        ("a.jsonl.zst", long_window(LINES)),
        ("a.jsonl", parquet(TEXTS)),
        ("a.jsonl", LINES.decode().encode("utf-8-sig")),
        ("a.jsonl", LINES.decode().encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(LINES.decode().encode("utf-32"))),
        ("a.jsonl", json.dumps([{"text": t} for t in TEXTS]).encode()),
        ("a.json.gz", gzip.compress(json.dumps([{"text": t} for t in TEXTS], indent=1).encode())),
        ("a.txt", "\n\n".join(TEXTS).encode("utf-16")),
        ("A.TXT", "\n\n".join(TEXTS).encode()),
        ("jsonl.txt", "\n\n".join(TEXTS).replace("\n", "\r\n").encode("utf-8-sig")),
        ("a.parquet", parquet(pa.array(TEXTS, pa.large_string()))),
        ("a.parquet", parquet(pa.array(TEXTS).dictionary_encode())),
        ("a.parquet", parquet(pa.array([t.encode() for t in TEXTS], pa.binary()))),
    ],
)
def test_a_file_is_what_its_bytes_are(tmp_path, name, content):
    path, bad = tmp_path / name, BadLines()
    path.write_bytes(content)
    assert read(path, bad) == TEXTS
    assert (bad.count, bad.blank) == (0, 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"PK\x03\x04" + bytes(50), "a zip archive"),
        (LINES.decode().encode("utf-16-le"), "every fifth byte is NUL"),
    ],
)
def test_what_holds_no_rows_is_said(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        read(path)


def test_parquet_that_is_none_or_cannot_be_opened_is_an_error_of_its_own(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"text")
    with pytest.raises(UserError, match="not parquet"):
        read(path)
    path.write_bytes(parquet(TEXTS)[:200])
    with pytest.raises(UserError, match=r"a\.parquet: damaged parquet file"):
        read(path)
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        read(tmp_path / "b.parquet")


def test_a_file_of_which_no_row_can_be_used_is_an_error_whatever_the_budget(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{broken\n")
    with pytest.raises(UserError, match=r"not one of its rows .*\n.*a\.jsonl:1: not JSON"):
        read(path)
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}])[:-8])
    with pytest.raises(UserError, match=r"array that cannot be read from its element 2 on"):
        read(path)


def test_rows_that_are_not_utf8_cost_themselves(tmp_path):
    raw = [t.encode() for t in TEXTS]
    raw[50] = b"caf\xe9"
    path, bad = tmp_path / "a.parquet", BadLines()
    kept = TEXTS[:50] + TEXTS[51:]
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        array = pa.array(raw, pa.large_binary() if kind == pa.large_string() else pa.binary())
        path.write_bytes(parquet(array.view(kind)))
        assert read(path, bad) == kept
    assert bad.examples == [(str(path), 51, "the text is not UTF-8")]


def test_nul_is_no_text(tmp_path):
    path, bad = tmp_path / "a.jsonl", BadLines()
    path.write_bytes(b'{"text": "a\\u0000b"}\n{"text": "c"}\n')
    assert read(path, bad) == ["c"]
    assert "NUL" in bad.listing()


def test_blank_rows_use_up_no_budget_and_are_said(tmp_path):
    path, bad = tmp_path / "a.jsonl", BadLines(budget=0)
    rows = [{"text": t} for pair in zip(TEXTS, [" ", "", None] * 40, strict=True) for t in pair]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, bad) == read(path, bad) == TEXTS
    assert bad.blank == 120
    assert bad.describe() == "120 rows without text"
    path.write_text("\n".join(map(json.dumps, rows[1::2])))
    domain = Domain(files=[str(path)])
    with pytest.raises(UserError, match=r"no documents.*all 120 rows are blank"):
        list(read_documents(domain, "train", BadLines()))


# data sets in the layout of the hub


def test_shards_of_a_data_set_may_differ_where_the_field_is_the_same(tmp_path):
    rows = [{"text": t} for t in TEXTS]
    (tmp_path / "train-0.jsonl").write_text("\n".join(map(json.dumps, rows[:60])))
    more = [{"meta": {"url": "x"}, "text": r["text"]} for r in rows[60:]]
    (tmp_path / "train-1.jsonl").write_text("\n".join(map(json.dumps, more)))
    assert hub(tmp_path) == TEXTS
    (tmp_path / "train-1.jsonl").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"train-1\.jsonl: .*Git LFS"):
        hub(tmp_path)


def test_columns_that_are_not_wanted_are_never_decoded(tmp_path):
    pictures = pa.array([{"bytes": b"no picture", "path": None}] * len(TEXTS))
    table = pa.table({"text": TEXTS, "image": pictures})
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    assert hub(tmp_path) == TEXTS


def test_configurations_are_named(tmp_path):
    for name in ("en", "de"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match=r"has several; set `hub_config` to one of: en, de"):
        hub(tmp_path)
    with pytest.raises(UserError, match=r"no configuration 'fr'; set `hub_config` .* en, de"):
        hub(tmp_path, hub_config="fr")
    assert hub(tmp_path, hub_config="de") == ["de"]


def test_other_kinds_are_streamed_and_their_errors_are_named(tmp_path):
    """CSV is read by `datasets`, which stops at a row of another shape."""
    (tmp_path / "train-0.csv").write_text("id,text\n1,one\n2,two\n3,\n")
    domain = Domain(hub=str(tmp_path))
    assert hub_files(domain, "train") is None
    assert hub(tmp_path) == ["one", "two"]
    (tmp_path / "train-1.csv").write_text("other\n1\n")
    with pytest.raises(UserError, match=r"data set '.*', split 'train', cannot be read behind row"):
        hub(tmp_path)


def test_files_behind_an_address_are_read_like_local_ones():
    for name, content in {"a.jsonl.gz": gzip.compress(LINES), "a.parquet": parquet(TEXTS)}.items():
        with fsspec.open(f"memory://reader/{name}", "wb") as file:
            file.write(content)
        assert read(f"memory://reader/{name}") == TEXTS
    with pytest.raises(UserError, match="cannot be opened"):
        read("memory://reader/nothing.jsonl")


def test_plain_text_has_no_prompts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(UserError, match="no fields for prompt"):
        read(path, instruction=Instruction())
