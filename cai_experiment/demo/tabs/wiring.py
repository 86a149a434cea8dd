"""What the tabs share: an action as a Gradio handler of the page that asks, and pieces of layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from cai_experiment.demo.actions import Actions

PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of every event: the page may call it, no client library
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
LIGHT: dict[str, Any] = {**QUIET, "queue": False}  # answers at once, so it need not wait behind work


def of_page(actions: Actions, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(session, *inputs)` as a handler: the session is that of the page which asks."""

    def once(request: gr.Request, *inputs: Any) -> Any:
        return method(actions.sessions.get(str(request.session_hash)), *inputs)

    def stream(request: gr.Request, *inputs: Any) -> Iterator[Any]:
        yield from method(actions.sessions.get(str(request.session_hash)), *inputs)

    return stream if inspect.isgeneratorfunction(method) else once


def shared(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method(*inputs)` as a handler: what it does is the same for all pages."""

    def once(*inputs: Any) -> Any:
        return method(*inputs)

    def stream(*inputs: Any) -> Iterator[Any]:
        yield from method(*inputs)

    return stream if inspect.isgeneratorfunction(method) else once


def intro(text: str) -> gr.HTML:
    """One line above a tab that says what it is for; `text` is our own."""
    return html(f'<p class="cai-intro">{text}</p>')


def html(value: str = "", **options: Any) -> gr.HTML:
    """A place for finished markup; Gradio's own styles for text are left out."""
    return gr.HTML(value, apply_default_css=False, js_on_load=None, **options)


def offered(done: tuple[Path | None, str]) -> tuple[Any, str]:
    """(download button, line) for what an export gives."""
    path, line = done
    if path is None:
        return gr.DownloadButton(visible=False), line
    return gr.DownloadButton(f"Download {path.name}", value=str(path), visible=True), line
