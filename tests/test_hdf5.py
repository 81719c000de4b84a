"""HDF5 and CSV files of strangers: nothing is read that is not what it has to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from spin_cli import activations, artifacts, hdf5, selected
from spin_cli.activations import Feature
from spin_cli.choices import Pooling, Site, StorageDtype
from spin_cli.errors import ArtifactError
from spin_cli.inspection.overlap import overlaps
from spin_cli.samples import read_samples, write_samples
from spin_cli.training.table import read_masks
from spin_cli.verification import verify

FEATURE = Feature("layer_01", Site.FFN, Pooling.MEAN, 100)
MATRIX = np.arange(600, dtype="<f2").reshape(6, 100)


# -- matrices --------------------------------------------------------------------------------


def write_matrix(folder: Path, **options) -> h5py.File:
    file = h5py.File(folder / "layer_01.h5", "w")
    file.create_dataset("ffn/mean", data=MATRIX, **options)
    return file


def read_matrix(folder: Path):
    return activations.read_matrix(folder, FEATURE, 6, StorageDtype.FLOAT16)


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "lzf"}])
def test_a_matrix_that_another_program_packed_is_read(tmp_path, options):
    write_matrix(tmp_path, **options).close()
    np.testing.assert_array_equal(read_matrix(tmp_path), MATRIX)


def test_data_a_thousand_times_as_large_as_their_file_are_read(tmp_path):
    """Zeros are what gzip makes least of."""
    rows = 2**18
    with h5py.File(tmp_path / "layer_01.h5", "w") as file:
        zeros = file.create_dataset(
            "ffn/mean", (rows, 100), "<f2", chunks=(2**14, 100), compression="gzip"
        )
        for start in range(0, rows, 2**14):
            zeros[start : start + 2**14] = 0
    assert (tmp_path / "layer_01.h5").stat().st_size < rows * 200 / 800
    found = activations.read_matrix(tmp_path, FEATURE, rows, StorageDtype.FLOAT16)
    assert found.shape == (rows, 100)
    assert not found.any()


def put(make):
    """Replace the matrix by what *make* makes of the file."""

    def spoil(file: h5py.File) -> None:
        del file["ffn/mean"]
        make(file)

    return spoil


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((6, 100), "<f2")
    layout[:] = h5py.VirtualSource("gone.h5", "x", (6, 100))
    file.create_virtual_dataset("ffn/mean", layout)


def outside_group(file: h5py.File) -> None:
    del file["ffn"]
    file["ffn"] = h5py.ExternalLink("other.h5", "/ffn")


OTHER_FILES = {
    "external link": put(
        lambda file: file.__setitem__("ffn/mean", h5py.ExternalLink("other.h5", "/ffn/mean"))
    ),
    "external link above": outside_group,
    "soft link": put(lambda file: file.__setitem__("ffn/mean", h5py.SoftLink("/copy"))),
    "virtual": put(virtual),
    "external storage": put(
        lambda file: file.create_dataset("ffn/mean", (6, 100), "<f2", external=[("raw", 0, 1200)])
    ),
}


@pytest.mark.parametrize("spoil", OTHER_FILES.values(), ids=OTHER_FILES)
def test_values_that_stand_elsewhere_are_not_looked_up(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)  # where links would lead to if they were followed
    write_matrix(tmp_path).close()
    shutil.copy("layer_01.h5", "other.h5")
    Path("raw").write_bytes(MATRIX.tobytes())
    with h5py.File("layer_01.h5", "r+") as file:
        file["copy"] = MATRIX
        spoil(file)
    with pytest.raises(ArtifactError, match=r"layer_01\.h5: /ffn/mean .*not (followed|opened)"):
        read_matrix(tmp_path)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((600,), "<f2"), ((6, 10, 10), "<f2"), ((6, 99), "<f2"), ((5, 100), "<f2"), ((6, 100), "<f4")],
)
def test_a_matrix_of_another_shape_or_type_is_refused(tmp_path, shape, dtype):
    with h5py.File(tmp_path / "layer_01.h5", "w") as file:
        file["ffn/mean"] = np.zeros(shape, dtype)
    with pytest.raises(ArtifactError, match=r"/ffn/mean is \(.*expected \(6 or more, 100\)"):
        read_matrix(tmp_path)


def test_rows_that_were_never_written_are_not_read_as_zeros(tmp_path):
    """A file of 2 KB whose shape says 186 GiB: the shape is as expected, and no value is there."""
    rows = 10**9
    with h5py.File(tmp_path / "layer_01.h5", "w") as file:
        file.create_dataset("ffn/mean", (rows, 100), "<f2", chunks=(1000, 100))
    with pytest.raises(ArtifactError, match="200,000,000,000 bytes by its shape, the file"):
        activations.read_matrix(tmp_path, FEATURE, rows, StorageDtype.FLOAT16)


# -- masks -----------------------------------------------------------------------------------


def write_masks(folder: Path) -> h5py.File:
    file = h5py.File(folder / selected.MASKS, "w")
    group = file.create_group("layer_01/ffn/mean")
    group["neurons"] = np.int32([7, 3, 99, 0])
    group["importance"] = [8.0, 4.0, 3.0, 1.0]
    group["cumulative"] = [0.5, 0.75, 0.9375, 1.0]
    group["class_importance"] = np.float32([[8, 2, 2, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    group.attrs.update(width=100, C=0.5, val_score=0.75)
    return file


def replace(name, values):
    def spoil(group: h5py.Group) -> None:
        del group[name]
        group[name] = values

    return spoil


def huge(group: h5py.Group) -> None:
    del group["neurons"], group["cumulative"]
    group.create_dataset("neurons", (4 * 10**9,), "i4", chunks=(1000,))
    group.create_dataset("cumulative", (4 * 10**9,), "f8", chunks=(1000,))


SPOILT = {
    "twice": (replace("neurons", np.int32([7, 3, 7, 0])), "neurons has the same one twice"),
    "beyond": (replace("neurons", np.int32([7, 3, 100, 0])), "neurons are not below 100"),
    "negative": (replace("neurons", np.int32([7, 3, -1, 0])), "neurons are not below 100"),
    "fractions": (replace("neurons", [7.5, 3.0, 9.0, 0.0]), "expected .* whole numbers"),
    "square": (replace("neurons", np.int32([[7, 3], [99, 0]])), r"neurons is \(2, 2\)"),
    "wider": (replace("neurons", np.arange(101)), r"neurons is \(101,\).*expected \(0 to 100\)"),
    "huge": (huge, r"neurons is \(4000000000,\)"),
    "nan": (replace("cumulative", [0.5, np.nan, 0.9, 1.0]), "cumulative does not rise"),
    "falling": (replace("cumulative", [0.5, 0.4, 0.9, 1.0]), "cumulative does not rise"),
    "more than all": (replace("cumulative", [0.5, 0.9, 1.0, 7.0]), "cumulative does not rise"),
    "shorter": (replace("cumulative", [0.5, 0.75, 1.0]), r"cumulative is \(3,\)"),
    "linked": (replace("neurons", h5py.ExternalLink("other.h5", "/x")), "not followed"),
    "width": (lambda group: group.attrs.update(width=10**12), "width 1e\\+12, expected"),
    "no width": (lambda group: group.attrs.__delitem__("width"), "no attribute width"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_masks_that_cannot_be_are_refused_by_all_that_read_them(tmp_path, spoil, words):
    with write_masks(tmp_path) as file:
        spoil(file["layer_01/ffn/mean"])
    for read in (
        lambda: read_masks(tmp_path, [FEATURE]),
        lambda: overlaps(tmp_path, 0.8, ["a", "b", "c"]),
    ):
        with pytest.raises(ArtifactError, match=f"masks.h5: layer_01/ffn/mean.*{words}"):
            read()


@pytest.mark.parametrize("value", ["strong", np.nan, [1.0, 2.0]])
def test_a_strength_that_is_no_number_is_named(tmp_path, value):
    with write_masks(tmp_path) as file:
        file["layer_01/ffn/mean"].attrs["C"] = value
    with pytest.raises(ArtifactError, match=r"masks\.h5: .*attribute C is not a finite number"):
        read_masks(tmp_path, [FEATURE])


def test_masks_are_read_as_they_are(tmp_path):
    write_masks(tmp_path).close()
    (found,) = read_masks(tmp_path, [FEATURE]).values()
    assert found.neurons.tolist() == [7, 3, 99, 0]
    assert (found.C, found.val_score) == (0.5, 0.75)
    assert found.top(0.8).tolist() == [7, 3, 99]
    with selected.open_masks(tmp_path) as file:
        ((key),) = selected.matrices(file)
        assert key == FEATURE.key
        mask = selected.read_mask(file, key)
        assert selected.read_importance(file, key, mask).tolist() == [8, 4, 3, 1]
        assert selected.read_class_importance(file, key, mask, 3)[:, 0].tolist() == [8, 0, 0]
        with pytest.raises(ArtifactError, match=r"class_importance is \(3, 4\)"):
            selected.read_class_importance(file, key, mask, 4)


def test_verify_reads_masks_by_the_same_rules(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run / "run", tmp_path / "run"))
    with h5py.File(run / "selection/masks.h5", "r+") as file:
        for key in selected.matrices(file):
            group = file["/".join(key)]
            replace("importance", h5py.ExternalLink("other.h5", "/x"))(group)
    old = json.loads((run / "selection/manifest.json").read_text())
    artifacts.write_manifest(run / "selection", "selection", old)
    (check,) = [check for check in verify(run / "selection") if check.ok is False]
    assert check.what == "recomputed probes"
    assert "not followed" in check.found


# -- scores ----------------------------------------------------------------------------------

HEADER = "layer,site,pooling,C,val_score,width,neurons_eta_1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("layer,site\nlayer_01,ffn\n", "no column pooling"),
        (HEADER + "layer_01,ffn,mean,0.1,high,100,4\n", "'high'"),
        (HEADER + "layer_01,ffn,mean,0.1,nan,100,4\n", "val_score is 'nan'"),
        (HEADER + "layer_01,ffn,mean,0.1,0.9,1000000000000,4\n", "width is '1000000000000'"),
        (HEADER + "layer_01,ffn,mean,0.1,0.9,100,-4\n", "neurons_eta_1 is '-4'"),
        (HEADER + "layer_01,ffn,mean,0.1,0.9\n", "different lengths"),
        (HEADER + "layer_01,ffn,mean,0.1,0.9,100,4,5\n", "different lengths"),
        (HEADER + "layer_01,ffn,mean," + "1" * 200_000 + ",0.9,100,4\n", "(field larger|C is)"),
        (HEADER + "l\xe4yer,ffn,mean,0.1,0.9,100,4\n", "utf-8"),
    ],
)
def test_scores_that_are_none_are_refused(tmp_path, text, words):
    (tmp_path / "scores.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=f"scores.csv: not the scores of spin.*{words}"):
        selected.read_scores(tmp_path)


# -- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("label", h5py.ExternalLink("other.h5", "/label"), "label is a link"),
        ("id", np.arange(4), r"id is \(4,\) int64, expected \(4\) text"),
        ("split", np.array(["train", "val", "test"], object), r"split is \(3,\)"),
        ("split", np.array(["train", "val", "test", "trial"], object), "split is not one of"),
        ("n_tokens", np.zeros(4), r"n_tokens is \(4,\) float64, expected \(4\) whole numbers"),
        ("truncated", np.zeros((4, 1), bool), r"truncated is \(4, 1\)"),
    ],
)
def test_samples_that_are_none_are_refused(tmp_path, name, values, words):
    write_samples(
        tmp_path / "samples.h5",
        ids="abcd",
        labels=np.array([0, 1, 0, 1]),
        classes=["no", "yes"],
        splits=np.uint8([0, 0, 1, 2]),
        n_tokens=np.full(4, 5, np.int32),
        truncated=np.zeros(4, bool),
    )
    assert read_samples(tmp_path).ids.tolist() == list("abcd")
    with h5py.File(tmp_path / "samples.h5", "r+") as file:
        replace(name, values)(file)
    with pytest.raises(ArtifactError, match=f"samples.h5: {words}"):
        read_samples(tmp_path)


# -- manifests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m["features"][3].update(width=10**12), "'features[3].width' is 1000000000000"),
        (lambda m: m["features"][0].update(width=384.5), "'features[0].width' is 384.5"),
        (lambda m: m["features"][0].update(width="384"), "'features[0].width' is \"384\""),
        (lambda m: m["features"][0].update(layer="../other"), "'features[0].layer' is \"../other"),
        (lambda m: m["features"][1].update(site="side"), "'features[1].site' is \"side\""),
        (lambda m: m["features"].append(7), "is 7, expected an object"),
        (lambda m: m["counts"].update(rows=10**20), "'counts.rows' is 100000000000000000000"),
        (lambda m: m["counts"].update(tokens=-1), "'counts.tokens' is -1, expected a whole number"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "select"])
def test_sizes_in_a_strangers_manifest_are_checked(spin, tiny_run, tmp_path, spoil, words, command):
    source = Path(shutil.copytree(tiny_run / "run/activations", tmp_path / "activations"))
    manifest = json.loads((source / "manifest.json").read_text())
    spoil(manifest)
    artifacts.write_manifest(source, "activations", manifest)
    done = spin(command, source)
    assert done.code == 4
    assert f"{source / 'manifest.json'}: the field " in done.err
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_missing_dataset_is_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    with hdf5.opened(tmp_path / "a.h5", "mend") as file:
        with pytest.raises(ArtifactError, match=r"a\.h5: no x/y in it"):
            hdf5.find(file, "x/y")
        with pytest.raises(ArtifactError, match=r"a\.h5: x is not a group"):
            hdf5.names(file, "x")
