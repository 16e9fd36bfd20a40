"""Stored token ids: the same batches as tokenising while reading, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_tools import END, oracle_samples, tar_member
from test_data_loader import digest, loader_of, plan_of, small_tokenizer

from dalr_scale.commands import index as index_command
from dalr_scale.commands import tokens as tokens_command
from dalr_scale.data.shards.arrays import gather_rows
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.token_id_store import (
    Encoding,
    open_token_ids,
    token_ids_path,
    write_token_ids,
)
from dalr_scale.data.shards.writer import write_text_shards
from dalr_scale.data.stream.loader import LoaderOptions, make_loader, tokenize
from dalr_scale.data.stream.source import Source, Sources
from dalr_scale.errors import UserError
from dalr_scale.models.tokenizer import tokenizer_hash

if TYPE_CHECKING:
    from dalr_scale.data.stream.batch import Batch

TOKENIZER = small_tokenizer()
SHA256 = tokenizer_hash(TOKENIZER)
WORDS = ["sentence", "of", "image", "zebra", "7", "99"]
sentences_lists = st.lists(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join), min_size=1, max_size=30
)


def shard_with(directory: Path, sentences: list[str]) -> Path:
    path = directory / "t.tar"
    path.write_bytes(tar_member(b"0.txt", "\n".join(sentences).encode()) + END)
    return path


@settings(max_examples=30, deadline=None)
@given(sentences=sentences_lists, max_length=st.integers(3, 60), seed=st.integers(0, 99))
def test_ids_are_those_of_the_tokenizer(
    sentences: list[str], max_length: int, seed: int, tmp_path_factory
) -> None:
    shard = shard_with(tmp_path_factory.mktemp("ids"), sentences)
    write_token_ids(shard, sentences, TOKENIZER, SHA256)
    source = Source([shard], encoding=Encoding(SHA256, max_length, 0))
    assert source.has_token_ids
    order = np.random.default_rng(seed).integers(0, len(sentences), 8)
    records = source.read(order, text=False)
    expected = tokenize(TOKENIZER, [sentences[n] for n in order], max_length)
    assert records.sentences == [] and records.token_ids is not None
    for found, wanted in zip(records.token_ids, expected, strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())


def test_rows_are_gathered_in_order() -> None:
    values = np.arange(10)
    found = gather_rows(values, np.array([7, 0, 3]), np.array([2, 3, 0]))
    assert found.tolist() == [7, 8, 0, 1, 2]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    lines = (f"sentence {'of ' * (n % 30)}{n}" for n in range(64))
    return Source(write_text_shards(lines, tmp_path, "t", per_member=16, members_per_shard=2))


def batches_of(source: Source, workers: int = 0, **options: object) -> list[Batch]:
    plan = plan_of(source, None, seed=1, global_batch=8)
    settings_: dict = {"total_steps": 16} | options
    chosen = LoaderOptions(max_length=8, num_workers=workers, **settings_)
    return list(make_loader(plan, Sources(source, None), TOKENIZER, chosen))


def store(source: Source) -> None:
    for shard in source.shards:
        own = Source([shard])
        write_token_ids(shard, own.read(np.arange(own.num_items)).sentences, TOKENIZER, SHA256)


def test_batches_are_the_same_with_and_without(source: Source) -> None:
    before = digest(batches_of(source))
    store(source)
    source.use_token_ids(Encoding(SHA256, 8, 0))
    assert source.has_token_ids
    assert digest(batches_of(source)) == before
    bare = batches_of(source, with_text=False, workers=1)
    assert all(batch.sentences == [] for batch in bare)
    for batch, other in zip(bare, batches_of(source), strict=True):
        assert batch.input_ids.tolist() == other.input_ids.tolist()
        assert batch.attention_mask.tolist() == other.attention_mask.tolist()


def test_ids_of_some_shards_or_of_another_tokenizer_are_not_used(source, caplog) -> None:
    store(source)
    source.use_token_ids(Encoding("0" * 64, 8, 0))
    assert not source.has_token_ids
    source.use_token_ids(Encoding(SHA256, 600, 0))  # more than is stored of an item
    assert not source.has_token_ids
    token_ids_path(source.shards[0], SHA256).unlink()
    source.use_token_ids(Encoding(SHA256, 8, 0))
    assert not source.has_token_ids
    assert "1 of 2 shards have no stored token ids" in caplog.text


def test_a_changed_row_is_a_fault_of_that_row(source: Source) -> None:
    store(source)
    path = token_ids_path(source.shards[0], SHA256)
    table = open_token_ids(source.shards[0], SHA256)
    assert table is not None
    start = path.read_bytes().rindex(table.values.whole().tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\x09")
    source.use_token_ids(Encoding(SHA256, 8, 0))
    with pytest.raises(UserError, match="the ids of item 0 have changed"):
        source.read(np.arange(source.num_items))
    found = [batch for batch in batches_of(source) if batch.bad]
    assert len(found) == 2  # once in each of two passes
    assert "the ids of item 0 have changed" in found[0].bad[0].why


def test_ids_of_another_state_of_the_shard_are_refused(source: Source) -> None:
    store(source)
    shard = source.shards[0]
    shard.write_bytes(shard.read_bytes().replace(b"sentence", b"Sentence", 1))
    with pytest.raises(UserError, match="belongs to another state"):
        open_token_ids(shard, SHA256)


def test_a_tokenizer_without_fixed_special_tokens_is_refused(tmp_path: Path) -> None:
    class Odd:
        def __call__(self, texts: list[str], **options: object) -> dict[str, list[list[int]]]:
            special = options.get("add_special_tokens", True)
            rows = [list(range(5, 5 + len(text.split()))) for text in texts]
            return {"input_ids": [[*row[::-1], 1] if special else row for row in rows]}

        def __len__(self) -> int:
            return 100

    shard = shard_with(tmp_path, ["a b c", "d"])
    with pytest.raises(UserError, match="same special tokens"):
        write_token_ids(shard, ["a b c", "d"], Odd(), SHA256)


def test_command_stores_checks_and_skips(source: Source, tmp_path: Path, capsys) -> None:
    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sentence", "of"]
    vocabulary.write_text("\n".join(words + [str(n) for n in range(64)]))
    words = [str(tmp_path), "--tokenizer", str(vocabulary), "--quiet"]
    assert tokens_command.main(words) == 0
    assert "2 token shards written, 0 were there" in capsys.readouterr().out
    assert tokens_command.main(words) == 0
    assert "0 token shards written, 2 were there" in capsys.readouterr().out
    assert expand_shards([str(tmp_path)]) == sorted(source.shards)
    packed = sorted(tmp_path.glob("*.tokens.tar"))
    assert {"manifest.json", "values.npy"} <= set(oracle_samples(packed[0])[0])
    assert index_command.main([str(tmp_path), "--check"]) == 0
    content = bytearray(packed[0].read_bytes())
    content[content.index(b"\x93NUMPY", content.index(b"values.npy")) + 130] ^= 1
    packed[0].write_bytes(content)
    capsys.readouterr()
    assert index_command.main([str(tmp_path), "--check"]) == 1
    assert "have changed" in capsys.readouterr().out


def test_loader_of_both_streams_still_reads_text(tmp_path: Path) -> None:
    """Only one of two streams has ids: the other is tokenised as before."""
    from shard_tools import write_pairs

    text = Source(write_text_shards((f"of {n}" for n in range(48)), tmp_path, "t"))
    pairs = Source(write_pairs(tmp_path, 6, per_shard=6))
    before = digest(list(loader_of((text, pairs), plan=plan_of(text, pairs, seed=1, global_batch=8),
                                   total_steps=6)))  # fmt: skip
    store(text)
    text.use_token_ids(Encoding(SHA256, 8, 0))
    after = loader_of((text, pairs), plan=plan_of(text, pairs, seed=1, global_batch=8),
                      total_steps=6)  # fmt: skip
    assert digest(list(after)) == before
