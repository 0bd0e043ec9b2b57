"""The DALI graph on the CPU against Pillow and the compiled operations, and the graph for a GPU as it is serialised."""

import itertools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastpmae_loaders import View, dino_global, dino_local, draw_samples, mae_view, plain_view
from fastpmae_loaders.engines.scratch import make_scratch
from fastpmae_loaders.pixels import colour
from fastpmae_loaders.sampling import BLURRED, FIRST_RECIPE, GRAY, JITTER, ORDER, SIGMA, SOLARISED, SampleDraws
from tests.loaders.files import photographs
from tests.made import made_image

pytest.importorskip("nvidia.nvimgcodec", reason="NVIDIA DALI is not installed (the extra dali-cuda130)")
dali_pipeline = pytest.importorskip("fastpmae_loaders.engines.dali_pipeline", reason="NVIDIA DALI is not installed")

ORDERS = list(itertools.permutations(range(4)))
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
COLOURED = View(
    40,
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_probability=1.0,
    grayscale_probability=0.5,
    blur=(0.5, 0.5),
    solarise=(0.5, 0.5),
)


def run(images, views, draws, colours=True) -> list[np.ndarray]:
    """The graph's views, uint8 [B, 3, S, S] each, of images given as pixels."""
    height, width = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    pipeline = dali_pipeline.views_pipeline(
        views, "cpu", colours, batch_size=len(images), num_threads=2, device_id=None
    )
    pipeline.build()
    pipeline.feed_input("data", [image.reshape(-1) for image in images])
    pipeline.feed_input("raw", np.ones(len(images), np.bool_))
    pipeline.feed_input("shape", np.array([image.shape for image in images], np.int32))
    for name, values in dali_pipeline.view_inputs(views, draws, height, width, colours).items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    outputs = pipeline.share_outputs()
    found = [np.stack([np.array(output[i]) for i in range(len(images))]) for output in outputs]
    pipeline.release_outputs()
    return found


def whole(count: int, side: int, factors: np.ndarray, choices: np.ndarray) -> SampleDraws:
    """Draws of one view that shows the whole of a square image as it is."""
    boxes = np.zeros((count, 1, 4), np.int32)
    boxes[..., 2:] = side
    return SampleDraws(
        boxes, np.zeros((count, 1), np.bool_), factors[:, None], choices[:, None], np.zeros((count, 0), np.int64)
    )


def squares(count: int, side: int) -> list[np.ndarray]:
    """Images with smooth colours, grays and edges, the darkest and the brightest among them."""
    images = [np.array(made_image(number, side, side)) for number in range(count)]
    images[0][: side // 2] = images[0][: side // 2].mean(2, keepdims=True).astype(np.uint8)
    images[1] = np.clip(images[1].astype(int) * 2 - 128, 0, 255).astype(np.uint8)
    images[2] //= 16
    return images


def recoloured(image: np.ndarray, factors: np.ndarray, choices: np.ndarray, threshold: int = 128) -> np.ndarray:
    """What the compiled operations make of it: uint8 [3, S, S]."""
    changed = np.ascontiguousarray(image.transpose(2, 0, 1))
    operations = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
    if choices[JITTER]:
        for which in choices[ORDER : ORDER + 4]:
            operations[which](changed, factors[which])
    if choices[GRAY]:
        colour.grayscale(changed)
    if choices[BLURRED]:
        colour.blur(changed, factors[SIGMA], make_scratch(8, 8, len(image)))
    if choices[SOLARISED]:
        colour.solarise(changed, threshold)
    return changed


@pytest.mark.slow
def test_each_colour_operation_is_the_compiled_one_within_a_level():
    factors = np.tile(np.array([1.0, 1.0, 1.0, 0.0, 1.0]), (40, 1))
    choices = np.zeros((40, 9), np.uint8)
    choices[:, ORDER : ORDER + 4] = range(4)
    choices[:, JITTER] = 1
    values = [(BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.8, 1.2), (HUE, -0.1, 0.1), (HUE, -0.5, 0.5)]
    for start, (which, low, high) in enumerate(values):
        factors[4 * start : 4 * start + 4, which] = np.linspace(low, high, 4)
    for row, column in ((20, GRAY), (24, SOLARISED), (28, BLURRED)):
        choices[row : row + 4, column] = 1
    factors[28:32, SIGMA] = (0.1, 0.7, 1.3, 2.0)
    images = squares(4, 40) * 10
    (found,) = run(images, [COLOURED], whole(40, 40, factors, choices))
    for row, image in enumerate(images):
        away = np.abs(found[row].astype(int) - recoloured(image, factors[row], choices[row]))
        assert away.max() <= 1, (row, factors[row], choices[row])
        if not choices[row, BLURRED]:
            assert (away > 0).mean() < 0.002, (row, factors[row])


def test_jitters_run_in_each_samples_own_order():
    rng = np.random.default_rng(5)
    factors = np.stack([rng.uniform(0.6, 1.4, 24), rng.uniform(0.6, 1.4, 24), rng.uniform(0.4, 1.6, 24)], 1)
    factors = np.concatenate([factors, rng.uniform(-0.3, 0.3, (24, 1)), np.ones((24, 1))], 1)
    choices = np.zeros((24, 9), np.uint8)
    choices[:, ORDER : ORDER + 4] = ORDERS
    choices[:, JITTER] = 1
    images = squares(3, 40) * 8
    (found,) = run(images, [COLOURED], whole(24, 40, factors, choices))
    other = np.roll(choices, 1, axis=0)
    for row, image in enumerate(images):
        away = np.abs(found[row].astype(int) - recoloured(image, factors[row], choices[row]))
        assert np.percentile(away, 99) <= 2
        assert away.mean() < 0.1
    # which is not for want of a difference between orders
    differ = [np.abs(recoloured(i, f, c).astype(int) - recoloured(i, f, o)).mean() for i, f, c, o in
              zip(images, factors, choices, other, strict=True)]  # fmt: skip
    assert np.mean(differ) > 1


def test_crops_and_flips_are_pillows_bicubic_within_dalis_filter():
    images = photographs("imagenet_sample_400", 24)
    height, width = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    views = [mae_view(224), dino_local(96)]
    draws = draw_samples(1, 2, np.arange(len(images)), height, width, views)
    found = run(images, views, draws, colours=False)
    for number, view in enumerate(views):
        away = []
        for row, image in enumerate(images):
            top, left, rows, columns = draws.boxes[row, number]
            crop = Image.fromarray(image[top : top + rows, left : left + columns])
            expected = np.array(crop.resize((view.size, view.size), Image.Resampling.BICUBIC))
            if draws.flips[row, number]:
                expected = expected[:, ::-1]
            away.append(np.abs(expected.transpose(2, 0, 1).astype(int) - found[number][row]))
        away = np.stack(away)
        # Pillow rounds and clamps between its two passes, DALI does not: hard edges alone differ by more than that
        assert away.mean() < 0.2
        assert (away > 2).mean() < 1e-3
        assert away.max() < 32
    assert draws.flips[:, 0].any()
    assert not draws.flips[:, 0].all()


@pytest.mark.parametrize("shape", [(37, 90), (90, 37), (64, 64), (61, 60)])
def test_the_view_of_an_evaluation_is_pillows(shape):
    image = np.array(made_image(3, shape[1], shape[0]))
    view = plain_view(32)
    height, width = np.array([shape[0]]), np.array([shape[1]])
    (found,) = run([image], [view], draw_samples(0, 0, np.zeros(1, np.int64), height, width, [view]))
    shorter = view.shorter
    full = (max(shorter, shorter * shape[1] // shape[0]), max(shorter, shorter * shape[0] // shape[1]))
    left, top = (round((side - 32) / 2) for side in full)
    expected = np.array(
        Image.fromarray(image).resize(full, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    )
    away = np.abs(expected.transpose(2, 0, 1).astype(int) - found[0])
    assert away.mean() < 0.4
    assert np.percentile(away, 99) <= 3


def test_without_colours_a_view_is_only_cropped():
    images = squares(4, 40)
    views = [dino_global("t1", 32), mae_view(32)]
    draws = draw_samples(0, 0, np.arange(4), np.full(4, 40), np.full(4, 40), views)
    plain = SampleDraws(draws.boxes, draws.flips, draws.factors, np.zeros_like(draws.choices), draws.order)
    plain.choices[:, :, FIRST_RECIPE] = 1
    plain.choices[:, :, ORDER : ORDER + 4] = range(4)
    for a, b in zip(run(images, views, draws, colours=False), run(images, views, plain), strict=True):
        assert (a == b).all()


@pytest.mark.slow
def test_the_graph_for_a_gpu_decodes_there_and_takes_all_its_numbers_from_the_host():
    views = [mae_view(), dino_global(), dino_local(), plain_view()]
    graphs = {}
    for device in ("cpu", "gpu"):
        # no driver is needed to define and to serialise
        made = dali_pipeline.views_pipeline(views, device, True, batch_size=64, num_threads=3, device_id=None)
        graphs[device] = list(operators(made.serialize()))
    on_gpu = {"Resize", "Slice", "GaussianBlur", "LookupTable", "Transpose", "CoordTransform", "_ArithmeticGenericOp"}
    assert on_gpu <= {operator["kind"] for operator in graphs["gpu"]}
    for operator in graphs["gpu"]:
        if operator["kind"] == "decoders__Image":
            assert operator["device"] == "mixed"
            assert operator["arguments"]["jpeg_fancy_upsampling"] == [1]
            assert operator["arguments"]["adjust_orientation"] == [0]
            # the same bits wherever in a batch a sample stands
            assert operator["arguments"]["hw_decoder_load"] == [0.0]
        elif operator["kind"] in on_gpu:
            assert operator["device"] == "gpu"
            assert operator["outputs"] == ["gpu"]
        elif operator["kind"] == "ExternalSource":
            assert operator["device"] == "cpu"
        # an operator's numbers for each sample may come from the host alone
        assert all(device == "cpu" for name, device in operator["inputs"].items() if name)
    resizes = [operator for operator in graphs["gpu"] if operator["kind"] == "Resize"]
    assert [operator["arguments"]["size"] for operator in resizes] == [[side] * 2 for side in (224, 224, 96, 224)]
    for operator in resizes:
        assert operator["arguments"]["interp_type"] == [2]  # cubic
        assert operator["arguments"]["antialias"] == [1]
        assert {"roi_start", "roi_end"} <= operator["inputs"].keys()
    # one definition: the same operators in the same order, but for the copies to the GPU
    kinds = {device: [operator["kind"] for operator in graph] for device, graph in graphs.items()}
    copies = ("MakeContiguous", "Copy", "_TransferOp")
    assert [kind for kind in kinds["gpu"] if kind not in copies] == [
        kind for kind in kinds["cpu"] if kind not in copies
    ]
    assert not any("random" in kind.lower() or "uniform" in kind.lower() for kind in kinds["cpu"])
    assert kinds["cpu"].count("decoders__Image") == 1


@pytest.mark.parametrize(("load", "loads"), [(0.0, [0.0]), (1.0, [1.0]), (0.4, [1.0, 0.0])])
def test_decoders_in_hardware_take_what_is_meant_for_them(load, loads):
    """A share of each batch would go by the place in it, so each decoder gets a batch of its own."""
    inputs = {}
    for asked in (0.0, load):
        made = dali_pipeline.views_pipeline(
            [mae_view()], "gpu", True, asked, batch_size=64, num_threads=3, device_id=None
        )
        graph = list(operators(made.serialize()))
        inputs[asked] = sum(operator["kind"] == "ExternalSource" for operator in graph)
    decoders = [operator for operator in graph if operator["kind"] == "decoders__Image"]
    assert [operator["arguments"]["hw_decoder_load"] for operator in decoders] == [[load] for load in loads]
    assert all(operator["arguments"]["jpeg_fancy_upsampling"] == [1] for operator in decoders)
    assert inputs[load] - inputs[0.0] == len(loads) - 1


def test_on_the_cpu_there_is_one_decoder_whatever_the_share():
    assert dali_pipeline.shares_decoders("gpu", 0.4)
    assert not dali_pipeline.shares_decoders("cpu", 0.4)
    made = dali_pipeline.views_pipeline([mae_view()], "cpu", True, 0.4, batch_size=4, num_threads=1, device_id=None)
    assert [operator["kind"] for operator in operators(made.serialize())].count("decoders__Image") == 1


def operators(graph: bytes) -> Iterator[dict]:
    """The operators of a serialised pipeline, read from protobuf's wire format.

    `kind`, `device`, `arguments` (name to list of values), `inputs` ("" or the argument's name to the device it comes
    from), `outputs` (devices).
    """
    for number, message in wire(graph):
        if number != 5:
            continue
        found = {"kind": "", "device": "", "arguments": {}, "inputs": {}, "outputs": []}
        for part, value in wire(message):
            inner = list(wire(value)) if part in (2, 3, 4) else []
            if part == 1:
                found["kind"] = value.decode()
            elif part == 2:
                fields = dict(inner)
                found["inputs"][fields.get(4, b"").decode() if fields.get(3) else ""] = fields[2].decode()
            elif part == 3:
                found["outputs"].append(dict(inner)[2].decode())
            elif part == 4:
                name = dict(inner)[1].decode()
                nested = [list(wire(value)) for field, value in inner if field == 7] or [inner]
                values = [value for fields in nested for field, value in fields if field in (3, 4, 5, 6)]
                found["arguments"][name] = values
                if name == "device":
                    found["device"] = values[0].decode()
        yield found


def wire(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message: numbers and values."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind == 5:
            yield number, struct.unpack("<f", data[at : at + 4])[0]
            at += 4
        else:
            assert kind == 2, f"wire type {kind}"
            length = varint()
            yield number, data[at : at + length]
            at += length
