"""Rows of single files: every format, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spin_cli.choices import Format
from spin_cli.config import MAX_TEXT_CHARS
from spin_cli.dataset import BadRow, Row, column_text, detect_format, read_items, read_rows
from spin_cli.errors import DataError, ModelError, SpinError, UsageError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [
    ("plain", "a"),
    ('quote " and, comma', "b"),
    ("ümläut 日本語 🎈", "a"),
    ("  kept  ", "b"),
]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def encode_rows(kind: str, rows=ROWS) -> bytes:
    if kind == "jsonl":
        lines = [json.dumps({"text": t, "label": name}) for t, name in rows]
        return "".join(line + "\n" for line in lines).encode()
    if kind == "parquet":
        sink = io.BytesIO()
        table = {"text": [t for t, _ in rows], "label": [name for _, name in rows]}
        pq.write_table(pa.table(table), sink)
        return sink.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",")
    writer.writerow(["text", "label"])
    writer.writerows(rows)
    return text.getvalue().encode()


def fail(path, kind=DataError, read=read_rows, **options) -> SpinError:
    """Read a file that has to be refused; return the error."""
    with pytest.raises(kind) as info:
        list(read(path, **options))
    error = info.value
    assert error.exit_code == (3 if kind is DataError else 2)
    assert Path(str(path)).name in error.message
    return error


def sort_out(path) -> tuple[list[Row], list[BadRow]]:
    """The good and the bad rows of a file."""
    items = list(read_items(path))
    return [i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, BadRow)]


def use_stdin(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


# Formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind, packed):
    path = write(tmp_path / f"x.{kind}{packed}", encode_rows(kind))
    rows = list(read_rows(path))
    assert [(r.text, r.label) for r in rows] == ROWS
    assert [r.id for r in rows] == ["0", "1", "2", "3"]
    first = 2 if kind in {"csv", "tsv"} else 1
    assert [r.line for r in rows] == [first, first + 1, first + 2, first + 3]
    assert all(r.columns is None for r in rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_stdin_in_every_format(monkeypatch, kind, packed):
    data = encode_rows(kind)
    use_stdin(monkeypatch, gzip.compress(data) if packed else data)
    rows = list(read_rows("-", format=Format(kind)))
    assert [(r.text, r.label) for r in rows] == ROWS
    assert not sys.stdin.buffer.closed


def test_real_stdin_defaults_to_lines():
    code = "from spin_cli.dataset import read_rows\nprint([r.text for r in read_rows('-')])"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, input=b"one\r\ntwo\n", capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['one', 'two']"


def test_stdin_errors_name_stdin(monkeypatch):
    use_stdin(monkeypatch, b"fine\n\xff\n")
    with pytest.raises(DataError, match=r"<stdin>, line 2: byte 0xff at byte offset 5"):
        list(read_rows("-"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="no stdin"):
        list(read_rows("-"))


def test_lines(tmp_path):
    path = write(tmp_path / "x.txt", "one\r\n two \nthree")
    rows = list(read_rows(path, keep_columns=True))
    assert rows[1] == Row("1", " two ", None, 2, {"text": " two "})
    assert [r.text for r in rows] == ["one", " two ", "three"]
    assert "no labels" in fail(path, UsageError, require_label=True).message
    assert "no ids" in fail(path, UsageError, id_column="id").message


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("a.csv", Format.CSV),
        ("a.CSV.GZ", Format.CSV),
        ("a.tsv", Format.TSV),
        ("a.tab.gz", Format.TSV),
        ("a.ndjson", Format.JSONL),
        ("d.x/a.jsonl.gz", Format.JSONL),
        ("a.pq", Format.PARQUET),
        ("a.txt.gz", Format.LINES),
        ("-", Format.LINES),
    ],
)
def test_detect_format(name, format_):
    assert detect_format(name, Format.AUTO) is format_
    assert detect_format(name, Format.JSONL) is Format.JSONL


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.gz", "a.json"])
def test_unknown_extension(name):
    with pytest.raises(UsageError) as info:
        detect_format(name, Format.AUTO)
    assert name in info.value.message
    assert ".csv, .tsv" in info.value.message
    assert "csv, tsv, jsonl, parquet, lines" in str(info.value.hint)


def test_missing_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", encode_rows("parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModelError) as info:
        read_rows(path)
    assert info.value.hint == "pip install 'spin-cli[parquet]'"


def test_importing_needs_no_pyarrow():
    code = "import sys, spin_cli.dataset; print(sorted({'pyarrow', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


# Columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_missing_text_column_suggests_a_close_one(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", encode_rows(kind))
    error = fail(path, text_column="Texts")
    assert "no column 'Texts'; the columns are 'text', 'label'" in error.message
    assert error.hint == "--text-column text"
    assert "--id-column X" in str(fail(path, id_column="zzz").hint)
    error = fail(path, label_column="lable", require_label=True)
    assert error.hint == "--label-column label"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_missing_label_column_is_fine_unless_required(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", encode_rows(kind))
    assert {r.label for r in read_rows(path, label_column="other")} == {None}
    assert {r.label for r in read_rows(path, label_column=None)} == {None}


def test_only_a_name_much_like_it_is_suggested_and_never_the_label_column(tmp_path):
    path = write(tmp_path / "x.csv", "body,intent\na,b\n")
    assert fail(path).hint == "name the column: --text-column X"
    path = write(tmp_path / "y.csv", "body,texts\na,b\n")
    assert fail(path, label_column="texts").hint == "name the column: --text-column X"
    assert fail(path).hint == "--text-column texts"


def test_semicolons_are_read_where_only_they_part_the_header(tmp_path):
    for header in ("text;label", '"text";"label"', "\ufefftext;label"):
        path = write(tmp_path / "x.csv", f'{header}\n"a; b, c";x\nd;y\n')
        found = [(row.text, row.label, row.line) for row in read_rows(path)]
        assert found == [("a; b, c", "x", 2), ("d", "y", 3)]
    path = write(tmp_path / "x.csv", "body;label\na;x\n")
    assert "the columns are 'body', 'label'" in fail(path).message
    path = write(tmp_path / "x.csv", "text,a;b\nc;d,e\n")
    assert [row.text for row in read_rows(path)] == ["c;d"]
    path = write(tmp_path / "x.csv", "a;text\nc;d\n")
    assert [row.text for row in read_rows(path, text_column="a;text")] == ["c;d"]


def test_column_with_a_blank_is_quoted_in_the_hint(tmp_path):
    path = write(tmp_path / "x.csv", "label, text\na,b\n")
    assert fail(path).hint == "--text-column ' text'"


def test_other_separators_are_recognised(tmp_path):
    assert "--format tsv" in str(fail(write(tmp_path / "x.csv", "text\tlabel\n")).hint)
    assert list(read_rows(write(tmp_path / "x.csv", "text;label\n"))) == []


def test_the_place_in_a_json_line_is_named_once(tmp_path):
    error = fail(write(tmp_path / "x.jsonl", '{"text": "a\x01b"}\n'))
    assert error.message.endswith("line 1, character 12: not JSON: Invalid control character")


def test_duplicate_columns(tmp_path):
    error = fail(write(tmp_path / "x.csv", "text,label,text\na,b,c\n"))
    assert "line 1: the header has 'text' more than once" in error.message
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "'text' more than once" in fail(tmp_path / "x.parquet").message


def test_nameless_columns_are_harmless(tmp_path):
    path = write(tmp_path / "x.csv", "text,label,,\na,b,,2\n")
    (row,) = read_rows(path, keep_columns=True)
    assert row.columns == {"text": "a", "label": "b", "column_2": "", "column_3": "2"}


def test_very_many_columns(tmp_path):
    header = ",".join([f"c{i}" for i in range(5000)] + ["text"])
    path = write(tmp_path / "x.csv", header + "\n" + ",".join(["1"] * 5000 + ["hello"]) + "\n")
    (row,) = read_rows(path, keep_columns=True)
    assert row.text == "hello"
    assert len(row.columns or {}) == 5001
    assert "and 4981 more" in fail(path, text_column="missing").message


def test_id_column(tmp_path):
    path = write(tmp_path / "x.csv", "id,text\nk1,a\n ,b\n")
    rows = read_rows(path, id_column="id")
    assert next(rows).id == "k1"
    with pytest.raises(DataError, match=r"x\.csv, line 3, column 'id': no id"):
        next(rows)
    path = write(tmp_path / "x.jsonl", '{"id": 7, "text": "a"}\n{"id": [1], "text": "b"}\n')
    rows = read_rows(path, id_column="id")
    assert next(rows).id == "7"
    with pytest.raises(DataError, match="line 2, column 'id': list"):
        next(rows)


def test_kept_columns_keep_their_types(tmp_path):
    line = '{"text": "a", "n": 1, "f": 0.5, "none": null, "deep": {"é": [true]}, "s": "x"}'
    (row,) = read_rows(write(tmp_path / "x.jsonl", line), keep_columns=True)
    assert row.columns == json.loads(line)
    assert [column_text(value) for value in (row.columns or {}).values()] == [
        "a", "1", "0.5", "", '{"é": [true]}', "x",
    ]  # fmt: skip
    day = datetime.date(2024, 5, 1)
    table = pa.table({
        "text": ["a"], "n": [1], "b": [True], "none": pa.array([None], pa.int8()), "l": [[1, 2]],
        "day": [day], "days": [[day]], "nan": [float("nan")],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "x.parquet")
    (row,) = read_rows(tmp_path / "x.parquet", keep_columns=True)
    assert row.columns == {
        "text": "a", "n": 1, "b": True, "none": None, "l": [1, 2], "day": "2024-05-01",
        "days": ["2024-05-01"], "nan": None,
    }  # fmt: skip
    json.dumps(row.columns, allow_nan=False)


def test_a_number_that_json_has_not_is_null(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a", "p": NaN, "q": {"r": [1.5, -Infinity]}}')
    (row,) = read_rows(path, keep_columns=True)
    assert row.columns == {"text": "a", "p": None, "q": {"r": [1.5, None]}}


@pytest.mark.parametrize("column", ['"\\ud800"', '["\\ud800"]', '{"a": {"\\ud800": 1}}'])
def test_a_kept_column_that_cannot_be_written_is_refused(tmp_path, column):
    path = write(tmp_path / "x.jsonl", '{"text": "a", "note": ' + column + "}")
    assert "column 'note': the escape \\ud800" in fail(path, keep_columns=True).message


# Texts and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("text", ["", " \t \u3000"])
def test_empty_text(tmp_path, kind, text):
    path = write(tmp_path / f"x.{kind}", encode_rows(kind, [("fine", "a"), (text, "b")]))
    place = {"csv": "line 3", "tsv": "line 3", "jsonl": "line 2", "parquet": "row 2"}[kind]
    assert f"{place}, column 'text': an empty text" in fail(path).message


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_labels_are_stripped_and_may_be_required(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", encode_rows(kind, [("x", " a b\t"), ("y", "  ")]))
    assert [r.label for r in read_rows(path)] == ["a b", None]
    place = {"csv": "line 3", "tsv": "line 3", "jsonl": "line 2", "parquet": "row 2"}[kind]
    assert f"{place}, column 'label': no label" in fail(path, require_label=True).message


def test_json_labels_become_strings(tmp_path):
    values = ["1", "true", "false", "1.0", "0.5", '"x"', "1e300", "null", "NaN", "[1]"]
    lines = "".join(f'{{"text": "t", "label": {value}}}\n' for value in values)
    path = write(tmp_path / "x.jsonl", lines)
    labels = ["1", "true", "false", "1", "0.5", "x", "1e+300", None, None, None]
    assert [r.label for r in read_rows(path)] == labels
    path = write(tmp_path / "y.jsonl", '{"text": "t", "label": [1]}')
    assert "line 1, column 'label': list '[1]'" in fail(path, require_label=True).message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, 2]), ["1", "2"]),
        (pa.array([1.0, 2.5]), ["1", "2.5"]),
        (pa.array([1.0, None]), ["1", None]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
    ],
)
def test_parquet_label_types(tmp_path, labels, expected):
    pq.write_table(pa.table({"text": ["a", "b"], "label": labels}), tmp_path / "x.parquet")
    assert [r.label for r in read_rows(tmp_path / "x.parquet")] == expected


def test_parquet_names_of_datasets_labels(tmp_path):
    feature = {"_type": "ClassLabel", "names": ["neg", "pos"]}
    meta = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    table = pa.table({"text": ["a", "b", "c"], "label": [1, 0, -1]}).replace_schema_metadata(meta)
    pq.write_table(table, tmp_path / "x.parquet")
    assert [r.label for r in read_rows(tmp_path / "x.parquet")] == ["pos", "neg", None]


# Encodings ----------------------------------------------------------------------------------


def test_not_utf8(tmp_path):
    path = write(tmp_path / "x.csv", b"text,label\nfine,a\ncaf\xe9,b\n")
    error = fail(path)
    assert "line 3: byte 0xe9 at byte offset 21" in error.message
    assert "iconv -f latin1 -t utf-8" in str(error.hint)
    assert "line 1: byte 0xe9" in fail(write(tmp_path / "h.csv", b"caf\xe9,text\n")).message


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_utf8_bom(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", b"\xef\xbb\xbf" + encode_rows(kind))
    assert [r.text for r in read_rows(path)] == [t for t, _ in ROWS]


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        ("text,label\n".encode("utf-16"), "UTF-16", "iconv -f utf-16"),
        (b"\xfe\xff" + "text".encode("utf-16-be"), "UTF-16", "iconv -f utf-16"),
        ("text,label\n".encode("utf-32"), "UTF-32", "iconv -f utf-32"),
        (gzip.compress(b"text\n", mtime=0), "gzip", ".gz"),
        (b"PAR1....", "Parquet", "--format parquet"),
        (b"PK\x03\x04", "Excel", "CSV"),
    ],
)
def test_files_that_are_no_utf8_text(tmp_path, data, what, hint):
    path = write(tmp_path / "x.csv", data)
    error = fail(path, read=read_items)  # bad rows apart: it is the file that is bad
    assert "line 1" in error.message
    assert what in error.message
    assert hint in str(error.hint)


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_nul(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", b"text\nfi\0ne\n")
    assert "line 2: a NUL character at byte offset 7" in fail(path).message


def test_nul_in_json_and_parquet(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a\\u0000"}')
    assert "line 1, column 'text': a NUL" in fail(path).message
    pq.write_table(pa.table({"text": ["a\0"]}), tmp_path / "x.parquet")
    assert "row 1, column 'text': a NUL" in fail(tmp_path / "x.parquet").message


def test_parquet_with_strings_that_are_not_utf8(tmp_path):
    raw = pa.array([b"ok", b"\xff"], pa.binary()).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    assert "row 2, column 'text': bytes that are not UTF-8" in fail(tmp_path / "x.parquet").message


# CSV ----------------------------------------------------------------------------------------


def test_crlf_and_embedded_line_ends(tmp_path):
    path = write(tmp_path / "x.csv", b'text,label\r\n"one\r\ntwo\nthree",a\r\n\r\nfour,b\r\n')
    rows = list(read_rows(path))
    assert [(r.text, r.label, r.line) for r in rows] == [
        ("one\r\ntwo\nthree", "a", 2),
        ("four", "b", 6),
    ]
    assert [r.id for r in rows] == ["0", "1"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('a,b\n"open,b\nmore,c\n', "line 3: a double quote opened in this row is never closed"),
        ("a,b\nc\n", "line 3: too few fields: 1, where the header has 2"),
        ("a,b\nc,d,e\n", "line 3: too many fields: 3, where the header has 2"),
        ('"a"b,c\n', "line 2: something follows the closing double quote"),
        ('"a\n"b,c\n', "line 2: something follows the closing double quote of a field (on line 3)"),
        ("a,b\rc,d\n", "line 2: a carriage return without a line feed"),
    ],
)
def test_broken_csv(tmp_path, body, message):
    error = fail(write(tmp_path / "x.csv", "text,label\n" + body))
    assert message in error.message
    assert error.hint


def test_old_mac_file(tmp_path):
    assert "line 1: a carriage return" in fail(write(tmp_path / "x.csv", "text\ra\rb")).message


def test_a_stray_quote_in_tsv_does_not_swallow_rows(tmp_path):
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"hello\ta\nbye"\tb\n')
    assert "line 2: a double quote opens a field here that runs on to line 3" in fail(path).message


def test_five_megabyte_line_from_an_unclosed_quote(tmp_path):
    path = write(tmp_path / "x.csv", 'text,label\nfine,a\n"' + "x" * 5_000_000 + ",b\nlast,a\n")
    error = fail(path)
    assert "line 3: a field of more than 2,000,000 characters" in error.message
    assert "unclosed double quote" in str(error.hint)
    assert [r.text for r in sort_out(path)[0]] == ["fine", "last"]


def test_an_unclosed_quote_before_many_rows_stops_at_the_limit(tmp_path):
    path = write(tmp_path / "x.csv", 'text,label\n"open,a\n' + "some text,b\n" * 300_000)
    assert "line 2: a field of more than" in fail(path).message


def test_long_fields_up_to_the_limit(tmp_path):
    text = "é" * MAX_TEXT_CHARS
    for kind in ("csv", "jsonl"):
        path = write(tmp_path / f"x.{kind}", encode_rows(kind, [(text, "a")]))
        assert next(read_rows(path)).text == text
    path = write(tmp_path / "y.jsonl", encode_rows("jsonl", [("x" * 2_000_001, "a")]))
    error = fail(path)
    assert "line 1, column 'text': a text of 2,000,001 characters" in error.message
    assert "unclosed quote" in str(error.hint)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_endless_lines_are_never_held(tmp_path, kind):
    path = write(tmp_path / f"x.{kind}", b"text\n" + b"x" * (17 * 2**20) + b"\n")
    if kind == "jsonl":
        path = write(path, b"x" * (17 * 2**20) + b'\n{"text": "next"}\n')
    line = 1 if kind == "jsonl" else 2
    rows, bad = sort_out(path)
    errors = [(each.error.message, each.line) for each in bad]
    assert errors == [(f"{path}, line {line}: longer than 16 MB", line)]
    assert [r.text for r in rows] == {"csv": [], "jsonl": ["next"], "txt": ["text"]}[kind]


# JSON lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "character 2: not JSON"),
        ('{"text": "cut', "not JSON"),
        ('["a"]', "a JSON list, where an object was expected"),
        ('"a"', "a JSON str, where an object"),
        ("null", "a JSON NoneType, where an object"),
        ('{"text": 5}', "column 'text': int '5', where a string was expected"),
        ('{"text": null}', "column 'text': no text (null)"),
        ('{"other": "x"}', "no column 'text'; the columns are 'other'"),
        ("{}", "no column 'text'; the columns are none at all"),
        ('{"text": "a\\ud800b"}', "column 'text': the escape \\ud800 (character 2) is half"),
        ('{"text": "a", "label": "\\udc00"}', "column 'label': the escape \\udc00"),
        ("[" * 100_000, "JSON that cannot be read"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "JSON that cannot be read"),
    ],
)
def test_broken_json(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", '{"text": "fine"}\n\n' + line + '\n{"text": "last"}\n')
    error = fail(path)
    assert "line 3" in error.message
    assert message in error.message
    rows, bad = sort_out(path)
    assert [(r.id, r.text) for r in rows] == [("0", "fine"), ("2", "last")]
    assert [each.line for each in bad] == [3]


def test_json_array_files_get_a_hint(tmp_path):
    for text in ('[\n {"text": "a"}\n]', '[{"text": "a"}]'):
        assert "jq -c '.[]'" in str(fail(write(tmp_path / "x.jsonl", text)).hint)


def test_json_oddities_that_are_fine(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a", "text": "b"}\r\n{"text": "\\ud83c\\udf88"}')
    assert [r.text for r in read_rows(path)] == ["b", "🎈"]


def test_surrogates_in_other_columns_matter_only_when_kept(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a", "note": "\\ud800"}')
    assert [r.text for r in read_rows(path)] == ["a"]
    assert "column 'note': the escape \\ud800" in fail(path, keep_columns=True).message


# Files --------------------------------------------------------------------------------------


def test_empty_files(tmp_path):
    assert "the file is empty; a header line" in fail(write(tmp_path / "x.csv", "")).message
    assert "the file is empty" in fail(write(tmp_path / "x.tsv.gz", "\n\n")).message
    assert list(read_rows(write(tmp_path / "h.csv", "text,label\n"))) == []
    assert list(read_rows(write(tmp_path / "x.jsonl", ""))) == []
    assert list(read_rows(write(tmp_path / "x.txt", ""))) == []


def test_files_that_cannot_be_opened(tmp_path):
    write(tmp_path / "reviews.csv", "text\na\n")
    error = fail(tmp_path / "review.csv")
    assert "no such file" in error.message
    assert f"did you mean {tmp_path / 'reviews.csv'}?" == error.hint
    assert "no" in fail(tmp_path / "nowhere" / "x.csv").message
    (tmp_path / "dir.csv").mkdir()
    assert "a directory, where a file was expected" in fail(tmp_path / "dir.csv").message
    assert "a directory" in fail(tmp_path, format=Format.CSV).message


@pytest.mark.skipif(os.name == "nt", reason="no POSIX modes")
def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "x.csv", "text\na\n")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    error = fail(path)
    assert "cannot be read: Permission denied" in error.message
    assert error.hint == f"chmod u+r {path}"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_broken_gzip(tmp_path, kind):
    path = tmp_path / f"x.{kind}.gz"
    rows = [(os.urandom(20).hex(), "a") for _ in range(5000)]
    whole = gzip.compress(encode_rows(kind, rows))
    path.write_bytes(whole[: len(whole) // 2])
    assert "ends too early" in fail(path, read=read_items).message
    path.write_bytes(encode_rows(kind, rows))
    error = fail(path, read=read_items)
    assert "no gzip data" in error.message
    assert "take .gz off" in str(error.hint)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    fail(path, read=read_items)


def test_broken_parquet(tmp_path):
    data = encode_rows("parquet")
    for content in (data[: len(data) // 2], b"text,label\na,b\n", b""):
        path = write(tmp_path / "x.parquet", content)
        assert "not a whole Parquet file" in fail(path).message


def test_parquet_text_has_to_be_strings(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "x.parquet")
    assert "column 'text' holds int64" in fail(tmp_path / "x.parquet").message
    pq.write_table(pa.table({"text": [["a"]]}), tmp_path / "x.parquet")
    assert "column 'text' holds list" in fail(tmp_path / "x.parquet").message
    coded = pa.array(["a", "b"]).dictionary_encode()
    for column in (coded, coded.cast(pa.large_string())):
        pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
        assert [r.text for r in read_rows(tmp_path / "x.parquet")] == ["a", "b"]
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "x.parquet")
    assert "row 2, column 'text': no text" in fail(tmp_path / "x.parquet").message


# Skipping bad rows --------------------------------------------------------------------------


def test_bad_rows_stand_in_their_place_and_keep_numbers(tmp_path):
    body = b'text,label\nok,a\n,b\nx\nb\xffd,a\n"multi\n\xfe line",a\n"q"z,a\nlast,b\n"open,a\n'
    path = write(tmp_path / "x.csv", body)
    rows, bad = sort_out(path)
    seen = [(each.line, each.error.message) for each in bad]
    assert [(r.id, r.text, r.line) for r in rows] == [("0", "ok", 2), ("6", "last", 9)]
    assert [line for line, _ in seen] == [3, 4, 5, 6, 8, 10]
    assert "line 7: byte 0xfe" in seen[3][1]
    assert all(str(path) in message for _, message in seen)


def test_rows_are_streamed(tmp_path):
    path = write(tmp_path / "x.csv", "text\nfirst\n\xff\n")
    assert next(read_rows(path)).text == "first"
    read, write_end = os.pipe()
    with os.fdopen(write_end, "wb", 0) as sink:
        rows = read_rows(f"/dev/fd/{read}", format=Format.LINES)
        sink.write(b"one\n")
        assert next(rows).text == "one"  # before the pipe is closed
    assert list(rows) == []
    os.close(read)
