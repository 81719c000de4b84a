"""Heads of every kind, judged on the same rows; test rows are not within reach."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from spin_cli.activations import Feature
from spin_cli.choices import HeadKind, Penalty, Search, Site, site_name, sites_of
from spin_cli.config import (
    CV_FEW_FOLDS,
    CV_FEW_ROWS,
    CV_FOLDS,
    CV_MAX_ROWS,
    CV_VAL_ROWS,
    Progress,
    TrainConfig,
)
from spin_cli.errors import DataError, SpinError, UsageError
from spin_cli.names import list_names
from spin_cli.training.blend import blends, with_stacks
from spin_cli.training.calibration import OUT_OF_FOLD, Evidence
from spin_cli.training.folds import Folds, too_large
from spin_cli.training.inputs import Inputs
from spin_cli.training.pick import Judged, best_of
from spin_cli.training.search import (
    finalists,
    first_choices,
    is_allowed,
    next_choices,
    pooling_groups,
    try_all,
)
from spin_cli.training.stack import DEPTHS, WIDEST, fit_stacks
from spin_cli.training.stack import FOLDS as STACK_FOLDS
from spin_cli.training.table import Reader
from spin_cli.training.tried import Found

FAST_FINALISTS = 6
FEW_ROWS = 100
"""With fewer rows the stack of all layers is taken: of hundreds of heads one would win by luck."""


def search(reader: Reader, inputs: Inputs, progress: Progress) -> Found:
    """Choose what the head reads and its penalty; test rows are not within reach.

    A coarse grid of masks is judged on val rows, then what lies around its best. Where these rows
    are few, the best of each kind are judged again by cross-validation, with the neurons of each
    fold selected anew, and what lies around the best of them. Blends of these, stacks of whole
    matrices, and means of a stack and one of the others join them; with fewer than `FEW_ROWS` rows
    the deepest stack is taken.
    """
    poolings = list(dict.fromkeys(feature.pooling for feature in inputs.features))
    config = _possible(inputs.config, {feature.site for feature in inputs.features})
    split, deepest, folds = inputs.split, inputs.deepest, fold_count(inputs)
    groups = pooling_groups(poolings)
    if config.search is Search.FAST and stack_features(inputs):
        groups = groups[: len(poolings)]  # a stack has them side by side for less
    first = first_choices(config, groups, deepest)
    done, total = 0, len(first) + 12 + 18 * folds + len(stack_features(inputs))

    def step() -> None:
        nonlocal done
        done += 1
        progress("train", min(done, total), total)

    tried: list[Judged] = []
    for group in groups:  # only the columns of one group in memory at a time
        part = [choice for choice in first if choice.poolings == group]
        tried += try_all(part, reader, split, config, step)
        reader.forget()
    if not tried:
        raise nothing_to_try(reader)
    y_val = split.codes[split.val]
    known = {item.main.choice for item in tried}
    around = next_choices(best_of(tried, y_val, split.metric).main.choice, config, deepest)
    fresh = [choice for choice in dict.fromkeys(around) if choice not in known]
    tried += try_all(fresh, reader, split, config, step)
    y = split.codes if folds else y_val
    judged = cross_validate(reader, inputs, tried, folds, step) if folds else tried
    most = config.max_neurons or sys.maxsize
    if not config.masks_only:
        blended = blends(judged, y, reader.count)
        judged = judged + [item for item in blended if item.neurons <= most]
    reader.forget()
    few, depths = len(split.codes) < FEW_ROWS, stack_depths(inputs)
    depths = depths[-1:] if few else depths
    stacked = stacks(reader, inputs, whole=bool(folds), depths=depths, step=step)
    mixed = with_stacks(judged, stacked, y, lambda item: item.size(reader))
    judged = judged + stacked + [item for item in mixed if item.neurons <= most]
    best = best_of(stacked if few and stacked else judged, y, split.metric)
    progress("train", total, total)
    evidence = Evidence(y, best.probs, tuple(inputs.classes), OUT_OF_FOLD if folds else "val")
    refit = bool(folds) if config.refit is None else config.refit
    if folds:
        return Found(best, tried, judged, evidence, refit)
    return Found(best, judged, [], evidence, refit)


def nothing_to_try(reader: Reader) -> SpinError:
    """Why no mask makes a head."""
    if any(len(item.neurons) for item in reader.ranked.values()):
        return UsageError("no head is left to try: --max-layer or --max-neurons allow none")
    return DataError(
        "the selection has no neurons: in no matrix does one say anything about the classes",
        "Look whether the texts are cut to what they all begin with (--max-length), are all alike,"
        " or have labels that do not belong to them.",
    )


def stacks(
    reader: Reader,
    inputs: Inputs,
    *,
    whole: bool,
    depths: Sequence[int],
    step: Callable[[], None] = lambda: None,
) -> list[Judged]:
    """Stacks on all neurons, fitted to train rows and judged by val rows; *whole*: out of fold."""
    split, config = inputs.split, inputs.config
    if whole:
        split = replace(split, train=np.arange(len(split.codes)))
    return fit_stacks(
        reader, stack_features(inputs), split, inputs.groups,
        judge=None if whole else split.val, depths=depths,
        seed=config.seed, workers=config.workers, step=step,
    )  # fmt: skip


def stack_features(inputs: Inputs) -> list[Feature]:
    """The matrices that a stack may use; none where the options ask for something else."""
    config = inputs.config
    other = config.head is not HeadKind.LOGISTIC or config.penalty is not Penalty.L2
    if other or config.masks_only:
        return []
    sites = {site for name in config.sites for site in sites_of(name)}
    found = [
        feature
        for feature in inputs.features
        if feature.site in sites
        and feature.width <= WIDEST
        and inputs.layers.index(feature.layer) <= inputs.deepest
    ]
    allowed = config.max_neurons or sys.maxsize
    return found if sum(feature.width for feature in found) <= allowed else []


def stack_depths(inputs: Inputs) -> list[int]:
    """Depths for stacks, evenly spread."""
    features = stack_features(inputs)
    deepest = max((inputs.layers.index(feature.layer) for feature in features), default=-1)
    spread = np.linspace(deepest / DEPTHS, deepest, DEPTHS).round().astype(int)
    return np.unique(spread).tolist() if features else []


def fold_count(inputs: Inputs) -> int:
    """Folds of the cross-validation; 0: none.

    A class takes two rows, so that one is left to learn from where the other is held out.
    """
    config, rows = inputs.config, len(inputs.search_rows)
    if config.cv is not None:
        if single := lone_classes(inputs):
            most = f"none, as the class {single[0]!r} has a single row of train and val"
        else:
            most = f"from 2 to {rows} (rows of train and val)"
        if config.cv == 1 or config.cv > (0 if single else rows):
            raise UsageError(f"--cv {config.cv}: {most}; or 0 for none")
        return config.cv
    if _enough_val(inputs) or lone_classes(inputs):
        return 0
    return CV_FOLDS if rows <= CV_FEW_ROWS else CV_FEW_FOLDS


def _enough_val(inputs: Inputs) -> bool:
    """Whether val rows alone tell heads apart, or cross-validation would take too long."""
    return len(inputs.rows["val"]) >= CV_VAL_ROWS or len(inputs.search_rows) > CV_MAX_ROWS


def lone_classes(inputs: Inputs) -> list[str]:
    """Classes with one row of train and val; labels are not dealt out one by one."""
    if inputs.codes.ndim == 2:
        return []
    counts = np.bincount(inputs.codes[inputs.search_rows])
    return [inputs.classes[code] for code in np.flatnonzero(counts < 2)]


def without_folds(inputs: Inputs) -> list[str]:
    """What to say where a class too rare is all that stands in the way of cross-validation."""
    single = lone_classes(inputs)
    if inputs.config.cv is not None or _enough_val(inputs) or not single:
        return []
    return [
        "no cross-validation, as a single row of train and val has the class"
        f" {list_names(single, 5)}: all choices were made on {len(inputs.rows['val'])} val rows"
        f" instead of all {len(inputs.search_rows)}; add rows of it, or leave it out"
    ]


def parted_groups(inputs: Inputs) -> list[str]:
    """What to say where more texts are near-duplicates of each other than fit into a fold."""
    folds, groups = fold_count(inputs), inputs.groups
    if groups is None:
        return []
    if not folds:  # then a stack alone has folds, of train rows
        groups = groups[: len(inputs.rows["train"])]
    if stack_features(inputs):
        folds = max(folds, STACK_FOLDS)
    count = int(too_large(groups, folds).sum())
    if not count:
        return []
    return [
        f"{count:,} of {len(groups):,} texts have so much of their wording in common that they do"
        f" not fit into one of {folds} folds: they were dealt out as if they were different texts,"
        " so that what is judged out of fold may look too good"
    ]


def cross_validate(
    reader: Reader, inputs: Inputs, tried: list[Judged], folds: int, step: Any
) -> list[Judged]:
    """Judge the best of each kind out of fold, then what lies around the best of these."""
    split, config = inputs.split, inputs.config
    crossing = Folds(
        reader, split, folds, config.workers, config.seed, inputs.groups,
        selecting=inputs.selecting,
    )  # fmt: skip
    full = config.search is Search.FULL
    some = finalists(tried, split, None if full else FAST_FINALISTS)
    crossed = crossing.judge(some, step)
    best = best_of(crossed, split.codes, split.metric).main
    near = {
        choice: some[best.choice] if full else (best.strength,)
        for choice in next_choices(best.choice, config, inputs.deepest, None if full else 2)
        if choice not in some and is_allowed(reader.count(choice), split, config)
    }
    return crossed + crossing.judge(near, step)


def _possible(config: TrainConfig, sites: set[Site]) -> TrainConfig:
    asked = [set(sites_of(name)) for name in config.sites]
    kept = tuple(dict.fromkeys(site_name(each) for each in asked if each <= sites))
    if not kept:
        there = ", ".join(site.value for site in Site if site in sites)
        raise UsageError(f"--site {','.join(config.sites)}: the activations have {there}")
    return replace(config, sites=kept)
