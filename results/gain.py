"""What a setting of the adaptation is worth at a fixed checkpoint, in seconds instead of a run.

    python -m results.gain                               # all of them, to results/gains.csv
    python -m results.gain DIR actor_step=2 "n_step=50 gamma=0.99"  # some: prints, writes nothing

One row a variant: the return before and after the adaptations of mu, averaged over MAML's first
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

HERE = Path(__file__).parent
TABLE = HERE / "gains.csv"
CASES = [  # run, updates, variants
    ("cheetah_vel-seed0", 1, [
        "n_step=1", "n_step=5", "n_step=10", "n_step=50", "gamma=0.9", "gamma=0.95", "gamma=0.99",
        "centre=false", "critic_updates=5", "critic_updates=50",
        "critic_updates=25 critic_batch=128", "critic_updates=6 critic_batch=512",
        "critic_lr=0.0003", "critic_lr=0.01", "actor_batch=64", "actor_batch=4000", "actor_step=1",
        "actor_step=2", "actor_step=5", "actor_step=10", "cycles=3", "cycles=3 actor_step=1.5"]),
    ("cheetah_vel-seed0", 3, ["shrink=0.3", "shrink=1"]),
    ("cheetah_dir-seed0", 1, ["actor_step=3", "actor_step=8"]),
    ("ant_vel-seed0", 1, ["actor_step=2", "actor_step=5"]),
    ("ant_dir-seed0", 1, ["actor_step=5", "actor_step=11"])]


def parse(variant):
    """The settings of 'name=value name=value', as the command line of esmeta would read them."""
    names = [word.split("=")[0] for word in variant.split()]
    known = {field.name for field in dataclasses.fields(esmeta.Config)} - {"task", "seed"}
    for word, name in zip(variant.split(), names):
        if name not in known or "=" not in word:
            raise ValueError(f"{word} is no setting: name=value, name one of {sorted(known)}")
    flags = [f"--{word.replace('_', '-')}" for word in variant.split()]
    args = vars(esmeta.make_parser().parse_args(flags))
    return {name: args[name] for name in names}


def gains(run, updates, variants, crew):
    """Lines of the table for one checkpoint: as trained, then each variant."""
    stored, meta = esmeta.load_checkpoint(run)
    goals, reference = tasks.test_goals(stored.task)[:10], None
    configs = {v: esmeta.check_config(dataclasses.replace(stored, **parse(v)))
               for v in ["", *variants]}
    for variant, config in configs.items():
        jobs = [esmeta.EvalJob(config, meta, goal, i, updates, seed=1)
                for i, goal in enumerate(goals)]
        returns = np.array(crew.map(esmeta.evaluate_goal, jobs))  # (10, updates + 1)
        before, after = returns[:, 0], returns[:, -1]
        reference = after if reference is None else reference
        row = [before.mean(), after.mean(), (after - before).mean(), (after - reference).mean(),
               (after - reference).std() / len(goals) ** 0.5]
        yield ",".join([stored.task, str(updates), variant or "as trained",
                        *(f"{value:.1f}" for value in row)])


def main(argv=None):
    """The program: -> exit status 0; 2 where the checkpoint or a setting is none."""
    parser = esmeta.OneLineParser("results.gain", description=__doc__)
    parser.add_argument("run", nargs="?", help="checkpoint or run directory; none: CASES")
    parser.add_argument("variant", nargs="*", help="settings")
    parser.add_argument("--updates", type=int, default=1)
    try:
        args = parser.parse_intermixed_args(argv)
        if args.updates < 1:
            raise ValueError(f"--updates must be at least 1, not {args.updates}")
        cases = [(args.run, args.updates, args.variant)] if args.run else [
            (HERE / run, *rest) for run, *rest in CASES]
        lines = ["task,updates,setting,before,after,gain,more,error"]
        print(*lines)
        with esmeta.Crew(os.cpu_count()) as crew:
            for case in cases:
                for line in gains(*case, crew):
                    print(line, flush=True)
                    lines.append(line)
        if not args.run:
            TABLE.write_text("\n".join(lines) + "\n")
    except ValueError as error:
        print(f"results.gain: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
