"""The tab Evaluation: is a text harmful, by which axis, where, and who says so."""

from __future__ import annotations

import gradio as gr

from cai_experiment.demo.actions import Actions
from cai_experiment.demo.evaluating import EXAMPLES, METHODS
from cai_experiment.demo.tabs.wiring import PRIVATE, QUIET, html, intro, of_page


def build(actions: Actions) -> None:
    """Lay the tab out."""
    intro("Check a text against the four axes of the constitution: by the model, by written rules, or by both.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            text = gr.Textbox(label="Text to evaluate", lines=4, max_lines=12, placeholder="Write or paste a text")
            method = gr.Radio(list(METHODS), value=METHODS[0], label="Method")
            evaluate = gr.Button("Evaluate", variant="primary")
        with gr.Column(scale=3, min_width=300):
            result = html('<p class="cai-note">The verdict appears here: press Evaluate.</p>', elem_id="evaluation")
    gr.Examples([[example] for example in EXAMPLES], text, label="Examples", api_visibility="private")
    handler = of_page(actions, actions.evaluate)
    evaluate.click(handler, [text, method], result, concurrency_limit=4, show_progress_on=result, **PRIVATE)
    text.submit(handler, [text, method], result, concurrency_limit=4, **QUIET)
