"""The accordion for two models: one evaluates, one generates; loaded here, they serve every tab."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from cai_experiment.demo.actions import Actions, Role
from cai_experiment.demo.tabs.wiring import QUIET, html, intro, shared

ROLES: tuple[tuple[Role, str], ...] = (("evaluation", "Evaluation"), ("generation", "Generation"))


def build(actions: Actions, blocks: gr.Blocks) -> gr.HTML:
    """Lay the accordion out; gives the status box, which the page fills. The models are listed when the page loads."""
    with gr.Accordion("Advanced: Dual Model Architecture", open=False):
        intro("Let one model evaluate and another generate. What is loaded here serves every tab and every page.")
        lines = []
        with gr.Row(equal_height=False):
            for role, name in ROLES:
                with gr.Column(min_width=300):
                    key = gr.Dropdown(
                        [],
                        label=f"{name} model",
                        allow_custom_value=True,
                        info="A preset, a Hugging Face id or a folder",
                    )
                    with gr.Row():
                        load = gr.Button(f"Load {name} Model", variant="primary", min_width=140)
                        unload = gr.Button(f"Unload {name} Model", min_width=140)
                    line = html(elem_id=f"{role}-model-line")
                    lines.append((role, key, load, unload, line))
        status = html(elem_id="dual-status")
    for role, key, load, unload, line in lines:
        _wire(actions, role, key, load, unload, line, status)
        blocks.load(partial(_offered, actions, role), None, key, **QUIET)
    return status


def _offered(actions: Actions, role: Role) -> Any:
    return gr.Dropdown(choices=actions.models.choices(role), value=actions.models.default(role))


def _wire(actions: Actions, role: Role, key: Any, load: Any, unload: Any, line: Any, status: Any) -> None:
    loaded = load.click(shared(_with_role(actions.load, role)), key, line, concurrency_id="models", **QUIET)
    unloaded = unload.click(shared(partial(actions.unload, role)), None, line, concurrency_id="unload", **QUIET)
    for event in (loaded, unloaded):
        event.then(shared(actions.status), None, status, **QUIET)


def _with_role(method: Any, role: Role) -> Any:
    def stream(*inputs: Any) -> Any:
        yield from method(role, *inputs)

    return stream
