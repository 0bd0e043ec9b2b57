"""Pseudo labels and their loss against the usual code, at [64 x 147, 4096]: time and peak memory. And colours.

`python -m benchmarks.bench_kernels [--quick] [--device cpu|cuda] [--json F]`. The cases take turns in one process;
peak memory is measured in a process for each case. The usual code is DINOv2's and SwAV's way of writing the same
work, operation by operation in torch, and for colours, which `--quick` leaves out, torchvision's operations, image by
image.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baseline import sinkhorn as plain_sinkhorn
from benchmarks.common import Case, Row, alternating, arguments, device_name, finish, make_row
from fastpmae_kernels import (
    nearest_patch,
    photometric,
    photometric_ref,
    prototype_cross_entropy,
    prototype_cross_entropy_from_features,
    sinkhorn,
    sinkhorn_bias,
    sinkhorn_bias_from_features,
    traffic,
)
from fastpmae_loaders.machine import usable_cores

BATCH, MASKED, PROTOTYPES, BOTTLENECK, DIM = 64, 147, 4096, 256, 768
EPSILON, TEMPERATURE, ITERATIONS = 0.05, 0.1, 3
IMAGES, SIDE = 8, 224
SLICE = 512
"""Rows that a check looks at at a time: large temporary matrices cost more time than the check itself."""


def labels_in_place(logits: Tensor) -> Tensor:
    """The iterations on one matrix, divided in place: DINOv2's and SwAV's arithmetic."""
    return plain_sinkhorn(logits.float(), EPSILON, ITERATIONS)


def labels_out_of_place(logits: Tensor) -> Tensor:
    """The same with a new matrix for each division."""
    table = (logits.float() / EPSILON).exp().t()
    prototypes, rows = table.shape
    table = table / table.sum()
    for _ in range(ITERATIONS):
        table = table / table.sum(dim=1, keepdim=True) / prototypes
        table = table / table.sum(dim=0, keepdim=True) / rows
    return (table * rows).t()


def usual_cross_entropy(student: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return -(labels[index] * F.log_softmax(student.float() / TEMPERATURE, dim=1)).sum(dim=1).mean()


def our_cross_entropy(student: Tensor, teacher: Tensor, logv: Tensor, index: Tensor) -> Tensor:
    return prototype_cross_entropy(
        student, teacher, logv, index, EPSILON, TEMPERATURE, overwrite=True, expected_gradient=1 / len(student)
    ).mean()


def nearest_by_cdist(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.cdist(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)).argmin(dim=-1)


def made(device: str) -> dict[str, Tensor]:
    """Unit features and prototypes of student and teacher, and which label each row takes."""
    generator = torch.Generator().manual_seed(0)
    rows = BATCH * MASKED
    sizes = {"teacher": rows, "student": rows, "teacher_prototypes": PROTOTYPES, "student_prototypes": PROTOTYPES}
    tensors = {
        name: F.normalize(torch.randn(count, BOTTLENECK, generator=generator), dim=1) for name, count in sizes.items()
    }
    within = torch.randint(MASKED, (BATCH, MASKED), generator=generator)
    tensors["index"] = (within + torch.arange(BATCH).unsqueeze(1) * MASKED).flatten()
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def usual_loss(given: dict[str, Tensor]) -> Tensor:
    """From features to the loss and its gradients, the usual way."""
    with torch.no_grad():
        labels = labels_in_place(given["teacher"] @ given["teacher_prototypes"].T)
    loss = usual_cross_entropy(given["student"] @ given["student_prototypes"].T, labels, given["index"])
    loss.backward()
    return loss.detach()


def our_loss(given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        teacher = given["teacher"] @ given["teacher_prototypes"].T
    logv = sinkhorn_bias(teacher, EPSILON, ITERATIONS)
    loss = our_cross_entropy(given["student"] @ given["student_prototypes"].T, teacher, logv, given["index"])
    loss.backward()
    return loss.detach()


def our_loss_in_chunks(given: dict[str, Tensor]) -> Tensor:
    teacher = given["teacher"], given["teacher_prototypes"]
    logv = sinkhorn_bias_from_features(*teacher, EPSILON, ITERATIONS, prototypes_chunk=1024)
    loss = prototype_cross_entropy_from_features(
        given["student"], given["student_prototypes"], *teacher, logv, given["index"], EPSILON, TEMPERATURE, 1024
    )
    loss.backward()
    return loss.detach()


LOSSES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "usual": usual_loss,
    "loss": our_loss_in_chunks,
    "loss-with-logits": our_loss,
}
"""From features to gradients. "loss" never holds a whole matrix of logits, "loss-with-logits" holds the two."""


def close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is a small part of the largest value; NaN is never close."""
    parts = zip(torch.atleast_1d(got).split(SLICE), torch.atleast_1d(expected).split(SLICE), strict=True)
    # torch's max, unlike Python's, keeps a NaN
    difference = torch.stack([(one - other).abs().max() for one, other in parts]).max()
    return bool(difference <= tolerance * expected.abs().max())


def exact_bias(teacher: Tensor) -> Tensor:
    """Sinkhorn's bias in float64; cosines divided by epsilon are too small to overflow there."""
    slices = [rows.double() / EPSILON for rows in teacher.split(SLICE)]
    logv = -torch.stack([rows.exp().sum(dim=0) for rows in slices]).sum(dim=0).log()
    for _ in range(ITERATIONS - 1):
        logv = logv - torch.stack([torch.softmax(rows + logv, dim=1).sum(dim=0) for rows in slices]).sum(dim=0).log()
    return logv


def exact_labels(teacher: Tensor, logv: Tensor) -> Tensor:
    """Computed in float64, rounded to fp32: a thousandth of what the checks allow."""
    exact = logv.double()
    return torch.cat([torch.softmax(rows.double() / EPSILON + exact, dim=1).float() for rows in teacher.split(SLICE)])


def exact_cross_entropy(student: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient, likewise."""
    value, slopes = torch.zeros((), dtype=torch.float64, device=student.device), []
    for rows, places in zip(student.split(SLICE), index.split(SLICE), strict=True):
        score, label = torch.log_softmax(rows.double() / TEMPERATURE, dim=1), labels[places].double()
        slopes.append(((score.exp() - label) / (TEMPERATURE * len(student))).float())
        value -= (label * score).sum() / len(student)
    return value, torch.cat(slopes)


def time_rows(device: str, rounds: int) -> list[Row]:
    """Each operation against the usual code for it, on logits that are there."""
    given = made(device)
    teacher, index = given["teacher"] @ given["teacher_prototypes"].T, given["index"]
    student = given["student"] @ given["student_prototypes"].T
    logv = sinkhorn_bias(teacher, EPSILON, ITERATIONS)
    rows: list[Row] = []

    def compare(cases: list[Case], ours: list[tuple[str, str]], gates: dict[str, bool]) -> None:
        seconds = alternating(cases, rounds, device)
        alone = [case.name for case in cases if case.name not in {name for name, _ in ours}]
        rows.extend(make_row(name, "time", "s", seconds[name], where, gates[name]) for name in alone)
        for name, baseline in ours:
            against = baseline, seconds[baseline]
            rows.append(make_row(name, "time", "s", seconds[name], where, gates[name] and gates[baseline], against))

    where = device_name(device)
    bias = exact_bias(teacher)
    truth = exact_labels(teacher, bias)
    gates = {
        # as good as labels that are off by this share of themselves
        "sinkhorn": bool((logv - bias).abs().max() <= 1e-4),
        "sinkhorn-matrix": close(sinkhorn(teacher, EPSILON, ITERATIONS), truth, 1e-4),
        "dinov2-in-place": close(labels_in_place(teacher), truth, 1e-4),
        "dinov2-out-of-place": close(labels_out_of_place(teacher), truth, 1e-4),
    }
    compare(
        [
            Case("sinkhorn", lambda: sinkhorn_bias(teacher, EPSILON, ITERATIONS)),
            Case("dinov2-in-place", lambda: labels_in_place(teacher)),
            Case("sinkhorn-matrix", lambda: sinkhorn(teacher, EPSILON, ITERATIONS)),
            Case("dinov2-out-of-place", lambda: labels_out_of_place(teacher), at_most=1 if rounds <= 3 else 2),
        ],
        [
            ("sinkhorn", "dinov2-in-place"),
            ("sinkhorn", "dinov2-out-of-place"),
            ("sinkhorn-matrix", "dinov2-in-place"),
        ],
        gates,
    )

    value, slope = exact_cross_entropy(student, truth, index)
    student.requires_grad_()

    def fresh() -> tuple[Tensor]:
        # As a product gives it: no leaf, and, since the gradient may be written over it, new each time.
        return (student * 1,)

    def with_gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            result = loss(logits)
            return result.detach(), torch.autograd.grad(result, logits)[0]

        return run

    ours = with_gradient(lambda logits: our_cross_entropy(logits, teacher, logv, index))
    theirs = with_gradient(lambda logits: usual_cross_entropy(logits, truth, index))
    gates = {}
    for name, run in (("prototype_cross_entropy", ours), ("usual", theirs)):
        loss, gradient = run(*fresh())
        gates[name] = close(loss, value, 1e-5) and close(gradient, slope, 1e-4)
    del slope

    compare(
        [Case("prototype_cross_entropy", ours, fresh), Case("usual", theirs, fresh)],
        [("prototype_cross_entropy", "usual")],
        gates,
    )
    del truth

    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(BATCH, MASKED, DIM, generator=generator).to(device) for _ in range(2))
    cosine = F.normalize(student.double(), dim=-1) @ F.normalize(teacher.double(), dim=-1).mT
    gates = {}
    for name, run in (("nearest_patch", nearest_patch), ("cdist", nearest_by_cdist)):
        chosen = cosine.gather(2, run(student, teacher).unsqueeze(2)).squeeze(2)
        gates[name] = bool((cosine.amax(dim=2) - chosen).max() <= 1e-6)
    compare(
        [
            Case("nearest_patch", lambda: nearest_patch(student, teacher)),
            Case("cdist", lambda: nearest_by_cdist(student, teacher)),
        ],
        [("nearest_patch", "cdist")],
        gates,
    )

    return rows


def colour_rows(device: str, rounds: int) -> list[Row]:
    """The colours of a batch against torchvision's operations, image by image."""
    images, factors, choices = made_views(device)
    changed = photometric(images, factors, choices)
    # torchvision rounds its blur otherwise: by 1, which a later step can enlarge
    apart = (colours_by_torchvision(images, factors, choices).int() - changed.int()).abs().float()
    right = torch.equal(changed[:FEW], photometric_ref(images[:FEW], factors[:FEW], choices[:FEW]))
    as_usual = bool(apart.mean() < 0.5)
    seconds = alternating(
        [
            Case("photometric", lambda: photometric(images, factors, choices)),
            Case("torchvision", lambda: colours_by_torchvision(images, factors, choices), at_most=2),
        ],
        rounds,
        device,
    )
    where, usual = device_name(device), seconds["torchvision"]
    return [
        make_row("torchvision", "time", "s", usual, where, as_usual),
        make_row(
            "photometric", "time", "s", seconds["photometric"], where, right and as_usual, ("torchvision", usual)
        ),
    ]  # fmt: skip


FEW = 2
"""Images on which the plain form, which takes a while, is the check."""


def made_views(device: str, count: int = IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth images, and draws for them: DINO's factors and shares of the coins, an order of its own for each."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(count, 3, 7, 7, generator=generator) * 255
    images = F.interpolate(coarse, SIDE, mode="bicubic").clamp(0, 255).byte()
    drawn = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    low, high = torch.tensor([[0.6, 0.6, 0.8, -0.1, 0.1], [1.4, 1.4, 1.2, 0.1, 2.0]], dtype=torch.float64)
    choices = torch.zeros(count, 9, dtype=torch.uint8)
    for row in choices:
        row[:4] = torch.randperm(4, generator=generator)
    # whatever is drawn, 80 % are jittered, 20 % gray, 55 % blurred, 10 % solarised
    for column, share in ((4, 0.8), (5, 0.2), (6, 0.55), (7, 0.1)):
        choices[torch.randperm(count, generator=generator)[: round(share * count)], column] = 1
    return images.to(device), (low + drawn * (high - low)).to(device), choices.to(device)


def colours_by_torchvision(images: Tensor, factors: Tensor, choices: Tensor) -> Tensor:
    """The usual way: torchvision's operations on one image after the other, each where it is due."""
    import torchvision.transforms.v2.functional as torchvision

    jitters = (
        torchvision.adjust_brightness, torchvision.adjust_contrast, torchvision.adjust_saturation,
        torchvision.adjust_hue,
    )  # fmt: skip
    changed = []
    for image, factor, choice in zip(images, factors.tolist(), choices.tolist(), strict=True):
        if choice[4]:
            for which in choice[:4]:
                image = jitters[which](image, factor[which])
        if choice[5]:
            image = torchvision.rgb_to_grayscale(image, 3)
        if choice[6]:
            image = torchvision.gaussian_blur(image, [23, 23], [factor[4], factor[4]])
        if choice[7]:
            image = torchvision.solarize(image, 128)
        changed.append(image)
    return torch.stack(changed)


def whole_loss_rows(device: str, rounds: int) -> list[Row]:
    """What the memory saved by chunks costs in time: the losses of `memory_rows`, taking turns."""
    given = made(device)
    for key in ("student", "student_prototypes"):
        given[key].requires_grad_()
    truth = usual_loss(given)
    gates = {name: close(run(given), truth, 1e-4) for name, run in LOSSES.items()}
    seconds = alternating([Case(name, lambda run=run: run(given)) for name, run in LOSSES.items()], rounds, device)
    where = device_name(device)
    return [
        make_row(f"whole-{name}", "time", "s", seconds[name], where, gates[name], baseline)
        for name in LOSSES
        for baseline in [None if name == "usual" else ("whole-usual", seconds["usual"])]
    ]


def memory_rows(device: str, rounds: int) -> list[Row]:
    """Peak memory of the whole loss, from features to gradients, beyond the features."""
    rows: list[Row] = []
    # It is memory that is measured and not time, so the processes may run side by side.
    with ThreadPoolExecutor(usable_cores()) as pool:
        started = {name: [pool.submit(_measured, name, device) for _ in range(rounds)] for name in LOSSES}
        found = {name: [json.loads(each.result()) for each in runs] for name, runs in started.items()}
    truth = found["usual"][0]["loss"]
    for name, runs in found.items():
        peaks = [run["peak"] / 2**20 for run in runs]
        gate = all(abs(run["loss"] - truth) <= 1e-4 * abs(truth) for run in runs)
        baseline = None if name == "usual" else ("usual", [run["peak"] / 2**20 for run in found["usual"]])
        rows.append(make_row(name, "peak_memory", "MiB", peaks, device_name(device), gate, baseline))
    return rows


def _measured(name: str, device: str) -> str:
    command = [sys.executable, "-m", "benchmarks.bench_kernels", "--measure", name, "--device", device]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]


def measure(name: str, device: str) -> None:
    """Print the peak memory of one loss: bytes beyond what was held before it, on a CPU by the kernel's account."""
    given = made(device)
    few = {key: tensor[:80] for key, tensor in given.items()} | {"index": torch.arange(80, device=device)}
    for tensors in (few, given):
        for key in ("student", "student_prototypes"):
            tensors[key] = tensors[key].clone().requires_grad_()
    LOSSES[name](few)  # what is compiled or loaded at first use is no part of the loss
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = LOSSES[name](given)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        loss = LOSSES[name](given)
        peak = _resident("VmHWM") - before
    print(json.dumps({"peak": peak, "loss": loss.item()}))


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def print_bandwidth(rows: list[Row]) -> None:
    """On a GPU: bytes a second that the operations reach, and their share of what a copy reaches."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    copy = min(alternating([Case("copy", source.clone)], 20, "cuda")["copy"])
    reached = 2 * source.nbytes / copy
    print(f"copy: {reached / 1e9:.0f} GB/s")
    count = BATCH * MASKED
    moved = {
        "sinkhorn": traffic.sinkhorn(count, PROTOTYPES, 4),
        "prototype_cross_entropy": traffic.cross_entropy(count, PROTOTYPES, 4),
        "nearest_patch": traffic.nearest_patch(BATCH, MASKED, MASKED, DIM, 4),
        "photometric": traffic.photometric(IMAGES, SIDE, SIDE, round(0.8 * IMAGES), round(0.55 * IMAGES)),
    }
    for name, bytes_of in moved.items():
        seconds = [row.value for row in rows if row.case == name and row.metric == "time"]
        if not seconds:
            continue
        rate = bytes_of.total / seconds[0]
        print(f"{name}: {rate / 1e9:.0f} GB/s, {rate / reached:.0%} of the copy's")


def main() -> int:
    parser = arguments("bench_kernels", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", choices=tuple(LOSSES), help="(used by the benchmark itself) one loss's memory")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("bench_kernels: error: --device cuda: torch finds no GPU here", file=sys.stderr)
        return 2
    if given.measure:
        measure(given.measure, given.device)
        return 0
    rows = time_rows(given.device, 3 if given.quick else 15)
    if not given.quick:
        rows += colour_rows(given.device, 15)
    rows += memory_rows(given.device, 1 if given.quick else 3)
    if not given.quick:
        rows += whole_loss_rows(given.device, 5)
    status = finish(rows, "Pseudo labels and their loss", given.json, given.plot)
    if given.device == "cuda":
        print_bandwidth(rows)
    else:
        print("No GPU was used. GPU times are modelled, not measured: `make certify` and kernels/README.md.")
    return status


if __name__ == "__main__":
    sys.exit(main())
