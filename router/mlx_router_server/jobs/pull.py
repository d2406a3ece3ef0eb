"""The job that downloads: ``python -P -m mlx_router_server.jobs.pull``, in a process of its own.

Everything about the hub is huggingface_hub's: addresses, tokens, redirects, the layout of the cache. Two things it does
not do (2.4): go on with a file that another process began, and compare the content with its hash. So weights are
fetched by its ``http_get`` into a file that keeps its name from one process to the next, compared, and moved to where
huggingface_hub then finds them. ``refs/main`` is written last: until everything is here, the revision that was here
before is the one that is served.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from huggingface_hub import HfApi, RepoFile, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import get_hf_file_metadata, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from mlx_router_server.catalogue.inspect import NotServable, check_config, read_json
from mlx_router_server.jobs.hub_errors import Refused, explain
from mlx_router_shared.codec import decode_job, encode_job_event
from mlx_router_shared.errors import ErrorCode
from mlx_router_shared.jobs import OURS, JobDone, JobEvent, JobProgress, JobStatus, PullJob

__all__ = ["main", "needed_files"]

_WANTED: Final = re.compile(
    r"(?:1_Pooling/config\.json|modules\.json|[\w.-]+\.(?:json|jsonl|jinja|txt|tiktoken)|tokenizer\.model|tiktoken\.model"
    r"|model[\w.-]*\.safetensors|LICENSE(?:\.\w+)?)",
    re.ASCII,
)
_WEIGHTS: Final = re.compile(r"model[\w.-]*\.safetensors", re.ASCII)
_SMALL_BYTES: Final = 64 * 2**20
"""Files that are not weights and larger than this are nothing that a tokenizer needs."""
_RESERVE_BYTES: Final = 512 * 2**20
_TELL_SECONDS: Final = 0.1
_TRIES: Final = 4
_PAUSE_SECONDS: Final = 1.0
_CHUNK: Final = 2**20


def needed_files(files: Iterable[RepoFile]) -> list[RepoFile]:
    """Those of a repository that MLX needs: configuration, tokenizer, templates, weights, the licence. No code."""
    return [
        file
        for file in files
        if _WANTED.fullmatch(file.path) and (_WEIGHTS.fullmatch(file.path) or file.size <= _SMALL_BYTES)
    ]


class _Teller:
    """Writes events from any thread; of progress the newest of each file, every tenth of a second."""

    def __init__(self, write: Callable[[JobEvent], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._newest: dict[str, JobProgress] = {}
        threading.Thread(target=self._tick, daemon=True).start()

    def __call__(self, event: JobEvent) -> None:
        with self._lock:
            if isinstance(event, JobProgress):
                before = self._newest.get(event.digest)
                if before is None or event.completed >= before.completed:
                    self._newest[event.digest] = event
                return
            self._flush()
            self._write(event)

    def _flush(self) -> None:
        for event in self._newest.values():
            self._write(event)
        self._newest.clear()

    def _tick(self) -> None:
        while True:
            time.sleep(_TELL_SECONDS)
            with self._lock:
                self._flush()


class Pull:
    """One repository at one revision; ``tell`` is called from several threads."""

    def __init__(self, job: PullJob, tell: Callable[[JobEvent], None]) -> None:
        self._job = job
        self._tell = tell
        self._api = HfApi(library_name="mlx-router")
        self._folder = Path(job.cache) / repo_folder_name(repo_id=job.repository, repo_type="model")

    def run(self) -> JobDone:
        self._tell(JobStatus(text="pulling manifest"))
        commit, files = self._look()
        weights = [file for file in files if _WEIGHTS.fullmatch(file.path)]
        others = [file for file in files if not _WEIGHTS.fullmatch(file.path)]
        if not any(file.path == "config.json" for file in files) or not weights:
            kinds = "GGUF files" if any(path.endswith(".gguf") for path in self._all) else "no MLX weights"
            raise Refused(
                ErrorCode.INVALID_REQUEST, f"{self._job.repository} has {kinds}: this server runs models in MLX layout"
            )
        self._check_room(files)
        with self._marked():
            self._fetch_others(others, commit)
            self._check_content(commit)
            with ThreadPoolExecutor(max(self._job.streams, 1)) as pool:
                for done in [pool.submit(self._fetch_weights, file, commit) for file in weights]:
                    done.result()
        self._tell(JobStatus(text="writing manifest"))
        for file in weights:
            self._link(file, commit)
        self._write_reference(commit)
        path = self._folder / "snapshots" / commit
        return JobDone(revision=commit, path=str(path))

    def _look(self) -> tuple[str, list[RepoFile]]:
        info = self._api.model_info(self._job.repository, revision=self._job.revision)
        commit = info.sha or ""
        tree = self._api.list_repo_tree(self._job.repository, revision=commit, recursive=True)
        listed = [file for file in tree if isinstance(file, RepoFile)]
        self._all = [file.path for file in listed]
        return commit, needed_files(listed)

    def _check_room(self, files: list[RepoFile]) -> None:
        missing = sum(file.size - self._present(file) for file in files)
        folder = Path(self._job.cache)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if missing and missing + _RESERVE_BYTES > free:
            raise Refused(
                ErrorCode.INSUFFICIENT_STORAGE,
                f"not enough disk space: {missing} bytes are to be fetched, and {free} are free where the cache is",
            )

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Say in the repository's folder itself that nothing of it was here before: no other program asked for it. When
        nothing has come nothing is said: the next who fetches it may be another program."""
        mark = self._folder / OURS
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            mark.touch()
        try:
            yield
        finally:
            if mark.exists() and not any(path.is_file() for path in self._folder.rglob("*") if path != mark):
                shutil.rmtree(self._folder, ignore_errors=True)

    # ----------------------------------------------------------- small files

    def _fetch_others(self, files: list[RepoFile], commit: str) -> None:
        """Told as one, because each is there in a moment."""
        digest = "sha256:" + hashlib.sha256("\n".join(sorted(file.blob_id for file in files)).encode()).hexdigest()
        total, completed = sum(file.size for file in files), 0
        for file in files:
            self._link(file, commit)
            completed += file.size
            self._tell(JobProgress(digest=digest, total=total, completed=completed, text="configuration and tokenizer"))

    def _check_content(self, commit: str) -> None:
        """Before gigabytes are fetched for nothing."""
        try:
            check_config(read_json(self._folder / "snapshots" / commit / "config.json"))
        except NotServable as error:
            raise Refused(ErrorCode.INVALID_REQUEST, f"{self._job.repository} cannot be served here: {error}") from None

    def _link(self, file: RepoFile, commit: str) -> None:
        """Have huggingface_hub put the file where it belongs; what lies in the cache already is not fetched."""
        huggingface_hub.hf_hub_download(
            self._job.repository, file.path, revision=commit, cache_dir=self._job.cache, library_name="mlx-router"
        )

    # ---------------------------------------------------------------- weights

    def _fetch_weights(self, file: RepoFile, commit: str) -> None:
        digest = f"sha256:{file.lfs.sha256}" if file.lfs is not None else f"sha1:{file.blob_id}"

        def told(completed: int) -> None:
            self._tell(JobProgress(digest=digest, total=file.size, completed=min(completed, file.size)))

        blob = self._blob(file)
        if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            self._link(file, commit)  # the hub serves it by a protocol of its own only, which begins anew each time
        if blob.exists():
            told(file.size)
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(self._job.cache) / ".locks" / self._folder.name / f"{blob.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        # The lock that huggingface_hub takes for this file: no other program fetches it at the same time.
        with WeakFileLock(lock):
            if not blob.exists():
                self._fetch_verified(file, commit, blob, told)
        told(file.size)

    def _fetch_verified(self, file: RepoFile, commit: str, blob: Path, told: Callable[[int], None]) -> None:
        """A file that turns out wrong is fetched once more from its beginning, since its first part may be old."""
        part = self._part(file)
        for last in (False, True):
            began = part.stat().st_size if part.exists() else 0
            self._fetch_part(file, commit, part, told)
            self._tell(JobStatus(text="verifying sha256 digest"))
            found = _hash(part, file)
            if found == (file.lfs.sha256 if file.lfs is not None else file.blob_id):
                os.replace(part, blob)
                return
            part.unlink()
            if last or not began:
                break
        raise Refused(ErrorCode.INTERNAL, f"digest mismatch: what came as {file.path} is not what the hub announced")

    def _fetch_part(self, file: RepoFile, commit: str, part: Path, told: Callable[[int], None]) -> None:
        """Until it is whole. A connection that breaks off is tried again as long as something comes."""
        tries = 0
        while (have := part.stat().st_size if part.exists() else 0) < file.size:
            told(have)
            address, headers = self._address(file, commit)
            progress = _progress(have, told)
            try:
                with part.open("r+b" if have else "wb") as stream:
                    stream.seek(have)
                    http_get(address, stream, resume_size=have, headers=headers, expected_size=file.size,
                             displayed_filename=file.path, tqdm_class=progress)  # fmt: skip
            except (OSError, ValueError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
                    raise
                size = part.stat().st_size
                if size > file.size:
                    part.unlink()
                tries = tries + 1 if size <= have else 0
                if tries >= _TRIES:
                    raise
                time.sleep(_PAUSE_SECONDS * 2**tries)
        if part.stat().st_size > file.size:
            part.unlink()
            raise Refused(ErrorCode.INTERNAL, f"more came of {file.path} than the hub announced")

    def _address(self, file: RepoFile, commit: str) -> tuple[str, dict[str, str]]:
        """Where the bytes are now: often an address that is signed for an hour, which gets no token."""
        url = hf_hub_url(self._job.repository, file.path, revision=commit)
        headers = build_hf_headers(library_name="mlx-router")
        location = get_hf_file_metadata(url, headers=headers).location
        if location.split("/")[2:3] != url.split("/")[2:3]:
            headers.pop("authorization", None)
        return location, headers

    # ----------------------------------------------------------------- places

    def _blob(self, file: RepoFile) -> Path:
        return self._folder / "blobs" / (file.lfs.sha256 if file.lfs is not None else file.blob_id)

    def _part(self, file: RepoFile) -> Path:
        """Not huggingface_hub's own name, which it would take for its own; its cleaning finds it by the ending."""
        return self._blob(file).with_name(self._blob(file).name + ".mlx-router.incomplete")

    def _present(self, file: RepoFile) -> int:
        for path in (self._blob(file), self._part(file)):
            if path.exists():
                return min(path.stat().st_size, file.size)
        return 0

    def _write_reference(self, commit: str) -> None:
        reference = self._folder / "refs" / self._job.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        new = reference.with_name(f".{reference.name}.new")
        new.write_text(commit, encoding="ascii")
        os.replace(new, reference)


def _hash(path: Path, file: RepoFile) -> str:
    """As the hub names the content: SHA-256, or what git calls a blob."""
    digest = hashlib.sha256() if file.lfs is not None else hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # noqa: S324  # git's name for it
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _progress(begin: int, told: Callable[[int], None]) -> Any:
    """A stand-in for a progress bar, which is how huggingface_hub tells how far it is."""

    class Progress:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.n = begin

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            told(self.n)

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

    return Progress


# ------------------------------------------------------------------------------------------------ the process


def main() -> None:
    """Read the job, do it, tell; the process is over when its standard input is."""
    job = decode_job(sys.stdin.buffer.readline())
    assert isinstance(job, PullJob)
    # huggingface_hub hands on ten million bytes at a time: ten seconds without a sign at a megabyte a second, and all
    # of them lost when the connection breaks off.
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK

    def write(event: JobEvent) -> None:
        sys.stdout.buffer.write(encode_job_event(event))
        sys.stdout.buffer.flush()

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)  # the router is gone, or does not want it any more

    threading.Thread(target=watch, daemon=True).start()
    tell = _Teller(write)
    try:
        last: JobEvent = Pull(job, tell).run()
    except Exception as error:
        last = explain(error, job)
    tell(last)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
