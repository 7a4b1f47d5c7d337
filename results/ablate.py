"""What a setting of the training is worth: short runs that differ in it, from the same seed.

    python -m results.ablate                         # all of them, to results/ablations.csv
    python -m results.ablate --task ant_vel tests=1  # some: prints, writes nothing

One row a variant: `return_after`, mean over the last quarter of the iterations and over seeds, and
its range over seeds. A variant is `name=value flag`, the settings of the command line.
"""

import sys
from pathlib import Path

import esmeta
import numpy as np
from results.gain import parse, tabulate

TABLE = Path(__file__).parent / "ablations.csv"
HEADER = "task,iterations,seeds,setting,return_after,range"
VARIANTS = [
    "", "momentum=0", "tests=2", "sigma=0.02", "sigma=0.045", "goals=2", "goals=8",
    "lr_mu_critic=0", "lr_sigma_actor=0 lr_sigma_critic=0"]


def final_return(config, iterations, crew):
    """Mean return after adaptation in the last quarter of a run; NaN where it cannot go on."""
    meta, after = esmeta.initial_state(config), []
    for _ in range(iterations):
        try:
            meta, row, _ = esmeta.iterate(config, meta, crew)
        except RuntimeError:  # no worker has a finite fitness
            return np.nan
        after.append(row["return_after"])
    return np.mean(after[-max(1, iterations // 4):])


def ablations(variants, task, iterations, seeds, crew):
    """Rows of the table, one a variant."""
    configs = {v: [esmeta.make_config(task, seed=s, **parse(v)) for s in range(seeds)]
               for v in variants}
    for variant, each in configs.items():
        values = [final_return(config, iterations, crew) for config in each]
        spread = f"{np.ptp(values):.1f}" if seeds > 1 else ""
        yield f"{task},{iterations},{seeds},{variant or 'default'},{np.mean(values):.1f},{spread}"


def main(argv=None):
    """The program: -> exit status 0; 2 bad input."""
    parser = esmeta.OneLineParser("results.ablate", description=__doc__)
    parser.add_argument("variant", nargs="*", help="settings; none: VARIANTS")
    parser.add_argument("--task", default="cheetah_vel")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, help="default: the cores")
    try:
        args = parser.parse_args(argv)
        if min(args.iterations, args.seeds) < 1:
            raise ValueError("--iterations and --seeds must be at least 1")
        with esmeta.Crew(args.processes) as crew:
            tabulate(HEADER, ablations(args.variant or VARIANTS, args.task, args.iterations,
                                       args.seeds, crew), None if args.variant else TABLE)
    except ValueError as error:
        print(f"results.ablate: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
