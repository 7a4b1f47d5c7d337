"""README.md's table, then results/README.md's, from the committed files: `python -m results.table`.

Returns are means over MAML's 40 test goals, +- 1.96 standard errors over them for velocities. A
direction has copies of one goal, which say nothing about others: what tells is the seeds.
"""

import sys

import esmeta
import numpy as np
import tasks
from results.figures import (PANELS, RIVALS, TASKS, find_runs, published, read_eval, read_log,
                             steps_once_a_task)
from results.guard import one_line

PAPER = {"cheetah_vel": '"better results than MAML", no number', "cheetah_dir": "400",
         "ant_vel": '"the better performance", no number', "ant_dir": "below MAML's 480"}


def row(cells):
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names):
    """The two lines that begin a Markdown table."""
    return row(names), "|---" * len(names) + "|"


def minutes_worked(log):
    """Minutes until the end of each iteration: a run that was stopped did not work in that time."""
    return np.minimum(log["seconds"], 2 * np.median(log["seconds"])).cumsum() / 60


def meta_tests(task, name="eval.csv", variant=""):
    """What there is of a task's meta-tests: folder, goals (n,) and returns (updates + 1, n)."""
    for folder in find_runs(task, variant):
        tested = read_eval(folder, task, name)
        if tested and len(tested[1]) < 4:
            raise ValueError(f"{folder / name} has fewer than 3 updates")
        if tested:
            yield folder, *tested


def mean_and_seeds(task, variant=""):
    """Before, after 1 and 3 updates: the mean over the seeds, each in brackets; [] without runs."""
    means = [returns.mean(axis=1)[[0, 1, 3]] for *_, returns in meta_tests(task, variant=variant)]
    return [f"{np.mean(seeds):.1f}" + f" ({', '.join(f'{m:.1f}' for m in seeds)})"
            * (len(seeds) > 1) for seeds in np.transpose(means)]


def new_seeds(task):
    """Mean after 1 and 3 updates of the new seeds (`heldout`), and how many there are."""
    means = [returns.mean(axis=1)[[1, 3]] for *_, returns in meta_tests(task, variant="heldout")]
    return (" / ".join(f"{mean:.1f}" for mean in np.mean(means, axis=0)) + f" ({len(means)})"
            if means else "none")


def results_table():
    """README's table, a row a task: mean over the seeds, each seed in brackets; then new seeds."""
    yield from head("task", "before", "1 update", "3 updates", "new seeds, 1 / 3 updates",
                    "MAML, 1 / 3 updates", "oracle", "paper")
    for task in TASKS:
        cells = mean_and_seeds(task) or ["not run", "", ""]
        maml = " / ".join(f"{published(task, 'maml', u):g}" for u in "13")
        yield row([f"`{task}`", *cells, new_seeds(task), maml,
                   f"{published(task, 'oracle', ''):g}", PAPER[task]])


def new_seeds_table():
    """A row for each task that has such seeds: mean, each seed in brackets."""
    yield from head("task", "new seeds", "before", "1 update", "3 updates")
    for task in TASKS:
        if cells := mean_and_seeds(task, "heldout"):
            seeds = [folder.name.rpartition("seed")[2]
                     for folder, *_ in meta_tests(task, variant="heldout")]
            yield row([f"`{task}`", ", ".join(seeds), *cells])


def returns_table():
    """A row for each run, for a direction task one for each direction."""
    yield from head("run", "goals", "before", "1 update", "2 updates", "3 updates")
    for task, name, variant in [*((task, "eval.csv", "") for task in TASKS),
                                ("ant_dir", "eval-K20.csv", ""), ("ant_dir", "eval.csv", "K40")]:
        for folder, goals, returns in meta_tests(task, name, variant):
            label = f"`{folder.name}`" + ", tested with K = 20" * (name != "eval.csv")
            if tasks.find_task(task).direction:
                for text, sign in ("forward", 1), ("backward", -1):
                    means = returns[:4, goals == sign].mean(axis=1)
                    yield row([label, text, *(f"{mean:.1f}" for mean in means)])
            else:
                half = 1.96 * returns.std(axis=1, ddof=1) / len(goals) ** 0.5
                yield row([label, len(goals), *(f"{mean:.1f} ± {h:.1f}" for mean, h
                                                in zip(returns[:4].mean(axis=1), half))])


def cost_table():
    """A row for each run: what it cost, and when it reached MAML's return after one update."""
    yield from head("run", "iterations", "steps of physics, M", "counted once a task, M",
                    "minutes", "minutes to MAML's one-update value")
    for task in TASKS:
        for folder in find_runs(task):
            log, once = read_log(folder), steps_once_a_task(folder)[-1]
            steps, minutes = log["env_steps"][-1] / 1e6, minutes_worked(log)
            reached = minutes[log["return_after"] >= published(task)]
            yield row([f"`{folder.name}`", len(minutes), f"{steps:.1f}",
                       f"{once:.0f}", f"{minutes[-1]:.0f}",
                       f"{reached[0]:.1f}" if len(reached) else "not reached"])


def rivals_table():
    """A row for each method that was run on a task: means over its seeds."""
    yield from head("task", "method", "seeds", "counted once a task, M", "minutes", "1 update",
                    "2 updates", "3 updates")
    for task in TASKS:
        for variant, label in ("", "ESMeta"), *(rival[:2] for rival in RIVALS):
            if tests := [*meta_tests(task, variant=variant)]:
                steps, minutes = np.mean([(steps_once_a_task(folder)[-1], minutes_worked(
                    read_log(folder))[-1]) for folder, *_ in tests], axis=0)
                means = np.mean([returns[1:4].mean(axis=1) for *_, returns in tests], axis=0)
                yield row([f"`{task}`", label, len(tests), f"{steps:.0f}", f"{minutes:.0f}",
                           *(f"{mean:.1f}" for mean in means)])


def variants_table():
    """A row for each curve of figure 2."""
    yield from head("task", "setting", "before", "1 update", "3 updates")
    variants = {(task, name): text for task, *_, names in PANELS for name, text in names.items()}
    for (task, variant), text in variants.items():
        if cells := mean_and_seeds(task, variant):
            yield row([f"`{task}`", text, *cells])


@one_line("results.table")
def main(argv=None):
    """Print all tables."""
    esmeta.OneLineParser("results.table", description=__doc__).parse_args(argv)
    for title, table in (("README.md", results_table), ("results/README.md: returns",
                         returns_table), ("results/README.md: new seeds", new_seeds_table),
                         ("results/README.md: cost", cost_table),
                         ("results/README.md: rivals", rivals_table),
                         ("results/README.md: figure 2", variants_table)):
        print("\n".join([f"# {title}", "", *table(), ""]))


if __name__ == "__main__":
    sys.exit(main())
