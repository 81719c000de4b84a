"""`spin run` as a pipeline: what is fresh and what is not, and spin.toml."""

from __future__ import annotations

import filecmp
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tomllib

from spin_cli import artifacts, backbone, extraction, pipeline, recipe
from spin_cli.choices import Control, HeadKind, Pooling
from spin_cli.cli import demo
from spin_cli.errors import UsageError
from tests.helpers import MODEL

BARE = {"data": {"path": "texts"}, "model": {"model": MODEL}}


@pytest.fixture
def run_copy(tiny_run, tmp_path) -> Path:
    """A run and its data, side by side as they were, that may be damaged."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny")) / "run"
    made = recipe.recipe_of(recipe.read_toml(run / "spin.toml"), "here")
    edit(run / "spin.toml", f'path = "{made.data}"', 'path = "../data"')
    return run


def states(spin, run, *args, code=4) -> dict[str, tuple[str, str]]:
    done = spin("status", run, "--json", *args)
    assert done.code == code, done.err
    found = json.loads(done.out)
    assert found["fresh"] == (code == 0)
    return {s["stage"]: (s["standing"], "; ".join(s["why"])) for s in found["stages"]}


# -- standing --------------------------------------------------------------------------------


def test_a_whole_run_is_fresh(spin, tiny_run):
    found = states(spin, tiny_run / "run", "--checksums", code=0)
    assert set(found.values()) == {("fresh", "")}
    assert "fresh" in spin("status", tiny_run / "run").out


def test_without_spin_toml_a_run_is_compared_with_its_own_options(spin, run_copy):
    (run_copy / "spin.toml").unlink()
    assert set(states(spin, run_copy, code=0).values()) == {("fresh", "")}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_changed_option_is_named_with_its_values(spin, run_copy):
    edit(run_copy / "spin.toml", "path_points = 20", "path_points = 7")
    found = states(spin, run_copy)
    assert found["activations"] == ("fresh", "")
    assert found["selection"] == ("stale", "options.path_points: 20 → 7")
    assert found["head"] == ("stale", "selection stale")


def test_changed_data_are_named(spin, run_copy):
    with (run_copy.parent / "data/val.csv").open("a") as file:
        file.write("One more good film.,good\n")
    found = states(spin, run_copy)
    assert found["activations"] == ("stale", "data.val changed")
    (run_copy.parent / "data/train.csv").unlink()
    assert "train" in states(spin, run_copy)["activations"][1]


def test_damage_of_each_kind_is_found(spin, run_copy):
    head = run_copy / "head/head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    assert states(spin, run_copy, code=0)["head"][0] == "fresh"  # sizes alone do not tell
    assert states(spin, run_copy, "--checksums")["head"][0] == "corrupt"
    told = spin("status", run_copy, "--checksums")
    assert (told.out + told.err).rstrip().endswith("spin.toml --force")
    (run_copy / "selection/masks.h5").unlink()
    assert states(spin, run_copy)["selection"][0] == "corrupt"
    shutil.rmtree(run_copy / "activations")
    found = states(spin, run_copy)
    assert [found[s][0] for s in pipeline.STAGES] == ["missing", "corrupt", "stale"]


def test_an_interrupted_extraction_is_partial_and_says_how_far_it_is(spin, run_copy):
    shutil.rmtree(run_copy / "activations")
    options = recipe.recipe_of(recipe.read_toml(run_copy / "spin.toml"), "here")

    def stop(_what, done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extraction.extract(
            options.data, run_copy / "activations", options.extracting, progress=stop
        )
    assert states(spin, run_copy)["activations"] == ("partial", "0 of 1 windows of rows done")
    edit(run_copy / "spin.toml", 'layers = "0-2"', 'layers = "0-1"')
    found = states(spin, run_copy)["activations"]
    assert found[1].endswith("begun with another options.layers: 0-2 → 0-1")
    done = spin("run", run_copy / "spin.toml", "-s", 'extract.poolings=["mean"]')
    assert done.code == 4
    assert "options.poolings (--pooling): mean,max,first → mean" in done.err
    begun = ("-s", 'extract.poolings=["mean", "max", "first"]', "--layers", "0-2")
    done = spin("run", run_copy / "spin.toml", *begun)
    assert done.code == 0, done.err
    assert "resume: 0 of 1 windows of rows are done" in done.err


def test_a_folder_of_somebody_else_is_not_replaced(spin, run_copy):
    shutil.rmtree(run_copy / "selection")
    (run_copy / "selection").mkdir()
    (run_copy / "selection/thesis.txt").write_text("mine")
    assert states(spin, run_copy)["selection"][0] == "foreign"
    done = spin("run", run_copy / "spin.toml")
    assert done.code == 4
    assert (run_copy / "selection/thesis.txt").read_text() == "mine"


def test_a_run_of_other_data_or_another_model_is_replaced_with_force_alone(
    spin, run_copy, tmp_path, monkeypatch
):
    before = (run_copy / "activations/manifest.json").read_bytes()
    recipe_before = (run_copy / "spin.toml").read_bytes()
    other = tmp_path / "other.csv"
    other.write_text((run_copy.parent / "data/train.csv").read_text() + "So good.,good\n")
    call = ("run", other, "-m", MODEL, "-o", run_copy, "--layers", "0-2")
    done = spin(*call)
    assert done.code == 4
    assert "train.csv" in done.err and str(other) in done.err and "--force" in done.err
    identify = backbone.identify

    def another(options):
        options, identity = identify(options)
        return options, identity | {"id": "org/other", "weights": []}

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "identify", another)
        done = spin("run", run_copy / "spin.toml")
    assert done.code == 4
    assert f"{MODEL}, not of org/other" in done.err
    assert (run_copy / "activations/manifest.json").read_bytes() == before
    assert (run_copy / "spin.toml").read_bytes() == recipe_before
    done = spin(*call, "--force")
    assert done.code == 0, done.err
    assert (run_copy / "activations/manifest.json").read_bytes() != before


def test_a_run_says_what_its_stages_note(spin, run_copy):
    """Of data that were edited in place, which needs no --force."""
    data = run_copy.parent / "data"
    with (data / "test.csv").open("a") as file:
        file.write((data / "train.csv").read_text().splitlines(keepends=True)[1])
    done = spin("run", run_copy / "spin.toml", "-s", "model.max_length=7")
    assert done.code == 0, done.err
    assert "note: 1 of the texts of test are in the train file too" in done.err
    assert "note: 101 of 101 texts were cut to the limit" in done.err


def test_activations_of_another_program_are_not_replaced(spin, run_copy):
    path = run_copy / "activations/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["versions"]["spin"]
    manifest["checksum"] = artifacts.checksum(manifest)
    path.write_text(json.dumps(manifest))
    assert states(spin, run_copy)["activations"][0] == "foreign"
    done = spin("run", run_copy / "spin.toml")
    assert done.code == 4 and "another program" in done.err


def test_no_run_is_an_error_with_code_4(spin, tmp_path):
    done = spin("status", tmp_path)
    assert done.code == 4
    assert "no run" in done.err


def test_a_dry_run_shows_the_plan_and_writes_nothing(spin, tiny_run, tmp_path):
    done = spin("run", tiny_run / "run", "-o", tmp_path / "new", "--dry-run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [s["standing"] for s in found["stages"]] == ["missing"] * 3
    assert found["estimate"]["rows"] == 100
    assert list(tmp_path.iterdir()) == []
    done = spin("run", tiny_run / "run", "--dry-run", "-s", "train.cv=3", "--json")
    found = json.loads(done.out)
    assert found["estimate"] is None
    assert found["stages"][2]["why"] == ["options.cv: none → 3"]


# -- spin.toml -------------------------------------------------------------------------------


def test_spin_toml_makes_the_same_run_again(spin, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths in the file do not count from here
    done = spin("run", tiny_run / "run/spin.toml", "-o", "again")
    assert done.code == 0, done.err
    first, again = tiny_run / "run", tmp_path / "again"
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert len(names) > 10
    for name in names:
        if name.name == "spin.toml":  # it lies elsewhere, so its path to the data differs
            one, other = (recipe.read_toml(folder / name) for folder in (first, again))
            assert (
                Path(one["data"].pop("path")).resolve() == Path(other["data"].pop("path")).resolve()
            )
            assert one == other
        elif name.name == "manifest.json" and name.parent.name == "activations":
            one, other = (artifacts.read_json(folder / name) for folder in (first, again))
            assert one["fingerprint"] == other["fingerprint"]
        elif name.name != "log.json":
            assert filecmp.cmp(first / name, again / name, shallow=False), name


def test_options_are_written_and_read_back_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = recipe.recipe_of(BARE, "here")
    odd = replace(
        plain,
        extracting=replace(
            plain.extracting,
            poolings=(Pooling.MEAN, Pooling.FIRST),
            model=replace(
                plain.extracting.model, prompt_template='say "\\{text}"\n\x7f\u2028é', overlap=0.1
            ),
        ),
        selecting=replace(plain.selecting, control=Control.LABELS, etas=(0.05, 1.0), tol=1e-9),
        training=replace(plain.training, head=HeadKind.MLP, refit=False, oof=Path("o of.csv")),
    )
    for made in (plain, odd):
        path = Path("deep/er/spin.toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.to_toml(made, path.parent, "0"), encoding="utf-8")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        assert values["data"]["path"].startswith("../")
        assert recipe.recipe_of(recipe.read_toml(path), "here") == made


def test_every_option_that_may_be_unset_is_so_by_default():
    checked = 0
    for section, kind in recipe.CONFIGS.items():
        hints = get_type_hints(kind)
        for field in fields(kind):
            if type(None) in get_args(hints[field.name]):
                assert field.default is None, (section, field.name)
                checked += 1
    assert checked > 15


def test_paths_count_from_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "models/mine").mkdir(parents=True)
    (tmp_path / "spin.toml").write_text('[data]\npath = "texts"\n[model]\nmodel = "models/mine"\n')
    monkeypatch.chdir(tmp_path / "models")
    found = recipe.recipe_of(recipe.read_toml(Path("../spin.toml")), "here")
    assert found.data == Path("../texts")
    assert found.extracting.model.model == "../models/mine"
    for name in ("bundled:minilm", "someone/model", "/far/away"):
        (tmp_path / "spin.toml").write_text(f'[data]\npath = "/d"\n[model]\nmodel = "{name}"\n')
        found = recipe.recipe_of(recipe.read_toml(Path("../spin.toml")), "here")
        assert (found.data, found.extracting.model.model) == (Path("/d"), name)


def test_the_command_line_goes_before_the_file(spin, tiny_run):
    done = spin(
        "run", tiny_run / "run", "--layers", "0-1", "-s", "select.etas=0.9,0.5", "--dry-run",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    why = {s["stage"]: s["why"] for s in json.loads(done.out)["stages"]}
    assert why["activations"] == ["options.layers: 0-2 → 0-1"]
    assert why["selection"] == ["options.etas: 0.05,0.1,0.2,0.4,0.6,0.8,0.9,… → 0.5,0.9"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.haed=mlp", ("[train]", "'haed'", "head?")),
        ("trian.head=mlp", ("[trian]", "train?")),
        ("train.head=mpl", ("'mpl'", "logistic, mlp")),
        ("train.cv=-1", ("cv = -1", "at least 0")),
        ("train.cv=true", ("cv", "a whole number")),
        ("train.refit=1", ("refit", "true or false")),
        ("select.etas=0.4,3", ("etas", "up to 1")),
        ("select.etas=[]", ("etas", "at least one")),
        ("extract.sites=hidden,fnn", ("sites", "'fnn'", "hidden, ffn")),
        ("train.sites=hidden,x", ("sites", "both")),
        ("model.overlap=5", ("overlap", "from 0 to 0.9")),
        ("model.prompt_template=none", ("{text}",)),
        ("model.system_prompt=be good", ("chat",)),
        ("head=mlp", ("SECTION.KEY=VALUE",)),
    ],
)
def test_a_wrong_option_is_refused_by_name(setting, words):
    with pytest.raises(UsageError) as caught:
        recipe.recipe_of(recipe.override(BARE, [setting]), "here")
    for word in words:
        assert word in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("text", ["[data", "data = 3", "[data]\npath = 3\n", "\x00", "[[data]]"])
def test_a_broken_file_is_a_usage_error(spin, tmp_path, text):
    (tmp_path / "spin.toml").write_text(text)
    done = spin("run", tmp_path / "spin.toml")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert str(tmp_path / "spin.toml") in done.err


def test_foreign_code_is_not_run_because_a_file_says_so(spin, tmp_path):
    (tmp_path / "spin.toml").write_text(
        f'[data]\npath = "x"\n[model]\nmodel = "{MODEL}"\nallow_pickle = true\n'
    )
    done = spin("run", tmp_path / "spin.toml", "--dry-run")
    assert done.code == 2
    assert "--allow-pickle" in done.err


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (("--long", "window"), "Give -s model.long=window"),
        (("--window-overlap=0.2",), "Give -s model.overlap=0.2"),
        (("--eta", "0.5"), "Give -s select.etas=0.5 -s train.etas=0.5"),
        (("--no-refit",), "Give -s train.refit=false"),
        (("--masks-only",), "Give -s train.masks_only=true"),
        (("-s", "extract.long=window"), "It belongs to [model]: model.long"),
        (("--nonsense",), "No such option"),
    ],
)
def test_an_option_of_a_stage_alone_is_told_how_to_be_given(spin, tmp_path, typed, hint):
    done = spin("run", tmp_path, "-m", MODEL, "-o", tmp_path / "run", *typed)
    assert done.code == 2
    assert hint in done.err


@pytest.mark.parametrize(
    ("model", "words"),
    [("./nosuch", "./nosuch: no such model folder"), ("minilm", "Did you mean bundled:minilm?")],
)
def test_a_model_that_is_not_there_is_called_so(spin, tiny_run, tmp_path, model, words):
    done = spin("run", tiny_run / "data", "-m", model, "-o", tmp_path / "run")
    assert done.code == 5
    assert words in done.err


def test_an_unknown_device_is_answered_with_the_usual_ones(spin, tiny_run, tmp_path):
    call = ("extract", tiny_run / "data", "-m", MODEL, "-o", tmp_path / "a", "--device", "gpu")
    done = spin(*call)
    assert done.code == 5
    assert "cuda:0" in done.err and "privateuseone" not in done.err


def test_without_data_or_model_nothing_is_begun(spin, tiny_run, tmp_path):
    run = tmp_path / "run"
    assert spin("run", tmp_path / "none", "-m", MODEL, "-o", run).code == 3
    assert spin("run", tiny_run / "data", "-m", "bundled:none", "-o", run).code == 5
    assert not run.exists()


def test_data_from_a_pipe_are_refused(spin, tmp_path):
    done = spin("run", "-", "-m", MODEL, "-o", tmp_path / "run")
    assert done.code == 2
    assert spin("run", tmp_path, "-o", tmp_path / "run").code == 2
    assert spin("run", tmp_path, "-m", MODEL).code == 2


@pytest.mark.parametrize(("form", "wanted"), [("file", 60), ("folder", 20)])
def test_the_demo_takes_a_file_as_well_as_a_folder(
    spin, tiny_run, run_copy, monkeypatch, form, wanted
):
    """Texts of test are classified; of a file alone its own."""
    monkeypatch.setattr(demo, "run_stages", lambda *_: {})  # the stages are there
    data = tiny_run / "data"
    data = data / "train.csv" if form == "file" else data
    done = spin("demo", "--data", data, "-o", run_copy, "--json")
    assert done.code == 0, done.err
    lines = (run_copy / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == wanted
    assert json.loads(done.out)["predictions"] == str(run_copy / "predictions.jsonl")
