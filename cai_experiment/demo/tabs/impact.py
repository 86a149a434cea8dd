"""The tab Impact: base against trained on a suite of prompts, with intervals, every example, and exports."""

from __future__ import annotations

from functools import partial

import gradio as gr

from cai_experiment.demo.actions import OWN_FILE, Actions
from cai_experiment.demo.impact import METHODS, SUITES
from cai_experiment.demo.tabs.generation import refreshed
from cai_experiment.demo.tabs.wiring import LIGHT, QUIET, html, intro, of_page, offered, shared

FILE_TYPES = [".txt", ".jsonl", ".json", ".csv"]


def build(actions: Actions, tab: gr.Tab) -> None:
    """Lay the tab out; the list of checkpoints is read again when `tab` is opened."""
    intro("Ask base and trained model every prompt of a suite, judge the answers, and see what training has changed.")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            suites = [(name.replace("_", " "), name) for name in SUITES]
            suite = gr.Dropdown([*suites, ("your own file", OWN_FILE)], value=SUITES[0], label="Test suite")
            own = gr.File(label="Your own prompts (.txt, .jsonl, .json, .csv)", file_types=FILE_TYPES, visible=False)
            field = gr.Textbox("", label="Field", info="The column of the prompts, where its name is not a usual one",
                               max_lines=1, visible=False)  # fmt: skip
            own_said = html(elem_id="impact-file", visible=False)
            checkpoint = gr.Dropdown([], label="Checkpoint")
            notes = html(elem_id="impact-notes")
        with gr.Column(min_width=300):
            method = gr.Radio(list(METHODS), value=METHODS[0], label="Judged by")
            count = gr.Slider(0, 100, 0, step=5, label="Prompts at most (0: all)")
            with gr.Row():
                run = gr.Button("Run Comparison", variant="primary")
                cancel = gr.Button("Cancel")
    bar, summary = html(elem_id="impact-state"), html(elem_id="impact-summary")
    plots = html(elem_id="impact-plots")
    with gr.Row():
        as_json, as_csv = gr.Button("Export JSON"), gr.Button("Export CSV")
        download = gr.DownloadButton("Download", visible=False, elem_id="impact-download")
    said = html(elem_id="impact-export")
    examples = html(elem_id="impact-examples")
    suite.change(_own_places, suite, [own, field, own_said], **QUIET)
    own.change(of_page(actions, actions.take_own_file), [own, field], own_said, **QUIET)
    field.submit(of_page(actions, actions.name_own_field), field, own_said, **QUIET)
    outputs = [bar, summary, plots, examples]
    inputs = [suite, checkpoint, method, count, field]
    running = run.click(of_page(actions, actions.compare), inputs, outputs, concurrency_limit=4, **QUIET)
    cancel.click(None, None, None, cancels=[running], **QUIET)
    for button, kind in ((as_json, "json"), (as_csv, "csv")):
        export = partial(_exported, actions, kind)
        button.click(of_page(actions, export), None, [download, said], **QUIET)
    tab.select(shared(lambda chosen: refreshed(actions, chosen, False)), checkpoint, [checkpoint, notes], **LIGHT)


def _own_places(chosen: str) -> tuple[gr.File, gr.Textbox, gr.HTML]:
    """The own file, its field and what is said of it: there only where it is what will be asked."""
    is_own = chosen == OWN_FILE
    return gr.File(visible=is_own), gr.Textbox(visible=is_own), gr.HTML(visible=is_own)


def _exported(actions: Actions, kind, session):  # type: ignore[no-untyped-def]
    return offered(actions.export_impact(session, kind))
