"""A writer's workers that never end their work: `python -m tests.programs.spinning_pool` prints their numbers."""

from fastpmae_loaders.write.workers import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool("tests.tasks:behaviour", (), 2, 600.0)
    print(*pool.pids, flush=True)
    list(pool.in_order(["spin"] * 4))
