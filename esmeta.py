"""ESMeta: meta-RL with a distribution of exploration parameters learned by evolution strategies.

One file of NumPy for one paper, "Meta Reinforcement Learning with Distribution of Exploration
Parameters Learned by Evolution Strategies" (Shen, Yang, Yuan, Liu). The tasks are in tasks.py.

Symbols                                                   shape     made by
  mu, sigma   mean and std of P_actor and P_critic        (P,)      initial_state
  rho         correlation of eps between the K actors               Config.correlation
  eps         (theta - mu) / sigma ~ N(0, 1)              (K, P)    sample_noise
  theta       weights of the K exploring actors           (K, P)    evaluate_worker
  theta_bar   mean of the K actors                        (P,)      evaluate_worker
  phi         weights of the critic                       (P_c,)    evaluate_worker
  F           fitness of a worker                         (M,)      evaluate_worker
  u           utility of a worker: its fitness in ranks   (M,)      utilities
  M, K, H     workers, explorers of a worker, horizon in steps
  G, N, B     tasks of a worker, episodes side by side, steps taken as one batch

Algorithm 1                                                         function
  initialise P_actor(mu_a, sigma_a), P_critic(mu_c, sigma_c)        initial_state
  while not done                                                    train
    sample a mini-batch of tasks T_t                                sample_tasks
    for i in M                                                      Crew.map
      sample K actors theta_1 .. theta_K and a critic phi           evaluate_worker
      for each task t in T_t
        get K trajectories from the K actors                        rollout
        theta_bar = mean of theta_1 .. theta_K                      evaluate_worker
        train theta_bar and phi on the K trajectories               adapt
        sample the fitness of the adapted actor and critic          rollout, critic_error
    update mu and sigma of actor and critic by Eq. 10               update_distribution

By default it differs (README, "Numbered differences"; --paper is the letter): the K trajectories
are simulated once and scored for every task, each antithetic pair of workers has its own T_t, the
fitness tests theta_j + (adapted theta_bar - theta_bar) for each explorer j, and what an explorer
gets for itself moves mu_a too (own_ranks).
"""

import os

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # the processes have the cores; more threads round sums otherwise

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import io
import json
import math
import multiprocessing
import signal
import sys
import threading
import time
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tasks

# ---- configuration: every default with its provenance ---------------------------------------


def setting(default, source, text, low=None, high=None):
    """A configuration field: default, where that comes from, a line of help, a range."""
    return dataclasses.field(default=default, metadata={
        "source": source, "help": text, "low": low, "high": high})


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a bit of a run; TASK_SETTINGS and PAPER are other defaults."""

    task: str = setting("cheetah_vel", "paper", "one of " + ", ".join(tasks.TASKS))
    seed: int = setting(0, "ours", "of every random number", 0, 2**63 - 1)
    workers: int = setting(64, "paper", "M, workers an iteration", 2, 10**5)
    rollouts: int = setting(20, "paper", "K, explorers of a worker (paper: ant_dir 40)", 1, 10**4)
    sigma_actor: float = setting(0.03, "ours", "initial sigma of the actor", 1e-5, 1)
    sigma_critic: float = setting(0.03, "ours", "initial sigma of the critic", 1e-5, 1)
    correlation: float = setting(0.5, "ours", "rho of eps between a worker's K actors", 0, 0.99)
    obs_clip: float = setting(5.0, "ours", "bound of normalised observations; 0: raw ones", 0, 1e6)
    gamma: float = setting(0.97, "ours", "discount of the critic's targets", 0, 0.9999)
    n_step: int = setting(20, "ours", "rewards in a critic target; 1: textbook DDPG", 1, 10**4)
    centre: bool = setting(True, "ours", "subtract the trajectories' mean reward from rewards")
    cycles: int = setting(1, "ours", "(fit critic, step actor) on the same data", 1, 10**4)
    critic_updates: int = setting(12, "ours", "minibatches of the critic in a cycle", 1, 10**6)
    critic_batch: int = setting(256, "ours", "rows in a minibatch", 1, 10**6)
    critic_lr: float = setting(3e-3, "ours", "Adam rate of the critic", 0, 10)
    actor_batch: int = setting(512, "ours", "states that an actor step averages over", 1, 10**6)
    actor_rule: str = setting("sigma", "ours", "sigma: a step along sigma^2 grad; sgd: along grad")
    actor_step: float = setting(3.3, "ours", "length of the step in sigmas; rate of sgd", 0, 1e6)
    shrink: float = setting(0.5, "ours", "of the step, for each further update of --eval", 0, 1)
    target_tau: float = setting(1.0, "ours", "share the target networks move after a cycle", 0, 1)
    goals: int = setting(4, "ours", "|T_t|, tasks a worker adapts to in an iteration", 1, 1000)
    alive_bonus: float = setting(0.0, "ours", "a living step earns; in no reported return", 0, 100)
    risk: float = setting(0.0, "ours", "stds over its tasks that a worker's fitness loses", 0, 10)
    own_credit: float = setting(6.0, "ours", "weight of an explorer's own returns beside F", 0, 100)
    test_rollouts: int = setting(5, "ours", "fresh rollouts that score one adaptation", 1, 10**4)
    antithetic: bool = setting(True, "ours", "workers in pairs of eps and -eps on common seeds")
    utility: str = setting("rank", "ours", "rank: utilities in [-0.5, 0.5]; raw: the fitness")
    natural: bool = setting(True, "ours", "natural gradient of Eq. 10: steps in sigmas")
    lr_mu_actor: float = setting(5.0, "ours", "SGD rate of mu_a", 0, 1e6)
    lr_sigma_actor: float = setting(1.0, "ours", "SGD rate of sigma_a; 0: fixed sigma", 0, 1e6)
    lr_mu_critic: float = setting(1.0, "ours", "SGD rate of mu_c", 0, 1e6)
    lr_sigma_critic: float = setting(1.0, "ours", "SGD rate of sigma_c; 0: fixed sigma", 0, 1e6)
    half_life: float = setting(50.0, "ours", "iterations that halve mu's rates; 0: never", 0, 1e9)
    momentum: float = setting(0.0, "ours", "share of its last step in a step of mu_a", 0, 0.999)
    weight_decay: float = setting(0.0, "ours", "share of mu_a an iteration removes", 0, 1)


ANT = dict(lr_mu_actor=17.0, half_life=100.0, momentum=0.7, weight_decay=0.012)
TASK_SETTINGS = {  # (ours)
    "point_goal": dict(goals=2, test_rollouts=1, critic_updates=10, actor_step=1.5, own_credit=0.0,
                       lr_mu_actor=6.0, half_life=150.0),
    "cheetah_dir": dict(goals=2, risk=0.5, actor_step=5.0, test_rollouts=10),
    "ant_vel": dict(ANT, alive_bonus=2.0, test_rollouts=10),
    "ant_dir": dict(ANT, goals=2, risk=0.5, actor_step=8.0, test_rollouts=20),
}
# The paper's literal form. It names no rates: those of DDPG are Lillicrap's (2015; the actor's was
# Adam's), those of raw Eq. 10 are small because its gradient is 1 / sigma^2 times raw returns: at
# 1e-5, cheetah_vel's mean sigma triples and mu grows 300 times in the second iteration
PAPER = dict(correlation=0.0, obs_clip=0.0, gamma=0.99, n_step=1, centre=False, cycles=50,
             critic_updates=1, critic_batch=128, critic_lr=1e-3, actor_batch=128, actor_rule="sgd",
             actor_step=1e-4, target_tau=1e-3, shrink=1.0, goals=1, alive_bonus=0.0, risk=0.0,
             own_credit=0.0, test_rollouts=1, antithetic=False, utility="raw", natural=False,
             lr_mu_actor=1e-6, lr_sigma_actor=1e-7, lr_mu_critic=1e-6, lr_sigma_critic=1e-7,
             half_life=0.0, momentum=0.0, weight_decay=0.0)
ITERATIONS = dict(  # a run's default length (ours)
    cheetah_vel=100, cheetah_dir=100, ant_vel=100, ant_dir=200, point_goal=60)
EVAL_ROLLOUTS = 20  # that a return of the meta-test averages (MAML)


def make_config(task, paper=False, **explicit):
    """Config from defaults, the task's settings, the --paper preset, then explicit values."""
    k = tasks.find_task(task).rollouts  # 40 on ant_dir, whose training takes 20 otherwise (ours)
    return Config(task=task, **{**TASK_SETTINGS.get(task, {}),
                                **(dict(PAPER, rollouts=k) if paper else {}), **explicit})


def check_config(config):
    """The config, if every field is of its type and makes sense; else ValueError in one line."""
    for field in dataclasses.fields(config):
        value, kind, limits = getattr(config, field.name), type(field.default), field.metadata
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{field.name} must be a {kind.__name__}, not {value!r}")
        if limits["low"] is not None and not limits["low"] <= value <= limits["high"]:
            raise ValueError(f"{field.name} must be from {limits['low']:g} to {limits['high']:g}, "
                             f"not {value!r}")
    tasks.find_task(config.task)
    for name, choices in (("actor_rule", ("sigma", "sgd")), ("utility", ("rank", "raw"))):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}, not {getattr(config, name)!r}")
    if config.antithetic and config.workers % 2:
        raise ValueError(f"workers must be even, as antithetic pairs are, not {config.workers}")
    return config


INIT, NOISE, GOALS, DATA, STARTS, EVAL = range(6)  # kinds of work, of a generator's key


def generator(kind, seed, iteration, index):
    """The generator of one piece of work. Keys have one length: [1] and [1, 0] would collide."""
    return np.random.default_rng([kind, seed, iteration, index])


# ---- networks: one flat vector of weights each, layers are views into it --------------------


class Dims(NamedTuple):
    """Sizes of a task's networks: observation, action, both hidden layers."""

    obs: int
    act: int
    hidden: int = 100


def actor_shapes(dims):
    """Shapes of W1, W2, W3 in the order of theta; a bias, the weight of a constant 1, is last."""
    o, a, h = dims
    return (o + 1, h), (h + 1, h), (h + 1, a)


def critic_shapes(dims):
    """Shapes of W1, W2, W3 in phi, a bias last; the action joins at the second hidden layer."""
    o, a, h = dims
    return (o + 1, h), (h + a + 1, h), (h + 1, 1)


def actor_size(dims):
    """Number of weights P of the actor."""
    return sum(map(math.prod, actor_shapes(dims)))


def critic_size(dims):
    """Number of weights P_c of the critic."""
    return sum(map(math.prod, critic_shapes(dims)))


@functools.lru_cache(maxsize=None)
def slices(shapes):
    """Where each layer lies in a flat vector: (slice, shape) in order."""
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    return [(slice(end - math.prod(shape), end), shape) for end, shape in zip(ends, shapes)]


def unpack(flat, shapes):
    """Views of flat (.., P) as layers (.., *shape), in order."""
    return [flat[..., part].reshape(*flat.shape[:-1], *shape) for part, shape in slices(shapes)]


def xavier(shapes, rng):
    """Weights ~ U(-b, b), b = sqrt(6 / (fan_in + fan_out)); biases zero; flat, float64."""
    parts = []
    for shape in shapes:
        bound = math.sqrt(6 / (sum(shape) - 1))
        parts.append(rng.uniform(-bound, bound, shape))
        parts[-1][-1] = 0.0
    return np.concatenate([part.ravel() for part in parts])


@functools.lru_cache(maxsize=64)
def zeros(shape, dtype):
    """Read-only zeros: np.maximum of like arrays is 2 to 5 times as fast as with a number."""
    return np.broadcast_to(np.zeros(shape, dtype), shape)  # a view: nobody can write to it


def relu(z):
    """max(z, 0) in place."""
    return np.maximum(z, zeros(z.shape, z.dtype), out=z)


def with_one(x):
    """[x, 1], what the weights of a layer multiply: (.., n) -> (.., n + 1)."""
    return np.concatenate([x, np.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def hidden_layer(x, w, joins=0):
    """[relu(x W), 1, 1, ..]: (.., n + 1) -> (.., hidden + joins + 1)."""
    y = np.empty((*x.shape[:-1], w.shape[-1] + joins + 1), x.dtype)
    np.matmul(x, w, out=y[..., : w.shape[-1]])
    y[..., w.shape[-1] :] = 1
    return relu(y)


def actor_forward(theta, obs, dims):
    """The policy a = tanh(W3 relu(W2 relu(W1 s))), biases everywhere.

    theta (P,), obs (B, obs) -> action (B, act), cache; or K actors at once: theta (K, P),
    obs (K, B, obs) -> action (K, B, act), cache.
    """
    w1, w2, w3 = unpack(theta, actor_shapes(dims))
    x1 = with_one(obs)
    x2 = hidden_layer(x1, w1)
    x3 = hidden_layer(x2, w2)
    action = np.tanh(x3 @ w3)
    return action, (theta, dims, x1, x2, x3, action)


def actor_backward(d_action, cache):
    """Gradient of sum(d_action * action) in theta: d_action (B, act) -> d_theta (P,)."""
    theta, dims, x1, x2, x3, action = cache
    _, w2, w3 = unpack(theta, actor_shapes(dims))
    d_theta = np.empty_like(theta)
    d_w1, d_w2, d_w3 = unpack(d_theta, actor_shapes(dims))
    d_z3 = d_action * (1 - action * action)
    d_z2 = d_z3 @ w3[:-1].T
    d_z2 *= (x3 > 0)[:, :-1]
    d_z1 = d_z2 @ w2[:-1].T
    d_z1 *= (x2 > 0)[:, :-1]
    for d_w, x, d_z in (d_w1, x1, d_z1), (d_w2, x2, d_z2), (d_w3, x3, d_z3):
        np.matmul(x.T, d_z, out=d_w)
    return d_theta


def critic_forward(phi, obs, action, dims):
    """The value Q(s, a): phi (P_c,), obs (B, obs), action (B, act) -> q (B,), cache."""
    w1, w2, w3 = unpack(phi, critic_shapes(dims))
    x1 = with_one(obs)
    x2 = hidden_layer(x1, w1, dims.act)
    x2[:, dims.hidden : -1] = action
    x3 = hidden_layer(x2, w2)
    return (x3 @ w3)[:, 0], (phi, dims, x1, x2, x3)


def critic_layer2_gradient(d_q, cache):
    """Gradient of sum(d_q * q) at the second hidden layer before its ReLU: (B,) -> (B, hidden)."""
    phi, dims, _, _, x3 = cache
    w3 = phi[-1 - dims.hidden : -1]
    d_z2 = d_q[:, None] * w3
    d_z2 *= (x3 > 0)[:, :-1]
    return d_z2


def critic_backward(d_q, cache):
    """Gradients of sum(d_q * q): d_q (B,) -> d_phi (P_c,), d_action (B, act)."""
    phi, dims, x1, x2, x3 = cache
    _, w2, _ = unpack(phi, critic_shapes(dims))
    d_phi = np.empty_like(phi)
    d_w1, d_w2, d_w3 = unpack(d_phi, critic_shapes(dims))
    d_z2 = critic_layer2_gradient(d_q, cache)
    d_z1 = d_z2 @ w2[: dims.hidden].T
    d_z1 *= (x2 > 0)[:, : dims.hidden]
    for d_w, x, d_z in (d_w1, x1, d_z1), (d_w2, x2, d_z2), (d_w3, x3, d_q[:, None]):
        np.matmul(x.T, d_z, out=d_w)
    return d_phi, d_z2 @ w2[dims.hidden : -1].T


# ---- DDPG: adapt the mean actor and the critic to one task ----------------------------------


class Trajectories(NamedTuple):
    """N trajectories in lockstep, time first; what follows a termination is not valid."""

    obs: np.ndarray  # (H + 1, N, obs), normalised
    action: np.ndarray  # (H, N, act)
    reward: np.ndarray  # (H, N)
    terminated: np.ndarray  # (H, N): the task ended here; the horizon is no termination
    valid: np.ndarray  # (H, N)

    def returns(self):
        """Undiscounted return of each trajectory, (N,)."""
        return np.sum(self.reward, axis=0, where=self.valid, dtype=np.float64)

    def rows(self, x):
        """What x (H, N, ..) has at the B valid steps: (B, ..)."""
        # a mask that lets all pass costs ten times a copy
        return x.reshape(-1, *x.shape[2:]) if self.valid.all() else x[self.valid]

    def part(self, start, stop):
        """Trajectories start .. stop - 1 alone."""
        return Trajectories(*(array[:, start:stop] for array in self))


def nstep_targets(reward, terminated, value, gamma, n):
    """y_t = r_t + .. + gamma^(m-1) r_(t+m-1) + gamma^m V(s_(t+m)), m = min(n, H - t).

    The horizon bootstraps, a termination does not. reward, terminated (H, N), value (H + 1, N) of
    every state -> (H, N).
    """
    target = value.copy()
    discount = np.where(terminated, 0, gamma).astype(value.dtype)
    for _ in range(min(n, len(reward))):  # a Bellman backup along all trajectories
        target[:-1] = reward + discount * target[1:]
    return target[:-1]


def mean_reward(data, config):
    """What is subtracted from rewards: their mean over the valid rows where centred, else 0."""
    return data.rows(data.reward).mean() if config.centre else 0.0


def state_values(theta, phi, obs, dims):
    """V(s) = Q_phi(s, a_theta(s)): obs (.., obs) -> (..)."""
    rows, value = obs.reshape(-1, dims.obs), np.empty(obs.shape[:-1], obs.dtype)
    for start in range(0, len(rows), 512):  # as many rows as the caches hold
        part = rows[start : start + 512]
        action, _ = actor_forward(theta, part, dims)
        value.reshape(-1)[start : start + 512] = critic_forward(phi, part, action, dims)[0]
    return value


def critic_targets(value, data, centre, config):
    """The n-step targets (H, N) of data less a mean reward `centre`; value (H + 1, N) of states.

    Q then counts what exceeds the mean; so does the zero that follows a termination.
    """
    reward = data.reward - centre * (1 + data.terminated * (config.gamma / (1 - config.gamma)))
    return nstep_targets(
        reward.astype(value.dtype), data.terminated, value, config.gamma, config.n_step)


def critic_error(theta, phi, data, centre, config, dims):
    """Mean of (Q_phi(s, a) - y)^2 over the valid rows of data, y from theta and phi themselves."""
    value = state_values(theta, phi, data.obs, dims)
    target = data.rows(critic_targets(value, data, centre, config))
    q, _ = critic_forward(phi, data.rows(data.obs[:-1]), data.rows(data.action), dims)
    return float(np.mean((q - target) ** 2))


def adam_step(weights, gradient, m, v, t, lr, beta1=0.9, beta2=0.999, eps=1e-8):
    """weights -= lr m_hat / (sqrt(v_hat) + eps), the t-th step from t = 1: all (P,), in place."""
    bias1, bias2 = 1 - beta1**t, math.sqrt(1 - beta2**t)
    m += (1 - beta1) * (gradient - m)
    v += (1 - beta2) * (gradient**2 - v)
    weights -= (lr * bias2 / bias1) * m / (np.sqrt(v) + eps * bias2)


def fit_critic(phi, obs, action, target, rows, lr, dims, adam=None, done=0):
    """Descend the mean of (Q_phi(s, a) - y)^2, one Adam step for each minibatch; y stays fixed.

    phi (P_c,), obs (B, obs), action (B, act), target (B,), rows (updates, batch) -> phi' (P_c,).
    adam (2, P_c) holds the moments after `done` steps and moves on; without it, they start at 0.
    """
    phi = phi.copy()
    m, v = np.zeros((2, len(phi)), phi.dtype) if adam is None else adam
    batches = zip(*(np.take(x, rows, axis=0) for x in (obs, action, target)))
    for t, (s, a, y) in enumerate(batches, start=done + 1):
        q, cache = critic_forward(phi, s, a, dims)
        d_phi, _ = critic_backward((q - y) * phi.dtype.type(2 / len(y)), cache)
        adam_step(phi, d_phi, m, v, t, lr)
    return phi


def policy_gradient(theta, phi, obs, dims):
    """Eq. 3, the mean of grad_theta a_theta(s) grad_a Q_phi(s, a): obs (B, obs) -> (P,)."""
    action, actor_cache = actor_forward(theta, obs, dims)
    _, critic_cache = critic_forward(phi, obs, action, dims)
    d_q = np.full(len(obs), 1 / len(obs), obs.dtype)
    _, w2, _ = unpack(phi, critic_shapes(dims))
    w2_action = w2[dims.hidden : -1]  # (act, hidden); nothing below it depends on a
    return actor_backward(critic_layer2_gradient(d_q, critic_cache) @ w2_action.T, actor_cache)


def step_actor(theta, gradient, sigma, config):
    """theta + step sigma (sigma g) / |sigma g|, `step` sigmas along sigma^2 g; or theta + step g.

    theta, gradient, sigma (P,) -> (P,).
    """
    if config.actor_rule == "sgd":
        return theta + config.actor_step * gradient
    direction = sigma * gradient
    length = max(float(np.linalg.norm(direction)), 1e-30)
    return theta + sigma * direction * (config.actor_step / length)


def adapt(theta_bar, phi, data, sigma, config, dims, rng, value=None):
    """DDPG on K trajectories: `cycles` times fit the critic, step the actor, move the targets.

    theta_bar, sigma (P,), phi (P_c,), data (H, K) -> adapted theta (P,), phi (P_c,). `value`, the
    state_values (H + 1, K) of theta_bar and phi, serves all the tasks of a worker.
    """
    theta, target_theta, target_phi, tau = theta_bar, theta_bar, phi, config.target_tau
    obs, action = data.rows(data.obs[:-1]), data.rows(data.action)  # (B, obs), (B, act)
    centre, adam = mean_reward(data, config), np.zeros((2, len(phi)), phi.dtype)
    for cycle in range(config.cycles):
        if cycle or value is None:
            value = state_values(target_theta, target_phi, data.obs, dims)
        target = data.rows(critic_targets(value, data, centre, config))
        rows = rng.integers(len(obs), size=(config.critic_updates, config.critic_batch))
        phi = fit_critic(phi, obs, action, target, rows, config.critic_lr, dims, adam,
                         cycle * config.critic_updates)
        states = obs[rng.integers(len(obs), size=config.actor_batch)]
        theta = step_actor(theta, policy_gradient(theta, phi, states, dims), sigma, config)
        target_theta = (1 - tau) * target_theta + tau * theta
        target_phi = (1 - tau) * target_phi + tau * phi
    return theta, phi


# ---- NES: the gradient of the distribution --------------------------------------------------


def log_density(theta, mu, sigma):
    """log N(theta; mu, sigma^2) summed over weights: theta (.., P), mu, sigma (P,) -> (..)."""
    z = (theta - mu) / sigma
    return -np.sum(0.5 * z * z + np.log(sigma) + 0.5 * math.log(2 * math.pi), axis=-1)


def nes_gradient(theta, fitness, mu, sigma):
    """Eq. 10 to the letter: theta (M, K, P), fitness (M,), mu, sigma (P,) -> d_mu, d_sigma (P,).

    d_mu    = 1/M sum_i F_i sum_j (theta_ij - mu) / sigma^2
    d_sigma = 1/M sum_i F_i sum_j ((theta_ij - mu)^2 - sigma^2) / sigma^3
    """
    d = theta - mu  # (M, K, P)
    d_mu = np.mean(fitness[:, None] * np.sum(d / sigma**2, axis=1), axis=0)  # Eq. 10
    d_sigma = np.mean(fitness[:, None] * np.sum((d**2 - sigma**2) / sigma**3, axis=1), axis=0)
    return d_mu, d_sigma


def summed_gradient(eps_sum, eps_square, u_mu, u_sigma, sigma, k, rho=0.0):
    """Eq. 10 from sums over j, for K actors whose eps correlate by rho; equal to it at rho = 0.

    With eps_sum = sum_j eps_ij, eps_square = sum_j eps_ij^2 (M, P), c = 1 + (K - 1) rho:
    d_mu    = 1/M sum_i u_i eps_sum_i / (c sigma)
    d_sigma = 1/M sum_i u_i ((eps_square_i - rho / c eps_sum_i^2) / (1 - rho) - K) / sigma
    utilities (M,), sigma (P,) -> d_mu, d_sigma (P,).
    """
    m, c = len(eps_sum), 1 + (k - 1) * rho
    d_mu = u_mu @ eps_sum / (m * c * sigma)
    square = u_sigma @ eps_square - rho / c * (u_sigma @ eps_sum**2)
    return d_mu, (square / (1 - rho) - k * u_sigma.sum()) / (m * sigma)


def natural_gradient(d_mu, d_sigma, sigma, k, rho=0.0):
    """The inverse Fisher matrix times summed_gradient, for mu and for log sigma: all (P,).

    F_mu = K / ((1 + (K - 1) rho) sigma^2), F_(log sigma) = 2 K.
    """
    return d_mu * sigma**2 * ((1 + (k - 1) * rho) / k), d_sigma * sigma / (2 * k)


def ranks(values):
    """Ranks from 0 of values (n,); ties share their mean rank."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[inverse]


def centred_ranks(fitness):
    """Ranks of fitness (M,) scaled to [-0.5, 0.5]; ties share their mean, constants give 0."""
    return (ranks(fitness) - (len(fitness) - 1) / 2) / max(len(fitness) - 1, 1)


def pair_utilities(fitness):
    """+ and - the rank of their difference for neighbours (0, 1), (2, 3), ..: (M,) -> (M,).

    The better one gets +, the largest difference 0.5, equals 0.
    """
    difference = fitness[0::2] - fitness[1::2]
    half = np.sign(difference) * (ranks(np.abs(difference)) + 1) / (2 * len(difference))
    return np.stack([half, -half], axis=1).ravel()


def utilities(fitness, config):
    """Utilities for mu and for sigma, (M,) each, from the workers' fitness (M,).

    eps^2 is the same in both halves of an antithetic pair, so +u and -u cancel in sigma's
    gradient: there, pairs are compared by their means.
    """
    finite = np.isfinite(fitness)
    if not finite.all():  # a worker that broke ranks last
        fitness = np.where(finite, fitness, np.min(fitness, where=finite, initial=0) - 1)
    if config.utility == "raw":
        return fitness, fitness
    if not config.antithetic:
        return centred_ranks(fitness), centred_ranks(fitness)
    means = fitness.reshape(-1, 2).mean(axis=1)
    return pair_utilities(fitness), np.repeat(centred_ranks(means), 2)


def ascend(mu, sigma, eps_sum, eps_square, fitness, k, rho, lr_mu, lr_sigma, config):
    """mu and sigma (P,) one SGD step up Eq. 10 or its natural gradient.

    sigma stays in [1e-5, 1], and the natural step changes log sigma by at most 0.1.
    """
    u_mu, u_sigma = (u.astype(eps_sum.dtype) for u in utilities(fitness, config))
    d_mu, d_sigma = summed_gradient(eps_sum, eps_square, u_mu, u_sigma, sigma, k, rho)
    if config.natural:
        d_mu, d_log_sigma = natural_gradient(d_mu, d_sigma, sigma, k, rho)
        new_sigma = sigma * np.exp(np.clip(lr_sigma * d_log_sigma, -0.1, 0.1))
    else:
        new_sigma = sigma + lr_sigma * d_sigma
    return mu + lr_mu * d_mu, np.clip(new_sigma, 1e-5, 1.0)


def update_distribution(meta, results, config):
    """One step of mu and sigma of actor and critic: -> MetaState, |change of mu_a| / |mu_a|.

    mu_a also climbs what each explorer gets for itself, own_credit times as fast as F: along the
    natural gradient sigma / (M K) sum_i sum_j r_ij eps_ij, r_ij the own_ranks of worker i. Of both
    together: v = momentum v + (1 - momentum) step, mu_a = (1 - rate weight_decay) mu_a + v.
    """
    eps_own, eps_sum, eps_square, eps_critic = (
        np.stack(part) for part in zip(*(result.noise for result in results)))  # (M, P) each
    rate = 0.5 ** (meta.iteration / config.half_life) if config.half_life else 1.0
    mu_actor, sigma_actor = ascend(
        meta.mu_actor, meta.sigma_actor, eps_sum, eps_square,
        np.array([result.fitness_actor for result in results]), config.rollouts,
        config.correlation, rate * config.lr_mu_actor, config.lr_sigma_actor, config)
    own_step = rate * config.lr_mu_actor * config.own_credit / config.rollouts
    mu_actor = mu_actor + own_step * meta.sigma_actor * eps_own.mean(axis=0)
    velocity = (config.momentum * meta.velocity
                + (1 - config.momentum) * (mu_actor - meta.mu_actor))
    mu_actor = (1 - rate * config.weight_decay) * meta.mu_actor + velocity
    mu_critic, sigma_critic = ascend(
        meta.mu_critic, meta.sigma_critic, eps_critic, eps_critic**2,
        np.array([result.fitness_critic for result in results]), 1,
        0.0, rate * config.lr_mu_critic, config.lr_sigma_critic, config)
    ratio = np.linalg.norm(mu_actor - meta.mu_actor) / np.linalg.norm(meta.mu_actor)
    return meta._replace(mu_actor=mu_actor, sigma_actor=sigma_actor, mu_critic=mu_critic,
                         sigma_critic=sigma_critic, velocity=velocity), float(ratio)


# ---- worker: explore, adapt, score ----------------------------------------------------------


class MetaState(NamedTuple):
    """What a checkpoint holds: the two Gaussians, the observations' moments, the counters."""

    mu_actor: np.ndarray  # (P,)
    sigma_actor: np.ndarray  # (P,)
    mu_critic: np.ndarray  # (P_c,)
    sigma_critic: np.ndarray  # (P_c,)
    velocity: np.ndarray  # (P,), the running mean of mu_a's steps
    obs_count: float
    obs_mean: np.ndarray  # (obs,)
    obs_m2: np.ndarray  # (obs,), summed squared deviations from the mean
    iteration: int
    env_steps: int


class Job(NamedTuple):
    """A worker's part of an iteration; the worker draws its noise itself, from a seed."""

    config: Config
    meta: MetaState
    goals: np.ndarray  # (G, ..)
    worker: int

    def describe(self):
        """What to tell of a job that cannot be done."""
        return f"worker {self.worker} of iteration {self.meta.iteration}, seed {self.config.seed}"


class Result(NamedTuple):
    """What a worker sends back, means over its tasks."""

    fitness_actor: float  # of tests, bonus included, less risk times its std over the tasks
    fitness_critic: float  # minus the critic's squared error after adaptation
    return_before: float
    return_explorers: float
    return_after: float
    env_steps: int
    # sum_j r_j eps, sum_j eps, sum_j eps^2 (P,), eps of the critic (P_c,): to draw the noise again
    # costs the main process 3.7 ms a worker (cheetah, K = 20), to receive three such sums 0.6 ms
    noise: tuple
    moments: tuple  # count, mean and summed squared deviations of the explorers' observations


def task_dims(name):
    """Dims of a task's networks."""
    return Dims(tasks.TASKS[name].obs, tasks.TASKS[name].act)


def make_normaliser(meta, config):
    """The function (s, out) that writes clip((s - mean) / std, -c, c) to out, by meta's moments.

    Before there are any, or with c = 0, it copies.
    """
    if not config.obs_clip or not meta.obs_count:
        return lambda obs, out: np.copyto(out, obs, casting="same_kind")
    bound = np.full_like(meta.obs_mean, config.obs_clip)
    parts = meta.obs_mean, 1 / np.sqrt(meta.obs_m2 / meta.obs_count + 1e-8), -bound, bound

    @functools.lru_cache(maxsize=8)
    def tiled(n):  # NumPy computes with arrays of one shape about twice as fast
        return [np.tile(part, (n, 1)) for part in parts]

    def normalise(obs, out):
        mean, scale, low, high = tiled(len(obs))
        z = obs - mean
        z *= scale
        np.maximum(z, low, out=z)
        out[:] = np.minimum(z, high, out=z)

    return normalise


def moments(rows):
    """Count, mean and summed squared deviations of rows (n, obs)."""
    mean = rows.mean(axis=0)
    return len(rows), mean, np.sum((rows - mean) ** 2, axis=0)


def merge_moments(a, b):
    """Moments of two sets of rows together (Chan, Golub and LeVeque 1979)."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n, shift = n_a + n_b, mean_b - mean_a
    return n, mean_a + shift * (n_b / n), m2_a + m2_b + shift**2 * (n_a * n_b / n)


def make_policy(theta, envs, dims):
    """actor_forward for A actors theta (A, P) of `envs` environments each, laid out once:
    the function (obs (A * envs, obs), out (A * envs, act)) that writes the actions to out."""
    w1, w2, w3 = unpack(theta, actor_shapes(dims))
    w3 = w3.swapaxes(1, 2).copy().swapaxes(1, 2)  # few columns: each in one piece takes half
    x1, x2, x3 = (np.ones((len(theta), envs, w.shape[1]), theta.dtype) for w in (w1, w2, w3))
    s, z1, z2 = x1[..., :-1], x2[..., :-1], x3[..., :-1]

    def policy(obs, out):
        s[:] = obs.reshape(s.shape)
        np.matmul(x1, w1, out=z1)
        np.matmul(relu(x2), w2, out=z2)
        np.tanh(np.matmul(relu(x3), w3).reshape(out.shape), out=out)

    return policy


@functools.lru_cache(maxsize=8)
def lockstep(name, num_envs):
    """This process's own environments, made once; a robot that has fallen costs no more steps."""
    return tasks.make_vec(name, num_envs, freeze=tasks.TASKS[name].model is not None)


class Run(NamedTuple):
    """N episodes not yet scored: no dynamics depend on the goal, so all tasks share them."""

    obs: np.ndarray  # (H + 1, N, obs), normalised
    action: np.ndarray  # (H, N, act)
    raw: np.ndarray  # (H + 1, N, obs), float64
    velocity: np.ndarray  # (H, N), m/s
    broken: bool  # the simulation diverged somewhere

    def score(self, name, goal, bonus=0.0):
        """Trajectories under `goal` (N, ..) or (..), a living step worth `bonus` more.

        A broken simulation has a NaN return.
        """
        reward, terminated = tasks.outcomes(name, self.raw[1:], self.action, self.velocity, goal)
        valid = np.ones_like(terminated)
        valid[1:] = ~np.logical_or.accumulate(terminated)[:-1]
        reward = np.full_like(reward, np.nan) if self.broken else reward + bonus
        return Trajectories(self.obs, self.action, reward.astype(self.obs.dtype), terminated, valid)


def rollout(name, theta, starts, normalise):
    """Episodes of A actors theta (A, P) from N seeds `starts`, N / A in turn for each -> Run."""
    dims, horizon, n = task_dims(name), tasks.TASKS[name].horizon, len(starts)
    env, policy = lockstep(name, n), make_policy(theta, n // len(theta), dims)
    raw = np.empty((horizon + 1, n, dims.obs))
    obs = np.empty((horizon + 1, n, dims.obs), theta.dtype)
    action = np.zeros((horizon, n, dims.act), theta.dtype)
    velocity = np.zeros((horizon, n))
    goal = np.zeros((n, *tasks.TASKS[name].goal_shape))  # any: the dynamics see none
    raw[0], _ = env.reset(seed=[int(seed) for seed in starts], options={"goal": goal})
    normalise(raw[0], obs[0])
    for t in range(horizon):
        policy(obs[t], action[t])
        going = env.advance(action[t], raw[t + 1])
        normalise(raw[t + 1], obs[t + 1])
        velocity[t] = env.velocity()
        if not going:
            raw[t + 2 :], obs[t + 2 :] = raw[t + 1], obs[t + 1]
            break
    return Run(obs, action, raw, velocity, bool(env.unstable().any()))


def sample_noise(config, iteration, worker, dims):
    """A worker's eps (K, P) and eps_critic (P_c,), float32 ~ N(0, 1), rho between the K actors.

    The two workers of an antithetic pair have opposite noise.
    """
    stream, sign = (worker // 2, 1 - 2 * (worker % 2)) if config.antithetic else (worker, 1)
    rng = generator(NOISE, config.seed, iteration, stream)
    eps = rng.standard_normal((config.rollouts, actor_size(dims)), np.float32)
    eps_critic = rng.standard_normal(critic_size(dims), np.float32)
    if config.correlation:
        eps *= math.sqrt(1 - config.correlation)
        eps += math.sqrt(config.correlation) * rng.standard_normal(actor_size(dims), np.float32)
    return sign * eps, sign * eps_critic


def own_ranks(before, after):
    """Centred ranks r (K,) of a worker's explorers by their own returns, before and after a step.

    before (G, K) on each task; after (G, T), test t of task g is of explorer (g T + t) mod K
    and counts less the mean of its task's tests. A worker that broke has no say: zeros.
    """
    own = before.mean(axis=0)
    np.add.at(own, np.arange(after.size) % len(own), (after - after.mean(axis=1)[:, None]).ravel())
    return centred_ranks(own) if np.isfinite(own).all() else np.zeros(len(own))


@np.errstate(all="ignore")  # a worker that diverges ranks last and is counted, which says enough
def evaluate_worker(job):
    """The body of Algorithm 1's loop over workers, its tasks side by side: Job -> Result."""
    config, meta, goals, worker = job
    name, dims, k = config.task, task_dims(config.task), config.rollouts
    eps, eps_critic = sample_noise(config, meta.iteration, worker, dims)
    theta = meta.mu_actor + meta.sigma_actor * eps  # (K, P) ~ N(mu_a, sigma_a^2)
    phi = meta.mu_critic + meta.sigma_critic * eps_critic  # (P_c,) ~ N(mu_c, sigma_c^2)
    theta_bar = theta.mean(axis=0)  # (P,)
    normalise = make_normaliser(meta, config)
    stream = worker // 2 if config.antithetic else worker  # a pair has common random numbers
    starts = generator(STARTS, config.seed, meta.iteration, stream).integers(
        2**31, size=k + 1 + config.test_rollouts)
    run = rollout(name, np.vstack([theta, theta_bar]), starts[: k + 1], normalise)
    scored = [run.score(name, goal, config.alive_bonus) for goal in goals]
    datas = [data.part(0, k) for data in scored]
    value = state_values(theta_bar, phi, run.obs[:, :k], dims)
    adapted = [adapt(theta_bar, phi, data, meta.sigma_actor, config, dims,
                     generator(DATA, config.seed, meta.iteration, stream), value) for data in datas]
    n, actors = config.test_rollouts, np.stack([actor for actor, _ in adapted])  # (G, P)
    if config.own_credit:  # explorers in turn take the worker's step, instead of theta_bar
        explorers = theta[np.arange(len(goals) * n) % k]
        actors = explorers + np.repeat(actors - theta_bar, n, axis=0)  # (G n, P)
    tests = rollout(name, actors, np.tile(starts[k + 1 :], len(goals)), normalise).score(
        name, np.repeat(goals, n, axis=0), config.alive_bonus)
    tested = [tests.part(i, i + n) for i in range(0, len(goals) * n, n)]
    before = np.array([data.returns() for data in scored])  # (G, K + 1)
    after = np.array([test.returns() for test in tested])  # (G, n)
    paid_before, paid_after = (  # what of them is bonus
        config.alive_bonus * np.array([part.valid.sum(axis=0) for part in parts])
        for parts in (scored, tested))
    fitness = after.mean(axis=1)  # (G,)
    own = own_ranks(before[:, :k], after) if config.own_credit else np.zeros(k)
    seen = np.any([data.valid for data in scored], axis=0)  # (H, K + 1)
    return Result(
        fitness_actor=np.mean(fitness) - config.risk * np.std(fitness),
        fitness_critic=-np.mean([
            critic_error(*pair, test, mean_reward(data, config), config, dims)
            for pair, test, data in zip(adapted, tested, datas)]),
        return_before=np.mean((before - paid_before)[:, k]),
        return_explorers=np.mean((before - paid_before)[:, :k]),
        return_after=np.mean(after - paid_after),
        env_steps=int(seen.sum() + tests.valid.sum()),
        noise=(own.astype(eps.dtype) @ eps, eps.sum(axis=0), np.einsum("kp,kp->p", eps, eps),
               eps_critic),
        moments=moments(run.raw[:-1, :k][seen[:, :k]]))


# ---- training loop, checkpoints, meta-test --------------------------------------------------


def initial_state(config):
    """Xavier means, constant sigmas, no observation seen: Config -> MetaState, float32."""
    dims = task_dims(config.task)
    rng = generator(INIT, config.seed, 0, 0)
    mu_actor = xavier(actor_shapes(dims), rng).astype(np.float32)
    mu_critic = xavier(critic_shapes(dims), rng).astype(np.float32)
    return MetaState(mu_actor, np.full_like(mu_actor, config.sigma_actor),
                     mu_critic, np.full_like(mu_critic, config.sigma_critic),
                     np.zeros_like(mu_actor), 0.0, np.zeros(dims.obs), np.zeros(dims.obs), 0, 0)


def sample_tasks(config, iteration, stream):
    """T_t: the G goals (G, ..) of a pair of workers, or (stream 0) of all.

    Velocities: one uniform in each of G equal parts of the range. Directions: in turn, the first
    at random. Points: uniform.
    """
    rng, n = generator(GOALS, config.seed, iteration, stream), config.goals
    task = tasks.TASKS[config.task]
    if task.direction:
        return np.where((np.arange(n) + rng.integers(2)) % 2, task.goal_high, task.goal_low)
    if task.goal_shape:
        return tasks.sample_goals(config.task, rng, n)
    part = (np.arange(n) + rng.uniform(size=n)) / n
    return task.goal_low + (task.goal_high - task.goal_low) * part


def make_jobs(config, meta):
    """The M jobs of an iteration; each antithetic pair has its own tasks, else all share them."""
    meta = meta._replace(velocity=None)  # no worker needs it
    return [Job(config, meta, sample_tasks(
        config, meta.iteration, i // 2 if config.antithetic else 0), i)
        for i in range(config.workers)]


@contextlib.contextmanager
def signals_held():
    """SIGINT and SIGTERM wait for the end of the block: no half a worker, no half a file."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    came, handlers = [], {}
    # the mask is of this thread: what another one receives, Python would handle here at once
    if threading.current_thread() is threading.main_thread():
        for signum in signal.SIGINT, signal.SIGTERM:
            handlers[signum] = signal.signal(signum, lambda signum, _: came.append(signum))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in came:
            signal.raise_signal(signum)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Crew:
    """The processes that work: a Pool, here or on a Ray cluster, that outlives its workers' deaths.

    A bare Pool.map waits for ever for the job of a killed worker.
    """

    def __init__(self, processes, kind="local", address=None):
        self.processes, self.kind, self.address = processes, kind, address
        self.pool, self.members, self.others, self.lost_errors = None, [], [], ()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def children(self):
        """The processes that the local pool has started and that still run."""
        started = self.kind == "local"
        return [c for c in multiprocessing.active_children() if started and c not in self.others]

    def alive(self):
        """No process of the pool has died; Ray's are found out by their jobs."""
        return all(member.is_alive() for member in self.members)

    def open(self):
        """A pool with all its processes alive: the last one, or a new one."""
        if self.pool is not None and not self.alive():
            self.close()
        if self.pool is None and self.kind == "ray":
            self.pool, self.lost_errors = ray_pool(self.processes, self.address)
        elif self.pool is None:  # spawn: a fork would copy locks and threads of this process
            # workers never draw: else each starts a process that looks for glfw, and may outlive it
            os.environ.setdefault("MUJOCO_GL", "off")
            resource_tracker.ensure_running()  # its start would unblock the signals
            self.others = multiprocessing.active_children()  # of who imported this module
            with signals_held():  # workers inherit it: they hear no Ctrl-C
                self.pool = multiprocessing.get_context("spawn").Pool(
                    self.processes, signal.pthread_sigmask, (signal.SIG_UNBLOCK, {signal.SIGTERM}))
                self.members = self.children()
        return self.pool

    def close(self):
        """End the pool and all its processes, whatever state they are in."""
        if self.pool is None:
            return
        # terminate waits for ever for a lock that a killed worker held, hence a thread and kill
        ending = threading.Thread(target=self.pool.terminate, daemon=True)
        ending.start()
        ending.join(0.5)
        for child in self.children():
            child.kill()
            child.join(5)
        self.pool, self.members = None, []

    def map(self, function, jobs, progress=lambda count: None):
        """[function(job) for job in jobs]; jobs lost with their worker run again, one at a time.

        Raises RuntimeError where a job loses its worker three times.
        """
        results, losses, suspects = {}, Counter(), []
        while len(results) < len(jobs):
            pool = self.open()
            todo = suspects[:1] or [i for i in range(len(jobs)) if i not in results]
            pending = {i: pool.apply_async(function, (jobs[i],)) for i in todo}
            lost = False
            while pending and not lost:
                next(iter(pending.values())).wait(0.05)
                lost = not self.alive()
                for i in [i for i, handle in pending.items() if handle.ready()]:
                    try:
                        results[i] = pending[i].get()
                        del pending[i]
                    except self.lost_errors:
                        lost = True
                progress(len(results))
            suspects = [i for i in suspects if i not in results]
            if lost:
                self.close()
                suspects = suspects or list(pending)[: self.processes]  # what may have been running
                losses.update(list(pending) if len(todo) == 1 else suspects)
                for i in (i for i in losses if losses[i] == 3):
                    raise RuntimeError(f"a worker died three times on {jobs[i].describe()}")
        return [results[i] for i in range(len(jobs))]


def ray_pool(processes, address=None):
    """Ray's Pool, which has the same API, and the errors of its lost workers: -> Pool, (error,)."""
    import ray
    from ray.util.multiprocessing import Pool

    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        folder = {"working_dir": str(Path(__file__).parent),
                  "excludes": ["runs", ".venv", ".git", "results"]}
        ray.init(address=address, runtime_env=folder, log_to_driver=False,
                 num_cpus=None if address else processes)  # a running cluster takes none
    return Pool(processes), (ray.exceptions.RayActorError,)


LOG_COLUMNS = ("iteration", "return_before", "return_explorers", "return_after", "critic_error",
               "sigma_actor", "update_ratio", "env_steps", "seconds")


def iterate(config, meta, crew, progress=lambda count: None):
    """One turn of Algorithm 1's outer loop: -> MetaState, row of log.csv but for its `seconds`,
    number of failed workers.

    Raises RuntimeError where no worker has a finite fitness.
    """
    results = crew.map(evaluate_worker, make_jobs(config, meta), progress)
    fine = [r for r in results if math.isfinite(r.fitness_actor + r.fitness_critic)]
    if not fine:
        raise RuntimeError(f"iteration {meta.iteration}: no worker has a finite fitness")
    new, ratio = update_distribution(meta, results, config)
    seen = functools.reduce(merge_moments, (r.moments for r in fine),
                            (meta.obs_count, meta.obs_mean, meta.obs_m2))
    steps = meta.env_steps + sum(r.env_steps for r in results)
    before, explorers, after, critic = np.mean(
        [(r.return_before, r.return_explorers, r.return_after, r.fitness_critic) for r in fine], 0)
    row = dict(zip(LOG_COLUMNS, (meta.iteration, before, explorers, after, -critic,
                                 float(new.sigma_actor.mean()), ratio, steps)))
    new = new._replace(obs_count=float(seen[0]), obs_mean=seen[1], obs_m2=seen[2],
                       iteration=meta.iteration + 1, env_steps=steps)
    return new, row, len(results) - len(fine)


def train(config, iterations=None, processes=None, out=None, resume=False, pool="local",
          ray_address=None):
    """Algorithm 1 up to `iterations` in all, each a row of log.csv and a checkpoint: -> MetaState.

    `out` is the run directory, by default runs/<task>-seed<N>. Of the arguments after config only
    `iterations` changes the result. Raises ValueError for what cannot be, RuntimeError for a run
    that cannot go on; the checkpoint of the last whole iteration stays.
    """
    config = check_config(config)
    iterations = ITERATIONS[config.task] if iterations is None else iterations
    processes = os.cpu_count() if processes is None else processes
    if iterations < 0 or processes < 1 or pool not in ("local", "ray"):
        raise ValueError("iterations must be >= 0, processes >= 1, pool local or ray, not "
                         f"{iterations}, {processes}, {pool!r}")
    if ray_address is not None and pool != "ray":
        raise ValueError("--ray-address needs --pool ray")
    if pool == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--pool ray needs ray: pip install ray")
    out = Path(out or f"runs/{config.task}-seed{config.seed}")
    with run_directory(out, resume), Crew(processes, pool, ray_address) as crew:
        meta = open_run(out, config, resume)
        first, start = meta.iteration, time.monotonic()
        while meta.iteration < iterations:
            begin = time.monotonic()
            meta, row, failed = iterate(config, meta, crew, progress_bar(config.workers))
            row["seconds"] = time.monotonic() - begin
            with open(out / "log.csv", "a") as log:  # a resume drops rows after the checkpoint's
                log.write(csv_line(row.values()))
            save_checkpoint(out / "checkpoint.npz", config, meta)
            pace = (time.monotonic() - start) / (meta.iteration - first)
            print(status_line(row, iterations, failed, pace * (iterations - meta.iteration)),
                  flush=True)
    return meta


@contextlib.contextmanager
def run_directory(out, resume):
    """Hold the run directory for this process alone; ValueError where it cannot be used."""
    if resume and not out.is_dir():
        raise ValueError(f"no run to resume in {out}")
    if not resume and (out / "checkpoint.npz").exists():
        raise ValueError(f"{out} holds a run: --resume continues it, --out names another place")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a directory")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:  # the kernel lets go of it however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {out}") from None
        yield


def open_run(out, config, resume):
    """The state to go on from, the checkpoint's or the first, with log.csv cut to it."""
    if resume and (out / "checkpoint.npz").exists():
        stored, meta = load_checkpoint(out)
        for name, value in dataclasses.asdict(config).items():
            if getattr(stored, name) != value:
                raise ValueError(f"{out} was trained with {name} {getattr(stored, name)!r}, "
                                 f"not {value!r}")
        rows = (out / "log.csv").read_text().splitlines(keepends=True)[1 : meta.iteration + 1]
    else:
        meta, rows = initial_state(config), []
    replace_file(out / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
    replace_file(out / "log.csv", "".join([csv_line(LOG_COLUMNS), *rows]).encode())
    save_checkpoint(out / "checkpoint.npz", config, meta)
    return meta


def csv_line(values):
    """One line of a CSV file; floats with 6 significant digits."""
    return ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values) + "\n"


def replace_file(path, content):
    """Write bytes to path in one step: whatever happens, it holds the old ones or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only where an error or a signal came


def save_checkpoint(path, config, meta):
    """Replace the checkpoint at path: the arrays of meta and one JSON string, no clock."""
    packages = {p.__name__: p.__version__ for p in (np, tasks.mujoco, tasks.gymnasium)}
    stored = {"version": 2, "config": dataclasses.asdict(config), "packages": packages}
    content = io.BytesIO()
    with signals_held():  # an exception in savez leaves an archive that cannot be closed
        np.savez(content, config=json.dumps(stored, sort_keys=True), **meta._asdict())
        replace_file(path, content.getvalue())


def load_checkpoint(path):
    """Config and MetaState of a checkpoint, or of the run directory that holds one.

    Raises ValueError, in one line, for anything but a whole checkpoint of this version.
    """
    path = Path(path) / "checkpoint.npz" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = json.loads(str(archive["config"]))
            meta = MetaState(**{name: archive[name] for name in MetaState._fields})
        if stored["version"] != 2:
            raise ValueError(f"version {stored['version']}, not 2")
        config = check_config(Config(**stored["config"]))
        for name, like in initial_state(config)._asdict().items():
            value, like = getattr(meta, name), np.asarray(like)
            if (value.shape, value.dtype) != (like.shape, like.dtype):
                raise ValueError(f"{name} is {value.dtype} {value.shape}")
            low = -np.inf if name in ("mu_actor", "mu_critic", "velocity", "obs_mean") else 0
            low = 1e-6 if name.startswith("sigma") else low
            if not (np.isfinite(value) & (value >= low)).all():
                raise ValueError(f"{name} holds a number that no run writes")
    except Exception as error:  # zipfile, zlib, numpy and json have many for broken bytes
        raise ValueError(f"{path} is no checkpoint of esmeta: {error!s:.200}") from None
    return config, meta._replace(obs_count=float(meta.obs_count), iteration=int(meta.iteration),
                                 env_steps=int(meta.env_steps))


class EvalJob(NamedTuple):
    """One goal of the meta-test."""

    config: Config
    meta: MetaState
    goal: np.ndarray
    index: int
    updates: int
    seed: int

    def describe(self):
        """What to tell of a job that cannot be done."""
        return f"goal {self.index} of the meta-test, seed {self.seed}"


def adaptations(job):
    """The actor (P,) before and after each of the job's updates: a generator.

    An update runs K fresh explorers around the current actor and adapts their mean.
    """
    config, meta, goal, index, updates, seed = job
    name, dims, normalise = config.task, task_dims(config.task), make_normaliser(meta, config)
    # explorers spread as in training around their own mean, which stays near the current actor
    spread = meta.sigma_actor * math.sqrt(1 - config.correlation)
    actor, phi = meta.mu_actor, meta.mu_critic
    yield actor
    for update in range(updates):
        rng = generator(EVAL, seed, index + 1, update + 1)
        theta = actor + spread * rng.standard_normal((config.rollouts, len(actor)), np.float32)
        starts = rng.integers(2**31, size=config.rollouts)
        data = rollout(name, theta, starts, normalise).score(name, goal, config.alive_bonus)
        step = config.actor_step * config.shrink**update
        actor, phi = adapt(theta.mean(axis=0), phi, data, meta.sigma_actor,
                           dataclasses.replace(config, actor_step=step), dims, rng)
        yield actor


def evaluate_goal(job):
    """Returns before and after each of U updates, EVAL_ROLLOUTS episodes each: EvalJob -> (U + 1,).

    The episodes start alike for all goals and updates.
    """
    name, normalise = job.config.task, make_normaliser(job.meta, job.config)
    starts = generator(EVAL, job.seed, 0, 0).integers(2**31, size=EVAL_ROLLOUTS)
    return np.array([
        rollout(name, actor[None], starts, normalise).score(name, job.goal).returns().mean()
        for actor in adaptations(job)])


def meta_test(checkpoint, goals=None, updates=1, seed=0, processes=1, rollouts=None):
    """MAML's protocol: returns (updates + 1, n) on goals (n, ..), by default the 40 test goals.

    checkpoint is a file or a run directory. Each update has K = `rollouts` explorers, by default as
    many as MAML had. Raises ValueError where there is no checkpoint or K < 1.
    """
    config, meta = load_checkpoint(checkpoint)
    rollouts = tasks.TASKS[config.task].rollouts if rollouts is None else rollouts
    config = check_config(dataclasses.replace(config, rollouts=rollouts))
    goals = tasks.test_goals(config.task) if goals is None else np.asarray(goals, float)
    jobs = [EvalJob(config, meta, goal, i, updates, seed) for i, goal in enumerate(goals)]
    if processes == 1:  # here: a script that calls this need not guard against being spawned
        return np.array([evaluate_goal(job) for job in jobs]).T
    with Crew(processes) as crew:
        return np.array(crew.map(evaluate_goal, jobs, progress_bar(len(jobs)))).T


# ---- command line ---------------------------------------------------------------------------


def progress_bar(total):
    """The function of a count that draws a bar of finished workers, on a terminal only."""
    def show(count):
        if sys.stdout.isatty():
            filled = 40 * count // total
            line = f"[{'#' * filled}{'.' * (40 - filled)}] {count}/{total}"
            print("\r" + (line if count < total else " " * len(line) + "\r"), end="", flush=True)

    return show


def status_line(row, iterations, failed, left):
    """An iteration in one line of at most 100 columns."""
    _, before, explorers, after, critic, sigma, ratio, steps, seconds = row.values()
    return (f"{row['iteration'] + 1}/{iterations} " + f"failed {failed} " * bool(failed)
            + f"returns {before:.4g} {explorers:.4g} {after:.4g} critic {critic:.3g}"
            f" sigma {sigma:.3g} ratio {ratio:.2g} {steps / 1e6:.4g}M {seconds:.3g}s left "
            f"{int(left // 3600)}:{int(left // 60 % 60):02d}")[:100]


def interval(values):
    """Mean of values (n,) and half its 95 % interval, 1.96 std / sqrt(n)."""
    return np.mean(values), 1.96 * np.std(values) / math.sqrt(len(values))


def report_eval(path, updates, processes, rollouts=None):
    """Meta-test a checkpoint, print the table, write eval.csv (eval-K<rollouts>.csv) beside it."""
    config, _ = load_checkpoint(path)
    goals = tasks.test_goals(config.task)
    returns = meta_test(path, goals, updates, 0, processes, rollouts)
    head = "".join(f"{'after ' + str(u) if u else 'before':>18}" for u in range(updates + 1))
    print(f"{config.task:<18}{head}")
    for goal, values in sorted(zip(goals.tolist(), returns.T.tolist())):
        print(f"goal {np.array2string(np.array(goal), precision=2):<13}"
              + "".join(f"{value:18.1f}" for value in values))
    groups = [("mean", np.ones(len(goals), bool))]
    if tasks.TASKS[config.task].direction:
        groups += [("forward", goals > 0), ("backward", goals < 0)]
    for label, chosen in groups:
        cells = "".join(f"{m:10.1f} +- {ci:4.1f}" for m, ci in map(interval, returns[:, chosen]))
        print(f"{label:<18}{cells}")
    maml = Path(__file__).parent / "results" / "maml.csv"
    if maml.exists():
        table = [line.split(",") for line in maml.read_text().splitlines()]
        row = {line[2]: line for line in table if line[:2] == [config.task, "maml"]}
        if row:
            print(f"{'MAML':<18}" + "".join(
                f"{float(row[str(u)][3]):10.1f} +- {float(row[str(u)][4]):4.1f}"
                for u in range(updates + 1) if str(u) in row))
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    lines = [csv_line(("task", "goal", "updates", "return"))] + [
        csv_line((config.task, " ".join(f"{x:.6g}" for x in np.ravel(goal)), u, float(value)))
        for u, values in enumerate(returns) for goal, value in zip(goals, values)]
    name = f"eval-K{rollouts}.csv" if rollouts else "eval.csv"
    replace_file(folder / name, "".join(lines).encode())


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line, raised as ValueError."""

    def error(self, message):
        """Raise ValueError instead of printing the usage."""
        raise ValueError(message)


def boolean(word):
    """True or False of "true" or "false"."""
    return ("false", "true").index(word.lower()) == 1  # ValueError for other words


def make_parser():
    """The command line: a flag for every field of Config, generated from it, and a few more."""
    parser = OneLineParser("esmeta.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--iterations", type=int,
                        help="in all, also after --resume (default: the task's)")
    parser.add_argument("--processes", type=int, help="worker processes (default: the cores)")
    parser.add_argument("--out", help="run directory (default runs/<task>-seed<N>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--paper", action="store_true", help="the paper's literal choices")
    parser.add_argument("--eval", metavar="PATH", help="meta-test a checkpoint or run directory; "
                        "--rollouts: with another K than MAML's")
    parser.add_argument("--updates", type=int, default=1, help="adaptations in --eval (default 1)")
    parser.add_argument("--pool", choices=("local", "ray"), default="local",
                        help="of workers (default local)")
    parser.add_argument("--ray-address", help="default: RAY_ADDRESS, or local")
    for field in dataclasses.fields(Config):
        kind = type(field.default)
        own = [f"{t} {s[field.name]}" for t, s in TASK_SETTINGS.items() if field.name in s]
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=None,
            type=boolean if kind is bool else kind,
            help=f"{field.metadata['help']} (default {'; '.join([str(field.default), *own])}) "
                 f"({field.metadata['source']})")
    return parser


def stop(signum, _):
    """Signal handler: leave by an exception, so that every `with` cleans up."""
    raise SystemExit(128 + signum)


def run(argv):
    """Do what the command line says; ValueError for what it should not say."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    explicit = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config)
                if field.name in given}
    processes = os.cpu_count() if args.processes is None else args.processes
    if not 1 <= processes <= 4096 or not 0 <= args.updates <= 10_000 or args.out == "":
        raise ValueError("--processes must be from 1 to 4096, --updates from 0 to 10000, --out a "
                         f"directory, not {processes}, {args.updates}, {args.out!r}")
    if args.eval is not None:
        if wrong := given - {"eval", "updates", "rollouts", "processes"}:
            raise ValueError(f"--eval takes no --{min(wrong).replace('_', '-')}")
        return report_eval(args.eval, args.updates, processes, args.rollouts)
    if "updates" in given:
        raise ValueError("--updates needs --eval")
    task = explicit.pop("task", Config.task)
    config = check_config(make_config(task, args.paper, **explicit))
    train(config, args.iterations, processes, args.out, args.resume, args.pool, args.ray_address)


def main(argv=None):
    """The program: -> exit status 0; 2 bad input; 1 disk or run failed; 130, 143 interrupted."""
    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(argv)
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
    return 0


if __name__ == "__main__":
    import esmeta  # jobs name functions of esmeta, not of __main__, to whoever unpickles them

    sys.exit(esmeta.main())
