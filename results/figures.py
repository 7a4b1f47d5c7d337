"""The figures: `python -m results.figures` the paper's, from results/<task>[-<variant>]-seed<N>/;
`python -m results.figures DIR [DIR ..]` the training curves of any runs.
"""

import argparse
import csv
import functools
import json
import re
import sys
from pathlib import Path

import esmeta
import numpy as np
import tasks
from results.guard import one_line

HERE = Path(__file__).parent
TASKS = ("cheetah_vel", "cheetah_dir", "ant_vel", "ant_dir")
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0969b2", "#d95f02", "#1b8a5a", "#777777", "#7b3294"
RIVALS = (  # of figure 1: variant, label, colour, iterations that a point is the mean of
    ("baldwin", "ES + A2C", ORANGE, 1), ("maml", "MAML here", PURPLE, 1),
    ("paper", "--paper", "black", 50))  # its iteration has one goal
SHARED = {"": "as it is", "shared03": "sigma 0.03, one a layer, learned"}
PANELS = (  # of figure 2: task, key, title, after which updates MAML's lines are, {variant: label}
    ("cheetah_vel", "workers", "workers; learned or fixed sigma", "1",
     {"": "as it is", "M16": "16 workers, not 64", "fixed_sigma": "fixed sigma"}),
    ("cheetah_vel", "cycles", "gradient updates of an adaptation", "13",
     {"": "as it is", "cycles3": "3 gradient updates, each a third as long"}),
    ("cheetah_vel", "updates", "MAML here, gradient updates", "13",
     {"maml": "MAML here", "maml3": "MAML here, trained with 3 updates"}),
    ("cheetah_vel", "sigma", "one sigma a layer", "1",
     {**SHARED, "shared06": "sigma 0.06, one a layer, learned", "fixed06": "sigma 0.06, fixed"}),
    ("cheetah_dir", "sigma", "one sigma a layer", "1", SHARED),
    ("ant_dir", "sigma", "one sigma a layer", "1", SHARED))
STYLE = {"figure.dpi": 100, "font.size": 11, "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "legend.fontsize": 9.5, "lines.linewidth": 1.8}


# ---- what there is to draw ----------------------------------------------------------------------


def read_log(folder):
    """Columns of a run's log.csv as a dict of arrays (iterations,); ValueError for other files.

    MAML's has only some of esmeta's columns.
    """
    path = Path(folder) / "log.csv"
    if not path.is_file():
        raise ValueError(f"no log.csv in {folder}")
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in esmeta.LOG_COLUMNS if rows and name in rows[0]]
        log = {name: np.array([float(row[name]) for row in rows]) for name in names}
    except (KeyError, TypeError, ValueError, csv.Error):  # a binary file decodes to ValueError too
        raise ValueError(f"{path} is no log of esmeta") from None
    if not log.keys() >= {"iteration", "return_before", "return_after", "env_steps", "seconds"}:
        raise ValueError(f"{path} has no iteration of esmeta")
    return log


def read_config(folder, make=lambda given: esmeta.Config(**given)):
    """What `make` makes of a run's config.json, None where there is none; ValueError for others."""
    path = Path(folder) / "config.json"
    try:
        return make(json.loads(path.read_text())) if path.is_file() else None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no configuration of esmeta") from None


def read_task(folder):
    """The task of a run of any method, None without config.json; ValueError for another file."""
    return read_config(folder, lambda given: tasks.find_task(given["task"]).name)


def read_eval(folder, task, name="eval.csv"):
    """A run's meta-test: -> goals (n,), returns (updates + 1, n); None where there is none."""
    path = Path(folder) / name
    if not path.is_file():
        return None
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        goal, update, value = (np.array([float(row[c]) for row in rows])
                               for c in ("goal", "updates", "return"))
        n = len(tasks.test_goals(task))
        return goal[:n], value[np.argsort(update, kind="stable")].reshape(-1, n)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no meta-test of {task}") from None


def published(task, method="maml", updates="1"):
    """MAML's table: mean return of a method after some updates ('' for the oracle), or None."""
    for row in csv.DictReader((HERE / "maml.csv").read_text().splitlines()):
        if (row["task"], row["method"], row["updates"]) == (task, method, updates):
            return float(row["mean_return"])
    return None


def constant_speed(task, goals):
    """Return of the best constant speed, the goals' median, on each goal, without its costs."""
    task = tasks.find_task(task)
    return task.horizon * (task.best_reward - np.abs(goals - np.median(goals)))


def steps_once_a_task(folder):
    """Millions of steps after each iteration as MAML counts: each task has its own exploration.

    A worker's tasks share theirs, for no dynamics depend on the goal; its tests count once.
    """
    log = read_log(folder)
    if "return_explorers" not in log:  # MAML's
        return log["env_steps"] / 1e6
    config = read_config(folder)
    if config is None:
        raise ValueError(f"no config.json in {folder}")
    g, explore = len(esmeta.sample_tasks(config, 0, 0)), config.rollouts + 1
    test = config.tests * (g if config.paper else config.rollouts)
    return log["env_steps"] / 1e6 * (g * explore + test) / (explore + test)


@functools.cache  # it says what is missing, once
def find_runs(task, variant=""):
    """Folders of the seeds of one setting, in order; one line where there is none."""
    name = task + (f"-{variant}" if variant else "")
    runs = sorted((folder for folder in HERE.glob(f"{name}-seed*")
                   if re.fullmatch(re.escape(name) + r"-seed\d+", folder.name)
                   and (folder / "log.csv").is_file()),
                  key=lambda folder: int(folder.name.rpartition("seed")[2]))
    if not runs:
        print(f"skipped: no results/{name}-seed*/log.csv", file=sys.stderr)
    return runs


# ---- pieces of a picture ------------------------------------------------------------------------


def curve(ax, runs, column, label, colour, steps=False, every=1, **line):
    """Mean of the seeds' column against iterations, or steps; their range as a band."""
    logs = [read_log(folder) for folder in runs]
    n = min(len(log[column]) for log in logs) // every * every  # as far as all seeds go
    values, x = np.stack([log[column][:n] for log in logs]), logs[0]["iteration"][:n] + 1
    if steps:
        x = np.mean([steps_once_a_task(folder)[:n] for folder in runs], axis=0)
    values, x = (array.reshape(*array.shape[:-1], -1, every).mean(axis=-1) for array in (values, x))
    ax.plot(x, values.mean(axis=0), color=colour, label=label, **line)
    if len(runs) > 1:
        ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)


def yardsticks(ax, task, updates="1", constant=True):
    """Horizontal lines: MAML after some updates, the oracle, the best constant speed."""
    lines = [(published(task, "maml", u), f"MAML's paper, {u} update" + "s" * (u != "1"), "black",
              style) for u, style in zip(updates, ("--", "-."))]
    lines.append((published(task, "oracle", ""), "oracle that sees the goal", GREEN, ":"))
    if constant and task in TASKS and not tasks.find_task(task).direction:
        lines.append((constant_speed(task, tasks.test_goals(task)).mean(),
                      "best constant speed, without costs", GREY, (0, (6, 3, 1, 3))))
    for value, label, colour, style in lines:
        if value is not None:
            ax.axhline(value, color=colour, ls=style, lw=1.4, label=label)


def finish(ax, title, xlabel="iteration", ylabel="return (200 steps)"):
    """Title and names of the axes."""
    ax.set_title(title, fontsize=12)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)


def shared_legend(figure, axes):
    """One legend below all panels, which hides no curve: each label once."""
    labelled = {label: handle for ax in axes.flat
                for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3)


def save(figure, path):
    """Write the picture and say so."""
    figure.savefig(path)
    print(path)


# ---- the figures --------------------------------------------------------------------------------


def figure1(plt):
    """Return after adaptation against steps on the four tasks, each method; None without runs."""
    found = [(task, runs) for task in TASKS if (runs := find_runs(task))]
    if not found:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    for ax, (task, runs) in zip(axes.flat, found):
        curve(ax, runs, "return_after", "ESMeta, after adaptation", BLUE, steps=True)
        curve(ax, runs, "return_before", "ESMeta, before", GREY, steps=True, lw=1)
        counts = [f"ESMeta {len(runs)}"]
        for variant, label, colour, every in RIVALS:
            if rival := find_runs(task, variant):
                curve(ax, rival, "return_after", f"{label}, after adaptation", colour, steps=True,
                      every=every, lw=0.8)
                counts.append(f"{label.removesuffix(' here')} {len(rival)}")
        yardsticks(ax, task)
        ax.set_xscale("log")  # --paper takes six to eleven times ESMeta's steps
        ax.xaxis.set_major_formatter("{x:g}")
        finish(ax, f"{task}\nseeds: {', '.join(counts)}", "steps of all tasks, millions (log)")
    for ax in axes.flat[len(found):]:
        ax.set_visible(False)
    shared_legend(figure, axes)
    return figure


def setting_label(runs, part):
    """What tells a setting from the others, from its config."""
    def text(config):
        if part in ("cycles", "updates"):
            return f"{config[part]} gradient update{'s' * (config[part] != 1)}"
        sigma = "learned" if config["lr_sigma_actor"] else "fixed"
        sigma += ", one a layer" * (runs[0] / "sigma.csv").exists()  # results.shared_sigma's
        return (f"{config['workers']} workers, sigma {sigma}" if part == "workers" else
                f"sigma {config['sigma']:g}, {sigma}")

    return f"{read_config(runs[0], text)} ({len(runs)} seed{'s' * (len(runs) != 1)})"


def figure2(plt):
    """A panel for each of PANELS; None without runs to compare."""
    panels = [(*panel, [runs for name in names if (runs := find_runs(panel[0], name))])
              for *panel, names in PANELS]
    panels = [panel for panel in panels if len(panel[-1]) > 1]
    if not panels:
        return None
    figure, axes = plt.subplots(3, 2, figsize=(10, 12.4), sharey="row", layout="constrained")
    for ax, (task, part, title, updates, variants) in zip(axes.flat, panels):
        for runs, colour in zip(variants, (BLUE, ORANGE, GREEN, PURPLE)):
            curve(ax, runs, "return_after", setting_label(runs, part), colour)
        yardsticks(ax, task, updates, constant=False)
        finish(ax, f"{task}: {title}", ylabel="return after adaptation (200 steps)")
        ax.legend(loc="lower right")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    return figure


def draw_directions(ax, goals, before, after):
    """A line from before to after for each goal, one column for each direction."""
    for direction in (-1, 1):
        chosen = goals == direction
        shift = np.linspace(-0.3, 0.3, chosen.sum())
        for x, b, a in zip(direction + shift, before[chosen], after[chosen]):
            ax.plot([x, x], [b, a], color=GREY, lw=0.7, alpha=0.6)
        ax.plot(direction + shift, before[chosen], "o", mfc="white", mec=GREY, ms=5)
        ax.plot(direction + shift, after[chosen], "o", color=BLUE, ms=5)
        ax.annotate(f"mean {after[chosen].mean():.0f}", (direction, after[chosen].max()),
                    (0, 9), textcoords="offset points", ha="center", color=BLUE)
    ax.margins(y=0.14)
    ax.set_xticks([-1, 1], [f"backward ({(goals < 0).sum()} goals)",
                            f"forward ({(goals > 0).sum()} goals)"])


def draw_velocities(ax, task, goals, before, after):
    """Returns before and after against the goal, with what one constant speed would earn."""
    order = np.argsort(goals)
    for g, b, a in zip(goals, before, after):
        ax.plot([g, g], [b, a], color=GREY, lw=0.7, alpha=0.6)
    ax.plot(goals, before, "o", mfc="white", mec=GREY, ms=5)
    ax.plot(goals, after, "o", color=BLUE, ms=5)
    ax.plot(goals[order], constant_speed(task, goals)[order], color=GREEN, ls="--", lw=1.3)


def adaptation(plt):
    """Before and after one update on each of the 40 test goals (seeds averaged)."""
    tested = {}
    for task in TASKS:
        evals = [e for folder in find_runs(task) if (e := read_eval(folder, task)) is not None]
        if evals:
            if min(len(returns) for _, returns in evals) < 2:
                raise ValueError(f"a results/{task}-seed*/eval.csv has no update")
            returns = np.mean([returns[:2] for _, returns in evals], axis=0)
            tested[task] = evals[0][0], returns, len(evals)
        else:
            print(f"skipped: no results/{task}-seed*/eval.csv", file=sys.stderr)
    if not tested:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    for ax, (task, (goals, (before, after), n)) in zip(axes.flat, tested.items()):
        if tasks.find_task(task).direction:
            draw_directions(ax, goals, before, after)
        else:
            draw_velocities(ax, task, goals, before, after)
        finish(ax, f"{task} ({n} seed{'s' * (n != 1)})", "goal direction"
               if tasks.find_task(task).direction else "goal velocity (m/s)")
    for ax in axes.flat[len(tested):]:
        ax.set_visible(False)
    dot = dict(ls="", marker="o")
    marks = [plt.Line2D([], [], mfc="white", mec=GREY, label="before adaptation", **dot),
             plt.Line2D([], [], color=BLUE, label="after one update", **dot),
             plt.Line2D([], [], color=GREEN, ls="--", label="best constant speed, without costs")]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def training(plt, folders):
    """Before, explorers and after against iterations, a panel for each run."""
    logs, names = [read_log(f) for f in folders], [read_task(f) for f in folders]
    columns = min(2, len(folders))
    rows = -(-len(folders) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 5.4 if rows == 1 else 4.6 * rows),
                                layout="constrained", squeeze=False)
    for ax, folder, log, task in zip(axes.flat, folders, logs, names):
        few = "." if len(log["iteration"]) < 3 else None  # one point makes no line
        for column, label, colour, width in (  # explorers are often close to before: wide, below
                ("return_explorers", "explorers", "#f5b58a", 3.5),
                ("return_before", "before", ORANGE, 1.0), ("return_after", "after", BLUE, 1.8)):
            if column in log:  # MAML has no explorers
                ax.plot(log["iteration"] + 1, log[column], color=colour, lw=width, label=label,
                        marker=few)
        yardsticks(ax, task)
        steps, hours = log["env_steps"][-1] / 1e6, log["seconds"].sum() / 3600
        finish(ax, f"{Path(folder).resolve().name}: {steps:.1f} M steps, {hours:.1f} h",
               ylabel="return of an episode")  # of any task, of any length
    for ax in axes.flat[len(folders):]:
        ax.set_visible(False)
    shared_legend(figure, axes)
    return figure


def draw(plt, folders):
    """The figures that the command line asks for, as PNG files."""
    plt.rcParams.update(STYLE)
    if folders:
        target = Path(folders[0]) if len(folders) == 1 else Path()
        return save(training(plt, folders), target / "training.png")
    for name, make in (("figure1", figure1), ("figure2", figure2), ("adaptation", adaptation)):
        figure = make(plt)
        if figure is not None:
            save(figure, HERE / f"{name}.png")


@one_line("results.figures")
def main(argv=None):
    """The program."""
    parser = esmeta.OneLineParser("results.figures", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", help="run directories; none: the paper's figures")
    folders = parser.parse_args(argv).run
    for folder in folders:  # before the slow import, and whether or not it is there
        read_log(folder), read_task(folder)
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("no matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    draw(plt, folders)


if __name__ == "__main__":
    sys.exit(main())
