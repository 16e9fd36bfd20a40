"""Remote shards: opt-in per scheme, copied whole, verified, and never half."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shard_tools import write_pairs

from dalr_scale.data.shards import remote as remote_module
from dalr_scale.data.shards.features_store import features_path, open_features, write_features
from dalr_scale.data.shards.files import expand_shards
from dalr_scale.data.shards.index_file import index_path
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.remote import RemoteShards
from dalr_scale.errors import UserError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[list[Path]]:
    """Three shards in memory://bucket, the first one with features and an index."""
    shards = write_pairs(tmp_path / "there", 6, per_shard=2)
    values = np.ones((2, 3))
    path = write_features(shards[0], "clip", values, level="sample", manifest_extra={})
    system = fsspec.filesystem("memory")
    for file in (*shards, path, index_path(shards[0])):
        system.pipe(f"/bucket/{file.name}", file.read_bytes())
    yield shards
    system.rm("/bucket", recursive=True)


def localise(pattern: str, cache: Path, *schemes: str, features: tuple[str, ...] = ()) -> list:
    return RemoteShards(schemes, str(cache), features).localise(pattern, Path)


def test_shards_are_copied_once_and_read_from_the_cache(store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    urls = "memory://bucket/pairs-{000000..000002}.tar"
    copies = localise(urls, cache, "memory", features=("clip", "other"))
    assert [copy.read_bytes() for copy in copies] == [shard.read_bytes() for shard in store]
    assert open_features(copies[0], "clip").rows == 2
    assert not features_path(copies[1], "clip").exists()
    assert [ensure_index(copy).header.items for copy in copies] == [10, 10, 10]
    times = [copy.stat().st_mtime_ns for copy in copies]
    assert localise("memory://bucket/*.tar", cache, "memory") == copies
    assert [copy.stat().st_mtime_ns for copy in copies] == times
    note = json.loads((copies[0].parent / f"{copies[0].name}.origin.json").read_text())
    assert note["url"] == "memory://bucket/pairs-000000.tar" and len(note["sha256"]) == 64


def test_nothing_is_opened_unless_its_scheme_is_allowed(store, tmp_path: Path) -> None:
    for pattern, message in (
        ("memory://bucket/pairs-000000.tar", "add 'memory' to data.remote"),
        ("https://host/x.tar", "add 'https' to data.remote"),
        ("s3://bucket/x.tar", "add 's3' to data.remote"),
        ("file:///etc/passwd", "never opened"),
        ("ftp://host/x.tar", "never opened"),
    ):
        with pytest.raises(UserError, match=message):
            localise(pattern, tmp_path, "hf")
    for scheme in ("file", "pipe", "ssh", ""):
        with pytest.raises(UserError, match="none of the schemes"):
            RemoteShards([scheme])
    assert localise("local/x.tar", tmp_path) == [Path("local/x.tar")]
    for name in ("pipe:cat x.tar", "simplecache::memory://bucket/x.tar"):
        with pytest.raises(UserError, match="is a URL or a command"):  # by the list of files
            expand_shards(list(map(str, localise(name, tmp_path, "memory"))))
    assert not list(tmp_path.glob("*/*.tmp*"))


def test_a_remote_shard_that_changed_is_refused_by_name(store, tmp_path: Path) -> None:
    url = "memory://bucket/pairs-000001.tar"
    (copy,) = localise(url, tmp_path / "cache", "memory")
    fsspec.filesystem("memory").pipe("/bucket/pairs-000001.tar", store[1].read_bytes() + bytes(512))
    with pytest.raises(UserError, match="has changed since it was copied; remove"):
        localise(url, tmp_path / "cache", "memory")
    copy.unlink()
    assert localise(url, tmp_path / "cache", "memory")[0].stat().st_size % 1024


def test_a_damaged_copy_is_replaced(store, tmp_path: Path, caplog) -> None:
    url = "memory://bucket/pairs-000001.tar"
    (copy,) = localise(url, tmp_path / "cache", "memory")
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert localise(url, tmp_path / "cache", "memory")[0].read_bytes() == store[1].read_bytes()
    assert "the copy is damaged" in caplog.text


def test_a_copy_that_is_not_what_its_index_says_is_refused(store, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    content = bytearray(store[0].read_bytes())
    content[700] ^= 1
    system.pipe("/bucket/pairs-000000.tar", bytes(content))
    with pytest.raises(UserError, match=r"3 tries \(its SHA-256 is not that of .*\.idx"):
        localise("memory://bucket/pairs-000000.tar", tmp_path / "cache", "memory")
    assert not list((tmp_path / "cache").glob("*/*.tar*[!k]"))


def test_short_copies_are_tried_again(store, tmp_path: Path, monkeypatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    whole = MemoryFileSystem.get_file
    calls: list[str] = []

    def torn(self, path, target, **options):
        whole(self, path, target, **options)
        calls.append(path)
        if len(calls) < 3:
            Path(target).write_bytes(Path(target).read_bytes()[:100])

    monkeypatch.setattr(MemoryFileSystem, "get_file", torn)
    (copy,) = localise("memory://bucket/pairs-000002.tar", tmp_path / "cache", "memory")
    assert copy.read_bytes() == store[2].read_bytes() and len(calls) == 3


def test_missing_shards_and_strange_names_are_refused(store, tmp_path: Path) -> None:
    for pattern, message in (
        ("memory://bucket/none.tar", "cannot be found"),
        ("memory://bucket/none-*.tar", "no shard matches"),
        ("memory://bucket/pairs-000000.tar.idx", "must end in .tar"),
        ("memory://bucket/", "must end in .tar"),
        ("http://127.0.0.1/x-*.tar", "lists no files"),
    ):
        with pytest.raises(UserError, match=message):
            localise(pattern, tmp_path / "cache", "memory", "http")


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        localise("https://me:canary@host/x.tar?token=canary", tmp_path)
    assert "canary" not in str(raised.value) and "https://host/x.tar" in str(raised.value)


class _Flaky(http.server.SimpleHTTPRequestHandler):
    """Breaks the first transfer of each shard in the middle."""

    broken: set[str]

    def do_GET(self) -> None:
        if self.path.endswith(".tar") and self.path not in self.broken:
            self.broken.add(self.path)
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *_: object) -> None: ...


def test_a_web_server_that_breaks_off(store, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    _Flaky.broken = set()
    handler = functools.partial(_Flaky, directory=str(tmp_path / "there"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/pairs-{{000000,000001}}.tar"
        copies = localise(url, tmp_path / "cache", "http", features=("clip",))
        assert [c.read_bytes() for c in copies] == [s.read_bytes() for s in store[:2]]
        assert len(_Flaky.broken) >= 2
        server.shutdown()
    again = localise(url, tmp_path / "cache", "http")  # without a connection: as they are
    assert again == copies
