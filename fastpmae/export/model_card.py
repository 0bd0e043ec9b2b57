"""The model card beside exported weights: what the network is, how to load it, its evaluations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from fastpmae.config import Config
from fastpmae.export.markdown import code, plain
from fastpmae.model.patches import IMAGENET_MEAN, IMAGENET_STD
from fastpmae.run.folder import run_of
from fastpmae.run.results import DenseResult, Evaluated, Result, dense_results_in, results_in, step_in
from fastpmae.templating import text_page

if TYPE_CHECKING:
    from fastpmae.export.network import Export

Kind = TypeVar("Kind", bound=Evaluated)

PLACES = ("beton", "out", "init", "resume", "eval_train", "eval_val")
"""Settings that say where something lies on the machine that trained: nobody else's business, and no use to them."""

TUNING = {"finetune": "classifier", "segment": "segmenter", "detect": "detector"}
"""Which subcommand of `fastpmae-eval` leaves which network."""
TIMM = "1.0.16"
"""The first timm that opens a folder by `local-dir:`, with the sizes that its config.json names."""


def portable(config: Config) -> dict[str, Any]:
    """The settings of a run that mean something on any machine."""
    return {name: value for name, value in config.flat().items() if name not in PLACES}


def loading_lines(out: Path | str, format: str, arguments: dict[str, Any], dense: str = "") -> list[str]:
    """Python that loads an export. What it loads it with need not be installed here.

    Args:
        arguments: for timm.
        dense: "segmenter" or "detector" where the encoder is that of one.
    """
    if format == "plain" and dense:
        return [f"from fastpmae import load_{dense}", "", f"{dense} = load_{dense}({str(out)!r})"]
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


def model_card(name: str, format: str, export: "Export") -> str:
    """README.md of an exported folder, in Markdown."""
    arguments, classes = export.arguments, export.classes
    library = {"huggingface": "transformers", "timm": "timm"}.get(format)
    task = "image-classification" if classes else "image-feature-extraction"
    what = "a fine-tuned classifier" if classes else f"the encoder of the {export.network.replace('_', ' ')}"
    dense = "" if export.dense is None else export.network
    whole = export.dense is not None and format == "plain"
    if export.dense is not None and whole:
        task = {"segment": "image-segmentation", "detect": "object-detection"}[export.dense.kind]
        what = f"the encoder of this {export.network} of {len(export.dense.names)} classes"
        classes = list(export.dense.names)
    usual = (tuple(export.mean), tuple(export.std)) == (IMAGENET_MEAN, IMAGENET_STD)
    normal = "ImageNet's mean and std" if usual else f"mean {list(export.mean)} and std {list(export.std)}"
    pretraining = None if export.config is None else portable(export.config)
    return text_page(
        "fastpmae.export",
        "model_card.md.j2",
        plain,
        library=library and Markup(library),
        task=Markup(task),
        name=name,
        network=arguments,
        what=what,
        source=Markup(code(export.source.name)),
        normalisation=Markup(normal),
        whole=whole,
        command=Markup(next((name for name, word in TUNING.items() if word == export.network), "finetune")),
        # Where the folder will lie nobody knows yet.
        loading=Markup("\n".join(loading_lines(name, format, arguments, dense))),
        timm=TIMM if format == "timm" else None,
        results=[_row(result) for result in _results(export, results_in)],
        dense=[_dense_row(result) for result in _results(export, dense_results_in)],
        classes=classes,
        backbone=without_folders(export.backbone),
        finetune=_as_json(export.finetune),
        pretraining=_as_json(pretraining),
    )


def _as_json(settings: dict[str, Any] | None) -> Markup | None:
    """Settings for a block of code, whose fence no line of JSON can be: strings are on one line with their quotes."""
    return None if settings is None else Markup(json.dumps(settings, indent=1))


def _results(export: "Export", read: Callable[[Path], list[Kind]]) -> list[Kind]:
    """Of the results beside the weights those of these very weights, not of the run's other checkpoints or networks."""
    source = export.source
    if export.network in TUNING.values():
        # What was found of its own encoder names its file.
        own = [name for name, word in TUNING.items() if word == export.network]
        return [r for r in read(source.parent) if r.evaluation in own or r.source.endswith(source.name)]
    run = run_of(source)
    found = [] if run is None else read(run / "eval")
    return [result for result in found if (result.network, result.step) == (export.network, step_in(source.name))]


def _row(result: Result) -> list[str]:
    cells = [result.evaluation, result.images_of, result.detail, f"{result.top1:.2f} %", f"{result.top5:.2f} %"]
    return [*cells, f"{result.images:,}"]


def _dense_row(result: DenseResult) -> list[str]:
    return [result.evaluation, result.images_of, result.words, f"{result.images:,}"]


def without_folders(source: str) -> str:
    """The weights' own name, without the folders of this machine."""
    layout, _, path = source.partition(", ")
    return f"{layout}, {Path(path).name}" if path.endswith((".safetensors", ".pth", ".pt", ".bin")) else source
