"""``s3://`` and ``hf://`` through their own packages, against small servers on this host."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from shard_tools import write_pairs

from dalr_scale.data.shards import remote as remote_module
from dalr_scale.data.shards.indexing import ensure_index
from dalr_scale.data.shards.remote import RemoteShards
from dalr_scale.errors import UserError


class _Store(http.server.BaseHTTPRequestHandler):
    """Files of a directory, as they are or with one bit or the second half of each shard lost."""

    protocol_version = "HTTP/1.1"
    directory: Path
    damage = "none"  # or "flipped", "cut"
    asked: list[str]

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, name: str, **headers: str) -> None:
        content = (self.directory / name).read_bytes()
        length = str(len(content))
        if name.endswith(".tar") and self.command == "GET" and self.damage == "flipped":
            content = content[:700] + bytes([content[700] ^ 1]) + content[701:]
        if name.endswith(".tar") and self.command == "GET" and self.damage == "cut":
            content = content[: len(content) // 2]
            self.close_connection = True
        etag = f'"{hashlib.md5(name.encode()).hexdigest()}"'
        self.answer(200, content, Content_Length=length, ETag=etag, **headers)

    def log_message(self, *_: object) -> None: ...


class _Bucket(_Store):
    """The part of S3 that reading needs; every request must be signed with the reader's key."""

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.asked.append(path)
        signature = "AWS4-HMAC-SHA256 Credential=reader/"
        if not self.headers.get("Authorization", "").startswith(signature):
            self.answer(403, b"")
        elif path.strip("/") == "bucket":
            self.answer(200, self.listing(query), Content_Type="application/xml")
        elif (self.directory / path.removeprefix("/bucket/")).is_file():
            modified = "Thu, 01 Jan 2026 00:00:00 GMT"
            self.send_file(path.removeprefix("/bucket/"), Last_Modified=modified)
        else:
            self.answer(404, b"")

    do_HEAD = do_GET

    def listing(self, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        names = [p.name for p in sorted(self.directory.iterdir()) if p.name.startswith(prefix)]
        rows = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"0"</ETag><Size>{(self.directory / name).stat().st_size}</Size></Contents>'
            for name in names
        )
        return (
            '<?xml version="1.0"?><ListBucketResult><Name>bucket</Name>'
            f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>{rows}"
            "</ListBucketResult>"
        ).encode()


class _Hub(_Store):
    """The part of the Hugging Face Hub that reading one dataset needs."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        api, files = "/api/datasets/me/mine", "/datasets/me/mine/resolve/main/"
        if path in (api, f"{api}/revision/main"):
            self.answer_json({"id": "me/mine", "sha": "0" * 40, "siblings": []})
        elif path.rstrip("/") == f"{api}/tree/main":
            self.answer_json([self.entry(file) for file in sorted(self.directory.iterdir())])
        elif path.startswith(files) and (self.directory / path.removeprefix(files)).is_file():
            self.send_file(path.removeprefix(files), X_Repo_Commit="0" * 40)
        else:
            self.answer(404, b"", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def entry(self, file: Path) -> dict[str, object]:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        size = file.stat().st_size
        lfs = {"oid": sha256, "size": size, "pointerSize": 130}
        return {"type": "file", "oid": sha256[:40], "size": size, "path": file.name, "lfs": lfs}


def serve(handler: type[_Store], directory: Path) -> Iterator[type[_Store]]:
    class Handler(handler):
        pass

    Handler.directory, Handler.asked = directory, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Handler.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield Handler
        server.shutdown()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards; an index lies beside the first one."""
    found = write_pairs(tmp_path / "there", 4, per_shard=2)
    ensure_index(found[0])
    return found


@pytest.fixture
def bucket(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(remote_module, "_PAUSES", (0.0, 0.0))
    for server in serve(_Bucket, tmp_path / "there"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        s3fs.S3FileSystem.clear_instance_cache()


def from_bucket(pattern: str, cache: Path, *schemes: str) -> list[Path]:
    return RemoteShards(schemes or ("s3",), str(cache)).localise(f"s3://bucket/{pattern}", Path)


def test_s3_shards_are_copied_verified_and_found_again(bucket, shards, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    copies = from_bucket("pairs-{000000,000001}.tar", cache)
    assert [copy.read_bytes() for copy in copies] == [shard.read_bytes() for shard in shards]
    note = (copies[0].parent / f"{copies[0].name}.origin.json").read_text()
    assert "ETag" in json.loads(note)["remote"] and "canary" not in note
    before = [copy.stat().st_mtime_ns for copy in copies]
    assert from_bucket("pairs-*.tar", cache) == copies  # listed this time, and not copied again
    assert [copy.stat().st_mtime_ns for copy in copies] == before


def test_s3_is_opened_only_when_it_is_allowed(bucket, shards, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"add 's3' to data\.remote"):
        from_bucket("pairs-000000.tar", tmp_path / "cache", "https", "hf")
    assert bucket.asked == []
    with pytest.raises(UserError, match="cannot be found"):
        from_bucket("none.tar", tmp_path / "cache")


def test_damaged_s3_copies_are_refused(bucket, shards, tmp_path: Path) -> None:
    bucket.damage = "flipped"
    with pytest.raises(UserError, match=r"3 tries \(its SHA-256 is not that of .*\.idx"):
        from_bucket("pairs-000000.tar", tmp_path / "cache")
    bucket.damage = "cut"
    with pytest.raises(UserError, match="could not be copied in 3 tries"):
        from_bucket("pairs-000001.tar", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*.tar"))
    bucket.damage = "none"  # the control: it was the damage that was refused
    assert from_bucket("pairs-000000.tar", tmp_path / "cache")[0].exists()


HUB = """
import sys
from pathlib import Path
from dalr_scale.data.shards import remote
from dalr_scale.errors import UserError

remote._PAUSES = (0.0, 0.0)
try:
    found = remote.RemoteShards(sys.argv[3:], sys.argv[2]).localise(sys.argv[1], Path)
    print(*found)
except UserError as error:
    print("error:", error)
"""


def test_hub_shards_are_copied_and_damaged_ones_refused(shards, tmp_path: Path) -> None:
    """In processes of their own: the package reads its endpoint when it is imported."""
    for server in serve(_Hub, tmp_path / "there"):
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

        def run(cache: str, *schemes: str, environment: dict = environment) -> str:
            words = ["hf://datasets/me/mine/pairs-00000*.tar", str(tmp_path / cache), *schemes]
            done = subprocess.run(
                [sys.executable, "-c", HUB, *words],
                env=environment, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        assert "add 'hf' to data.remote" in run("cache", "s3") and server.asked == []
        copies = [Path(path) for path in run("cache", "hf").split()]
        assert [copy.read_bytes() for copy in copies] == [shard.read_bytes() for shard in shards]
        server.damage = "flipped"
        assert run("cache", "hf").split() == list(map(str, copies))  # sound copies stay
        assert "its SHA-256 is not the one that the store names" in run("other", "hf")
        assert not list((tmp_path / "other").glob("*/*.tar"))
