"""The page: `build(actions)` lays it out, `launch(blocks, port)` serves it on 127.0.0.1. All logic is in actions.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from cai_experiment.demo.access import LOCAL, Doors
from cai_experiment.demo.actions import Actions
from cai_experiment.demo.sessions import Session
from cai_experiment.demo.tabs import architecture, data, dual, evaluation, generation, impact, log, training
from cai_experiment.demo.tabs.wiring import LIGHT, html, of_page

TITLE = "Constitutional AI demo"
STYLE = Path(__file__).with_name("style.css")
POLL_SECONDS = 1.0
MOST_UPLOADED = "2mb"
FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
FIXED = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


def build(actions: Actions) -> gr.Blocks:
    """The page with its tabs; nothing is served yet."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        html(f'<h1 class="cai-title">{TITLE}</h1>')
        header = html(elem_id="model-line")
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
            with gr.Tab("Evaluation", id="evaluation"):
                evaluation.build(actions)
            with gr.Tab("Generation", id="generation") as tab:
                generation.build(actions, tab)
            with gr.Tab("Training", id="training"):
                panel = training.build(actions)
            with gr.Tab("Impact", id="impact") as tab:
                impact.build(actions, tab)
            with gr.Tab("Data", id="data") as tab:
                data.build(actions, tab)
            with gr.Tab("Architecture", id="architecture") as tab:
                architecture.build(actions, tab)
        status = dual.build(actions, blocks)
        view = log.build(actions)
        _follow(actions, blocks, header, panel, status, view)
        blocks.queue(api_open=False, max_size=64, default_concurrency_limit=8)
    return blocks


def _follow(actions: Actions, blocks: gr.Blocks, header: Any, panel: training.Panel, status: Any, view: Any) -> None:
    """One light request a second keeps what changes by itself as it is now; the first one comes with the page."""

    def news(session: Session) -> list[Any]:
        parts = {"header": actions.header(), "status": actions.status(), "log": session.log_html()}
        told = [value if session.news(part, value) else gr.skip() for part, value in parts.items()]
        return [*told, *panel.news(actions, session)]

    def left(request: gr.Request) -> None:
        actions.sessions.left(str(request.session_hash))

    follow, outputs = of_page(actions, news), [header, status, view, *panel.outputs]
    blocks.load(follow, None, outputs, **LIGHT)
    gr.Timer(POLL_SECONDS).tick(follow, None, outputs, trigger_mode="once", **LIGHT)
    blocks.unload(left)


def launch(blocks: gr.Blocks, port: int, share: bool = False, exports: Path | None = None) -> str:
    """Serve the page in a thread on 127.0.0.1:`port`; gives its address (the public one with `share`).

    `exports`: files of this folder may be offered, wherever the demo was started; `Doors` gives out Gradio's copies
    alone.
    """
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=FIXED).set(
        button_large_text_size="*text_md", button_large_text_weight="500", button_large_padding="*spacing_md",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600", button_primary_background_fill_hover_dark="*primary_700",
        body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_600", input_placeholder_color_dark="*neutral_300",
    )  # fmt: skip
    doors = Middleware(Doors, files=get_upload_folder(), local=not share)
    allowed = [] if exports is None else [str(exports.expanduser().absolute())]
    _, local, public = blocks.launch(
        server_name=LOCAL, server_port=port, share=share, prevent_thread_lock=True, quiet=True, inbrowser=False,
        show_error=False, footer_links=[], run_history=False, allowed_paths=allowed, max_file_size=MOST_UPLOADED,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=theme, css_paths=STYLE,
        state_session_capacity=200, app_kwargs={"middleware": [doors], "docs_url": None},
    )  # fmt: skip
    return str(public or local)
