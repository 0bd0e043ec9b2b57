"""The whole training step with the kernels against the step with their plain forms, in fp32."""

from typing import Any

import pytest
import torch

from fastpmae.pretraining.step import compute_targets, student_loss
from fastpmae_kernels import backend
from tests.tiny import drop_path_scale_of, made_batch, tiny_config, tiny_networks


@pytest.mark.parametrize(
    "settings",
    [{}, {"match_metric": "l2"}, {"match_scope": "fold"}, {"preset": "single-step"}, {"preset": "mae"}],
    ids=str,
)
def test_step_with_kernels_is_the_step_with_plain_forms(settings: dict[str, Any]):
    settings = dict(settings)
    config = tiny_config(settings.pop("preset", "paper"), folds=3, **settings)
    student, teachers = tiny_networks(config)
    student, batch = student.float(), made_batch(1, 2, (5, 4, 4))
    for teacher in (teachers.reconstruction, teachers.labelling):
        if teacher is not None:
            teacher.float()
    drop_path_scale = drop_path_scale_of(config, len(batch)) if config.network.drop_path else None
    drop_path_scale = None if drop_path_scale is None else drop_path_scale.float()

    def run(choice: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        student.zero_grad()
        with backend.use(choice):
            losses = student_loss(student, batch, drop_path_scale, compute_targets(teachers, batch, config), config)
            losses.total.backward()
        return [loss.detach() for loss in losses[:4]], {
            name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
        }

    losses, gradients = run("device")
    plain_losses, plain_gradients = run("ref")
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses, plain_losses, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in plain_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-5 * largest, msg=name)
    again, _ = run("device")
    assert all(torch.equal(a, b) for a, b in zip(again, losses, strict=True))
