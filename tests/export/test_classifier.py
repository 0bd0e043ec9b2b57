"""A stranger's classifier: what its header says reaches no Python and no page unless it is what it must be."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from fastpmae import UserError, export_encoder
from fastpmae.export import export as export_module
from fastpmae.export.classifier import read_tuned
from fastpmae.export.model_card import loading_lines

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 2,
                         "global_pool": "token"}  # fmt: skip
ARGUMENTS: dict[str, Any] = {"model_name": "vit_tiny_patch16_224", **SIZES, "mlp_ratio": 4.0}
EVIL = "cat\n\n# Injected heading\n<script>alert(1)</script> [a](javascript:b) ![x](http://y) `c` | www.evil.com"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict()


def left(folder: Path, weights: dict[str, torch.Tensor], **header: Any) -> Path:
    """A folder as a fine-tuning leaves it, its header as it is said here."""
    said = {"timm": ARGUMENTS, "classes": ["cat", "dog"], "finetune": {"pool": "class"}} | header
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in said.items()}
    folder.mkdir()
    save_file(weights, folder / "classifier.safetensors", {"format": "pt", "backbone": "plain ViT, x.pth"} | words)
    return folder


def test_a_sound_one(weights, tmp_path: Path):
    found = read_tuned(left(tmp_path / "tuned", weights) / "classifier.safetensors")
    assert found.arguments == ARGUMENTS
    assert found.classes == ["cat", "dog"]
    assert (found.shape.patch_size, found.shape.width, found.shape.depth, found.shape.heads) == (8, 32, 2, 2)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"timm": ARGUMENTS | {"num_classes": "2); __import__('os').system('id'); (0"}}, "num_classes is .2"),
        ({"timm": ARGUMENTS | {"x=0)\nimport os; os.system('id')\n(": 1}}, r"no such argument here: x=0\)\\nimport os"),
        ({"timm": ARGUMENTS | {"img_size": [32, 32]}}, "img_size is"),
        ({"timm": ARGUMENTS | {"depth": 10**9}}, "it has 2 blocks, and its header says 1000000000"),
        ({"timm": ARGUMENTS | {"embed_dim": 64}}, r"patch_embed.proj.weight is \(32, 3, 8, 8\)"),
        ({"timm": ARGUMENTS | {"num_heads": 3}}, "3 heads do not divide 32"),
        ({"timm": ARGUMENTS | {"num_heads": -2}}, "num_heads is -2"),
        ({"timm": ARGUMENTS | {"mlp_ratio": float("inf")}}, "mlp_ratio is inf"),
        ({"timm": ARGUMENTS | {"num_classes": True}}, "num_classes is True"),
        ({"timm": ARGUMENTS | {"global_pool": "map"}}, "global_pool is 'map'"),
        ({"timm": ARGUMENTS | {"model_name": "hf-hub:somebody/something"}}, "timm has no model"),
        ({"timm": ARGUMENTS | {"model_name": "vit_tiny_patch16_224'); evil(('"}}, "timm has no model"),
        ({"timm": ARGUMENTS | {"mlp_ratio": 1e308}}, ""),
        ({"timm": ARGUMENTS | {"qk_norm": "yes"}}, "qk_norm is 'yes'"),
        ({"timm": {"model_name": "vit_tiny_patch16_224"}}, "missing"),
        ({"timm": [1]}, "names no arguments"),
        ({"timm": "[" * 10_000}, ""),
        ({"classes": ["cat"]}, "the number of classes, 1"),
        ({"classes": ["cat", 3]}, "classes is"),
        ({"classes": {"0": "cat"}}, "classes is"),
        ({"finetune": "[]"}, "names no settings of its training"),
        ({"finetune": {"epochs": "many"}}, "epochs is 'many'"),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5]}, "mean or std is"),
        ({"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, "import os"]}, "mean or std is"),
        ({"mean": "[NaN, 0, 0]", "std": [1, 1, 1]}, "not finite"),
        ({"mean": [0, 0, 0], "std": [1, 0, 1]}, "std is not above 0"),
    ],
)
def test_a_header_that_says_what_cannot_be(weights, tmp_path: Path, header: dict[str, Any], said: str):
    folder = left(tmp_path / "tuned", weights, **header)
    for out in ("o.safetensors", "folder"):
        with pytest.raises(UserError, match=rf"(?s)is no fine-tuned ViT of fastpmae-eval.*{said}") as caught:
            export_encoder(folder, tmp_path / out)
        assert str(caught.value).isprintable()
    assert {path.name for path in tmp_path.iterdir()} == {"tuned"}


@pytest.mark.parametrize("kind", ["timm", "huggingface", "plain"])
def test_words_of_a_stranger_stay_words(weights, tmp_path: Path, kind, monkeypatch, capsys):
    finetune = {"pool": "class", "x": "```\n# out of the fence"}
    folder = left(
        tmp_path / "tuned", weights, classes=[EVIL, "\x1b[31mdog"], finetune=finetune,
        backbone="plain ViT, </code><img src=x onerror=alert(1)>\n# Backbone",
    )  # fmt: skip
    record = {"evaluation": "finetune<b>", "network": EVIL, "top1": 51.5, "top5": 100.0, "images": 44}
    record |= {"val": {"path": "/a/<i>b</i>|c/`d`"}, "pool": "\n# pool"}
    (folder / "r.json").write_text(json.dumps(record))
    (folder / "s.json").write_text(json.dumps(record | {"evaluation": "finetune"}))
    monkeypatch.setattr("sys.argv", ["fastpmae-export", str(folder), str(tmp_path / kind), "--format", kind])
    assert export_module.main() == 0
    printed = capsys.readouterr().out
    compile(printed, "printed", "exec")
    assert "\x1b" not in printed

    card = (tmp_path / kind / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    # as another reader of Markdown sees it
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [kind, "Evaluation", "Classes", "Fine-tuning"]
    assert "html_block" not in {token.type for token in tokens}
    inside = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inside} <= {"text", "softbreak", "code_inline"}
    assert "javascript" in "".join(child.content for child in inside)  # it is there, as text
    fences = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in fences] == ["python", "json"]
    compile(fences[0].content, "card", "exec")
    assert "\x1b" not in card
    assert "pool" in json.loads(fences[1].content)
    assert "x" not in json.loads(fences[1].content)
    rows = [token for token in tokens if token.type == "tr_open"]
    assert len(rows) == 2


def test_lines_of_any_place_are_python():
    name = "a'b\"c\n`d`\\"
    for kind in ("timm", "plain", "huggingface"):
        for out in (name, name + ".safetensors"):
            compile("\n".join(loading_lines(out, kind, ARGUMENTS)), "lines", "exec")
