"""The model card beside exported weights: what the network is, how to load it, how good it was found to be."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fastpmae.config import Config
from fastpmae.run import run_of


def loading_lines(out: Path | str, format: str, arguments: dict[str, Any]) -> list[str]:
    """Python that loads an export. What it loads it with need not be installed here."""
    if format == "huggingface":
        kind = "ViTForImageClassification" if arguments["num_classes"] else "ViTModel"
        more = "" if arguments["num_classes"] else ", add_pooling_layer=False"
        return [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({str(out)!r}{more})"]
    if format == "plain":
        file = str(out) if str(out).endswith(".safetensors") else str(Path(out) / "model.safetensors")
        return ["from safetensors.torch import load_file", "", f"tensors = load_file({file!r})"]
    if not str(out).endswith(".safetensors"):
        words = f"num_classes={arguments['num_classes']}"
        return ["import timm", "", f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True, {words})"]
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if key != "model_name")
    return [
        "import timm",
        "from safetensors.torch import load_file",
        "",
        f"model = timm.create_model({arguments['model_name']!r}, {words})",
        f"model.load_state_dict(load_file({str(out)!r}))",
    ]


def model_card(
    name: str,
    format: str,
    source: Path,
    network: str,
    arguments: dict[str, Any],
    config: Config | None,
    classes: list[str] | None,
) -> str:
    """README.md of an exported folder, in Markdown."""
    library = {"huggingface": "transformers", "timm": "timm"}.get(format)
    task = "image-classification" if classes else "image-feature-extraction"
    head = ["---", *([f"library_name: {library}"] if library else []), f"pipeline_tag: {task}", "---"]
    what = "a fine-tuned classifier" if classes else f"the encoder of the {network.replace('_', ' ')}"
    lines = [
        *head,
        "",
        f"# {name}",
        "",
        f"A vision transformer: {arguments['depth']} blocks, {arguments['embed_dim']} wide, {arguments['num_heads']} "
        f"heads, patches of {arguments['patch_size']} pixels, images of {arguments['img_size']}; {what}, written by "
        f"fastpmae from `{source.name}`. Images are resized, cut at the centre and normalised with ImageNet's mean and "
        "spread.",
        "",
        "```python",
        # Where the folder will lie nobody knows yet.
        *loading_lines(name, format, arguments),
        "```",
    ]
    figures = _figures(source, network)
    if figures:
        lines += [
            "",
            "## How good it was found to be",
            "",
            "| evaluation | top-1 | top-5 | images |",
            "| --- | --- | --- | --- |",
        ]
        lines += figures
    if classes:
        lines += ["", "## Classes", "", ", ".join(classes)]
    if config is not None:
        settings = {key: value for key, value in config.flat().items() if key not in ("beton", "out", "init", "resume")}
        lines += [
            "",
            "## How it was pretrained",
            "",
            "With Pseudo-MAE (Nandam et al., BMVC 2024) and these settings:",
            "",
        ]
        lines += ["```json", json.dumps(settings, indent=1, default=str), "```"]
    return "\n".join(lines) + "\n"


def _figures(source: Path, network: str) -> list[str]:
    """A row for each result of this network that lies beside its run."""
    run = source.parent if network == "classifier" else run_of(source)
    rows = []
    for path in sorted((run / ("." if network == "classifier" else "eval")).glob("*.json")) if run is not None else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(path.read_text())
            if network in ("classifier", found["network"]):
                figures = f"{found['top1']:.2f} % | {found['top5']:.2f} % | {found['images']:,}"
                rows.append(f"| {found['evaluation']} | {figures} |")
    return rows
