"""Heads that read several sites, as one, as a stack or as a blend, and what is said of them."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from spin_cli import reports, training
from spin_cli.choices import Pooling, Site, site_name, sites_of
from spin_cli.config import AblateConfig, ReportConfig, TrainConfig
from spin_cli.errors import UsageError
from spin_cli.head import load_head
from spin_cli.reports.sources import read_run
from spin_cli.training import blend, contest
from spin_cli.training.ablation import ablate
from tests.helpers import MODEL, run_quietly, write_data


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> Path:
    """A run without its head, with `gate` beside another site."""
    folder = tmp_path_factory.mktemp("gated")
    write_data(folder / "data")
    run_quietly(
        "extract", folder / "data", "-m", MODEL, "-o", folder / "activations",
        "--site", "hidden,gate", "--pooling", "mean,max", "--layers", "1-2",
    )  # fmt: skip
    run_quietly("select", folder / "activations", "-o", folder / "selection")
    return folder


def read_of(head: Path) -> set[tuple[str, str, str]]:
    return {(f.layer, f.site.value, f.pooling.value) for f in load_head(head).features}


def test_every_set_of_sites_has_one_name():
    sets = [set(some) for n in range(1, 5) for some in combinations(Site, n)]
    names = [site_name(some) for some in sets]
    assert len(set(names)) == len(sets) == 15
    assert [set(sites_of(name)) for name in names] == sets
    assert site_name([Site.FFN, Site.HIDDEN]) == "both"
    assert site_name([Site.GATE, Site.HIDDEN]) == "hidden+gate"
    assert set(sites_of("hidden+ffn")) == set(sites_of("both"))
    for wrong in ("", "hidden+", "both+gate", "up"):
        with pytest.raises(ValueError, match="not a valid Site"):
            sites_of(wrong)


def test_a_head_of_gate_and_another_site_from_search_to_answers(spin, gated, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(gated, run)
    done = spin("train", run / "selection", "--max-layer", "1", "--json")
    assert done.code == 0, done.err
    kinds = {entry["site"] for entry in json.loads(done.out)["metrics"]["frontier"]}
    listed = json.loads((run / "head/metrics.json").read_text())["candidates"]
    stacks = [e for e in listed if "matrices" in e and "parts" not in e]
    assert {e["site"] for e in stacks} == {"hidden+gate"}
    assert kinds <= {"hidden", "gate", "hidden+gate"}
    predicted = spin("predict", run / "head", run / "data/test.csv", "--check-exit", "5")
    assert predicted.code == 0, predicted.err
    for command in (("inspect", run / "head"), ("report", run, "--no-model", "-o", run / "r.html")):
        done = spin(*command)
        assert done.code == 0, done.err


def test_sites_side_by_side_are_those_that_were_asked_for(spin, gated, tmp_path):
    head = tmp_path / "head"
    options = ("--site", "gate+hidden", "--masks-only", "--cv", "0")
    done = spin("train", gated / "selection", "-o", head, *options)
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80 and "log loss" in done.out
    chosen = json.loads((head / "metrics.json").read_text())["chosen"]
    assert chosen["site"] == "hidden+gate"
    assert {site for _, site, _ in read_of(head)} == {"hidden", "gate"}
    found = ablate(gated / "selection", head, AblateConfig(etas=(0.9,), draws=1))
    assert set(found["what"]["sites"]) == {"hidden", "gate"}
    only = ablate(gated / "selection", head, AblateConfig(site="gate", etas=(0.9,), draws=1))
    assert only["what"]["sites"] == ["gate"]
    with pytest.raises(UsageError, match="the activations have hidden, gate"):
        training.train(gated / "selection", tmp_path / "no", TrainConfig(sites=("ffn", "both")))
    for command in (("train", gated / "selection"), ("ablate", gated / "selection")):
        refused = spin(*command, "--site", "hidden+up")
        assert refused.code == 2 and "hidden, ffn, gate, router, both" in refused.err
    assert spin("ablate", gated / "selection", "--site", "hidden,gate").code == 2


def test_a_blend_is_told_of_by_what_all_its_parts_read(gated, tmp_path, monkeypatch):
    def differing(judged, y, count):
        """The blend of two heads that differ in site and pooling, the shallower one first."""
        pairs = [
            (one, other)
            for one, other in combinations(sorted(judged, key=lambda item: item.depth), 2)
            for a, b in [(one.main.choice, other.main.choice)]
            if a.site != b.site and a.poolings != b.poolings and a.depth < b.depth
        ]
        return blend.blends(pairs[0], y, count)

    monkeypatch.setattr(contest, "FEW_ROWS", 0)  # else the stack is taken
    monkeypatch.setattr(contest, "blends", differing)
    monkeypatch.setattr(blend, "_greedy", lambda logs, *_: list(range(len(logs))))
    best_of = contest.best_of
    monkeypatch.setattr(
        contest, "best_of",
        lambda judged, *rest: next(
            (i for i in judged if len(i.parts) > 1 and i.linear is None), None
        ) or best_of(judged, *rest),
    )  # fmt: skip
    config = TrainConfig(sites=("hidden", "gate"), cv=3, etas=(0.4, 1.0))
    report = training.train(gated / "selection", tmp_path / "head", config)["metrics"]
    parts = report["chosen"]["parts"]
    assert len(parts) == 2 and len({p["site"] for p in parts}) == 2
    assert report["chosen"]["depth"] == parts[1]["depth"] > parts[0]["depth"]

    layers = ["layer_01", "layer_02"]
    expected = {
        (layer, p["site"], p["pooling"]) for p in parts for layer in layers[: p["depth"] + 1]
    }
    assert read_of(tmp_path / "head") <= expected
    found = ablate(gated / "selection", tmp_path / "head", AblateConfig(etas=(0.9,), draws=1))
    assert found["what"]["matrices"] == len(expected) == 3
    assert set(found["what"]["sites"]) == {"hidden", "gate"}
    assert set(found["what"]["poolings"]) == {"mean", "max"}

    run = read_run(tmp_path / "head")
    assert (run.choice.site, run.choice.depth) == ("hidden+gate", 1)
    assert set(run.choice.poolings) == {Pooling.MEAN, Pooling.MAX}
    assert run.choice.eta == max(p["eta"] for p in parts)
    reports.report(tmp_path / "head", tmp_path / "page.html", ReportConfig(use_model=False))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    poolings = "+".join(dict.fromkeys(p["pooling"] for p in parts))
    said = f"hidden+gate, {poolings}-pooled, a blend of 2 heads on masked neurons"
    assert said in page and "it is a blend of 2 heads on masked neurons" in page
