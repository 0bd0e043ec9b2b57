"""Pseudo-MAE a second time: float64, one image, one fold, one token at a time, straight from the equations.

Nothing here calls the trainer or its kernels or shares their structure, so a mistake would have to be made twice to
go unseen. Weights are a dict of float64 tensors by name; tokens are lists of vectors. Gradients come from autograd.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Tokens = list[Tensor]

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights_of(module: torch.nn.Module, *, grad: bool = False) -> Weights:
    """A module's tensors in float64, cut off from it."""
    return {name: t.detach().double().clone().requires_grad_(grad) for name, t in module.state_dict().items()}


def under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def position(row: int, column: int, dim: int) -> Tensor:
    """MAE's position of one patch: (sin, cos) of its column at dim / 4 frequencies, then of its row."""
    quarter = dim // 4
    angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
    values = [f(angle) for half in angles for f in (math.sin, math.cos) for angle in half]
    return torch.tensor(values, dtype=torch.float64)


def pixels_of(image: Tensor, patch: int, patch_size: int) -> Tensor:
    """Normalised pixels [3, p, p] of one patch of a uint8 image [3, H, W]; patches are counted row by row."""
    columns = image.shape[2] // patch_size
    top, left = patch // columns * patch_size, patch % columns * patch_size
    values = image[:, top : top + patch_size, left : left + patch_size].double() / 255
    return torch.stack([(values[c] - MEAN[c]) / SPREAD[c] for c in range(3)])


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def layer_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.max().detach())
    return powers / powers.sum()


def attention(weights: Weights, name: str, tokens: Tokens, heads: int) -> Tokens:
    dim = len(tokens[0])
    size = dim // heads
    projected = [linear(weights, f"{name}.qkv", token) for token in tokens]
    queries, keys, values = ([p[part * dim : (part + 1) * dim] for p in projected] for part in range(3))
    keys, values = torch.stack(keys), torch.stack(values)
    results = []
    for query in queries:
        mixed = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            mixed.append(softmax(keys[:, own] @ query[own] / math.sqrt(size)) @ values[:, own])
        results.append(linear(weights, f"{name}.proj", torch.cat(mixed)))
    return results


def blocks(weights: Weights, tokens: Tokens, heads: int, drop_path_scale: Tensor | None = None) -> Tokens:
    """All blocks, then the final norm. drop_path_scale [depth, 2] scales what the two branches of each block add."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for b in range(depth):
        first, second = (
            (1.0, 1.0) if drop_path_scale is None else (float(drop_path_scale[b, 0]), float(drop_path_scale[b, 1]))
        )
        normed = [layer_norm(weights, f"blocks.{b}.norm1", t) for t in tokens]
        added = attention(weights, f"blocks.{b}.attn", normed, heads)
        tokens = [t + first * a for t, a in zip(tokens, added, strict=True)]
        normed = [layer_norm(weights, f"blocks.{b}.norm2", t) for t in tokens]
        hidden = [gelu(linear(weights, f"blocks.{b}.mlp.fc1", t)) for t in normed]
        tokens = [t + second * linear(weights, f"blocks.{b}.mlp.fc2", h) for t, h in zip(tokens, hidden, strict=True)]
    return [layer_norm(weights, "norm", t) for t in tokens]


def encode(
    weights: Weights,
    image: Tensor,
    ids: Sequence[int],
    patch_size: int,
    heads: int,
    drop_path_scale: Tensor | None = None,
    fixed: bool = True,
) -> Tokens:
    """The class token and the patches `ids` of one image, through the encoder.

    Positions are MAE's, and none for the class token, or those among the weights, as SdAE's teacher has them.
    """
    columns = image.shape[2] // patch_size
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    table = weights["pos_embed"][0]
    tokens = [weights["cls_token"].flatten() + (0 if fixed else table[0])]
    for patch in ids:
        embedded = kernel @ pixels_of(image, patch, patch_size).flatten() + weights["patch_embed.proj.bias"]
        place = position(patch // columns, patch % columns, len(embedded)) if fixed else table[1 + patch]
        tokens.append(embedded + place)
    return blocks(weights, tokens, heads, drop_path_scale)


def encode_folds(
    weights: Weights,
    image: Tensor,
    folds: Sequence[int],
    fold_sizes: Sequence[int],
    patch_size: int,
    heads: int,
    fixed: bool = True,
) -> tuple[Tokens, Tokens]:
    """Class tokens, one a fold, and patch tokens in the order of `folds`."""
    classes, patches, start = [], [], 0
    for size in fold_sizes:
        first, *rest = encode(weights, image, folds[start : start + size], patch_size, heads, fixed=fixed)
        classes.append(first)
        patches += rest
        start += size
    return classes, patches


def decode(
    weights: Weights,
    encoded: Tokens,
    visible: Sequence[int],
    masked: Sequence[int],
    grid: int,
    heads: int,
) -> tuple[Tensor, Tokens]:
    """The class prediction and those of the masked patches, from tokens put back in the order of the image.

    As MAE and SdAE decode (models_mae.py, forward_decoder): the class token goes first, with a position of zeros, and
    takes part in every block; a method without labels reads nothing of it afterwards.
    """
    seen = dict(zip(visible, encoded[1:], strict=True))
    tokens = [linear(weights, "embed", encoded[0])]
    for patch in range(grid * grid):
        token = linear(weights, "embed", seen[patch]) if patch in seen else weights["mask_token"].flatten()
        if patch in seen or patch in masked:
            tokens.append(token + position(patch // grid, patch % grid, len(token)))
    outputs = [linear(weights, "output", t) for t in blocks(weights, tokens, heads)]
    order = [patch for patch in range(grid * grid) if patch in seen or patch in masked]
    return outputs[0], [outputs[1 + order.index(patch)] for patch in masked]


def logits(weights: Weights, token: Tensor, prototypes: str) -> Tensor:
    """One token's cosine with every prototype after the MLP; `prototypes` names the layer."""
    return cosines(weights[prototypes], bottleneck(weights, token))


def bottleneck(weights: Weights, token: Tensor) -> Tensor:
    """What the MLP makes of one token."""
    hidden = gelu(linear(weights, "fc1", token))
    hidden = gelu(linear(weights, "fc2", hidden))
    return linear(weights, "fc3", hidden)


def teacher_logits(weights: Weights, tokens: Tokens, prototypes: str, centre: bool) -> Tensor:
    """The logits of all tokens of a batch, one after the other; their features may be centred first."""
    features = [bottleneck(weights, token) for token in tokens]
    if centre:
        mean = torch.stack(features).mean(0)
        features = [feature - mean for feature in features]
    return torch.stack([cosines(weights[prototypes], feature) for feature in features])


def cosines(rows: Tensor, bottom: Tensor) -> Tensor:
    """The cosine of a feature with every row."""
    return rows @ bottom / torch.sqrt((rows**2).sum(1) * (bottom**2).sum())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / torch.sqrt((a * a).sum() * (b * b).sum())


def standardised(x: Tensor) -> Tensor:
    """Equation 2, with the unbiased variance."""
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / (len(x) - 1)
    return (x - mean) / torch.sqrt(variance + 1e-6)


def pixel_target(image: Tensor, patch: int, patch_size: int) -> Tensor:
    """MAE's target: row by row, pixel by pixel, the three channels of a pixel side by side."""
    pixels = pixels_of(image, patch, patch_size)
    values = [pixels[:, row, column] for row in range(patch_size) for column in range(patch_size)]
    return standardised(torch.cat(values))


def reconstruction_loss(predicted: list[Tokens], target: list[Tokens]) -> Tensor:
    """Equation 1 over images and their masked tokens."""
    terms = []
    for ours, theirs in zip(predicted, target, strict=True):
        terms += [1 - cosine(a, b) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(terms).mean()


def released_loss(predicted: list[Tokens], target: list[Tokens], fold_sizes: Sequence[int]) -> Tensor:
    """SdAE's loss as released (engine_pretrain.py, train_one_epoch_ema).

    There the masked tokens of an image are cut into its folds, and each fold is a row of a larger batch: for each row
    and each feature stands the cosine of two vectors whose entries are the tokens of that fold. One minus the mean of
    them all is the loss.
    """
    cosines = []
    for ours, theirs in zip(predicted, target, strict=True):
        start = 0
        for size in fold_sizes:
            fold = range(start, start + size)
            for feature in range(len(ours[0])):
                a = torch.stack([ours[token][feature] for token in fold])
                b = torch.stack([theirs[token][feature] for token in fold])
                cosines.append(cosine(a, b))
            start += size
    return 1 - torch.stack(cosines).mean()


def pixel_loss(predicted: list[Tokens], target: list[Tokens]) -> Tensor:
    terms = [
        ((a - b) ** 2).sum() / len(a)
        for ours, theirs in zip(predicted, target, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(terms).mean()


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Textbook Sinkhorn-Knopp on exp(scores / epsilon): prototypes (columns) to equal sums, then rows to 1."""
    table = torch.exp((scores.double() - scores.double().max()) / epsilon)
    rows, prototypes = table.shape
    table = table / table.sum()
    for _ in range(iterations):
        table = table / table.sum(0, keepdim=True) / prototypes
        table = table / table.sum(1, keepdim=True) / rows
    return table * rows


def cross_entropy(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    return -(target * torch.log(softmax(scores / temperature))).sum()


@torch.no_grad()
def nearest(
    student: Tokens, teacher: Tokens, metric: str = "cosine", scope: str = "image", fold_sizes: Sequence[int] = ()
) -> list[int]:
    """For each student token the index of the nearest teacher token of this image, the lowest among equals."""
    fold_of = [fold for fold, size in enumerate(fold_sizes) for _ in range(size)]
    result = []
    for n, a in enumerate(student):
        best, found = math.inf, -1
        for i, b in enumerate(teacher):
            if scope == "fold" and fold_of[n] != fold_of[i]:
                continue
            distance = float(-cosine(a, b) if metric == "cosine" else ((a - b) ** 2).sum())
            if distance < best:
                best, found = distance, i
        result.append(found)
    return result


class Result(NamedTuple):
    total: Tensor
    reconstruction: Tensor
    class_label: Tensor
    patch_label: Tensor


def step(
    student: Weights,
    reconstruction_teacher: Weights | None,
    labelling_teacher: Weights | None,
    batch: Any,
    config: Any,
    drop_path_scale: Tensor | None = None,
) -> Result:
    """Equation 5 and its parts for a batch; `config` is only read for its numbers.

    Teachers' weights are named `encoder.` and `head.`, the student's `decoder.` as well. Without a labelling teacher
    the two label losses are 0.
    """
    size, heads, loss = config.network.patch_size, config.network.heads, config.loss
    grid, fixed = config.views.image_size // size, config.teacher.teacher_init == "copy"
    views = {"simple": batch.simple, "complex": batch.complex}
    encoder, decoder, head = (under(student, f"{part}.") for part in ("encoder", "decoder", "head"))

    predicted, targets, student_classes, student_patches = [], [], [], []
    label_tokens, class_tokens = [], []
    for i in range(len(batch.simple)):
        visible, masked = batch.visible[i].tolist(), batch.folds[i].tolist()
        encoded = encode(
            encoder, batch.simple[i], visible, size, heads, None if drop_path_scale is None else drop_path_scale[i]
        )
        token, tokens = decode(decoder, encoded, visible, masked, grid, config.network.decoder_heads)
        predicted.append(tokens)
        with torch.no_grad():
            if loss.target == "pixels":
                targets.append([pixel_target(batch.simple[i], patch, size) for patch in masked])
            else:
                assert reconstruction_teacher is not None
                image = views[config.views.reconstruction_view][i]
                teacher = under(reconstruction_teacher, "encoder.")
                patches = encode_folds(teacher, image, masked, batch.fold_sizes, size, heads, fixed)[1]
                targets.append([standardised(patch) for patch in patches])
        if labelling_teacher is None:
            continue
        student_classes.append(logits(head, token, "class_prototypes"))
        student_patches.append([logits(head, patch, "patch_prototypes") for patch in tokens])
        with torch.no_grad():
            image = views[config.views.labelling_view][i]
            teacher = under(labelling_teacher, "encoder.")
            classes, patches = encode_folds(teacher, image, masked, batch.fold_sizes, size, heads, fixed)
            label_tokens.append(patches)
            class_tokens += classes

    if loss.target == "pixels":
        l_m = pixel_loss(predicted, targets)
    elif loss.cosine_axis == "token":
        l_m = released_loss(predicted, targets, batch.fold_sizes)
    else:
        l_m = reconstruction_loss(predicted, targets)
    l_c = l_p = torch.zeros((), dtype=torch.float64)
    if labelling_teacher is not None:
        folds, count = len(batch.fold_sizes), len(batch.folds[0])
        with torch.no_grad():
            all_patches = [patch for patches in label_tokens for patch in patches]
            teacher_head, centre = under(labelling_teacher, "head."), loss.center_bottleneck
            class_logits = teacher_logits(teacher_head, class_tokens, "class_prototypes", centre)
            patch_logits = teacher_logits(teacher_head, all_patches, "patch_prototypes", centre)
        class_epsilon = loss.epsilon if loss.class_epsilon is None else loss.class_epsilon
        class_labels = sinkhorn(class_logits, class_epsilon, loss.sinkhorn_iterations)
        patch_labels = sinkhorn(patch_logits, loss.epsilon, loss.sinkhorn_iterations)
        class_terms, patch_terms = [], []
        for i in range(len(batch.simple)):
            mean_label = class_labels[i * folds : (i + 1) * folds].mean(0)
            class_terms.append(cross_entropy(mean_label, student_classes[i], loss.student_temperature))
            own = nearest(predicted[i], label_tokens[i], loss.match_metric, loss.match_scope, batch.fold_sizes)
            patch_terms += [
                cross_entropy(patch_labels[i * count + own[n]], student_patches[i][n], loss.student_temperature)
                for n in range(count)
            ]
        l_c, l_p = torch.stack(class_terms).mean(), torch.stack(patch_terms).mean()
    return Result(loss.lambda_m * l_m + loss.lambda_c * l_c + loss.lambda_p * l_p, l_m, l_c, l_p)


def momentum(first: float, last: float, t: int, total: int) -> float:
    return last - (last - first) * (1 + math.cos(math.pi * t / total)) / 2


def learning_rate(peak: float, epoch: float, warmup: float, epochs: float) -> float:
    """Linear over `warmup` epochs, then a half cosine down to 0 at `epochs`; `epoch` may have a fraction."""
    if epoch < warmup:
        return peak * epoch / warmup
    return peak / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def adamw(
    weight: Tensor,
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> Tensor:
    """Loshchilov and Hutter's algorithm 2 in float64: one weight after its steps."""
    weight, first, second = weight.double().clone(), 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient.double()
        second = betas[1] * second + (1 - betas[1]) * gradient.double() ** 2
        corrected = first / (1 - betas[0] ** t), second / (1 - betas[1] ** t)
        weight = weight - rate * (corrected[0] / (corrected[1].sqrt() + eps) + decay * weight)
    return weight
