"""The parts of a set written by the machines of a Ray cluster: a task for each part, a window of them at a time.

Ray starts a task again when its process or its machine dies. What a part's bytes are does not depend on that, and its
manifest is put last, so that it is done once whatever happens.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fastpmae_loaders.cli.progress import Progress
from fastpmae_loaders.errors import RunError, UserError
from fastpmae_loaders.printable import on_one_line, printable
from fastpmae_loaders.write.manifests import Manifest
from fastpmae_loaders.write.parts import PartSettings, done_already, worker_pool, write_part
from fastpmae_loaders.write.plan import Part
from fastpmae_loaders.write.shards import part_name
from fastpmae_loaders.write.targets import open_target
from fastpmae_loaders.write.write import BadImages

CLIENT_PORT = 10001
"""Where a cluster's head listens to programs outside it, where an address names no port."""
_PATIENCE = 20.0
"""Seconds for a head to answer."""
_TRIES = 5
"""How often a part's task may lose its process or machine before the command gives up."""
_AHEAD = 2
"""Tasks that are handed in for each that can run at a time."""


def check_place(on: str) -> None:
    """See that it is `local`, `ray` or `ray://HEAD`, that Ray is installed, and that it answers; else UserError."""
    if on == "local":
        return
    if on != "ray" and not (on.startswith("ray://") and len(on) > len("ray://")):
        raise UserError(f"--on is {printable(on)}; expected local, ray or ray://HEAD")
    if find_spec("ray") is None:
        raise UserError("--on ray takes Ray, which is not installed: pip install 'fastpmae-loaders[ray]'")
    _see_that_it_answers(_address(on))


@contextlib.contextmanager
def cluster(on: str) -> Iterator[Any]:
    """The cluster of this name, as the module `ray`: the one that runs on this machine, or one that is started for now.

    Raises:
        UserError: where there is none at the address.
    """
    import ray

    ways: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if on != "ray":
            ray.init(_address(on), **ways)
        else:
            try:
                ray.init("auto", **ways)
            except ConnectionError:
                ray.init(include_dashboard=False, **ways)
    except Exception as error:  # Ray has errors of its own, and those of its libraries
        ray.shutdown()
        raise UserError(f"there is no Ray cluster at {printable(on)}: {on_one_line(str(error), 200)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _address(on: str) -> str:
    """What names the cluster: an address with a port, or nothing."""
    address = os.environ.get("RAY_ADDRESS", "") if on == "ray" else on
    alone = address.startswith("ray://") and ":" not in address.removeprefix("ray://")
    return f"{address}:{CLIENT_PORT}" if alone else address


def _see_that_it_answers(address: str) -> None:
    """UserError where nobody listens at host:port; Ray itself goes on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"there is no Ray cluster at {printable(address)}: {reason}") from None


def write_on_ray(
    on: str,
    parts: Iterator[Part],
    out: str,
    settings: PartSettings,
    workers: int,
    failures: list[BadImages],
) -> Iterator[Manifest]:
    """Writes parts as tasks of a cluster that take `workers` cores each, and yields their manifests as they are done.

    Those with bad images go to `failures`.

    Raises:
        UserError: what a task found wrong.
        RunError: when a part's task has lost its process or its machine too often.
    """
    with cluster(on) as ray:
        task = ray.remote(num_cpus=workers, max_retries=_TRIES - 1)(_written)
        waiting: dict[Any, int] = {}
        for part in parts:
            while len(waiting) >= max(2, _AHEAD * int(ray.cluster_resources().get("CPU", 1)) // workers):
                yield from _next(ray, waiting, failures)
            waiting[task.remote(part, out, settings, workers)] = part.number
        while waiting:
            yield from _next(ray, waiting, failures)


def _next(ray: Any, waiting: dict[Any, int], failures: list[BadImages]) -> Iterator[Manifest]:
    """What comes of the task that is done first."""
    (done,), _ = ray.wait(list(waiting), num_returns=1)
    number = waiting.pop(done)
    try:
        result = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise RunError(f"{part_name(number)} was not written: {on_one_line(str(error.cause), 500)}") from None
    except ray.exceptions.RayError as error:
        raise RunError(
            f"{part_name(number)} was not written: {on_one_line(str(error), 300)}. "
            "The same command goes on where this one stopped"
        ) from None
    if isinstance(result, str):
        raise UserError(result)
    if isinstance(result, list):
        failures.append(BadImages(result, len(result)))
    else:
        yield result


def _written(part: Part, out: str, settings: PartSettings, workers: int) -> Manifest | list[tuple[str, str]] | str:
    """A task: the part's manifest, its bad images, or what is wrong as a sentence."""
    try:
        target = open_target(out)
        manifest = done_already(part, target, settings.force)
        if manifest is not None:
            return manifest
        with worker_pool(settings, part, workers, _nowhere) as pool:
            return write_part(part, target, settings, pool, Progress())
    except BadImages as bad:
        return bad.bad
    except UserError as error:
        return str(error)


def _nowhere(sentence: str) -> None:
    """A note about a worker process stays on the machine that it was on."""
