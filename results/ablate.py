"""What a setting of the training, or a difference from the paper, is worth, in short runs.

    python -m results.ablate                         # all of them, to results/ablations.csv
    python -m results.ablate --task ant_vel tests=1  # any argument: only prints

One row a variant: `return_after`, mean over the last quarter of the iterations and over seeds, and
its range over seeds. A variant is `name=value flag`, the settings of the command line, or
`paper:sample_tasks`: that function of esmeta runs its branch of `if config.paper:`. Variants of
`goals`, `tests`, `paper:sample_tasks` and `paper:evaluate_adapted` change what `return_after` is a
mean of.
"""

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import esmeta
import numpy as np
from results.gain import parse, tabulate
from results.guard import one_line

TABLE = Path(__file__).parent / "ablations.csv"
HEADER = "task,iterations,seeds,setting,return_after,range"
DIFFER = [name for name, member in vars(esmeta).items()
          if inspect.isfunction(member) and "config.paper" in inspect.getsource(member)
          and name != "config_of_update"]  # of meta-tests, no part of a training
VARIANTS = [
    "", "momentum=0", "tests=2", "sigma=0.02", "sigma=0.045", "goals=2", "goals=8",
    "lr_mu_critic=0", "lr_sigma_actor=0 lr_sigma_critic=0",
    "paper:sample_tasks", "paper:sample_explorers", "paper:make_normaliser",
    "paper:adapt actor_step=0.0012",  # each of 12806 weights by so much: 0.135 in all, as ours
    # raw returns, near -180, times these rates move mu and sigma as far as ranks do times ours
    "paper:sample_explorers paper:evaluate_adapted lr_mu_actor=0.05 lr_sigma_actor=0.0016"]


def as_the_paper(names, function, *args):
    """function(*args), while the functions of esmeta called `names` see `paper` set."""
    def see(own, paper):
        return lambda *args: own(*(dataclasses.replace(x, paper=paper) if isinstance(
            x, esmeta.Config) else x for x in args))

    if not names:
        return function(*args)
    with mock.patch.multiple(esmeta, **{  # the others too: one may hand its config to another
            name: see(getattr(esmeta, name), name in names) for name in DIFFER}):
        return function(*args)


class LiteralCrew(NamedTuple):
    """A crew whose jobs are done `as_the_paper`."""

    crew: esmeta.Crew
    names: list

    def map(self, function, jobs):
        """As the crew's."""
        return self.crew.map(as_the_paper, [(self.names, function, *job) for job in jobs])


def final_return(config, names, iterations, crew):
    """Mean return after adaptation in the last quarter of a run; NaN where it cannot go on."""
    meta, after = esmeta.initial_state(config), []
    for _ in range(iterations):
        try:
            meta, row, _ = as_the_paper(names, esmeta.iterate, config, meta,
                                        LiteralCrew(crew, names))
        except RuntimeError as error:
            if "finite" not in str(error):  # a process died
                raise
            return np.nan
        after.append(row["return_after"])
    return np.mean(after[-max(1, iterations // 4):])


def ablations(variants, task, iterations, seeds, crew):
    """Rows of the table, one a variant."""
    cases = []
    for variant in variants:
        words = variant.split()
        names = [word[6:] for word in words if word.startswith("paper:")]
        if wrong := [name for name in names if name not in DIFFER]:
            raise ValueError(f"{wrong[0]} is no function that differs: {', '.join(DIFFER)}")
        given = parse(" ".join(word for word in words if not word.startswith("paper:")))
        cases.append((variant, names, [esmeta.make_config(task, seed=s, **given)
                                       for s in range(seeds)]))
    for variant, names, configs in cases:
        values = [final_return(config, names, iterations, crew) for config in configs]
        spread = f"{np.ptp(values):.1f}" if seeds > 1 else ""
        yield f"{task},{iterations},{seeds},{variant or 'default'},{np.mean(values):.1f},{spread}"


@one_line("results.ablate")
def main(argv=None):
    """The program."""
    parser = esmeta.OneLineParser("results.ablate", description=__doc__)
    parser.add_argument("variant", nargs="*", help="settings; none: VARIANTS")
    parser.add_argument("--task", default="cheetah_vel")
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, help="default: the cores")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if min(args.iterations, args.seeds) < 1:
        raise ValueError("--iterations and --seeds must be at least 1")
    with esmeta.Crew(args.processes) as crew:
        rows = ablations(args.variant or VARIANTS, args.task, args.iterations, args.seeds, crew)
        tabulate(HEADER, rows, None if argv else TABLE)


if __name__ == "__main__":
    sys.exit(main())
