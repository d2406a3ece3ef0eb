"""What the router and a job tell each other: one task on its standard input, and lines about it on its standard output.

A job is a process of its own for work that takes minutes and is over then: a download, a quantisation. It ends when its
standard input is closed, so that none outlives the router, and can be killed at any moment: what it has done so far is
where the next one goes on. The last line is ``JobDone`` or ``JobFailed``.
"""

from __future__ import annotations

from msgspec import Struct

__all__ = ["Job", "JobDone", "JobEvent", "JobFailed", "JobProgress", "JobStatus", "OURS", "PullJob", "QuantizeJob"]


OURS = ".pulled-by-mlx-router"
"""A file in the folder of a repository that was not in the cache before a job brought it."""


class PullJob(Struct, frozen=True, kw_only=True, tag="pull"):
    """Bring the files that MLX needs of one repository into a Hugging Face cache."""

    repository: str
    cache: str
    """The cache folder, absolute."""
    revision: str = "main"
    streams: int = 4
    """Files at the same time."""


class QuantizeJob(Struct, frozen=True, kw_only=True, tag="quantize"):
    """Pack the weights of one folder into another, or put an adapter into them."""

    source: str
    target: str
    bits: int
    group_size: int
    mode: str = "affine"


Job = PullJob | QuantizeJob


class JobStatus(Struct, frozen=True, kw_only=True, tag="status"):
    """What it is doing now, in words."""

    text: str


class JobProgress(Struct, frozen=True, kw_only=True, tag="progress"):
    """How far it is with one file; never goes back."""

    digest: str
    total: int
    completed: int
    text: str = ""


class JobDone(Struct, frozen=True, kw_only=True, tag="done"):
    """It is whole and checked."""

    revision: str = ""
    path: str = ""


class JobFailed(Struct, frozen=True, kw_only=True, tag="failed"):
    """It cannot be done; ``code`` is one of ``errors.ErrorCode``."""

    code: str
    message: str


JobEvent = JobStatus | JobProgress | JobDone | JobFailed
