"""Arrays in files: the rows that numpy gives, and no death by signal when a file shrinks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import write_pairs
from test_data_loader import plan_of, small_tokenizer

from dalr_scale.data.shards import arrays as arrays_module
from dalr_scale.data.shards.arrays import FileArray, OpenFile, TruncatedFile, row_sums
from dalr_scale.data.shards.features_store import features_path, write_features
from dalr_scale.data.shards.index_file import index_path
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.token_id_store import Encoding, token_ids_path, write_token_ids
from dalr_scale.data.stream import source as source_module
from dalr_scale.data.stream.loader import LoaderOptions, make_loader
from dalr_scale.data.stream.source import Source, Sources
from dalr_scale.errors import UserError
from dalr_scale.models.tokenizer import tokenizer_hash

TOKENIZER = small_tokenizer()
SHA256 = tokenizer_hash(TOKENIZER)


def in_file(values: np.ndarray) -> FileArray:
    """The array in a file that exists in memory only, after three bytes of something else."""
    file = OpenFile.of_bytes("x", b"abc" + values.tobytes())
    return FileArray(file, 3, values.shape, values.dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.sampled_from([1, 3, 40_000]), count=st.integers(1, 60))
def test_rows_and_spans_are_those_of_the_array(data: st.DataObject, width: int, count: int) -> None:
    """Wide rows are read one by one, narrow ones with what lies between them."""
    values = np.arange(count * width, dtype=np.uint16).reshape(count, width)
    array = in_file(values)
    numbers = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=9)), np.int64)
    np.testing.assert_array_equal(array.rows(numbers), values[numbers])
    lengths = np.array([data.draw(st.integers(0, count - n)) for n in numbers.tolist()], np.int64)
    spans = [values[n : n + k] for n, k in zip(numbers, lengths, strict=True)]
    expected = np.concatenate([values[:0], *spans])
    np.testing.assert_array_equal(array.spans(numbers, lengths), expected)
    np.testing.assert_array_equal(array.whole(), values)
    assert b"".join(array.blocks()) == values.tobytes()
    assert row_sums(expected, lengths).tolist() == [row_sums(s.reshape(1, -1))[0] for s in spans]


def test_both_ways_of_reading_notice_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (0, 1 << 20):  # one by one, and everything in between
        monkeypatch.setattr(arrays_module, "_CALL", call)
        array = in_file(np.arange(100, dtype=np.int64).reshape(50, 2))
        os.ftruncate(array.file.descriptor, 3 + 40 * 16 - 1)
        assert array.rows(np.array([38, 2])).tolist() == [[76, 77], [4, 5]]
        with pytest.raises(TruncatedFile, match="x: has been truncated"):
            array.rows(np.array([39, 2]))
        with pytest.raises(TruncatedFile):
            array.spans(np.array([1, 30]), np.array([1, 10]))
        for starts, lengths in (([-1], [1]), ([49], [2]), ([5], [-1]), ([2**40], [1])):
            with pytest.raises(TruncatedFile):
                array.spans(np.array(starts), np.array(lengths))


def test_a_mapped_file_that_shrinks_ends_the_process(tmp_path: Path) -> None:
    """The control: this is what reading protects from."""
    script = (
        "import mmap, os, sys\n"
        "descriptor = os.open(sys.argv[1], os.O_RDWR)\n"
        "data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)\n"
        "os.ftruncate(descriptor, 0)\n"
        "data[0]\n"
    )
    (tmp_path / "x").write_bytes(bytes(10_000))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")])
    assert done.returncode == -signal.SIGBUS


def files_of(shard: Path) -> dict[str, Path]:
    return {
        "image features": features_path(shard, "clip"),
        "token features": features_path(shard, "tok"),
        "ids": token_ids_path(shard, SHA256),
        "index": index_path(shard),
        "shard": shard,
    }


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Two shards of 20 captions, every kind of file beside them, all of them open."""
    shards = write_pairs(tmp_path, 8, per_shard=4)
    for shard in shards:
        rng = np.random.default_rng(0)
        offsets = np.arange(0, 63, 3)
        write_features(shard, "clip", rng.normal(size=(4, 900)), level="sample", manifest_extra={})
        write_features(
            shard, "tok", rng.normal(size=(60, 50)), level="token", offsets=offsets,
            manifest_extra={},
        )  # fmt: skip
        lines = Source([shard]).read(np.arange(20)).sentences
        write_token_ids(shard, lines, TOKENIZER, SHA256)
    opened = Source(shards, features={"image": "clip", "tokens": "tok"})
    opened.use_token_ids(Encoding(SHA256, 8, 0))
    assert opened.has_token_ids and not opened.read(np.arange(40)).faults
    return opened


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("kind", files_of(Path("x.tar")))
def test_a_file_that_shrinks_during_the_run_is_named(
    kind: str, damage: Callable[[Path], None], source: Source
) -> None:
    path = files_of(source.shards[1])[kind]
    damage(path)
    with pytest.raises(UserError, match=path.name):
        source.read(np.arange(40))
    faults = source.read(np.arange(40), strict=False).faults
    assert faults and set(faults) <= set(range(20, 40))  # the other shard is as it was
    assert all(path.name in why for why in faults.values())
    assert not source.read(np.arange(20)).faults


def test_rows_of_a_file_that_shrank_are_replaced_and_counted(source: Source) -> None:
    empty(features_path(source.shards[0], "clip"))
    plan = plan_of(None, source, seed=1, global_batch=4)
    for workers in (0, 1):
        options = LoaderOptions(total_steps=2, max_length=8, num_workers=workers)
        loader = make_loader(plan, Sources(None, source), TOKENIZER, options)
        batches = list(loader)
        assert all((batch.item_ids >= 20).all() for batch in batches)
        bad = [row for batch in batches for row in batch.bad]
        assert bad and all(row.item < 20 and "clip.features.tar" in row.why for row in bad)


def test_storage_that_fails_is_asked_again(
    source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(source_module, "_RETRY_SECONDS", (0.0, 0.0))
    read, failures = arrays_module.read_exactly, []

    def stumble(descriptor: int, size: int, offset: int) -> bytes:
        if len(failures) < 2:
            failures.append(offset)
            raise OSError(5, "Input/output error")
        return read(descriptor, size, offset)

    monkeypatch.setattr(arrays_module, "read_exactly", stumble)
    assert not source.read(np.arange(40)).faults
    assert caplog.text.count("trying again") == 2


def test_an_index_that_is_kept_in_memory_is_read_like_one_in_a_file(tmp_path: Path) -> None:
    shard = write_pairs(tmp_path, 3, per_shard=9)[0]
    file = ensure_index(shard)
    kept = type(file)(shard, file.header, index_path(shard).read_bytes())
    index_path(shard).unlink()
    rows, whole = kept.open(), kept.load()
    np.testing.assert_array_equal(rows.items.whole(), whole.items)
    assert [rows.key(sample) for sample in range(3)] == whole.keys()
