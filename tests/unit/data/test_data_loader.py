"""The loader: the same batches at any number of ranks and workers, and from any step."""

from __future__ import annotations

import hashlib
import pickle
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_tools import image_bytes, jpeg, write_pairs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dalr_scale.data.shards.features_store import write_features
from dalr_scale.data.shards.images import check_image, decode_image
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.writer import ShardSetWriter, write_text_shards
from dalr_scale.data.stream import prefetch as prefetch_module
from dalr_scale.data.stream.loader import (
    Batch,
    LoaderOptions,
    StepDataset,
    make_loader,
    tokenize,
)
from dalr_scale.data.stream.order import StreamPlan
from dalr_scale.data.stream.prefetch import prefetch
from dalr_scale.data.stream.source import Source, Sources
from dalr_scale.errors import UserError


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sentence", "pairs", "caption", "of", "image"]
    words += [str(number) for number in range(100)]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_text_shards(
        ("sentence " + "of " * (n % 9) + str(n) for n in range(100)),
        path,
        "text",
        per_member=16,
        members_per_shard=2,
    )
    for shard in write_pairs(path, 11, per_shard=4):
        rows = ensure_index(shard).header.samples
        values = np.random.default_rng(0).normal(size=(rows, 6))
        write_features(shard, "clip", values, level="sample", manifest_extra={})
    return path


@pytest.fixture(scope="module")
def sources(directory: Path) -> tuple[Source, Source]:
    text = Source(sorted(directory.glob("text-*.tar")))
    pairs = Source(sorted(directory.glob("pairs-??????.tar")), features={"image": "clip"})
    return text, pairs


def plan_of(
    text: Source | None, pairs: Source | None, *, seed: int, global_batch: int
) -> StreamPlan:
    items = {
        "text_items": text.num_items if text else 0,
        "pair_items": pairs.num_items if pairs else 0,
    }
    return StreamPlan(seed=seed, global_batch=global_batch, **items)


def loader_of(sources: tuple[Source, Source], **changes: object):
    plan = plan_of(*sources, seed=3, global_batch=12)
    settings: dict = {
        "rank": 0,
        "world_size": 1,
        "start_step": 0,
        "total_steps": 20,
        "max_length": 8,
        "num_workers": 0,
    } | changes
    plan = settings.pop("plan", plan)
    return make_loader(plan, Sources(*sources), small_tokenizer(), LoaderOptions(**settings))


def digest(batches: list[Batch]) -> list[str]:
    """Hash what each step holds, whatever it is padded to."""
    found = []
    for batch in batches:
        rows = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        features = {role: value.tolist() for role, value in batch.features.items()}
        content = (batch.step, batch.kind, batch.item_ids.tolist(), batch.sentences, rows)
        text = repr((content, batch.image_ids.tolist(), features))
        found.append(hashlib.sha256(text.encode()).hexdigest())
    return found


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """Put the rows of all ranks together again, padded to the longest rank."""
    whole = []
    for ranks in zip(*parts, strict=True):
        length = max(batch.input_ids.shape[1] for batch in ranks)

        def cat(name: str, ranks=ranks, length=length) -> torch.Tensor:
            values = [getattr(batch, name) for batch in ranks]
            if values[0].dim() == 2:
                values = [torch.nn.functional.pad(v, (0, length - v.shape[1])) for v in values]
            return torch.cat(values)

        names = ("item_ids", "input_ids", "attention_mask", "image_ids")
        whole.append(
            Batch(
                step=ranks[0].step,
                kind=ranks[0].kind,
                sentences=[text for batch in ranks for text in batch.sentences],
                features={
                    role: torch.cat([batch.features[role] for batch in ranks])
                    for role in ranks[0].features
                },
                **{name: cat(name) for name in names},
            )
        )
    return whole


def test_ranks_and_workers_do_not_change_a_batch(sources) -> None:
    reference = digest(list(loader_of(sources)))
    assert len(reference) == len(set(reference)) == 20
    for world in (2, 3, 4):
        parts = [list(loader_of(sources, rank=r, world_size=world)) for r in range(world)]
        assert digest(joined(parts)) == reference
    for workers in (1, 2):
        assert digest(list(loader_of(sources, num_workers=workers))) == reference


KEPT = StreamPlan(3, 12, 100, 55, tail="keep")  # last batches of 4 sentences and 7 captions


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_ranks_cut_a_last_batch_equally_and_repeat_its_last_row(world: int, sources) -> None:
    whole = list(loader_of(sources, plan=KEPT))
    parts = [list(loader_of(sources, plan=KEPT, rank=r, world_size=world)) for r in range(world)]
    for one, batch, ranks in zip(whole, joined(parts), zip(*parts, strict=True), strict=True):
        rows = len(one.item_ids)
        assert rows == KEPT.batch_rows(one.step) == len(KEPT.batch_ids(one.step))
        assert {len(rank.item_ids) for rank in ranks} == {-(-rows // world)}
        places = np.minimum(np.arange(len(batch.item_ids)), rows - 1)
        assert batch.item_ids.tolist() == one.item_ids[places].tolist()
        assert batch.sentences == [one.sentences[place] for place in places]
        assert all(torch.equal(batch.features[n], v[places]) for n, v in one.features.items())
    assert {len(one.item_ids) for one in whole} == {12, 4, 7}


def test_a_bad_last_row_and_its_copies_get_one_substitute(tmp_path: Path) -> None:
    sentences = [f"sentence number {n} of" for n in range(20)]
    shard = write_text_shards(iter(sentences), tmp_path, "text", per_member=8)[0]
    source = Source([shard])
    plan = StreamPlan(seed=1, global_batch=6, text_items=20, tail="keep")  # 6, 6, 6, 2
    last = int(plan.batch_ids(3)[-1])
    content = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(content.index(sentences[last].encode()))
        file.write(b"#")

    def items(rank: int, world: int) -> list[int]:
        options = LoaderOptions(4, 8, 0, start_step=3, rank=rank, world_size=world)
        loader = make_loader(plan, Sources(source, None), small_tokenizer(), options)
        (batch,) = loader
        assert {row.item for row in batch.bad} <= {last}
        return batch.item_ids.tolist()

    alone = items(0, 1)
    assert last not in alone and len(set(alone)) == 2
    assert [items(rank, 3) for rank in range(3)] == [[alone[0]], [alone[1]], [alone[1]]]


def test_the_comparison_notices_swapped_ranks_and_another_seed(sources) -> None:
    reference = digest(list(loader_of(sources)))
    parts = [list(loader_of(sources, rank=r, world_size=2)) for r in (1, 0)]
    assert not set(digest(joined(parts))) & set(reference)
    other = plan_of(*sources, seed=4, global_batch=12)
    assert not set(digest(list(loader_of(sources, plan=other)))) & set(reference)


@pytest.mark.parametrize("start", [1, 2, 7, 8, 11, 12, 19, 20])
def test_a_later_start_continues_the_same_order(start: int, sources) -> None:
    reference = digest(list(loader_of(sources)))
    assert digest(list(loader_of(sources, start_step=start))) == reference[start:]


def test_a_batch_holds_what_the_plan_says(sources) -> None:
    text, pairs = sources
    plan = plan_of(text, pairs, seed=3, global_batch=12)
    kinds = []
    for batch in loader_of(sources, rank=1, world_size=3):
        ids = plan.batch_ids(batch.step)[4:8]
        source = pairs if batch.kind == "pair" else text
        assert batch.item_ids.tolist() == ids.tolist()
        assert batch.sentences == source.read(ids).sentences
        assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
        assert batch.input_ids.shape[1] == int(batch.attention_mask.sum(1).max())
        assert ((batch.input_ids == 0) == (batch.attention_mask == 0)).all()
        assert set(batch.features) == ({"image"} if batch.kind == "pair" else set())
        assert (batch.image_ids >= 0).all() == (batch.kind == "pair")
        kinds.append(batch.kind)
    assert kinds.count("pair") == plan.batches_before(20)[1] > 0


def test_sentences_are_cut_and_padded_to_the_longest() -> None:
    tokenizer = small_tokenizer()
    ids, mask = tokenize(tokenizer, ["of", "of of of of"], 32)
    assert ids.tolist() == [[2, 7, 3, 0, 0, 0], [2, 7, 7, 7, 7, 3]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    ids, mask = tokenize(tokenizer, ["of", "of of of of"], 4)
    assert ids.tolist() == [[2, 7, 3, 0], [2, 7, 7, 3]]


def test_one_shard_serves_any_number_of_ranks(tmp_path: Path) -> None:
    """Ranks cut items, not shards: none is left without rows, none sees another's."""
    source = Source(write_pairs(tmp_path, 4, per_shard=9))
    assert len(source.shards) == 1
    plan = StreamPlan(seed=1, global_batch=8, pair_items=source.num_items)
    seen: list[int] = []
    for rank in range(4):
        options = LoaderOptions(2, 8, 0, rank=rank, world_size=4)
        loader = make_loader(plan, Sources(None, source), small_tokenizer(), options)
        batches = list(loader)
        assert [len(batch.sentences) for batch in batches] == [2, 2]
        seen += [item for batch in batches for item in batch.item_ids.tolist()]
    assert len(set(seen)) == len(seen) == 16
    assert set(seen) == {*plan.batch_ids(0).tolist(), *plan.batch_ids(1).tolist()}


def test_impossible_settings_are_refused(sources) -> None:
    cases = [
        ({"world_size": 5}, "global batch of 12 cannot be cut into 5"),
        ({"start_step": 21}, "ends at step 20"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            loader_of(sources, **changes)
    with pytest.raises(ValueError, match="other sources"):
        loader_of(sources, plan=StreamPlan(3, 12, 99, 55))
    with pytest.raises(ValueError, match="rank 2"):
        loader_of(sources, rank=2, world_size=2)
    with pytest.raises(UserError, match="fewer than one global batch of 60"):
        plan_of(*sources, seed=1, global_batch=60)
    without = small_tokenizer()
    without.pad_token = None
    with pytest.raises(UserError, match="padding token"):
        make_loader(
            plan_of(*sources, seed=3, global_batch=12),
            Sources(*sources),
            without,
            LoaderOptions(total_steps=1, max_length=8, num_workers=0),
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_arrive_as_one_sentence(workers: int, tmp_path: Path) -> None:
    """A batch that takes the whole stream has no other item for a bad row."""
    shard = write_pairs(tmp_path, 4, per_shard=9)[0]
    source = Source([shard])
    content = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(content.index(b"caption 2 of image 1"))
        file.write(b"#")
    with pytest.raises(UserError) as raised:
        list(
            make_loader(
                plan_of(None, source, seed=1, global_batch=20),
                Sources(None, source),
                small_tokenizer(),
                LoaderOptions(total_steps=5, max_length=8, num_workers=workers),
            )
        )
    assert str(raised.value).startswith(f"{shard}: line 3 of sample 'pairs0001' differs")
    assert "\n" not in str(raised.value)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1)


def image_dataset(source: Source) -> StepDataset:
    plan = plan_of(None, source, seed=1, global_batch=source.num_items)
    options = LoaderOptions(1, 8, 0, image_transform=to_tensor)
    return StepDataset(plan, Sources(None, source), small_tokenizer(), options)


def test_images_are_decoded_in_the_worker(tmp_path: Path) -> None:
    source = Source(write_pairs(tmp_path, 2, per_shard=9), with_images=True)
    batch = image_dataset(source)[0]
    assert isinstance(batch, Batch)
    assert batch.images is not None
    assert batch.images.shape == (10, 3, 8, 8)
    for text, image in zip(batch.sentences, batch.images, strict=True):
        assert torch.equal(image, to_tensor(decode_image(jpeg(int(text.rsplit(" ", 1)[1])))))


def test_an_undecodable_image_names_its_sample(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, "p", samples_per_shard=9) as writer:
        writer.write("good", {"jpg": jpeg(), "txt": b"of"})
        writer.write("half", {"jpg": jpeg()[:-200], "txt": b"of\n\npicture"})
    found = image_dataset(Source(writer.shards, with_images=True))[0]
    assert isinstance(found, UserError)
    assert "sample 'half', line " in str(found)
    assert "cannot be decoded" in str(found)


GRAY16 = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
IMAGES = {
    "JPEG": image_bytes(Image.new("RGB", (8, 8)), "JPEG"),
    "PNG": image_bytes(Image.new("P", (8, 8)), "PNG"),
    "PNG with alpha": image_bytes(Image.new("RGBA", (8, 8)), "PNG"),
    "WebP": image_bytes(Image.new("RGB", (8, 8)), "WEBP"),
    "CMYK": image_bytes(Image.new("CMYK", (8, 8)), "JPEG"),
    "16 bit": image_bytes(GRAY16, "PNG"),
    "1 pixel": image_bytes(Image.new("RGB", (1, 1)), "JPEG"),
    "animated": image_bytes(
        Image.new("RGB", (8, 8)),
        "WEBP",
        save_all=True,
        append_images=[Image.new("RGB", (8, 8), "red")],
    ),
}


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES.keys())
def test_usual_and_unusual_images_decode_to_rgb(data: bytes) -> None:
    assert check_image(data) in ("jpg", "png", "webp")
    assert decode_image(data).mode == "RGB"


NO_IMAGES = {
    "empty": b"",
    "HTML": b"<html>not found</html>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "GIF": image_bytes(Image.new("P", (8, 8)), "GIF"),
    "half a JPEG": jpeg()[:-200],
    "half a PNG": image_bytes(Image.fromarray(np.eye(64, dtype=np.uint8)), "PNG")[:-40],
    "JPEG header only": jpeg()[:20],
}


@pytest.mark.parametrize("data", NO_IMAGES.values(), ids=NO_IMAGES.keys())
def test_no_images_are_refused(data: bytes) -> None:
    for use in (check_image, decode_image):
        with pytest.raises(ValueError, match=r"cannot be decoded|is not a JPEG"):
            use(data)


def png_bomb(side: int) -> bytes:
    small = image_bytes(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + small[24:29]
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


def jpeg_bomb(side: int) -> bytes:
    small = jpeg()
    size = small.index(b"\xff\xc0") + 5  # height and width in the start of the frame
    return small[:size] + side.to_bytes(2, "big") * 2 + small[size + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("bomb", [png_bomb, jpeg_bomb])
@pytest.mark.parametrize("side", [9_000, 13_000, 30_000])
def test_bombs_are_refused_from_their_header(bomb: Callable[[int], bytes], side: int) -> None:
    for use in (check_image, decode_image):
        with pytest.raises(ValueError, match="pixels"):
            use(bomb(side))
    assert decode_image(bomb(16 if bomb is jpeg_bomb else 8)).mode == "RGB"  # the control


def test_batches_move_and_pickle(sources) -> None:
    batch = next(iter(loader_of(sources, start_step=1)))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.sentences == batch.sentences
    assert all(value.device.type == "meta" for value in moved.features.values())
    again = pickle.loads(pickle.dumps(batch))
    assert digest([again]) == digest([batch])


def test_batches_are_received_before_they_are_asked_for() -> None:
    """While the first item is in use two more arrive and no third; errors come in their place."""
    taken: list[int] = []
    arrived = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(4):
            taken.append(number)
            arrived.release()
            yield number
        raise UserError("the fifth is broken")

    received = prefetch(items(), 2)
    assert next(received) == 0
    for _ in range(3):
        assert arrived.acquire(timeout=30)
    assert not arrived.acquire(timeout=0.1) and taken == [0, 1, 2]
    assert [next(received) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="the fifth"):
        next(received)
    assert list(prefetch(iter("abc"), 1)) == list("abc")


def test_a_long_wait_for_a_batch_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    come = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        come.wait(30)
        yield 1

    received = prefetch(items(), 1)
    assert next(received) == 0 and not caplog.text
    monkeypatch.setattr(prefetch_module, "_WARN_AFTER", 0.05)
    threading.Timer(0.3, come.set).start()
    assert next(received) == 1
    assert "slow storage" in caplog.text


def test_a_loader_that_is_left_early_leaves_no_thread(sources) -> None:
    batches = iter(loader_of(sources, num_workers=1))
    next(batches)
    assert "loader" in [thread.name for thread in threading.enumerate()]
    batches.close()  # type: ignore[attr-defined]
    assert "loader" not in [thread.name for thread in threading.enumerate()]
