"""Settings small enough to train on the images of `made` in a second."""

from fastpmae.evaluate.dense.recipe import DetectConfig, SegmentConfig

SEGMENT = SegmentConfig(
    iterations=8, batch_size=4, lr=2e-3, warmup_iterations=1, crop_size=32, short_side=0, drop_path=0.2, channels=8,
    log_every=2, eval_every=4, scale=(0.8, 1.25),
)  # fmt: skip
DETECT = DetectConfig(
    epochs=4.0, batch_size=4, lr=2e-3, warmup_iterations=1, milestones=(3.0,), short_sides=(32, 64), long_side=96,
    test_short_side=48, drop_path=0.2, box_head="fc", channels=16, proposals=40, boxes_per_image=24,
    log_every=2, eval_every=4,
)  # fmt: skip
