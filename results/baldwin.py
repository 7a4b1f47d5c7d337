"""A rival of the paper's figure 1, ES + A2C: `python -m results.baldwin --task cheetah_vel`.

After Fernando et al. 2018, "Meta-learning by the Baldwin effect". Update, networks and settings are
esmeta's, the inner loop is advantage actor-critic. A worker has one actor and fitness, not K; it
explores by noise on its actions, a ~ N(actor(theta, s), ACTION_STD^2). Its fitness is the return
of the adapted actor on fresh starts, without noise, in ranks over all workers. Flags are esmeta's;
--out is by default runs/<task>-baldwin-seed<N>; --paper, --cycles and --pool are refused, and with
--eval all but --updates and --processes.
"""

import dataclasses
import math
import signal
import sys
import time
from pathlib import Path

import esmeta
import numpy as np
import tasks
from esmeta import actor_forward, nstep_targets, state_values
from results.guard import one_line

ACTION_STD = 0.3  # of the policy, whose actions are cut at -1 and 1
VERSION = "1 of results.baldwin"  # of checkpoints, which esmeta refuses, as it adapts otherwise


def a2c_gradient(theta, obs, action, advantage, std, dims):
    """Gradient in theta of the mean of log N(a; actor(theta, s), std^2) A.

    theta (P,), obs (B, obs), action (B, act), advantage (B,) -> (P,).
    """
    mean, cache = actor_forward(theta, obs, dims)
    d_mean = (action - mean) / std**2 * advantage[:, None] / len(obs)
    return esmeta.actor_backward(d_mean, cache)


def adapt(theta, phi, data, sigma, config, dims, rng):
    """One step of A2C on K trajectories: fit V to n-step returns, step along the policy gradient.

    theta, sigma (P,), phi (P_c,), data (H, K) -> adapted theta (P,), phi (P_c,).
    V(s) = Q_phi(s, actor(theta, s)).
    """
    obs, action = data.obs[:-1][data.valid], data.action[data.valid]  # (B, obs), (B, act)
    # the critic starts from the right mean, as in esmeta.adapt
    offset = data.reward[data.valid].mean() / (1 - config.gamma) - phi[-1]
    phi = np.append(phi[:-1], phi[-1] + offset)
    y = nstep_targets(data, state_values(theta, phi, data.obs, dims), config)[data.valid]  # (B,)
    rows = rng.integers(len(obs), size=(config.critic_updates, config.batch))
    mean, _ = actor_forward(theta, obs, dims)
    phi, _ = esmeta.fit_critic(phi, obs, mean, y, rows, config.critic_lr, dims,
                               np.zeros((2, len(phi)), phi.dtype))
    value = state_values(theta, phi, data.obs, dims)  # (H + 1, K)
    advantage = (nstep_targets(data, value, config) - value[:-1])[data.valid]  # (B,)
    advantage -= advantage.mean()  # not over their std: the length of the step is set
    direction = sigma * a2c_gradient(theta, obs, action, advantage, ACTION_STD, dims)
    length = max(float(np.linalg.norm(direction)), 1e-30)
    return theta + sigma * direction * (config.actor_step / length), phi


def explore(theta, goals, config, normalise, rng):
    """K episodes of the policy of theta (P,), then one of the actor without noise.

    -> Trajectories under each of `goals`; their actions are those that the policy drew.
    """
    task, n = tasks.TASKS[config.task], config.rollouts + 1
    noise = ACTION_STD * rng.standard_normal((task.horizon, n, task.act), np.float32)
    noise[:, -1] = 0
    starts = rng.integers(2**31, size=n)
    return esmeta.rollout(task.name, theta[None], starts, normalise, goals, config.alive_bonus,
                          noise)


class Population(esmeta.Crew):
    """The crew for esmeta.iterate: another inner loop, and a fitness ranked over all workers."""

    def map(self, _, jobs):
        """The Result of each job, its term of Eq. 10 times the rank of its worker."""
        fitness, results = zip(*super().map(evaluate_worker, jobs))
        # a failed worker ranks last, and esmeta.iterate leaves it out
        F = esmeta.centred_ranks(np.nan_to_num(fitness, nan=-np.inf)).astype(np.float32)
        return [r._replace(d_mu=f * r.d_mu, d_sigma=f * r.d_sigma) for f, r in zip(F, results)]


@np.errstate(all="ignore")  # a worker that diverges is left out and counted
def evaluate_worker(config, meta, worker):
    """An actor, its A2C on each task, its tests: -> fitness, Result with Eq. 10 for F = 1."""
    k, dims, bonus = config.rollouts, esmeta.task_dims(config.task), config.alive_bonus
    normalise = esmeta.make_normaliser(meta, config)
    # workers 2 i and 2 i + 1 are mirrored, eps and -eps; all else that is random they share
    pair, sign = worker // 2, 1 - 2 * (worker % 2)
    rng = esmeta.generator(esmeta.WORKER, config.seed, meta.iteration, pair)
    goals = esmeta.sample_tasks(config, meta.iteration, pair)  # (G, ..)
    theta, phi = (mu + sigma * (sign * rng.standard_normal(len(mu), np.float32))
                  for mu, sigma in (meta[:2], meta[2:4]))  # (P,), (P_c,) ~ N(mu, sigma^2)
    each = math.ceil(config.tests * k / len(goals))  # tests of a task
    starts = rng.integers(2**31, size=each * len(goals))  # drawn before what depends on theta
    scored = explore(theta, goals, config, normalise, rng)
    adapted = [adapt(theta, phi, data.part(slice(k)), meta.sigma_actor, config, dims, rng)
               for data in scored]
    [tests] = esmeta.rollout(config.task, np.stack([actor for actor, _ in adapted]), starts,
                             normalise, [goals.repeat(each, axis=0)], bonus)
    errors = [esmeta.critic_error(*adapted[g], tests.part(slice(g * each, (g + 1) * each)), config,
                                  dims) for g in range(len(goals))]
    reported = np.array([data.returns(bonus) for data in scored])  # (G, K + 1)
    returns = np.array([reported[:, k].mean(), reported[:, :k].mean(), tests.returns(bonus).mean()])
    lived = np.any([data.valid for data in scored], axis=0)  # (H, K + 1)
    seen = scored[0].raw[:-1][lived]  # (steps, obs)
    obs_sums = np.array([np.full(dims.obs, len(seen)), seen.sum(axis=0), (seen**2).sum(axis=0)])
    # sqrt(K) makes steps, which are mostly noise, as long as esmeta's at the same rates: Eq. 10's
    # sum over j has one term here, and esmeta.ascend divides by K
    d_mu, d_sigma = esmeta.nes_gradient(theta[None], np.float32(math.sqrt(k)), *meta[:2])
    return tests.returns().mean(), esmeta.Result(
        d_mu, d_sigma, phi, -np.mean(errors), returns, obs_sums, len(seen) + int(tests.valid.sum()))


def train(config, iterations=esmeta.ITERATIONS, processes=None, out=None, resume=False):
    """esmeta.train with a Population: log.csv and a checkpoint after each iteration."""
    out = Path(out or f"runs/{config.task}-baldwin-seed{config.seed}")
    with Population(processes) as crew:
        meta = esmeta.open_run(out, config, resume)
        while meta.iteration < iterations:
            begin = time.monotonic()
            meta, row, failed = esmeta.iterate(config, meta, crew)
            row["seconds"] = time.monotonic() - begin
            with open(out / "log.csv", "a") as log:
                log.write(esmeta.csv_line(row.values()))
            esmeta.save_checkpoint(out / "checkpoint.npz", config, meta)
            print(*(f"{name} {value:.4g}" for name, value in row.items()), f"failed {failed}",
                  flush=True)


@np.errstate(all="ignore")  # as esmeta's
def evaluate_goal(config, meta, goal, index, updates):
    """esmeta.evaluate_goal with A2C: mean returns of mu before and after each update, (U + 1,)."""
    normalise, k = esmeta.make_normaliser(meta, config), config.rollouts
    phi, actors = meta.mu_critic, [meta.mu_actor]
    for update in range(updates):
        rng = esmeta.generator(esmeta.EVAL, 0, index + 1, update + 1)
        data = explore(actors[-1], [goal], config, normalise, rng)[0].part(slice(k))
        actor, phi = adapt(
            actors[-1], phi, data, meta.sigma_actor,
            esmeta.config_of_update(update, data, config), esmeta.task_dims(config.task), rng)
        actors.append(actor)
    starts = esmeta.generator(esmeta.EVAL, 0, 0, 0).integers(2**31, size=esmeta.EVAL_ROLLOUTS)
    return np.array([
        esmeta.rollout(config.task, actor[None], starts, normalise, [goal])[0].returns().mean()
        for actor in actors])


def report_eval(path, updates=1, processes=None):
    """Meta-test with MAML's goals and K: write eval.csv as esmeta does, print the means."""
    config, meta = esmeta.load_checkpoint(Path(path) / "checkpoint.npz")
    config = dataclasses.replace(config, rollouts=tasks.TASKS[config.task].rollouts)
    goals = tasks.test_goals(config.task)
    jobs = [(config, meta, goal, i, updates) for i, goal in enumerate(goals)]
    with esmeta.Crew(processes) as crew:
        returns = np.array(crew.map(evaluate_goal, jobs)).T  # (U + 1, n)
    rows = [(config.task, " ".join(f"{x:.6g}" for x in np.ravel(goal)), u, float(value))
            for u, values in enumerate(returns) for goal, value in zip(goals, values)]
    esmeta.replace_file(Path(path) / "eval.csv", "".join(map(
        esmeta.csv_line, [("task", "goal", "updates", "return"), *rows])))
    print(f"{config.task} before and after updates: {returns.mean(axis=1).round(1).tolist()}")


@one_line("baldwin")
def main(argv=None):
    """The program, with esmeta's flags."""
    fields = {field.name for field in dataclasses.fields(esmeta.Config)}
    parser = esmeta.make_parser()
    parser.prog, parser.description = "results.baldwin", __doc__
    usual, esmeta.VERSION = esmeta.VERSION, VERSION
    try:
        given = vars(parser.parse_args(argv))
        allowed = {"eval", "updates", "processes"} if "eval" in given else (
            fields - {"paper", "cycles"} | {"iterations", "processes", "out", "resume"})
        if wrong := given.keys() - allowed:
            raise ValueError(f"results.baldwin takes no --{min(wrong).replace('_', '-')} here")
        if min(given.get("iterations", 0), given.get("updates", 0)) < 0:
            raise ValueError("iterations and updates must be at least 0")
        if "eval" in given:
            report_eval(given.pop("eval"), **given)
        else:
            settings = {name: given.pop(name) for name in fields & given.keys()}
            train(esmeta.make_config(**settings), **given)
    finally:
        esmeta.VERSION = usual


if __name__ == "__main__":
    from results import baldwin  # jobs name functions of this file, not of __main__

    for signum in (signal.SIGINT, signal.SIGTERM):  # Crew stops between two jobs
        signal.signal(signum, lambda number, _: esmeta.SIGNALS.append(number))
    sys.exit(baldwin.main())
