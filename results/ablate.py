"""What a setting of the training is worth: short runs that differ in it, from the same seed.

    python -m results.ablate                            # all of them, to results/ablations.csv
    python -m results.ablate --task cheetah_vel goals=1  # some: prints, writes nothing

One row a variant: `return_after`, mean over the last quarter of the iterations and over seeds, and
its range over seeds. A variant is `name=value name=value`, the settings of the command line.
"""

import os
import sys
from pathlib import Path

import esmeta
import numpy as np
from results.gain import parse

TABLE = Path(__file__).parent / "ablations.csv"
VARIANTS = [
    "", "sigma_actor=0.015", "sigma_actor=0.045", "sigma_critic=0.01", "correlation=0",
    "obs_clip=0", "centre=false", "n_step=1", "cycles=3 actor_step=1.7", "risk=0",
    "own_credit=0 lr_mu_actor=12",  # without its part a step is shorter
    "test_rollouts=5", "test_rollouts=20", "antithetic=false",
    # the rate of mu_a fits the raw returns' spread, the others stand still: theirs would not
    "utility=raw lr_mu_actor=0.2 lr_sigma_actor=0 lr_mu_critic=0 lr_sigma_critic=0",
    "lr_mu_actor=2.5", "lr_mu_actor=10", "lr_sigma_actor=0", "lr_mu_critic=0", "half_life=0",
    "momentum=0.7", "momentum=0.7 weight_decay=0.012"]


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


def main(argv=None):
    """The program: -> exit status 0; 2 bad input."""
    parser = esmeta.OneLineParser("results.ablate", description=__doc__)
    parser.add_argument("variant", nargs="*", help="settings; none: VARIANTS")
    parser.add_argument("--task", default="cheetah_dir")
    parser.add_argument("--iterations", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    try:
        args = parser.parse_args(argv)
        if min(args.iterations, args.seeds, args.processes) < 1:
            raise ValueError("--iterations, --seeds and --processes must be at least 1")
        variants = {v: [esmeta.check_config(esmeta.make_config(args.task, seed=s, **parse(v)))
                        for s in range(args.seeds)] for v in args.variant or VARIANTS}
        lines = ["task,iterations,seeds,setting,return_after,range"]
        with esmeta.Crew(args.processes) as crew:
            for variant, configs in variants.items():
                values = [final_return(config, args.iterations, crew) for config in configs]
                spread = f"{np.ptp(values):.1f}" if len(values) > 1 else ""
                lines.append(f"{args.task},{args.iterations},{args.seeds},{variant or 'default'},"
                             f"{np.mean(values):.1f},{spread}")
                print(lines[-1], flush=True)
                if not args.variant:
                    TABLE.write_text("\n".join(lines) + "\n")
    except ValueError as error:
        print(f"results.ablate: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
