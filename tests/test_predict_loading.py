"""What `predict` loads: GGUF files read once and in part, as their own libraries read them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.gguf_reader import GGUFReader

from spin_cli.backbone import gguf_files


def write_gguf(path, blocks=3, width=32):
    """A file with every kind of metadata and tensors of several blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_uint32("llama.block_count", blocks)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("a.flag", True)
    writer.add_array("a.numbers", [3, -1, 7])
    writer.add_array("a.shares", [0.5, 0.25])
    writer.add_array("a.flags", [True, False])
    writer.add_token_list(["<pad>", "Ġfilm", "", "é\u4e16", "\U0001f600"])
    writer.add_token_types([3, 1, 1, 1, 1])
    rng = np.random.default_rng(0)
    names = ["token_embd", "output_norm", "output", *[f"blk.{i}.ffn_up" for i in range(blocks)]]
    for name in names:
        writer.add_tensor(f"{name}.weight", rng.normal(size=(4, width)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_quick_reader_reads_what_the_other_one_reads(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    slow, quick = GGUFReader(path), gguf_files.QuickReader(path)
    assert list(slow.fields) == list(quick.fields)
    for name, field in slow.fields.items():
        other = quick.fields[name]
        assert field.types == other.types, name

        def values(f):
            return [gguf_values(f.parts[i]) for i in f.data]

        assert values(field) == values(other), name
    for one, two in zip(slow.tensors, quick.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data_offset) == (
            two.name, two.tensor_type, two.data_offset,
        )  # fmt: skip
        np.testing.assert_array_equal(one.data, two.data)


def gguf_values(part):
    """A part as plain values: strings as their bytes."""
    return list(part) if isinstance(part, bytes) else np.asarray(part).tolist()


def test_a_cut_file_is_a_plain_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    start = whole.index("Ġfilm".encode())
    path.write_bytes(whole[: start + 3])
    with pytest.raises(ValueError, match=r"ends within|buffer|unpack"):
        gguf_files.QuickReader(path)


def test_only_the_wanted_blocks_are_unpacked(tmp_path):
    reader = gguf_files.QuickReader(write_gguf(tmp_path / "m.gguf"))
    part = gguf_files._Shortened(reader, 2)
    names = {tensor.name for tensor in part.tensors}
    assert names == {
        "token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight",
    }  # fmt: skip
    assert not any(name.startswith("tokenizer.ggml") for name in part.fields)
    whole = {tensor.name for tensor in gguf_files._Shortened(reader, None).tensors}
    assert whole == {t.name for t in reader.tensors} - {"output.weight"}
