"""The encoder as others load it: for timm, for Hugging Face's transformers, or as plain tensors."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from fastpmae.evaluate.features import Network
from fastpmae.export.model_card import loading_lines, model_card, portable, without_folders
from fastpmae.export.network import Export, at_size, read_export
from fastpmae.export.transformers import image_config, model_config, transformers_names
from fastpmae.run.stored_run import brought_here
from fastpmae.weights.tensor_file import save_tensors
from fastpmae_loaders.cli.exits import exit_with_sentence
from fastpmae_loaders.cli.help_texts import HELP_TEXTS
from fastpmae_loaders.cli.outputs import check_no_run_file, check_output
from fastpmae_loaders.cli.terminal import tell
from fastpmae_loaders.errors import UserError
from fastpmae_loaders.files import atomic_write
from fastpmae_loaders.stores.address import Address, place_of
from fastpmae_loaders.values import checked
from fastpmae_loaders.write.outputs import open_output

Format = Literal["timm", "huggingface", "plain"]

MODEL = "model.safetensors"


@checked
def export_encoder(
    checkpoint: Address | Path | str,
    out: Address | Path | str,
    network: Network = "student",
    *,
    format: Format = "timm",
    image_size: int = 0,
    with_head: bool = False,
    force: bool = True,
) -> dict[str, Any]:
    """Write an encoder to a .safetensors file, or to a folder with settings and a model card.

    Args:
        checkpoint: a checkpoint or a run folder, here or in a store; or what `fastpmae-eval finetune` left, which has a
            classifier, or `segment` or `detect`, of which "plain" writes the whole network.
        out: a name that ends in .safetensors makes a file, any other a folder; it may be an address.
        network: whose encoder.
        format: timm's names (a folder opens with `timm.create_model("local-dir:FOLDER")`); a folder that
            transformers' `from_pretrained` opens; or the checkpoint's own tensors under `encoder.`. Of a segmenter or a
            detector the last is what `fastpmae.load_segmenter` and `load_detector` open.
        image_size: interpolate the positions for images of this side; 0 keeps the run's own.
        with_head: with "plain", the projection head and the prototypes too, under `head.`.
        force: replace files that are there; the checkpoint itself and files of a run never are. The command does so
            where it is told to.

    The same network gives the same bytes.

    Returns:
        The arguments for `timm.create_model`, which are also in the file's header as JSON under "timm", as is under
        "mean" and "std" what images are normalised with: ImageNet's, or what a classifier's first weights wanted; and
        under "crop_ratio" what whole images are cut to: 0.875, or what a classifier was tested with.

    Raises:
        UserError: when the checkpoint cannot be used, the format cannot hold it, or the file not be written.
    """
    return _exported(checkpoint, place_of(out), network, format, image_size, with_head, force).arguments


def _exported(
    checkpoint: Address | Path | str,
    place: Path | Address,
    network: Network,
    format: Format,
    image_size: int,
    with_head: bool,
    force: bool,
) -> Export:
    with brought_here(checkpoint) as here:
        export = read_export(here, network, with_head)
    _check_format(export, format, image_size, with_head)
    export = at_size(export, image_size)
    tensors = {name: tensor.contiguous() for name, tensor in export.tensors.items()}
    header = {
        "format": "pt",
        "timm": json.dumps(export.arguments),
        "mean": json.dumps(export.mean),
        "std": json.dumps(export.std),
        "crop_ratio": json.dumps(export.crop_ratio),
    }
    if export.dense is not None and format == "plain":
        header = export.dense.told() | {"backbone": without_folders(export.dense.source)}
    if place.suffix == ".safetensors":
        if format == "huggingface":
            raise UserError(f"{place}: what transformers opens is a folder; leave .safetensors out of the name")
        with open_output(place, force=force, inputs=[export.source, checkpoint]).writing() as beside:
            save_tensors(_plain(export) if format == "plain" else tensors, beside, header)
        return export
    files: dict[str, Any] = {}
    size = export.arguments["img_size"]
    if format == "huggingface":
        tensors = _for_transformers(export)
        files = {
            "config.json": model_config(export.shape, size, export.classes),
            "preprocessor_config.json": image_config(size, export.mean, export.std, export.crop_ratio),
        }
    elif format == "timm":
        files = {"config.json": _timm_config(export)}
    else:
        tensors = _plain(export)
        said = {"run": None if export.config is None else portable(export.config)}
        files = {"config.json": export.arguments | said if export.dense is None else export.dense.settings()}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    texts["README.md"] = model_card(place.name, format, export)
    with _writing(place, (*texts, MODEL), force, export.source) as places:
        save_tensors(tensors, places[MODEL], header)
        for name, text in texts.items():
            places[name].write_text(text, encoding="utf-8", errors="backslashreplace")
    return export


def _check_format(export: Export, format: Format, image_size: int, with_head: bool) -> None:
    """Raise UserError where a format does not hold what is asked for."""
    if with_head and format != "plain":
        raise UserError(f"the projection head fits only into --format plain, not into {format}")
    if export.dense is None:
        return
    if format == "plain" and image_size not in (0, export.dense.image_size):
        raise UserError(
            f"--image-size {image_size}: a {export.network} is exported as it was trained; of its encoder alone, with "
            "--format timm, positions can be interpolated"
        )
    if format != "plain" and "model_name" not in export.arguments:
        raise UserError(
            f"{export.source}: its encoder has relative positions, which a plain ViT lacks; --format plain writes the "
            f"whole {export.network}"
        )


@contextlib.contextmanager
def _writing(out: Path | Address, names: Sequence[str], force: bool, source: Path) -> Iterator[dict[str, Path]]:
    """Places for the files of a folder, here or in a store: all are written before the first takes its name."""
    with contextlib.ExitStack() as stack:
        if isinstance(out, Address):
            outputs = [open_output(out / name, force=force, inputs=[source]) for name in names]
            yield {name: stack.enter_context(output.writing()) for name, output in zip(names, outputs, strict=True)}
            return
        for name in names:
            if out.is_dir():
                check_output(out / name, force=force, inputs=[source])
            else:
                check_no_run_file(out / name)
        stack.enter_context(_folder(out))
        yield {name: stack.enter_context(atomic_write(out / name, force)) for name in names}


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """A folder to write in, which goes again where it is new and nothing comes to lie in it."""
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}") from None
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def _for_transformers(export: Export) -> dict[str, Tensor]:
    """ViTModel's tensors, or those of ViTForImageClassification where there is a classifier."""
    encoder = {name: tensor for name, tensor in export.tensors.items() if not name.startswith("head.")}
    if export.classes is None:
        return transformers_names(encoder)
    if export.arguments["global_pool"] != "token":
        raise UserError(
            "transformers' ViTForImageClassification reads the class token, and this classifier the mean of the "
            "patches: fine-tune with --pool class, or use --format timm"
        )
    named = {f"vit.{name}": tensor for name, tensor in transformers_names(encoder).items()}
    return named | {f"classifier.{kind}": export.tensors[f"head.{kind}"].contiguous() for kind in ("weight", "bias")}


def _timm_config(export: Export) -> dict[str, Any]:
    """config.json as timm reads it from a folder."""
    arguments = {key: value for key, value in export.arguments.items() if key not in ("model_name", "num_classes")}
    size = arguments["img_size"]
    return {
        "architecture": export.arguments["model_name"],
        "num_classes": export.arguments["num_classes"],
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "label_names": export.classes,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": export.crop_ratio,
            "mean": list(export.mean),
            "std": list(export.std),
            "num_classes": export.arguments["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _plain(export: Export) -> dict[str, Tensor]:
    if export.dense is not None:
        return {name: tensor.contiguous() for name, tensor in export.dense.tensors.items()}
    tensors = {f"encoder.{name}": tensor.contiguous() for name, tensor in export.tensors.items()}
    return tensors | {f"head.{name}": tensor.contiguous() for name, tensor in export.more.items()}


def export_command(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    network: Network = "student",
    format: Format = "timm",
    image_size: int = 0,
    with_head: bool = False,
    force: bool = False,
) -> None:
    """Write the encoder of a run for other programs, and print the lines that load it.

    Args:
        checkpoint: A checkpoint or a run folder, or the folder of a fine-tuning, whose classifier goes along, or of a
            segmentation or detection. It and OUT may lie in a store (s3://, gs://, az://).
        out: A name that ends in .safetensors makes a file; any other a folder with settings and a model card.
        network: The network whose encoder is written.
        format: Layout of the export: for timm, for transformers (a folder), or plain, the checkpoint's own tensors; of
            a segmenter or detector the whole network.
        image_size: Interpolate the positions for images of this side; 0 keeps the run's own.
        with_head: Write the projection head and the prototypes too (with --format plain).
        force: Replace files that are there, but for CKPT itself and files of a run.
    """
    place = place_of(out)
    export = _exported(checkpoint, place, network, format, image_size, with_head, force)
    dense = "" if export.dense is None else export.network
    if isinstance(place, Address):
        tell(f"wrote {place}; on a disk, as {place.name}, it is loaded so:")
    shown = place.name if isinstance(place, Address) else place
    tell("\n".join(loading_lines(shown, format, export.arguments, dense)))


def main() -> int:
    """`fastpmae-export`."""
    return exit_with_sentence(
        "fastpmae-export", lambda: tyro.cli(export_command, prog="fastpmae-export", registry=HELP_TEXTS)
    )


if __name__ == "__main__":
    sys.exit(main())
