"""What a setting of the adaptation is worth at a fixed checkpoint, in seconds instead of a run.

    python -m results.gain                               # all of them, to results/gains.csv
    python -m results.gain DIR actor_step=2 "n_step=50 gamma=0.99"  # any argument: only prints

One row a variant: the return before and after the adaptations of mu, averaged over 40 goals spread
over the training's (half of them in each direction, not MAML's test goals), the gain, and `more`:
how much higher the return after is than with the settings of the training, with its standard error
over goals. Each goal has its own explorers. In the first update all variants see the same
trajectories, but for `rollouts`.
"""

import dataclasses
import sys
from pathlib import Path

import esmeta
import numpy as np
import tasks
from results.guard import one_line

HERE = Path(__file__).parent
TABLE = HERE / "gains.csv"
HEADER = "task,updates,setting,before,after,gain,more,error"
CASES = [  # run, variants
    ("cheetah_vel-seed0", [
        "n_step=1", "n_step=5", "n_step=10", "n_step=50", "gamma=0.9", "gamma=0.95", "gamma=0.99",
        "critic_updates=5", "critic_updates=24", "critic_updates=50", "batch=128", "batch=512",
        "critic_lr=0.0003", "critic_lr=0.01", "actor_step=1", "actor_step=2", "actor_step=5",
        "actor_step=10", "cycles=3", "cycles=3 actor_step=1.5"]),
    ("cheetah_dir-seed1", [
        "n_step=50 gamma=0.99", "critic_updates=12", "critic_updates=24", "actor_step=5",
        "actor_step=10"])]


ALL = {field.name for field in dataclasses.fields(esmeta.Config)} - {"task", "seed"}
USED = {"rollouts"} | {field.name for field in dataclasses.fields(esmeta.Config)  # of a meta-test
                       if field.metadata["group"] == "inner loop"}


def parse(variant, known=ALL):
    """The settings of 'name=value flag', as the command line of esmeta would read them."""
    names = {word: word.split("=")[0] for word in variant.split()}
    for word, name in names.items():
        if name not in known:
            raise ValueError(f"{word} is no setting here: name=value, one of {sorted(known)}")
    args = esmeta.make_parser().parse_args([f"--{word.replace('_', '-')}" for word in names])
    return {name: getattr(args, name) for name in names.values()}


def tabulate(header, rows, path):
    """Print a table's rows as they come, in the end keep them in a file unless path is None."""
    text = ""
    for row in rows:
        new = row if text else f"{header}\n{row}"  # an error before the first row prints nothing
        print(new, flush=True)
        text += new + "\n"
    if path is not None:
        esmeta.replace_file(path, text)


def gains(stored, meta, updates, variants, crew):
    """Rows of the table for one checkpoint: as trained, then each variant."""
    rng, reference = np.random.default_rng(0), None
    goals = np.concatenate([tasks.spread_goals(stored.task, rng, 2) for _ in range(20)])  # (40, ..)
    configs = {v: dataclasses.replace(stored, **parse(v, USED)) for v in ["", *variants]}
    for variant, config in configs.items():
        jobs = [(config, meta, goal, i, updates, 1) for i, goal in enumerate(goals)]
        results = crew.map(esmeta.evaluate_goal, jobs)
        returns = np.array([each for each, _ in results])  # (40, updates + 1)
        before, after = returns[:, 0], returns[:, -1]
        reference = after if reference is None else reference
        row = [before.mean(), after.mean(), (after - before).mean(), (after - reference).mean(),
               (after - reference).std(ddof=1) / len(goals) ** 0.5]
        yield ",".join([stored.task, str(updates), variant or "as trained",
                        *(f"{value:.1f}" for value in row)])


@one_line("results.gain")
def main(argv=None):
    """The program."""
    parser = esmeta.OneLineParser("results.gain", description=__doc__)
    parser.add_argument("run", nargs="?", help="checkpoint or run directory; none: CASES")
    parser.add_argument("variant", nargs="*", help="settings")
    parser.add_argument("--updates", type=int, default=1)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_intermixed_args(argv)
    if args.updates < 1:
        raise ValueError(f"--updates must be at least 1, not {args.updates}")
    cases = [(args.run, args.variant)] if args.run else [(HERE / r, v) for r, v in CASES]
    cases = [(*esmeta.load_checkpoint(run), args.updates, v) for run, v in cases]
    with esmeta.Crew() as crew:
        rows = (row for case in cases for row in gains(*case, crew))
        tabulate(HEADER, rows, None if argv else TABLE)


if __name__ == "__main__":
    sys.exit(main())
