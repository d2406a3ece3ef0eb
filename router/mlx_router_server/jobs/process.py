"""Starts a job, hands on what it tells, and ends it when nobody wants it any more."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from mlx_router_shared.codec import decode_job_event, encode_job
from mlx_router_shared.errors import ErrorCode, ProtocolError
from mlx_router_shared.jobs import Job, JobDone, JobEvent, JobFailed, PullJob

__all__ = ["job_environment", "run_job"]

log = logging.getLogger(__name__)

_PULL: Final = "mlx_router_server.jobs.pull"
_QUANTIZE: Final = "mlx_router_worker.engines.quantize"
_LINE_BYTES: Final = 64 * 2**10
_TAIL_LINES: Final = 20
_EXIT_SECONDS: Final = 5.0
_SILENCE_SECONDS: Final = 600.0  # to write or to hash a very large file takes minutes
_PASSED_ON: Final = frozenset(
    ["PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME",
     "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"]
)  # fmt: skip
_NETWORK: Final = frozenset(
    ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
     "CURL_CA_BUNDLE", "XDG_CACHE_HOME"]
)  # fmt: skip


def job_environment(job: Job, environment: dict[str, str]) -> dict[str, str]:
    """What a job may see of the router's environment. Only a download gets the hub's variables and its token."""
    downloads = isinstance(job, PullJob)
    kept = {
        name: value
        for name, value in environment.items()
        if name in _PASSED_ON
        or name.startswith(("LC_", "COV_"))
        or (downloads and (name.upper() in _NETWORK or name.startswith("HF_") or name == "HUGGING_FACE_HUB_TOKEN"))
        or (not downloads and name.startswith(("MLX_", "OMP_")) and not name.startswith("MLX_ROUTER_"))
    }
    kept.update(PYTHONUNBUFFERED="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    if not downloads:
        kept.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    return kept


async def run_job(job: Job) -> AsyncGenerator[JobEvent, None]:
    """What the job tells, up to its last word, ``JobDone`` or ``JobFailed``; there always is one.

    Closing the generator ends the process, and waits for that. Raises ``OSError`` when it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", _PULL if isinstance(job, PullJob) else _QUANTIZE,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=job_environment(job, dict(os.environ)), start_new_session=True, limit=_LINE_BYTES,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    relay = asyncio.create_task(_relay(process, tail), name="job-stderr")
    try:
        process.stdin.write(encode_job(job))
        ended = False
        while not ended and (line := await asyncio.wait_for(process.stdout.readline(), _SILENCE_SECONDS)):
            event = decode_job_event(line)
            ended = isinstance(event, JobDone | JobFailed)
            if ended:
                await asyncio.wait([asyncio.create_task(process.wait())], timeout=_EXIT_SECONDS)  # else it is killed
            yield event
        if not ended:
            status = await process.wait()
            last = next((line for line in reversed(tail) if line.strip()), "")
            yield JobFailed(
                code=ErrorCode.INTERNAL, message=f"the job ended with status {status}" + (f" ({last})" if last else "")
            )
    except TimeoutError:
        yield JobFailed(
            code=ErrorCode.INTERNAL, message=f"the job has reported nothing for {_SILENCE_SECONDS:g} s and was ended"
        )
    except (ProtocolError, ValueError) as error:  # a line that is none, or one without an end
        yield JobFailed(code=ErrorCode.PROTOCOL, message=f"the job wrote what is no event: {error}")
    finally:
        if process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # all that it leaves behind is meant to be gone on from
            except (ProcessLookupError, PermissionError):
                pass  # it ended in this very moment; of a group of zombies, macOS says that it is not allowed
            await process.wait()
        process.stdin.close()
        relay.cancel()
        await asyncio.gather(relay, return_exceptions=True)


async def _relay(process: asyncio.subprocess.Process, tail: deque[str]) -> None:
    assert process.stderr is not None
    while True:
        try:
            line = await process.stderr.readline()
        except ValueError:  # longer than the limit; the rest of it comes next
            continue
        if not line:
            return
        text = line[:4096].decode("utf-8", "replace").rstrip()
        tail.append(text)
        log.info("event=job_output pid=%d text=%r", process.pid, text)
