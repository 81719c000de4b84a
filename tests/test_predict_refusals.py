"""What `spin predict` refuses, or is refused: what is wrong, where, and one way on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spin_cli import artifacts, atomic, prediction
from spin_cli.cli.style import Style
from spin_cli.config import PredictConfig
from spin_cli.errors import ArtifactError
from tests.helpers import ENV, MODEL, PATIENCE, SPIN, json_lines, sentences, write_csv

TEXTS = [f"{text} It is {i}." for i, (text, _) in enumerate(sentences()[:40])]
EVERYTHING = (
    "--top", "1", "--threshold", "0.8", "--explain", "3", "--explain-tokens", "--keep-columns",
    "--on-error", "skip",
)  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    rows = [(text, "good", "note") for text in TEXTS]
    rows[25] = ("", "good", "note")
    return write_csv(tmp_path / "in.csv", rows, ("text", "label", "why"))


@pytest.fixture
def head_copy(tiny_run, tmp_path) -> Path:
    """A head that may be changed."""
    return Path(shutil.copytree(tiny_run / "run/head", tmp_path / "head"))


def change_head(folder: Path, **changes: object) -> None:
    """Change a head's ``config.json`` (``reading__long`` for a field within another one)."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        inside = config[above[0]] if above else config
        inside[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    for name in ("kind", "schema", "versions", "files", "fingerprint"):
        del manifest[name]
    artifacts.write_manifest(folder, "head", manifest)


# -- where predictions cannot go -------------------------------------------------------------


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_stdout_has_names(spin, head, source, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    plain = spin("predict", head, source, "--on-error", "skip")
    named = spin("predict", head, source, "--on-error", "skip", "-o", name)
    assert (named.code, named.out) == (0, plain.out)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("option", [(), ("--force",), ("--resume",)])
def test_no_file_takes_the_place_of_what_is_none(spin, head, source, tmp_path, kind, option):
    place = tmp_path / "out"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/null")  # were it replaced, the device would be unharmed
    mode = place.lstat().st_mode
    done = spin("predict", head, source, "-o", place, *option)
    assert (done.code, done.out) == (4, "")
    assert "where a file was expected" in done.err
    assert place.lstat().st_mode == mode


def test_names_of_open_files_are_no_places_for_a_file(tmp_path):
    (tmp_path / "plain").write_text("mine")
    with (tmp_path / "plain").open() as file:
        for name in (f"/proc/self/fd/{file.fileno()}", f"/dev/fd/{file.fileno()}", "/dev/stderr"):
            with pytest.raises(ArtifactError, match="where a file was expected"):
                atomic.check_free(Path(name), force=True)
    atomic.check_free(Path("/dev/shm/spin-test-of-a-name"), force=False)


# -- going on with other options -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((), ("--top", "1"), "--top was not given, and is 1 now"),
        (("--top", "1"), (), "--top was 1, and is not given now"),
        ((), ("--threshold", "0.7"), "--threshold was not given, and is given now"),
        (("--threshold", "0.7"), (), "--threshold was given, and is not given now"),
        (("--threshold", "0"), ("--threshold", "1"), "--threshold was another"),
        (("--threshold", "1"), ("--threshold", "0"), "--threshold was another"),
        ((), ("--decision-threshold", "bad=0.999"), "--decision-threshold was another"),
        (("--decision-threshold", "good=0.001"), (), "--decision-threshold was another"),
        (
            ("--top", "1"),
            ("--top", "1", "--decision-threshold", "bad=0.999"),
            "--decision-threshold was another: bad is given at",
        ),
        ((), ("--explain", "2"), "--explain was not given, and is 2 now"),
        (("--explain", "2"), ("--explain", "3"), "--explain was 2, and is 3 now"),
        (("--explain", "5"), ("--explain-tokens",), "--explain-tokens was not given"),
        ((), ("--keep-columns",), "--keep-columns was not given, and is given now"),
        (("--keep-columns",), (), "--keep-columns was given, and is not given now"),
        (
            ("--keep-columns",),
            ("--keep-columns", "--top", "1"),
            "--top was not given, and is 1 now",
        ),
    ],
)
def test_resume_names_the_options_that_were_others(
    spin, head, source, tmp_path, kind, before, after, words
):
    out, common = tmp_path / "out", ("--output-format", kind, "--on-error", "skip", "-o")
    assert spin("predict", head, source, *common, out, *before).code == 0
    content = out.read_bytes()
    done = spin("predict", head, source, *common, out, "--resume", *after)
    assert (done.code, done.out) == (4, ""), done.err
    assert words in done.err
    assert "Give the options" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "out"]
    assert out.read_bytes() == content


def test_resume_takes_no_column_of_the_input_for_its_own(spin, head, tmp_path):
    rows = [(text, "mine", "x") for text in TEXTS]
    source = write_csv(tmp_path / "in.csv", rows, ("text", "label_1", "prob_1"))
    whole, part = tmp_path / "whole.csv", tmp_path / "part.csv"
    assert spin("predict", head, source, "--keep-columns", "-o", whole).code == 0
    part.write_bytes(whole.read_bytes()[:-50])
    done = spin("predict", head, source, "--keep-columns", "-o", part, "--resume")
    assert done.code == 0, done.err
    assert part.read_bytes() == whole.read_bytes()


def test_a_table_needs_its_column_of_errors(spin, head, source, tmp_path):
    out, options = tmp_path / "out.csv", ("--output-format", "csv", "--resume")
    assert spin("predict", head, source, "-o", out, *options[:2]).code == 3
    done = spin("predict", head, source, "-o", out, *options, "--on-error", "skip")
    assert (done.code, "--on-error was not given, and is skip now" in done.err) == (4, True)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("options", [EVERYTHING, ("--top", "9", "--on-error", "skip")])
def test_resume_goes_on_with_the_same_options(spin, head, source, tmp_path, kind, options):
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = (*options, "--output-format", kind, "-o")
    assert spin("predict", head, source, *options, whole).code == 0
    part.write_bytes(whole.read_bytes()[:-50])
    done = spin("predict", head, source, *options, part, "--resume")
    assert done.code == 0, done.err
    assert "16 rows are kept" in done.err
    assert part.read_bytes() == whole.read_bytes()


def test_json_lines_may_go_on_behind_bad_rows(spin, head, source, tmp_path):
    out = tmp_path / "out.jsonl"
    stopped = spin("predict", head, source, "-o", out)
    assert stopped.code == 3
    done = spin("predict", head, source, "-o", out, "--resume", "--on-error", "skip")
    assert done.code == 0, done.err
    assert [row["label"] is None for row in json_lines(out.read_text())].index(True) == 25


def test_another_input_with_the_same_row_numbers_is_not_blamed_on_the_head(spin, head, tmp_path):
    first = write_csv(tmp_path / "a.csv", [(text,) for text in TEXTS], ("text",))
    second = write_csv(
        tmp_path / "b.csv", [(text.translate(str.maketrans("aeo", "xyz")),) for text in TEXTS],
        ("text",),
    )  # fmt: skip
    out = tmp_path / "out.jsonl"
    assert spin("predict", head, first, "-o", out).code == 0
    content = out.read_bytes()
    done = spin("predict", head, second, "-o", out, "--resume")
    assert done.code == 4
    assert "b.csv, line" in done.err
    assert "The input, the head" in done.err
    assert "--resume goes on" not in done.err
    assert out.read_bytes() == content  # under its own name


# -- one advice ------------------------------------------------------------------------------


def fail_at(monkeypatch, row: str, number: int) -> None:
    """Let the disk be full, say, when the row of this id is written."""
    record = Style.record

    def failing(self, found):
        if found.id == row:
            raise OSError(number, os.strerror(number))
        return record(self, found)

    monkeypatch.setattr(Style, "record", failing)


@pytest.mark.parametrize(
    ("row", "kind", "advice"),
    [
        ("20", "jsonl", "keeps what is done: the same command with --resume goes on"),
        ("20", "csv", "keeps what is done: the same command with --resume goes on"),
        ("20", "parquet", "keeps what is done: --force begins again"),
        ("3", "jsonl", "run the same command again"),
    ],
)
def test_a_full_disk_has_one_advice(spin, head, tmp_path, monkeypatch, row, kind, advice):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    source = write_csv(tmp_path / "in.csv", [(text,) for text in TEXTS], ("text",))
    fail_at(monkeypatch, row, errno.ENOSPC)
    done = spin("predict", head, source, "-o", tmp_path / "out", "--output-format", kind)
    assert (done.code, done.out) == (4, "")
    assert "the disk is full" in done.err
    assert "stopped" not in done.err
    assert advice in done.err
    others = {"run the same command again", "--resume goes on", "--force begins again"}
    assert [other for other in others if other in done.err and other not in advice] == []
    assert (tmp_path / "out.partial").exists() == (row == "20")
    again = spin("predict", head, source, "-o", tmp_path / "out", "--output-format", kind)
    assert ("--resume" in again.err) == ("--resume" in advice)


def test_a_bad_row_tells_how_to_go_on_with_the_file(spin, head, source, tmp_path):
    done = spin("predict", head, source, "-o", tmp_path / "out.jsonl")
    assert done.code == 3
    assert "in.csv, line 27" in done.err
    assert "--on-error skip" in done.err
    assert "out.jsonl.partial keeps what is done: the same command with --resume" in done.err
    assert "stopped" not in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("what", ["predict", "inspect", "--help"])
def test_a_full_disk_behind_stdout_is_a_plain_error(head, source, what, unbuffered):
    args = {"predict": [head, source, "--on-error", "skip"], "inspect": [head]}.get(what, [])
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*SPIN, what, *map(str, args)], env=ENV | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.startswith("error: stdout: No space left on device\n  ↳ Make room")
    assert done.stderr.count("\n") == 2


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes stdout")
def test_a_closed_stdout_and_a_place_that_is_none_are_no_bugs(spin, head, source, tmp_path):
    program = "import sys; sys.stdout = None; from spin_cli.cli import run; sys.exit(run())"
    args = ["predict", str(head), str(source), "--on-error", "skip"]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], env=ENV, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    refused = spin(*args, "-o", source / "out.jsonl")
    assert refused.code == 4
    assert str(source) in refused.err
    assert "↳" in refused.err


# -- what is no input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "say"),
    [
        (b"text,label\nfine,good\n", "csv"),
        (b'"label","text"\r\ngood,fine\r\n', "csv"),
        (b"id\ttext\n1\tfine\n", "tsv"),
        (b"text;label\nfine;good\n", "csv"),
        (b"text\nfine\n", "csv"),
        (b'\xef\xbb\xbf{"text": "fine"}\n', "jsonl"),
    ],
)
def test_a_table_on_stdin_is_not_read_as_lines(spin, head, stdin, say):
    done = spin("predict", head, "-", stdin=stdin)
    assert (done.code, done.out) == (2, "")
    assert f"--format {say}" in done.err
    assert "<stdin>, line 1" in done.err
    as_lines = spin("predict", head, "-", "--format", "lines", stdin=stdin)
    assert (as_lines.code, len(json_lines(as_lines.out))) == (0, stdin.count(b"\n"))
    if b";" not in stdin:  # which --format csv refuses with a reason of its own
        as_said = spin("predict", head, "-", "--format", say, stdin=stdin)
        assert (as_said.code, len(json_lines(as_said.out))) == (0, 1)


@pytest.mark.parametrize(
    "first",
    ["text, please", "the text,a label", "{text}", "{'text': 1}", "[1]", '{"body": "text"}',
     "text\rlabel", "Text", "word " * 40_000 + ",text"],
)  # fmt: skip
def test_texts_on_stdin_remain_texts(spin, head, first):
    done = spin("predict", head, "-", stdin=f"{first}\ntext,label\n".encode())
    assert (done.code, len(json_lines(done.out))) == (0, 2), done.err


def test_a_text_in_place_of_a_file_is_told_how_to_go_in(spin, head):
    for text in ("I want my money back", "money", "money " * 500, "3.50 back"):
        done = spin("predict", head, text)
        assert (done.code, done.out) == (3, "")
        assert "no such file" in done.err
        assert f"echo '…' | spin predict {head} -" in done.err
        assert len(done.err) < 500


def test_a_missing_file_of_a_known_kind_is_named(spin, head, source):
    done = spin("predict", head, source.with_name("inn.csv"))
    assert (done.code, "did you mean" in done.err) == (3, True)


@pytest.mark.parametrize("part", ["", "selection", "activations", "haed"])
def test_the_head_is_pointed_at_where_it_lies_beside(spin, tiny_run, part):
    done = spin("predict", tiny_run / "run" / part, "-")
    assert done.code == 4
    assert f"Give {tiny_run / 'run/head'}, which is there" in done.err
    assert "first" not in done.err


@pytest.mark.parametrize(("command", "wanted"), [("select", "activations"), ("train", "selection")])
def test_a_run_is_not_what_a_stage_reads(spin, tiny_run, command, wanted):
    done = spin(command, tiny_run / "run")
    assert done.code == 4
    assert f"Give {tiny_run / 'run' / wanted}, which is there" in done.err


def test_an_empty_line_in_a_pipe_says_how_to_live_with_it(spin, head):
    done = spin("predict", head, "-", stdin=b"fine\n\nfine\n")
    assert (done.code, len(json_lines(done.out))) == (3, 1)
    assert "--on-error skip" in done.err


def test_a_label_that_the_head_lacks_is_named_with_its_place(spin, head, tmp_path):
    source = write_csv(tmp_path / "in.csv", [("fine", "good"), ("so so", "middling")])
    done = spin("predict", head, source, "--evaluate")
    assert done.code == 3
    assert f"{source}, line 3: label 'middling'" in done.err
    assert "--label-column" in done.err


def test_a_text_that_is_too_long_is_named_with_its_place(spin, head_copy, tmp_path):
    change_head(head_copy, reading__long="error", reading__max_length=12)
    source = write_csv(tmp_path / "in.csv", [("fine",), ("fine " * 30,)], ("text",))
    done = spin("predict", head_copy, source)
    assert (done.code, len(json_lines(done.out))) == (3, 1)
    assert f"{source}, line 3: 32 tokens, the limit is 12" in done.err
    skipped = spin("predict", head_copy, source, "--on-error", "skip")
    assert f"{source}, line 3: 32 tokens" in json_lines(skipped.out)[1]["error"]


def test_extract_names_the_place_of_a_text_that_is_too_long(spin, tmp_path):
    rows = [("fine", "a"), ("bad", "b")] * 20 + [("fine " * 30, "a")]
    source = write_csv(tmp_path / "train.csv", rows)
    done = spin(
        "extract", source, "-m", MODEL, "-o", tmp_path / "out", "--long", "error", "--max-length",
        "12", "--layers", "0",
    )  # fmt: skip
    assert (done.code, f"{source}, line 42: 32 tokens" in done.err) == (3, True), done.err


def test_a_missing_package_is_no_wrong_option(spin, head, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for args in ((source, "-o", tmp_path / "out.parquet"), (tmp_path / "in.parquet",)):
        (tmp_path / "in.parquet").write_bytes(b"PAR1")
        done = spin("predict", head, *args)
        assert done.code == 5, done.err
        assert "'pyarrow'" in done.err and "pip install 'spin-cli[parquet]'" in done.err


def test_watch_alone_is_refused(spin, head):
    done = spin("predict", head, "-", "--watch", "good", stdin=b"fine")
    assert (done.code, done.out, "--stream-tokens" in done.err) == (2, "", True)


def test_a_model_of_too_few_blocks_is_another_model(head_copy, monkeypatch):
    def refuse(*_args, **_options):
        raise ArtifactError("layer_16: the model has 6 blocks only")

    monkeypatch.setattr("spin_cli.backbone.load", refuse)
    with pytest.raises(ArtifactError, match="another model than here: layer_16") as error:
        prediction.open_predictor(head_copy, PredictConfig(model="here"))
    assert f"It needs {MODEL}; give its place with --model" in str(error.value.hint)
