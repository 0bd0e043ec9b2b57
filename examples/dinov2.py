"""DINOv2 on this loader: a stand-in for facebookresearch/dinov2's train.py and ssl_meta_arch.py."""

import copy

import torch
from common import PATCH, SIZE, WIDTH, Encoder, arguments, follow, report
from torch import Tensor, nn

from fastpmae_loaders import PairedViews, dino_global, dino_local
from fastpmae_loaders.adapters import DINOv2Loader
from fastpmae_loaders.blockwise import DINOv2Masks

LOCALS, PROTOTYPES = 4, 256


class SSLMetaArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"backbone": Encoder(), "head": nn.Linear(WIDTH, PROTOTYPES, bias=False)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward_backward(self, images: dict, teacher_temp: float) -> dict[str, Tensor]:
        global_crops, local_crops = images["collated_global_crops"], images["collated_local_crops"]
        masks, places = images["collated_masks"], images["mask_indices_list"]

        def heads(network: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, Tensor]:
            """Class tokens, and the hidden patches in a buffer that is as large for every batch."""
            patches = tokens.new_zeros(images["upperbound"], WIDTH)
            patches[: len(places)] = tokens[:, 1:].flatten(0, 1)[places]
            return network["head"](tokens[:, 0]), network["head"](patches)[: len(places)]

        with torch.no_grad():
            cls, patches = heads(self.teacher, self.teacher["backbone"](global_crops))
            first, second = (((part - cls.mean(0)) / teacher_temp).softmax(-1) for part in cls.chunk(2))
            patch_targets = ((patches - patches.mean(0)) / teacher_temp).softmax(-1)
        cls, patches = heads(self.student, self.student["backbone"](global_crops, hidden=masks))
        local = self.student["head"](self.student["backbone"](local_crops)[:, 0])

        def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
            return -(target * (logits / 0.1).log_softmax(-1)).sum(-1)

        # each global crop against the other one, and every local crop against both
        losses = {
            "dino_global": cross_entropy(torch.cat([second, first]), cls).mean(),
            "dino_local": torch.stack(
                [cross_entropy(target, crop).mean() for target in (first, second) for crop in local.chunk(LOCALS)]
            ).mean(),
            "ibot": (cross_entropy(patch_targets, patches) * images["masks_weight"]).sum() / len(masks),
        }
        torch.stack(list(losses.values())).sum().backward()
        return losses


def main() -> None:
    args = arguments(__doc__)
    start_iter = 0

    # was: mask_generator, data_transform, collate_fn, dataset and
    #      data_loader = make_data_loader(dataset=dataset, sampler_type=SamplerType.SHARDED_INFINITE, ...)
    crops = [dino_global(which, SIZE, (0.32, 1.0), blur="code") for which in ("t1", "t2")]
    crops += [dino_local(32, (0.05, 0.32))] * LOCALS
    loader = PairedViews(args.beton, args.batch_size, args.engine, seed=0, views=crops, device=args.device)
    masks = DINOv2Masks(mask_ratio_min_max=(0.1, 0.5), mask_sample_probability=0.5)
    # float16, as DINOv2 takes its crops, is for GPUs
    data_loader = DINOv2Loader(loader, masks, PATCH, start_iter, dtype=torch.float32)

    model = SSLMetaArch().to(args.device)
    optimizer = torch.optim.AdamW(model.student.parameters(), 1e-3)
    for iteration, data in enumerate(data_loader, start_iter):
        optimizer.zero_grad(set_to_none=True)
        loss_dict = model.forward_backward(data, teacher_temp=0.07)
        optimizer.step()
        follow(model.teacher, model.student, 0.992)
        if report(iteration, args, **loss_dict):
            return


if __name__ == "__main__":
    main()
