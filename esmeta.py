"""ESMeta: meta-RL with a distribution of exploration parameters learned by evolution strategies.

One file of NumPy for one paper, "Meta Reinforcement Learning with Distribution of Exploration
Parameters Learned by Evolution Strategies" (Shen, Yang, Yuan, Liu). The tasks are in tasks.py.
Where our form differs from the paper's, the code branches on Config.paper; README lists these.

Symbols                                                    shape     made by
  mu, sigma   mean and std of P_actor (P_critic: (P_c,))   (P,)      initial_state
  theta       weights of a worker's K explorers            (K, P)    sample_explorers
  theta_bar   mean of the K explorers: the actor to adapt  (P,)      evaluate_worker
  phi         weights of a worker's critic                 (P_c,)    evaluate_worker
  F           fitness of each explorer (--paper: one, ())  (K,)      evaluate_adapted
  M, K, G, T  workers; explorers, tasks (the paper's T_t) and test episodes of a worker
  H, B, P     horizon in steps; rows of an array of steps; weights of an actor (P_c: of a critic)

Algorithm 1                                                          function
  initialise P_actor(mu_a, sigma_a), P_critic(mu_c, sigma_c)         initial_state
  while not done                                                     train, iterate
    sample a mini-batch of tasks T_t                                 sample_tasks
    for i in M                                                       evaluate_worker
      sample K actors theta_1 .. theta_K                             sample_explorers
      sample a critic phi                                            evaluate_worker
      for each task t in T_t
        get K trajectories from the K actors                         rollout
        theta_bar = mean of theta_1 .. theta_K                       evaluate_worker
        train theta_bar and phi on the K trajectories                adapt
        sample the fitness of the adapted actor and critic           evaluate_adapted, critic_error
    update mu and sigma of actor and critic by Eq. 10                update_distribution
"""

import os

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # processes fill the cores; and sums round by number of threads

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import multiprocessing.resource_tracker
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tasks

# ---- settings: every default with its provenance --------------------------------------------


def settings_of(group):
    """The function that makes a field of Config: default, where it comes from, help, range."""
    return lambda default, source, text, low=None, high=None: dataclasses.field(
        default=default, metadata=dict(group=group, source=source, help=text, low=low, high=high))


GROUPS = ("run", "outer loop", "exploration", "inner loop")  # of --help
run_, outer, explore, inner = map(settings_of, GROUPS)


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run's bits depend on; TASK_SETTINGS and PAPER are other defaults."""

    task: str = run_("cheetah_vel", "paper", "one of " + ", ".join(tasks.TASKS))
    seed: int = run_(0, "ours", "of every random number of a training", 0, 2**63 - 1)
    paper: bool = run_(False, "ours", "the paper's literal form, with rates that go with it")
    workers: int = outer(64, "paper", "M, workers of an iteration", 1, 10**5)
    goals: int = outer(4, "ours", "G, tasks of a worker (directions: 2 without --paper)", 1, 1000)
    tests: int = outer(1, "ours", "tests of an explorer; --paper: of a task", 1, 1000)
    alive_bonus: float = outer(0.0, "ours", "reward of each step; in no reported return", 0, 100)
    lr_mu_actor: float = outer(30.0, "ours", "natural-gradient rate of mu_a; --paper: SGD", 0, 1e6)
    lr_sigma_actor: float = outer(1.0, "ours", "rate of log sigma_a; --paper: of sigma_a", 0, 1e6)
    lr_mu_critic: float = outer(1.0, "ours", "natural-gradient rate of mu_c; --paper: SGD", 0, 1e6)
    lr_sigma_critic: float = outer(1.0, "ours", "rate of log sigma_c; --paper: of sigma_c", 0, 1e6)
    half_life: float = outer(50.0, "ours", "iterations that halve a step of mu; 0: never", 0, 1e9)
    momentum: float = outer(0.7, "ours", "share of its last step in a step of mu_a", 0, 0.999)
    weight_decay: float = outer(0.0, "ours", "share of mu_a that the first iteration removes", 0, 1)
    rollouts: int = explore(20, "paper", "K, explorers of a worker (paper: ant_dir 40)", 2, 10**4)
    sigma: float = explore(0.03, "ours", "initial std of every weight", 1e-5, 1)
    gamma: float = inner(0.97, "ours", "discount", 0, 0.9999)
    n_step: int = inner(20, "ours", "rewards in a target of the critic", 1, 10**4)
    cycles: int = inner(1, "ours", "(fit critic, step actor) on the same data", 1, 10**4)
    critic_updates: int = inner(12, "ours", "minibatches that a cycle fits the critic to", 1, 10**6)
    batch: int = inner(256, "ours", "steps in a minibatch", 1, 10**6)
    critic_lr: float = inner(3e-3, "ours", "Adam rate of the critic", 0, 10)
    actor_step: float = inner(4.5, "ours", "sigmas in the actor's step; --paper: Adam rate", 0, 1e6)

    def __post_init__(self):
        """Raise ValueError, one line, for a field that is not of its type or makes no sense."""
        for field in dataclasses.fields(self):
            value, kind, limits = getattr(self, field.name), type(field.default), field.metadata
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, not {value!r}")
            if limits["low"] is not None and not limits["low"] <= value <= limits["high"]:
                raise ValueError(f"{field.name} must be from {limits['low']:g} to "
                                 f"{limits['high']:g}, not {value!r}")
        tasks.find_task(self.task)
        if self.rollouts % 2 and not self.paper:
            raise ValueError(f"rollouts must be even, as mirrored pairs are, not {self.rollouts}")


ANT = dict(tests=2, lr_mu_actor=102.0, half_life=100.0, weight_decay=0.012)
TASK_SETTINGS = {  # (ours)
    "point_goal": dict(goals=2, lr_mu_actor=15.0),
    "cheetah_dir": dict(lr_mu_actor=60.0, critic_updates=48, actor_step=7.0),
    "ant_vel": dict(ANT, alive_bonus=2.0),
    "ant_dir": dict(ANT, actor_step=11.0),
}
# The paper names no rates, no number of tasks or DDPG steps. DDPG's rates are Lillicrap's (2015),
# the actor's ten times his. Eq. 10's are small, as its gradient is as large as F / sigma
PAPER = dict(goals=1, tests=1, alive_bonus=0.0, lr_mu_actor=3e-7, lr_sigma_actor=1e-8,
             lr_mu_critic=1e-6, lr_sigma_critic=1e-8, half_life=0.0, momentum=0.0,
             weight_decay=0.0, gamma=0.99, n_step=1, cycles=3, critic_updates=48, batch=64,
             critic_lr=1e-3, actor_step=1e-3)
TARGET_TAU = 1e-3  # share that the paper's target networks move (Lillicrap et al. 2015)
OBS_CLIP = 5.0  # of normalised observations: the ant's rare contact forces have tiny variances
ITERATIONS = 100  # of a run (ours)
MAX_STRETCH = 1.5  # a meta-test's step is at most this times the training's (ours)
EVAL_ROLLOUTS = 20  # that a return of the meta-test averages (MAML; on ant_dir it has 40)
VERSION = 3  # of checkpoints
INIT, GOALS, WORKER, EVAL = range(4)  # kinds of work, of a generator's key


def make_config(task=Config.task, paper=False, **explicit):
    """Config from defaults, the task's settings, PAPER if `paper`, then explicit values."""
    k = tasks.find_task(task).rollouts  # 40 on ant_dir, whose training takes 20 otherwise (ours)
    return Config(task=task, paper=paper, **{
        **TASK_SETTINGS.get(task, {}), **(dict(PAPER, rollouts=k) if paper else {}), **explicit})


def generator(kind, seed, iteration, index):
    """The generator of one piece of work. Keys have one length: [1] and [1, 0] would collide."""
    return np.random.default_rng([kind, seed, iteration, index])


# ---- Algorithm 1 ----------------------------------------------------------------------------


class MetaState(NamedTuple):
    """What a checkpoint holds: the two Gaussians, sums of observations, counters."""

    mu_actor: np.ndarray  # (P,)
    sigma_actor: np.ndarray  # (P,)
    mu_critic: np.ndarray  # (P_c,)
    sigma_critic: np.ndarray  # (P_c,)
    velocity: np.ndarray  # (P,), the running mean of mu_a's steps
    obs_sums: np.ndarray  # (3, obs), of 1, of s and of s^2 where the explorers acted
    iteration: int
    env_steps: int


class Result(NamedTuple):
    """What a worker sends back."""

    d_mu: np.ndarray  # (P,), the worker's term of Eq. 10 for mu_a
    d_sigma: np.ndarray  # (P,), the same for sigma_a
    phi: np.ndarray  # (P_c,), the critic that it sampled
    fitness_critic: float  # minus the squared error of the adapted critic
    returns: np.ndarray  # (3,), before adaptation, of the explorers, after it
    obs_sums: np.ndarray  # (3, obs)
    env_steps: int


LOG_COLUMNS = ("iteration", "return_before", "return_explorers", "return_after", "critic_error",
               "sigma_actor", "update_ratio", "env_steps", "seconds")


def initial_state(config):
    """Xavier means, constant sigmas, no observation seen: Config -> MetaState, float32."""
    dims, rng = task_dims(config.task), generator(INIT, config.seed, 0, 0)
    mu_actor = xavier(actor_shapes(dims), rng).astype(np.float32)
    mu_critic = xavier(critic_shapes(dims), rng).astype(np.float32)
    return MetaState(mu_actor, np.full_like(mu_actor, config.sigma),
                     mu_critic, np.full_like(mu_critic, config.sigma),
                     np.zeros_like(mu_actor), np.zeros((3, dims.obs)), 0, 0)


def train(config, iterations=ITERATIONS, processes=None, out=None, resume=False, pool="local"):
    """Algorithm 1 up to `iterations` in all, each a row of log.csv and a checkpoint: -> MetaState.

    `out` is by default runs/<task>-seed<N>. Only config and `iterations` change the result. Raises
    ValueError for what cannot be, RuntimeError for a run that cannot go on.
    """
    if iterations < 0 or out == "":
        raise ValueError(f"iterations must be at least 0, out a folder, not {iterations}, {out!r}")
    out = Path(out or f"runs/{config.task}-seed{config.seed}")
    with Crew(processes, pool) as crew:
        meta = open_run(out, config, resume)
        while meta.iteration < iterations:
            begin = time.monotonic()
            meta, row, failed = iterate(config, meta, crew)
            row["seconds"] = time.monotonic() - begin
            with open(out / "log.csv", "a") as log:  # a resume drops rows after the checkpoint's
                log.write(csv_line(row.values()))
            save_checkpoint(out / "checkpoint.npz", config, meta)
            print(f"{meta.iteration}/{iterations}", f"failed {failed} " * bool(failed) + " ".join(
                f"{name} {value:.4g}" for name, value in [*row.items()][1:]), flush=True)
    print(f"{out} has {meta.iteration} iterations; test it: --eval {out} --updates 3", flush=True)
    return meta


def iterate(config, meta, crew):
    """One turn of Algorithm 1's outer loop: -> MetaState, row of log.csv, number of workers failed.

    Raises RuntimeError where all of them failed, or where mu or sigma is finite no more.
    """
    results = crew.map(evaluate_worker, [(config, meta, i) for i in range(config.workers)])
    fine = [r for r in results if math.isfinite(r.returns.sum() + r.fitness_critic)]
    if not fine:
        raise RuntimeError(f"iteration {meta.iteration}: no worker has a finite fitness")
    new = update_distribution(meta, fine, config)._replace(
        obs_sums=meta.obs_sums + sum(r.obs_sums for r in fine), iteration=meta.iteration + 1,
        env_steps=meta.env_steps + sum(r.env_steps for r in results))
    if not all(np.isfinite(part).all() for part in new):
        raise RuntimeError(f"iteration {meta.iteration}: mu or sigma is finite no more")
    ratio = np.linalg.norm(new.mu_actor - meta.mu_actor) / np.linalg.norm(meta.mu_actor)
    returns = np.mean([r.returns for r in fine], axis=0)
    error = -np.mean([r.fitness_critic for r in fine])
    row = dict(zip(LOG_COLUMNS, (meta.iteration, *returns, error, float(new.sigma_actor.mean()),
                                 float(ratio), new.env_steps, 0.0)))
    return new, row, len(results) - len(fine)


@np.errstate(all="ignore")  # a worker that diverges is left out and counted, which says enough
def evaluate_worker(config, meta, worker):
    """The body of Algorithm 1's loop over workers, its tasks side by side: -> Result."""
    k, dims, bonus = config.rollouts, task_dims(config.task), config.alive_bonus
    mu, sigma, normalise = meta.mu_actor, meta.sigma_actor, make_normaliser(meta, config)
    rng = generator(WORKER, config.seed, meta.iteration, worker)
    goals = sample_tasks(config, meta.iteration, worker)  # (G, ..)
    theta, starts = sample_explorers(mu, sigma, config, rng)  # (K, P), (K,)
    theta_bar = theta.mean(axis=0)  # (P,)
    eps = rng.standard_normal(len(meta.mu_critic), np.float32)
    phi = meta.mu_critic + meta.sigma_critic * eps  # (P_c,) ~ N(mu_c, sigma_c^2)
    # no dynamics depend on the goal: one exploration for all tasks; theta_bar's is for the log
    scored = rollout(config.task, np.vstack([theta, theta_bar]), [*starts, rng.integers(2**31)],
                     normalise, goals, bonus)
    value = state_values(theta_bar, phi, scored[0].obs[:, :k], dims)  # (H + 1, K)
    adapted = [adapt(theta_bar, phi, data.part(slice(k)), sigma, config, dims, rng, value)
               for data in scored]
    move = np.stack([actor for actor, _ in adapted]) - theta_bar  # (G, P)
    explored = np.array([data.returns() for data in scored])[:, :k]  # (G, K), with the bonus
    tests, task, fitness = evaluate_adapted(
        theta, theta_bar, move, explored, goals, normalise, config, rng)
    errors = [critic_error(*adapted[g], tests.part(task == g), config, dims)
              for g in np.unique(task)]
    d_mu, d_sigma = nes_gradient(theta, fitness.astype(theta.dtype), mu, sigma)
    reported = np.array([data.returns(bonus) for data in scored])  # (G, K + 1), without it
    returns = np.array([reported[:, k].mean(), reported[:, :k].mean(), tests.returns(bonus).mean()])
    lived = np.any([data.valid for data in scored], axis=0)  # (H, K + 1)
    seen = scored[0].raw[:-1, :k][lived[:, :k]]  # (steps, obs)
    obs_sums = np.array([np.full(dims.obs, len(seen)), seen.sum(axis=0), (seen**2).sum(axis=0)])
    return Result(d_mu, d_sigma, phi, -np.mean(errors), returns, obs_sums,
                  int(lived.sum() + tests.valid.sum()))


def sample_tasks(config, iteration, worker):
    """T_t: the goals of a worker, (G, ..); --paper: one mini-batch of tasks for all workers."""
    sample, index = (tasks.sample_goals, 0) if config.paper else (tasks.spread_goals, worker)
    return sample(config.task, generator(GOALS, config.seed, iteration, index), config.goals)


def sample_explorers(mu, sigma, config, rng):
    """theta_1 .. theta_K ~ N(mu, sigma^2), (K, P), and the seeds of their starts, (K,)."""
    k, p = config.rollouts, len(mu)
    n = k if config.paper else k // 2  # independent explorers, or pairs
    eps, starts = rng.standard_normal((n, p), np.float32), rng.integers(2**31, size=n)
    if n < k:  # each pair mirrored, eps and -eps, from one start: theta_bar is mu, but for rounding
        eps, starts = np.stack([eps, -eps], axis=1).reshape(k, p), np.repeat(starts, 2)
    return mu + sigma * eps, starts


def evaluate_adapted(theta, theta_bar, move, explored, goals, normalise, config, rng):
    """Test theta + move (--paper: theta_bar + move), move (G, P), on fresh starts, score theta.

    explored (G, K), the explorers' returns -> T tests, which goal each has (T,), F (K,) or ().
    """
    if config.paper:  # F_i: the return of the adapted theta_bar, raw, shared by the K
        task = np.repeat(np.arange(len(goals)), config.tests)
        starts = rng.integers(2**31, size=len(task))
        [tests] = rollout(config.task, theta_bar + move[task], starts, normalise, [goals[task]],
                          config.alive_bonus)
        return tests, task, np.mean(tests.returns())
    # test r of j: the step of task (j // 2 + r) mod G, one start a pair; the first may have more
    r, j = np.divmod(np.arange(config.tests * len(theta)), len(theta))
    task, starts = (j // 2 + r) % len(goals), rng.integers(2**31, size=len(j) // 2).repeat(2)
    [tests] = rollout(config.task, theta[j] + move[task], starts, normalise, [goals[task]],
                      config.alive_bonus)
    return tests, task, centred_ranks(explorer_fitness(explored, tests.returns(), task))


def explorer_fitness(explored, after, task):
    """What ranks j: mean return exploring + mean lead of its tests over the mean of their task.

    explored (G, K); after (T,), test t is of explorer t mod K on task[t] -> (K,).
    """
    task_mean = np.bincount(task, after) / np.bincount(task)  # (G,), or fewer: tasks with a test
    ahead = (after - task_mean[task]).reshape(-1, explored.shape[1])  # (tests, K)
    return explored.mean(axis=0) + ahead.mean(axis=0)


def update_distribution(meta, results, config):
    """A step up Eq. 10 of both Gaussians; mu_a has momentum and weight decay too: -> MetaState."""
    d_mu, d_sigma = np.mean([(r.d_mu, r.d_sigma) for r in results], axis=0)  # Eq. 10: 1/M sum_i
    fitness = np.array([r.fitness_critic for r in results])
    fitness = fitness if config.paper else centred_ranks(fitness)
    phi = np.stack([r.phi for r in results])[:, None]  # (M, 1, P_c)
    d_critic = nes_gradient(phi, fitness.astype(phi.dtype), meta.mu_critic, meta.sigma_critic)
    decay = 0.5 ** (meta.iteration / config.half_life) if config.half_life else 1.0
    step, sigma_actor = ascend(d_mu, d_sigma, meta.sigma_actor, config.rollouts,
                               decay * config.lr_mu_actor, config.lr_sigma_actor, config)
    step_critic, sigma_critic = ascend(*d_critic, meta.sigma_critic, 1, decay * config.lr_mu_critic,
                                       config.lr_sigma_critic, config)
    velocity = config.momentum * meta.velocity + (1 - config.momentum) * step
    return meta._replace(
        mu_actor=(1 - decay * config.weight_decay) * meta.mu_actor + velocity,
        sigma_actor=sigma_actor, velocity=velocity,
        mu_critic=meta.mu_critic + step_critic, sigma_critic=sigma_critic)


def ascend(d_mu, d_sigma, sigma, k, lr_mu, lr_sigma, config):
    """A step of mu and the next sigma, in [1e-5, 1], up Eq. 10's or the natural gradient: (P,)."""
    if config.paper:  # Eq. 10 as it is, but for the limits of sigma
        step, sigma = lr_mu * d_mu, sigma + lr_sigma * d_sigma
    else:  # over the Fisher matrix of K independent theta: K / sigma^2, and 2 K for log sigma
        step = lr_mu * (d_mu * sigma**2 / k)
        sigma = sigma * np.exp(lr_sigma * (d_sigma * sigma / (2 * k)))
    return step, np.clip(sigma, 1e-5, 1.0)


# ---- Eq. 10 ---------------------------------------------------------------------------------


def log_density(theta, mu, sigma):
    """log N(theta; mu, sigma^2) summed over weights: theta (.., P), mu, sigma (P,) -> (..)."""
    z = (theta - mu) / sigma
    return -np.sum(0.5 * z * z + np.log(sigma) + 0.5 * math.log(2 * math.pi), axis=-1)


def nes_gradient(theta, fitness, mu, sigma):
    """Eq. 10, the gradient of 1/M sum_i sum_j F_ij log N(theta_ij; mu, sigma^2) in mu and sigma.

    theta (M, K, P), fitness (M, K) or one a worker (M,), mu, sigma (P,) -> d_mu, d_sigma (P,);
    theta (K, P) with fitness (K,) or () is one worker's term.
    """
    if np.ndim(fitness) == theta.ndim - 2:  # F_i, shared by the K of a worker
        fitness = np.expand_dims(fitness, -1)
    F = np.broadcast_to(fitness, theta.shape[:-1])[..., None, :]  # (.., 1, K)
    d = theta - mu
    d_mu = (F @ d)[..., 0, :] / sigma**2  # Eq. 10, sum over j
    d_sigma = (F @ (d**2 - sigma**2))[..., 0, :] / sigma**3  # Eq. 10, sum over j
    workers = tuple(range(theta.ndim - 2))
    return d_mu.mean(axis=workers), d_sigma.mean(axis=workers)


def centred_ranks(fitness):
    """Ranks of fitness (n,) scaled to [-0.5, 0.5]; ties share their mean rank, constants give 0."""
    _, inverse, count = np.unique(fitness, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count + 1) / 2)[inverse]  # from 0
    return (ranks - (len(fitness) - 1) / 2) / max(len(fitness) - 1, 1)


# ---- DDPG: adapts theta_bar and phi to one task ----------------------------------------------


class Trajectories(NamedTuple):
    """N episodes side by side, time first; what follows a termination is not valid."""

    obs: np.ndarray  # (H + 1, N, obs), normalised
    raw: np.ndarray  # (H + 1, N, obs), as the environment gives it
    action: np.ndarray  # (H, N, act)
    reward: np.ndarray  # (H, N)
    terminated: np.ndarray  # (H, N): the task ended here; the horizon is no termination
    valid: np.ndarray  # (H, N)

    def returns(self, bonus=0.0):
        """Undiscounted return of each episode, (N,), less the bonus in each reward."""
        reward = np.sum(self.reward, axis=0, where=self.valid, dtype=np.float64)
        return reward - bonus * self.valid.sum(axis=0)

    def part(self, chosen):
        """Some of the episodes alone: a slice, indices or a mask (N,)."""
        return Trajectories(*(array[:, chosen] for array in self))


def adapt(theta_bar, phi, data, sigma, config, dims, rng, value=None):
    """DDPG on K trajectories, `cycles` times: fit the critic to fixed targets, step the actor.

    theta_bar, sigma (P,), phi (P_c,), data (H, K) -> adapted theta (P,), phi (P_c,). `value`, the
    state_values (H + 1, K) of theta_bar and phi, serves all tasks of a worker.
    """
    obs, action = data.obs[:-1][data.valid], data.action[data.valid]  # (B, obs), (B, act)
    value = state_values(theta_bar, phi, data.obs, dims) if value is None else value
    if not config.paper:  # not the sampled bias: Adam would be slow to find the right mean
        offset = data.reward[data.valid].mean() / (1 - config.gamma) - phi[-1]
        phi, value = np.append(phi[:-1], phi[-1] + offset), value + offset
    theta, target = theta_bar, (theta_bar, phi)
    adam_actor, adam_critic = (np.zeros((2, len(x)), x.dtype) for x in (theta, phi))
    for cycle in range(config.cycles):
        value = state_values(*target, data.obs, dims) if cycle else value
        y = nstep_targets(data, value, config)[data.valid]
        rows = rng.integers(len(obs), size=(config.critic_updates, config.batch))
        phi, adam_critic = fit_critic(phi, obs, action, y, rows, config.critic_lr, dims,
                                      adam_critic, cycle * config.critic_updates)
        states = obs[rng.integers(len(obs), size=config.batch)]
        gradient = policy_gradient(theta, phi, states, dims)
        if config.paper:  # Lillicrap et al. (2015); targets matter from the second cycle on
            theta, adam_actor = adam_step(theta, -gradient, adam_actor, cycle + 1,
                                          config.actor_step)
            target = tuple((1 - TARGET_TAU) * old + TARGET_TAU * new
                           for old, new in zip(target, (theta, phi)))
        else:  # along sigma^2 times the gradient: |(theta' - theta) / sigma| = actor_step
            direction = sigma * gradient
            length = max(float(np.linalg.norm(direction)), 1e-20)
            theta = theta + sigma * direction * (config.actor_step / length)
            target = theta, phi
    return theta, phi


def nstep_targets(data, value, config):
    """y_t = r_t + .. + gamma^(m-1) r_(t+m-1) + gamma^m V(s_(t+m)), m = min(n_step, H - t).

    The horizon bootstraps, a termination does not. value (H + 1, N) of every state -> (H, N).
    """
    target = value.copy()
    discount = np.where(data.terminated, 0, config.gamma).astype(value.dtype)
    for _ in range(min(config.n_step, len(discount))):  # a Bellman backup along all trajectories
        target[:-1] = data.reward + discount * target[1:]
    return target[:-1]


def state_values(theta, phi, obs, dims):
    """V(s) = Q_phi(s, a_theta(s)): obs (.., obs) -> (..)."""
    rows = obs.reshape(-1, dims.obs)
    action, _ = actor_forward(theta, rows, dims)
    return critic_forward(phi, rows, action, dims)[0].reshape(obs.shape[:-1])


def critic_error(theta, phi, data, config, dims):
    """Mean of (Q_phi(s, a) - y)^2 over the valid steps, y from theta and phi themselves."""
    value = state_values(theta, phi, data.obs, dims)
    y = nstep_targets(data, value, config)[data.valid]
    q, _ = critic_forward(phi, data.obs[:-1][data.valid], data.action[data.valid], dims)
    return float(np.mean((q - y) ** 2))


def fit_critic(phi, obs, action, y, rows, lr, dims, moments, taken=0):
    """Descend the mean of (Q_phi(s, a) - y)^2, one Adam step for each minibatch; y stays fixed.

    phi (P_c,), obs (B, obs), action (B, act), y (B,), rows (updates, batch), Adam's moments
    (2, P_c) after `taken` steps -> phi' (P_c,), moments.
    """
    for t, batch in enumerate(rows, start=taken + 1):
        q, cache = critic_forward(phi, obs[batch], action[batch], dims)
        d_phi, _ = critic_backward((q - y[batch]) * (2 / len(batch)), cache)
        phi, moments = adam_step(phi, d_phi, moments, t, lr)
    return phi, moments


def policy_gradient(theta, phi, obs, dims):
    """Eq. 3, the mean of grad_theta a_theta(s) grad_a Q_phi(s, a): obs (B, obs) -> (P,)."""
    action, actor_cache = actor_forward(theta, obs, dims)
    _, critic_cache = critic_forward(phi, obs, action, dims)
    _, d_action = critic_backward(np.full(len(obs), 1 / len(obs), obs.dtype), critic_cache)
    return actor_backward(d_action, actor_cache)


def adam_step(weights, gradient, moments, t, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """weights - lr m_hat / (sqrt(v_hat) + eps), the t-th step from t = 1: (P,), moments (m, v)."""
    m = beta1 * moments[0] + (1 - beta1) * gradient
    v = beta2 * moments[1] + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return weights - lr * m_hat / (np.sqrt(v_hat) + eps), (m, v)


# ---- networks: one flat vector of weights each, layers are views into it --------------------


class Dims(NamedTuple):
    """Sizes of a task's networks: observation, action, both hidden layers."""

    obs: int
    act: int
    hidden: int = 100


def task_dims(name):
    """Dims of a task's networks."""
    return Dims(tasks.TASKS[name].obs, tasks.TASKS[name].act)


def actor_shapes(dims):
    """Shapes of W1, W2, W3 in the order of theta; the last row of each is its bias."""
    o, a, h = dims
    return (o + 1, h), (h + 1, h), (h + 1, a)


def critic_shapes(dims):
    """Shapes of W1, W2, W3 in phi, a bias last; the action joins at the second hidden layer."""
    o, a, h = dims
    return (o + 1, h), (h + a + 1, h), (h + 1, 1)


def unpack(flat, shapes):
    """Views of flat (.., P) as layers (.., *shape), in order."""
    layers, end = [], 0
    for shape in shapes:
        start, end = end, end + math.prod(shape)
        layers.append(flat[..., start:end].reshape(*flat.shape[:-1], *shape))
    return layers


def xavier(shapes, rng):
    """Weights ~ U(-b, b), b = sqrt(6 / (fan_in + fan_out)); biases zero; flat, float64."""
    parts = []
    for rows, columns in shapes:
        bound = math.sqrt(6 / (rows - 1 + columns))
        parts += [rng.uniform(-bound, bound, (rows - 1) * columns), np.zeros(columns)]
    return np.concatenate(parts)


def affine(x, w):
    """x W + b, b the last row of w: x (.., B, n), w (.., n + 1, m) -> (.., B, m)."""
    return x @ w[..., :-1, :] + w[..., -1:, :]


def affine_gradient(x, d_z):
    """Gradient of sum(d_z * affine(x, w)) in w, flat: x (B, n), d_z (B, m) -> ((n + 1) m,)."""
    return np.append(x.T @ d_z, d_z.sum(axis=0))


def actor_forward(theta, obs, dims):
    """The policy a = tanh(W3 relu(W2 relu(W1 s))), biases everywhere.

    theta (P,), obs (B, obs) -> action (B, act), cache; or all three with an axis of actors first.
    """
    w1, w2, w3 = unpack(theta, actor_shapes(dims))
    x1 = np.maximum(affine(obs, w1), 0)
    x2 = np.maximum(affine(x1, w2), 0)
    action = np.tanh(affine(x2, w3))
    return action, (w2, w3, obs, x1, x2, action)


def actor_backward(d_action, cache):
    """Gradient of sum(d_action * action) in theta: d_action (B, act) -> d_theta (P,)."""
    w2, w3, obs, x1, x2, action = cache
    d_z3 = d_action * (1 - action**2)
    d_z2 = d_z3 @ w3[:-1].T * (x2 > 0)
    d_z1 = d_z2 @ w2[:-1].T * (x1 > 0)
    return np.concatenate([affine_gradient(obs, d_z1), affine_gradient(x1, d_z2),
                           affine_gradient(x2, d_z3)])


def critic_forward(phi, obs, action, dims):
    """The value Q(s, a): phi (P_c,), obs (B, obs), action (B, act) -> q (B,), cache."""
    w1, w2, w3 = unpack(phi, critic_shapes(dims))
    x1 = np.maximum(affine(obs, w1), 0)
    x1_action = np.concatenate([x1, action], axis=1)  # (B, hidden + act)
    x2 = np.maximum(affine(x1_action, w2), 0)
    return affine(x2, w3)[:, 0], (w2, w3, obs, x1, x1_action, x2)


def critic_backward(d_q, cache):
    """Gradients of sum(d_q * q): d_q (B,) -> d_phi (P_c,), d_action (B, act)."""
    w2, w3, obs, x1, x1_action, x2 = cache
    d_z3 = d_q[:, None]
    d_z2 = d_z3 * w3[:-1].T * (x2 > 0)  # one column: an outer product
    d_x1, d_action = np.split(d_z2 @ w2[:-1].T, [x1.shape[1]], axis=1)
    d_z1 = d_x1 * (x1 > 0)
    return np.concatenate([affine_gradient(obs, d_z1), affine_gradient(x1_action, d_z2),
                           affine_gradient(x2, d_z3)]), d_action


# ---- rollouts: actors in environments in lockstep -------------------------------------------


def rollout(task, theta, starts, normalise, goals, bonus=0.0, noise=None):
    """N episodes, one from each seed in `starts`: theta (A, P); actor a has the a-th N / A of them.

    No dynamics depend on the goal: -> a list, the Trajectories under each of `goals`, (..) or
    (N, ..), where each step taken earns `bonus` more. `noise` (H, N, act) is added to the actions.
    """
    dims, horizon, n = task_dims(task), tasks.TASKS[task].horizon, len(starts)
    # an ant that has fallen costs no more steps; where a point ends depends on its goal
    env = tasks.make_vec(task, n, freeze=tasks.TASKS[task].model == "ant.xml")
    raw, velocity = np.empty((horizon + 1, n, dims.obs)), np.empty((horizon, n))
    obs = np.empty(raw.shape, theta.dtype)
    action = np.zeros((horizon, n, dims.act), theta.dtype) if noise is None else noise.copy()
    raw[0], _ = env.reset(seed=[int(seed) for seed in starts])
    obs[0] = normalise(raw[0])
    for t in range(horizon):
        a, _ = actor_forward(theta, obs[t].reshape(len(theta), -1, dims.obs), dims)
        action[t] += a.reshape(n, dims.act)
        env.advance(action[t], raw[t + 1])
        obs[t + 1] = normalise(raw[t + 1])
        velocity[t] = env.velocity
    scored, clipped, broken = [], action.clip(-1, 1), env.unstable()
    for goal in goals:
        reward, terminated = tasks.outcomes(task, raw[1:], clipped, velocity, goal)
        reward = np.where(broken, np.nan, reward + bonus).astype(obs.dtype)
        valid = np.ones_like(terminated)
        valid[1:] = ~np.logical_or.accumulate(terminated)[:-1]
        scored.append(Trajectories(obs, raw, action, reward, terminated, valid))
    return scored


def make_normaliser(meta, config):
    """s -> clip((s - mean) / sqrt(var + 1e-8), -5, 5) of what was seen; s itself before that."""
    count, total, square = meta.obs_sums
    if config.paper or not count.any():  # raw observations
        return lambda obs: obs
    mean = total / count
    std = np.sqrt(np.maximum(square / count - mean**2, 0) + 1e-8)
    return lambda obs: np.minimum(np.maximum((obs - mean) / std, -OBS_CLIP), OBS_CLIP)


# ---- what runs it: processes, run directory, meta-test, command line -------------------------

SIGNALS = []  # that came to main; read where it waits for its workers, so nothing is cut in half


class Crew(contextlib.AbstractContextManager):
    """Worker processes: a multiprocessing.Pool, here or Ray's; one process is this one."""

    def __init__(self, processes=None, kind="local"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.processes = cores if processes is None else processes
        self.kind, self.pool = kind, None
        if not 1 <= self.processes <= 4096 or kind not in ("local", "ray"):
            raise ValueError(f"not 1 to 4096 processes, local or ray: {processes}, {kind!r}")
        if kind == "ray" and getattr(importlib.util.find_spec("ray"), "origin", None) is None:
            raise ValueError("--pool ray needs ray: pip install ray")

    def map(self, function, jobs):
        """[function(*job) for job in jobs], all again where a process died, three times at most."""
        n = min(self.processes, len(jobs))
        if n <= 1 and self.kind == "local":
            return [stop_if_asked() or function(*job) for job in jobs]
        for _ in range(3):
            if self.pool is None:
                self.open(n)
            handles = [self.pool.apply_async(function, job) for job in jobs]
            while waiting := [handle for handle in handles if not handle.ready()]:
                stop_if_asked()
                if any(member.exitcode is not None for member in self.members):
                    break  # a Pool would wait for its job for ever
                waiting[0].wait(0.05)
            else:
                with contextlib.suppress(*self.lost_errors):
                    return [handle.get() for handle in handles]
            self.__exit__()
        raise RuntimeError("a worker process died in each of three attempts at one iteration "
                           "(a script must train under `if __name__ == \"__main__\":`)")

    def open(self, n):
        """Start a pool of n processes, and note which they are."""
        if self.kind == "ray":  # its Pool has the same API
            import ray
            from ray.util.multiprocessing import Pool
            if not ray.is_initialized():  # RAY_ADDRESS names a running cluster: it has its cores
                handler = signal.getsignal(signal.SIGTERM)
                ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else n, log_to_driver=False,
                         runtime_env={"working_dir": str(Path(__file__).parent),
                                      "excludes": ["runs", ".venv", ".git", "results"]})
                with contextlib.suppress(ValueError):  # outside the main thread, as Ray set none
                    signal.signal(signal.SIGTERM, handler)
            self.pool, self.members, self.lost_errors = Pool(n), (), (ray.exceptions.RayActorError,)
            return
        # workers never draw: else each starts a process that looks for glfw, and may outlive it
        os.environ.setdefault("MUJOCO_GL", "off")
        multiprocessing.resource_tracker.ensure_running()  # whose start unblocks the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:  # workers inherit the mask: no Ctrl-C; a fork would copy locks and threads
            self.pool = multiprocessing.get_context("spawn").Pool(n)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.members, self.lost_errors = [*self.pool._pool], ()  # Pool lists them nowhere else

    def __exit__(self, *_):
        """End the pool and what it started, in whatever state; Ray's may finish what they do."""
        pool, self.pool = self.pool, None
        if pool is not None and self.kind == "ray":
            pool.close()  # to kill them is what Ray calls an unexpected system error
            pool.join()
        elif pool is not None:
            # terminate waits for ever for a lock that a killed worker held, hence a thread and kill
            ending = threading.Thread(target=pool.terminate, daemon=True)
            ending.start()
            ending.join(0.5)
            for member in {*self.members, *pool._pool}:
                member.kill()
                member.join(5)


def open_run(out, config, resume):
    """Make or check a run directory, cut its log.csv: -> the state to go on from."""
    checkpoint, settings, log = (out / x for x in ("checkpoint.npz", "config.json", "log.csv"))
    meta = initial_state(config)
    if resume:
        stored, meta = load_checkpoint(checkpoint)
        for name, value in dataclasses.asdict(stored).items():
            if getattr(config, name) != value:
                raise ValueError(f"{out} was trained with another {name}, {value!r}")
    elif out.is_file() or checkpoint.exists() or settings.exists() or log.exists():
        raise ValueError(f"{out} is taken: --resume continues a run, --out names another place")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    rows = lines[1 : meta.iteration + 1]
    if [row.split(",")[0] for row in rows] != [str(i) for i in range(meta.iteration)]:
        raise ValueError(f"{log} has not the {meta.iteration} rows of {checkpoint}")
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, config, meta)  # the first: without it the others are of no run
    replace_file(settings, json.dumps(dataclasses.asdict(config), indent=1))
    replace_file(log, "\n".join([",".join(LOG_COLUMNS), *rows, ""]))
    return meta


def csv_line(values):
    """One line of a CSV file; floats with 6 significant digits."""
    return ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n"


def replace_file(path, content):
    """Write text or bytes to path in one step: who dies in it leaves the old ones or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def save_checkpoint(path, config, meta):
    """Replace the checkpoint at path: the arrays of meta and one JSON string, no clock."""
    stored = json.dumps({"version": VERSION, "config": dataclasses.asdict(config)})
    content = io.BytesIO()
    np.savez(content, config=stored, **meta._asdict())
    replace_file(path, content.getvalue())


def load_checkpoint(path):
    """Config, MetaState of a checkpoint or run directory; ValueError where there is none."""
    path = Path(path) / "checkpoint.npz" if Path(path).is_dir() else Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = json.loads(str(archive["config"]))
            if stored["version"] != VERSION:
                raise ValueError(f"version {stored['version']}, not {VERSION}")
            meta = MetaState(**{name: archive[name] for name in MetaState._fields})
        return Config(**stored["config"]), meta._replace(iteration=int(meta.iteration),
                                                         env_steps=int(meta.env_steps))
    except Exception as error:  # zipfile, zlib, numpy and json have many for broken bytes
        raise ValueError(f"{path} is no checkpoint of esmeta: {error!s:.200}") from None


@np.errstate(all="ignore")  # an adaptation that diverges returns NaN, which says enough
def evaluate_goal(config, meta, goal, index, updates, seed):
    """Meta-test on the goal of that index, before and after each of U updates by fresh explorers.

    -> mean returns of EVAL_ROLLOUTS episodes (U + 1,), the actors that made them (U + 1, P).
    """
    normalise, phi, actors = make_normaliser(meta, config), meta.mu_critic, [meta.mu_actor]
    for update in range(updates):
        rng = generator(EVAL, seed, index + 1, update + 1)
        theta, starts = sample_explorers(actors[-1], meta.sigma_actor, config, rng)
        [data] = rollout(config.task, theta, starts, normalise, [goal], config.alive_bonus)
        actor, phi = adapt(theta.mean(axis=0), phi, data, meta.sigma_actor,
                           config_of_update(update, data, config), task_dims(config.task), rng)
        actors.append(actor)
    starts = generator(EVAL, seed, 0, 0).integers(2**31, size=EVAL_ROLLOUTS)  # for all goals
    [tests] = rollout(config.task, np.array(actors), [*starts] * len(actors), normalise, [goal])
    return tests.returns().reshape(len(actors), -1).mean(axis=1), np.array(actors)


def config_of_update(update, data, config):
    """Config of a meta-test's update: its step is the training's times `shrink`^update.

    Where the task has a best reward, also times d / (R / 4), in [0, MAX_STRETCH]: d is what the
    later half of the steps lacks of it, R the goals' range (m/s), in the mean R / 4 off its middle.
    """
    if config.paper:  # steps as in training
        return config
    task, step = tasks.TASKS[config.task], config.actor_step
    if task.best_reward is not None and task.goal_low < task.goal_high:
        rewards = data.reward[data.valid]  # in the order of time
        distance = task.best_reward + config.alive_bonus - rewards[len(rewards) // 2 :].mean()
        stretch = 4 * float(distance) / (task.goal_high - task.goal_low)
        step *= min(max(0.0, stretch), MAX_STRETCH)  # 0 for NaN, which Config refuses
    return dataclasses.replace(config, actor_step=task.shrink**update * step)


def meta_test(path, goals=None, updates=1, seed=0, processes=1, rollouts=None):
    """MAML's protocol: returns (updates + 1, n) on goals (n, ..), by default the 40 test goals.

    path is a checkpoint or a run directory. Each update has K = `rollouts` explorers, by default
    as many as MAML had. Raises ValueError for no checkpoint, an odd K, updates < 0, no such goals.
    """
    config, meta = load_checkpoint(path)
    task = tasks.TASKS[config.task]
    config = dataclasses.replace(config, rollouts=task.rollouts if rollouts is None else rollouts)
    goals = tasks.test_goals(task.name) if goals is None else np.asarray_chkfinite(goals, float)
    if 0 in (goals.ndim, goals.size) or goals.shape[1:] != task.goal_shape or updates < 0:
        raise ValueError(f"goals must have shape {('n', *task.goal_shape)}, updates be at least 0, "
                         f"not {goals.shape}, {updates}".replace("'", ""))
    jobs = [(config, meta, goal, i, updates, seed) for i, goal in enumerate(goals)]
    with Crew(processes) as crew:
        return np.array([returns for returns, _ in crew.map(evaluate_goal, jobs)]).T


def report_eval(path, updates=1, processes=None, rollouts=None):
    """Meta-test, print the means, write eval.csv (eval-K<rollouts>.csv) beside the checkpoint."""
    name = load_checkpoint(path)[0].task
    goals, returns = tasks.test_goals(name), meta_test(path, None, updates, 0, processes, rollouts)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    rows = [(name, " ".join(f"{x:.6g}" for x in np.ravel(goal)), u, float(value))
            for u, values in enumerate(returns) for goal, value in zip(goals, values)]
    print(f"{name}, mean return before and after each update:",
          *(f"{mean:.1f}" for mean in returns.mean(axis=1)), flush=True)
    replace_file(folder / (f"eval-K{rollouts}.csv" if rollouts else "eval.csv"),
                 "".join(map(csv_line, [("task", "goal", "updates", "return"), *rows])))


def stop_if_asked():
    """Raise SystemExit, so that every `with` cleans up, where a signal has come."""
    if SIGNALS:
        raise SystemExit(128 + SIGNALS[0])


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, raised as ValueError, and no usage."""

    def error(self, message):
        raise ValueError(message)


def make_parser():
    """The command line: a flag for every field of Config, generated from it, and a few more."""
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False,
                           argument_default=argparse.SUPPRESS)  # a flag not given is absent
    groups = {name: parser.add_argument_group(name).add_argument for name in GROUPS}
    for field in dataclasses.fields(Config):
        name, kind, about = field.name, type(field.default), field.metadata
        others = {**TASK_SETTINGS, "--paper": PAPER}.items()
        own = "".join(f"; {whose} {x[name]}" for whose, x in others if name in x)
        groups[about["group"]]("--" + name.replace("_", "-"), help=(
            f"{about['help']} (default {field.default}{own}) ({about['source']})"),
            **(dict(action="store_true") if kind is bool else dict(type=kind)))
    add = groups["run"]
    add("--iterations", type=int, help=f"in all (default {ITERATIONS})")
    add("--processes", type=int, help="worker processes (default: the cores)")
    add("--out", help="run directory (default runs/<task>-seed<N>)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--pool", choices=("local", "ray"), help="of workers (default local)")
    add("--eval", metavar="PATH", help="meta-test a run, with MAML's K or that of --rollouts")
    add("--updates", type=int, help="adaptations in --eval (default 1)")
    return parser


def main(argv=None):
    """The program: -> exit status 0; 2 bad input; 1 disk or run failed; 130, 143 interrupted."""
    previous = {s: signal.signal(s, lambda signum, _: SIGNALS.append(signum))
                for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        given = vars(make_parser().parse_args(argv))
        if "eval" in given:
            if wrong := given.keys() - {"eval", "updates", "rollouts", "processes"}:
                raise ValueError(f"--eval takes no --{min(wrong).replace('_', '-')}")
            report_eval(given.pop("eval"), **given)
        elif "updates" in given:
            raise ValueError("--updates needs --eval")
        else:
            fields = {field.name for field in dataclasses.fields(Config)} & given.keys()
            train(make_config(**{name: given.pop(name) for name in fields}), **given)
    except SystemExit as end:
        if end.code in (130, 143):
            print("\nesmeta: stopped; with --resume and the same flags a training goes on",
                  file=sys.stderr)
        return end.code or 0
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print("esmeta: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        SIGNALS.clear()
    return 0


if __name__ == "__main__":
    import esmeta  # jobs name functions of esmeta, not of __main__, to whoever unpickles them

    status = esmeta.main()
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: it was closed, so None
        sys.stdout.close()  # else what a full disk or a closed pipe refused is tried again at exit
    sys.exit(status)
