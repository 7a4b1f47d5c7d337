"""A rival of the paper's figure 1, ES + A2C: `python -m results.baldwin --task cheetah_vel`.

After Fernando et al. 2018, "Meta-learning by the Baldwin effect", which also evolves settings of
the learning. Here update, networks and settings are esmeta's, the inner loop is advantage
actor-critic. A worker has one actor and fitness, not K; it explores by noise on its actions,
a ~ N(actor(theta, s), ACTION_STD^2). Its fitness is the return of the adapted actor on fresh
starts, without noise, in ranks over all workers. The program is esmeta's with four of its functions
replaced. It has esmeta's flags, but --out is by default runs/<task>-baldwin-seed<N>, and --paper,
--cycles and --pool are refused.
"""

import math
import sys
from collections import namedtuple
from unittest import mock

import esmeta
import numpy as np
import tasks
from esmeta import actor_forward, nstep_targets, state_values

ACTION_STD = 0.3  # of the policy, whose actions are cut at -1 and 1
VERSION = "1 of results.baldwin"  # of checkpoints, which esmeta refuses, as it adapts otherwise
Result = namedtuple("Result", (*esmeta.Result._fields, "fitness"))  # d_mu's F is still sqrt(K)


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


@np.errstate(all="ignore")  # a worker that diverges is left out and counted
def evaluate_worker(config, meta, worker):
    """An actor, its A2C on each task, its tests: -> Result."""
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
    return Result(d_mu, d_sigma, phi, -np.mean(errors), returns, obs_sums,
                  len(seen) + int(tests.valid.sum()), tests.returns().mean())


def update_distribution(meta, results, config, plain=esmeta.update_distribution):
    """esmeta's, where each worker's term of Eq. 10 counts by the rank of its fitness."""
    F = esmeta.centred_ranks(np.array([r.fitness for r in results])).astype(np.float32)
    return plain(meta, [r._replace(d_mu=f * r.d_mu, d_sigma=f * r.d_sigma)
                        for f, r in zip(F, results)], config)


@np.errstate(all="ignore")  # as esmeta's
def evaluate_goal(config, meta, goal, index, updates, seed):
    """esmeta's with A2C: -> mean returns of mu before and after each update, (U + 1,), actors."""
    normalise, k = esmeta.make_normaliser(meta, config), config.rollouts
    phi, actors = meta.mu_critic, [meta.mu_actor]
    for update in range(updates):
        rng = esmeta.generator(esmeta.EVAL, seed, index + 1, update + 1)
        data = explore(actors[-1], [goal], config, normalise, rng)[0].part(slice(k))
        actor, phi = adapt(
            actors[-1], phi, data, meta.sigma_actor,
            esmeta.config_of_update(update, data, config), esmeta.task_dims(config.task), rng)
        actors.append(actor)
    starts = esmeta.generator(esmeta.EVAL, seed, 0, 0).integers(2**31, size=esmeta.EVAL_ROLLOUTS)
    [tests] = esmeta.rollout(config.task, np.array(actors), [*starts] * len(actors), normalise,
                             [goal])
    return tests.returns().reshape(len(actors), -1).mean(axis=1), np.array(actors)


def train(config, *, out=None, pool="local", plain=esmeta.train, **others):
    """esmeta's with another default of `out`; ValueError for what has no meaning here."""
    if config.paper or config.cycles > 1 or pool != "local":
        raise ValueError("results.baldwin takes no --paper, --cycles, --pool")
    return plain(config, out=out or f"runs/{config.task}-baldwin-seed{config.seed}", **others)


def main(argv=None):
    """The program, with esmeta's flags and exit status."""
    with mock.patch.multiple(
            esmeta, train=train, evaluate_worker=evaluate_worker, evaluate_goal=evaluate_goal,
            update_distribution=update_distribution, VERSION=VERSION, __doc__=__doc__):
        return esmeta.main(argv)


if __name__ == "__main__":
    from results import baldwin  # jobs name functions of this file, not of __main__

    sys.exit(baldwin.main())
