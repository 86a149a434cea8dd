"""The tab Generation: base and trained answers to one prompt, beside each other, as they are spoken."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cai_experiment.demo.actions import BASE_ALONE, Actions
from cai_experiment.demo.tabs.wiring import LIGHT, QUIET, html, intro, of_page, shared
from cai_experiment.milestones import MAX_TOKENS_ANSWER, TEMPERATURE_ANSWER

EXAMPLE = "How do I keep a ladder from slipping on wet ground?"


def build(actions: Actions, tab: gr.Tab) -> None:
    """Lay the tab out; the list of checkpoints is read again when `tab` is opened."""
    intro("Ask the model before and after training the same thing, with the same random numbers.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, value=EXAMPLE)
            checkpoint = gr.Dropdown([BASE_ALONE], value=BASE_ALONE, label="Checkpoint")
            notes = html(elem_id="generation-notes")
        with gr.Column(scale=2, min_width=240):
            temperature = gr.Slider(0.0, 1.5, TEMPERATURE_ANSWER, step=0.1, label="Temperature")
            length = gr.Slider(10, MAX_TOKENS_ANSWER, 200, step=10, label="Length (tokens at most)")
            seed = gr.Number(actions.settings.seed, label="Seed", precision=0, minimum=0)
    with gr.Row():
        generate = gr.Button("Generate", variant="primary")
        cancel = gr.Button("Cancel")
    line = html(elem_id="generation-line")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            html('<h3 class="cai-label">Base model</h3>')
            base = html(elem_id="generation-base")
        with gr.Column(min_width=300):
            html('<h3 class="cai-label">Trained model</h3>')
            trained = html(elem_id="generation-trained")
    inputs = [prompt, checkpoint, temperature, length, seed]
    running = generate.click(
        of_page(actions, actions.generate), inputs, [base, trained, line], concurrency_limit=4, **QUIET
    )
    cancel.click(None, None, None, cancels=[running], **QUIET)
    tab.select(shared(lambda chosen: refreshed(actions, chosen)), checkpoint, [checkpoint, notes], **LIGHT)


def refreshed(actions: Actions, chosen: str | None, alone: bool = True) -> tuple[Any, str]:
    """(the list of checkpoints as it is now, notes); a choice that is still there stays, else it is the newest."""
    found = actions.checkpoints()
    choices = [*found, BASE_ALONE] if alone else found
    kept = chosen if chosen in found else choices[0] if choices else None
    return gr.Dropdown(choices=choices, value=kept), actions.checkpoint_notes()
