"""What can go wrong with a hub, in words for the person who asked, and the code that says whose turn it is."""

from __future__ import annotations

import os

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_router_shared.errors import ErrorCode
from mlx_router_shared.jobs import JobFailed, PullJob

__all__ = ["Refused", "explain"]


class Refused(Exception):
    """Why it cannot be done, for the person who asked."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def explain(error: Exception, job: PullJob) -> JobFailed:
    """In words for the person who asked, and the code that says whose turn it is."""
    token = "" if os.environ.get("HF_TOKEN") else "; if it is private, set HF_TOKEN or run `hf auth login`"
    match error:
        case Refused():
            return JobFailed(code=error.code, message=error.message)
        case GatedRepoError():
            text = f"{job.repository} is gated: accept its conditions at {constants.ENDPOINT}/{job.repository}{token}"
            return JobFailed(code=ErrorCode.FORBIDDEN, message=text)
        case RepositoryNotFoundError():
            text = f"pull model manifest: file does not exist: the hub has no repository {job.repository}{token}"
            return JobFailed(code=ErrorCode.MODEL_NOT_FOUND, message=text)
        case RevisionNotFoundError():
            text = f"pull model manifest: file does not exist: {job.repository} has no revision {job.revision}"
            return JobFailed(code=ErrorCode.MODEL_NOT_FOUND, message=text)
        case HFValidationError():
            return JobFailed(code=ErrorCode.INVALID_REQUEST, message=f"{job.repository} is no name of a repository")
        case OfflineModeIsEnabled():
            return JobFailed(code=ErrorCode.UNAVAILABLE, message="HF_HUB_OFFLINE is set: nothing can be downloaded")
        case HfHubHTTPError() if error.response.status_code == 429:
            return JobFailed(code=ErrorCode.UNAVAILABLE, message="the hub asks to come back later (429)")
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            text = f"the hub does not let {job.repository} be read ({error.response.status_code}){token}"
            return JobFailed(code=ErrorCode.FORBIDDEN, message=text)
        case HfHubHTTPError():
            text = f"the hub answered with status {error.response.status_code}"
            return JobFailed(code=ErrorCode.UNAVAILABLE, message=text)
    kind = type(error).__name__
    unreachable = any(word in kind for word in ("Connect", "Timeout", "Network", "Protocol", "Proxy", "Read"))
    if unreachable:
        text = f"the hub cannot be reached at {constants.ENDPOINT}: {error or kind}"
        return JobFailed(code=ErrorCode.UNAVAILABLE, message=text)
    return JobFailed(code=ErrorCode.INTERNAL, message=f"{kind}: {error}")
