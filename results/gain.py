"""What a setting of the adaptation is worth at a fixed checkpoint, in seconds instead of a run.

    python -m results.gain results/cheetah_vel-seed0
    python -m results.gain results/cheetah_vel-seed0 actor_step=2 "n_step=50 gamma=0.99"

One row a variant: the return before and after one adaptation of mu, averaged over MAML's first
10 test goals, the gain and its standard error over goals. All variants see the same trajectories.
"""
import dataclasses
import os
import sys

import esmeta
import numpy as np
import tasks

VARIANTS = ["", "n_step=1", "n_step=5", "n_step=10", "n_step=50", "gamma=0.9", "gamma=0.95",
            "gamma=0.99", "centre=false", "critic_updates=5", "critic_updates=50",
            "critic_updates=25 critic_batch=128", "critic_updates=6 critic_batch=512",
            "critic_lr=0.0003", "critic_lr=0.01", "actor_batch=64",
            "actor_batch=4000", "actor_step=1", "actor_step=2", "actor_step=5", "actor_step=10",
            "cycles=3", "cycles=3 actor_step=1.5"]


def parse(variant):
    """The settings of 'name=value name=value', as the command line of esmeta would read them."""
    flags = [f"--{word.replace('_', '-')}" for word in variant.split()]
    args = vars(esmeta.make_parser().parse_args(flags))
    return {word.split("=")[0]: args[word.split("=")[0]] for word in variant.split()}


def main(argv):
    """Print the table; exit status 2 and one line where the checkpoint or a setting is none."""
    try:
        stored, meta = esmeta.load_checkpoint(argv[0] if argv else "")
        goals = tasks.test_goals(stored.task)[:10]
        print(f"{stored.task}, iteration {meta.iteration}")
        print(f"{'setting':<36}{'before':>9}{'after':>9}{'gain':>9}{'s.e.':>7}")
        configs = {v: esmeta.check_config(dataclasses.replace(stored, **parse(v)))
                   for v in argv[1:] or VARIANTS}
        with esmeta.Crew(os.cpu_count()) as crew:
            for variant, config in configs.items():
                jobs = [esmeta.EvalJob(config, meta, goal, i, updates=1, seed=1)
                        for i, goal in enumerate(goals)]
                before, after = np.array(crew.map(esmeta.evaluate_goal, jobs)).T
                error = (after - before).std() / len(goals) ** 0.5
                print(f"{variant or 'as trained':<36}{before.mean():9.1f}{after.mean():9.1f}"
                      f"{(after - before).mean():9.1f}{error:7.1f}", flush=True)
    except ValueError as error:
        print(f"results.gain: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
