"""README's tables of numbers, from the committed files: `python -m results.table`.

Returns are means over MAML's 40 test goals and over seeds, +- 1.96 standard errors over goals (of
the means over seeds); in brackets the mean of each seed.
"""

import functools
import sys

import esmeta
import numpy as np
import tasks
from results import figures
from results.figures import TASKS, constant_speed, published, read_config, read_eval, read_log

find_runs = functools.cache(figures.find_runs)  # it says what is missing, once
PAPER = {"cheetah_vel": '"better results than MAML", no number', "cheetah_dir": "400",
         "ant_vel": '"better results than MAML", no number', "ant_dir": "below MAML's 480"}


def row(cells):
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def spread(seeds):
    """Mean and interval of returns (seeds, n), and each seed's mean where there are several."""
    mean, half = esmeta.interval(seeds.mean(axis=0))
    each = ", ".join(f"{m:.1f}" for m in seeds.mean(axis=1))
    return f"{mean:.1f} ± {half:.1f}" + (f" ({each})" if len(seeds) > 1 else "")


def returns(task, name="eval.csv"):
    """Goals (n,) and returns (seeds, updates + 1, n) of the committed meta-tests of a task."""
    tested = [t for t in (read_eval(folder, task, name) for folder in find_runs(task)) if t]
    if any(len(values) < 4 for _, values in tested):
        raise ValueError(f"a {name} of {task} has fewer than 3 updates")
    return (tested[0][0], np.array([values for _, values in tested])) if tested else (None, None)


def results_table():
    """Lines of the main table: before and after 1, 2, 3 updates, and what others reach."""
    yield row(["task", "before", "1 update", "2 updates", "3 updates", "MAML, 1 / 3 updates",
               "oracle", "best constant speed", "paper"])
    yield "|---" * 9 + "|"
    for task in TASKS:
        if not find_runs(task):
            yield row([f"`{task}`", "not run", "", "", "", *others(task)])
            continue
        goals, values = returns(task)
        if values is None:
            raise ValueError(f"no eval.csv in {find_runs(task)[0]}")
        yield row([f"`{task}`", *(spread(values[:, u]) for u in range(4)), *others(task)])
        for label, sign in ("forward", 1), ("backward", -1):
            if tasks.find_task(task).direction:
                part = values[:, :, goals == sign]
                yield row([label, *(spread(part[:, u]) for u in range(4)), "", "", "", ""])
        _, fewer = returns(task, "eval-K20.csv")
        if fewer is not None:
            yield row(["with K = 20", *(spread(fewer[:, u]) for u in range(4)), "", "", "", ""])


def others(task):
    """MAML, the oracle, the best constant speed and the paper on a task, as cells."""
    maml = " / ".join(f"{published(task, 'maml', u):g}" for u in "13")
    constant = constant_speed(task, tasks.test_goals(task))
    return (maml, f"{published(task, 'oracle', ''):g}",
            "" if constant is None else f"{constant.mean():.0f}", PAPER[task])


def cost_table():
    """Lines of the table of what each run cost."""
    yield row(["run", "iterations", "steps of physics, M", "counted once a task, M", "hours"])
    yield "|---" * 5 + "|"
    for task in TASKS:
        for folder in find_runs(task):
            log, c = read_log(folder), read_config(folder)
            explore, test = c["rollouts"] + 1, c["goals"] * c["test_rollouts"]
            once_a_task = (c["goals"] * explore + test) / (explore + test)
            steps = log["env_steps"][-1] / 1e6
            yield row([f"`{folder.name}`", len(log["iteration"]), f"{steps:.1f}",
                       f"{steps * once_a_task:.0f}", f"{log['seconds'].sum() / 3600:.2f}"])


def main():
    """Print all tables; exit status 2 and one line where a run's files are broken."""
    try:
        print("\n".join([*results_table(), "", *cost_table()]))
    except (ValueError, OSError) as error:
        print(f"results.table: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
