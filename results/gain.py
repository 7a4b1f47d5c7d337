"""What a setting of the adaptation is worth at a fixed checkpoint, in seconds instead of a run.

    python -m results.gain                               # all of them, to results/gains.csv
    python -m results.gain DIR actor_step=2 "n_step=50 gamma=0.99"  # some: prints, writes nothing

One row a variant: the return before and after one adaptation of mu, averaged over MAML's first
10 test goals, the gain, and what it exceeds the gain of the settings trained with by, with its
standard error over goals. All variants see the same trajectories.
"""
import dataclasses
import os
import sys
from pathlib import Path

import esmeta
import numpy as np
import tasks

TRAINED = Path(__file__).parent / "cheetah_vel-seed0"
TABLE = Path(__file__).parent / "gains.csv"
VARIANTS = ["n_step=1", "n_step=5", "n_step=10", "n_step=50", "gamma=0.9", "gamma=0.95",
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
        stored, meta = esmeta.load_checkpoint(argv[0] if argv else TRAINED)
        goals = tasks.test_goals(stored.task)[:10]
        configs = {v: esmeta.check_config(dataclasses.replace(stored, **parse(v)))
                   for v in ["", *(argv[1:] or VARIANTS)]}
        print(f"{stored.task}, iteration {meta.iteration}")
        lines, reference = ["setting,before,after,gain,more,error"], None
        print("{:<36}{:>9}{:>9}{:>9}{:>9}{:>9}".format(*lines[0].split(",")))
        with esmeta.Crew(os.cpu_count()) as crew:
            for variant, config in configs.items():
                jobs = [esmeta.EvalJob(config, meta, goal, i, updates=1, seed=1)
                        for i, goal in enumerate(goals)]
                before, after = np.array(crew.map(esmeta.evaluate_goal, jobs)).T
                reference = after if reference is None else reference
                error = (after - reference).std() / len(goals) ** 0.5
                row = [before.mean(), after.mean(), (after - before).mean(),
                       (after - reference).mean(), error]
                name = variant or "as trained"
                print(f"{name:<36}" + "".join(f"{value:9.1f}" for value in row), flush=True)
                lines.append(",".join([name, *(f"{value:.1f}" for value in row)]))
        if not argv:
            TABLE.write_text("\n".join(lines) + "\n")
    except ValueError as error:
        print(f"results.gain: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
