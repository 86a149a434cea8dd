"""The content log of this page: what every stage really said, and its export."""

from __future__ import annotations

import gradio as gr

from cai_experiment.demo.actions import Actions
from cai_experiment.demo.sessions import Session
from cai_experiment.demo.tabs.wiring import LIGHT, QUIET, html, intro, of_page, offered


def build(actions: Actions) -> gr.HTML:
    """Lay the accordion out; gives the log view, which the page's timer fills."""
    with gr.Accordion("Content log", open=False):
        intro("What was really asked and answered on this page. The export holds all of it in full.")
        with gr.Row(equal_height=False):
            level = gr.Slider(0, 3, actions.settings.verbosity, step=1, label="Verbosity", min_width=240)
            with gr.Column(min_width=240):
                export = gr.Button("Export Logs")
                download = gr.DownloadButton("Download", visible=False, elem_id="log-download")
                said = html(elem_id="log-export")
        view = html(elem_id="log-view")
    level.change(of_page(actions, actions.set_verbosity), level, view, trigger_mode="always_last", **LIGHT)

    def exported(session: Session) -> object:
        return offered(actions.export_logs(session))

    export.click(of_page(actions, exported), None, [download, said], **QUIET)
    return view
