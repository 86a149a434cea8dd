"""Where a server is and with which key it is asked; and what its headers and errors say."""

from __future__ import annotations

import json
import math
import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, unquote, urlsplit

from cai_experiment.errors import BadInputError

KEY_NAMES = ("CAI_API_KEY", "OPENAI_API_KEY")


def read_address(url: str) -> tuple[str, tuple[str, str] | None]:
    """(address without credentials and closing slash, (user, password) or None). A bare host gets "/v1".

    Raises BadInputError for what is not the address of an API.
    """
    try:
        parts = urlsplit(url.strip())
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        known = False
    if not known or parts.query or parts.fragment:
        shown = re.sub(r"//.*@|[?#].*", "//", url)
        raise BadInputError(f"--server {shown} is not the address of an API", "give e.g. http://127.0.0.1:8000/v1")
    path = re.sub(r"/(chat/)?completions$|/models$", "", parts.path.rstrip("/")) or "/v1"
    auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return SplitResult(parts.scheme, parts.netloc.rpartition("@")[2], path, "", "").geturl(), auth


def is_loopback(url: str) -> bool:
    """True if the address is this machine's own."""
    host = urlsplit(url.strip()).hostname or ""
    return re.fullmatch(r"localhost|127\.[\d.]+|::1|0\.0\.0\.0", host) is not None


def read_key() -> str | None:
    """The key from the environment, or None. Raises BadInputError for one that no header can carry."""
    for name in KEY_NAMES:
        key = os.environ.get(name, "").strip()
        if not re.fullmatch(r"[!-~]*", key):
            raise BadInputError(f"{name} holds blanks or letters that no key has", f"export {name} again")
        if key:
            return key
    return None


def retry_after(header: str | None) -> float:
    """Seconds from a Retry-After header (a number or an HTTP date); 0.0 if there is none or it means nothing."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def error_message(text: str) -> str:
    """The message in an error's body: OpenAI's {"error": {"message"}}, {"error"}, {"message"}, {"detail"}, or all."""
    try:
        body = json.loads(text)
        error = body.get("error", body)
        found = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError):
        return text
    return str(found or text)
