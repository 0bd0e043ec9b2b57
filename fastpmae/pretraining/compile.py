"""The two functions that do a step's work, `teacher_forward` and `student_loss`: compiled, or as they are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastpmae.config import CUDA_GRAPHS, Config
from fastpmae.distributed.ranks import Ranks
from fastpmae.model.vit import Blocks
from fastpmae.pretraining.step import label_losses
from fastpmae.run.telemetry import collect_everything

StepFunction = Callable[..., Any]


def compile_step(
    teacher_forward: StepFunction,
    student_loss: StepFunction,
    config: Config,
    ranks: Ranks,
    networks: Iterable[nn.Module] = (),
    backend: str = "inductor",
) -> tuple[StepFunction, StepFunction]:
    """The step's two functions as the loop calls them, each as one graph where they are compiled, but for the losses of
    labels whose temperature warms up.

    Across ranks the student is inside a module of torch's that is not to be compiled: dynamo makes one graph of what
    stands before it, of the student and of the losses each. With --shard the blocks alone are compiled, each between
    FSDP2's hooks, which put it together and take it apart and are not to be traced.

    Args:
        networks: those of the step, whose blocks are changed in place where they are sharded.
        backend: torch.compile's; tests take one that needs no C++ compiler.
    """
    efficiency = config.efficiency
    on_gpu = ranks.device.type == "cuda"
    if not is_compiled(config, ranks):
        return teacher_forward, student_loss
    mode = None if efficiency.compile_mode == "default" else efficiency.compile_mode
    # xformers' operators have no form that a graph could hold.
    whole = efficiency.attention != "xformers"
    if efficiency.shard and ranks.group is not None:
        for network in networks:
            _compile_blocks(network, backend=backend, mode=mode, fullgraph=whole)
        return teacher_forward, student_loss
    one_graph = ranks.group is None
    if config.loss.warmup_epsilon is not None:
        student_loss, one_graph = _with_labels_outside(student_loss), False
    compiled_teacher = torch.compile(teacher_forward, backend=backend, mode=mode, fullgraph=whole)
    compiled_student = torch.compile(student_loss, backend=backend, mode=mode, fullgraph=whole and one_graph)
    if efficiency.compile_mode not in CUDA_GRAPHS or not on_gpu:
        return compiled_teacher, compiled_student

    def first_of_a_step(*arguments: Any) -> Any:
        # What the graphs of the step before have left may be written over from here on, and not before.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled_teacher(*arguments)

    return first_of_a_step, compiled_student


def _with_labels_outside(student_loss: StepFunction) -> StepFunction:
    """The function with the losses of labels left out of its graph, which would hold for one temperature alone.

    A temperature that warms up is another in each epoch: the function would be compiled as often, until torch gives up.
    """
    outside = torch.compiler.disable(label_losses)

    def run(*arguments: Any) -> Any:
        return student_loss(*arguments, outside)

    return run


def is_compiled(config: Config, ranks: Ranks) -> bool:
    """Whether a run's step is compiled."""
    efficiency = config.efficiency
    return efficiency.compile == "on" or (efficiency.compile == "auto" and ranks.device.type == "cuda")


def compile_anew(config: Config, ranks: Ranks) -> bool:
    """Forget what was compiled and captured: each function is compiled again for the shapes that it meets next.

    Left to itself, dynamo takes a second shape for the first of many and compiles for any, which costs speed in every
    kernel, and on a GPU the CUDA graphs of earlier shapes would keep their memory.

    Returns:
        Whether anything is compiled.
    """
    compiled = is_compiled(config, ranks)
    if compiled:
        torch.compiler.reset()
    collect_everything()  # networks in shards are cycles, which would stay beside the next phase's
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return compiled


def _compile_blocks(network: nn.Module, **how: Any) -> None:
    """Compile each transformer block's own work. Blocks of one shape share a graph, and each shape has its own."""
    for blocks in network.modules():
        if isinstance(blocks, Blocks):
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=False, **how)
