"""Tests in the paper's order: networks, Eq. 3 to Eq. 10, Algorithm 1; the tasks; the system; Ray.

A test is worth what it catches: each group was tried on deliberately wrong versions of the code.
"""
import ast
import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import unittest.mock
import warnings
from pathlib import Path

import esmeta  # before numpy: it pins BLAS to one thread, so this process has a worker's bits

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from hypothesis import assume, given, settings, strategies as st

import tasks
from esmeta import Dims

SEED = st.integers(0, 2**32 - 1)
DIMS = Dims(obs=3, act=2, hidden=4)
SMALL = st.builds(Dims, st.integers(1, 4), st.integers(1, 3), st.integers(2, 4))
settings.register_profile("untimed", deadline=None, derandomize=True)  # for a busy machine
settings.load_profile("untimed")
quick = settings(max_examples=15)
small_config = functools.partial(  # small, and the same when a default changes
    esmeta.Config, task="point_goal", workers=3, goals=2, tests=2, rollouts=4, gamma=0.9, n_step=3,
    cycles=1, critic_updates=3, batch=5, critic_lr=0.05, actor_step=0.5, alive_bonus=0.0,
    half_life=0.0, momentum=0.0, weight_decay=0.0)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Relative paths are in it; MuJoCo's MUJOCO_LOG.TXT lands there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide what is never flushed


def make_meta(config):
    """A state as after three iterations: uneven sigmas, and actors under which some ants fall."""
    meta, rng = esmeta.initial_state(config), np.random.default_rng(9)
    actor, critic = (rng.uniform(0.01, 0.09, len(mu)).astype(np.float32) for mu in (
        meta.mu_actor, meta.mu_critic))
    sums = np.full_like(meta.obs_sums, [[10.0], [1.0], [40.1]])  # mean 0.1, variance 4
    return meta._replace(mu_actor=3 * meta.mu_actor, sigma_actor=actor, sigma_critic=critic,
                         obs_sums=sums, iteration=3, env_steps=70)


def make_nets(dims, seed, rows=4, dtype=np.float64):
    """theta, phi (biases not zero), obs (rows, obs), action (rows, act) of random numbers."""
    rng = np.random.default_rng(seed)
    theta, phi = (x + 0.1 * rng.standard_normal(x.shape) for x in (
        esmeta.xavier(shapes(dims), rng) for shapes in (esmeta.actor_shapes, esmeta.critic_shapes)))
    obs, action = rng.standard_normal((rows, dims.obs)), rng.uniform(-1, 1, (rows, dims.act))
    return tuple(x.astype(dtype) for x in (theta, phi, obs, action))


def make_data(dims, seed, ends=0.15, dtype=np.float64, horizon=6, n=3):
    """Trajectories of random numbers; a step terminates with probability `ends`."""
    rng = np.random.default_rng([seed, 1])
    obs, action, reward = (rng.normal(mean, 1, size).astype(dtype) for mean, size in (
        (0, (horizon + 1, n, dims.obs)), (0, (horizon, n, dims.act)), (2, (horizon, n))))
    terminated = rng.random((horizon, n)) < ends
    valid = np.ones_like(terminated)
    valid[1:] = ~np.logical_or.accumulate(terminated)[:-1]
    raw = np.nan * obs  # which no formula looks at
    return esmeta.Trajectories(obs, raw, action, reward, terminated, valid)


def close(a, b, tolerance=1e-7):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def numeric_gradient(f, x):
    """Central differences of f, which returns a value and its ReLU pattern, along x's axes."""
    changes = []
    for step in 1e-6 * np.eye(x.size).reshape(-1, *x.shape):
        (above, pattern), (below, other) = f(x + step), f(x - step)
        if not np.array_equal(pattern, other):
            assume(False)  # a kink lies between
        changes.append((above - below) / 2e-6)
    return np.reshape(changes, x.shape)


# ---- networks ------------------------------------------------------------------------------------


def split(flat, *shapes):
    cuts = np.cumsum([math.prod(shape) for shape in shapes])
    assert cuts[-1] == len(flat)
    return [part.reshape(shape) for part, shape in zip(np.split(flat, cuts), shapes)]


def plain_actor(theta, obs, dims):
    """The actor written down a second time: action (B, act), ReLU pattern."""
    o, a, h = dims
    w1, b1, w2, b2, w3, b3 = split(theta, (o, h), (h,), (h, h), (h,), (h, a), (a,))
    z1 = obs @ w1 + b1
    z2 = np.where(z1 > 0, z1, 0) @ w2 + b2
    return np.tanh(np.where(z2 > 0, z2, 0) @ w3 + b3), np.hstack([z1, z2]) > 0


def plain_critic(phi, obs, action, dims):
    """The critic a second time, v2 joins the action at layer 2: q (B,), ReLU pattern."""
    o, a, h = dims
    w1, b1, w2, v2, b2, w3, b3 = split(phi, (o, h), (h,), (h, h), (a, h), (h,), (h,), (1,))
    z1 = obs @ w1 + b1
    z2 = np.where(z1 > 0, z1, 0) @ w2 + action @ v2 + b2
    return np.where(z2 > 0, z2, 0) @ w3 + b3[0], np.hstack([z1, z2]) > 0


@quick
@given(SMALL, SEED)
def test_forwards_and_backwards(dims, seed):
    theta, phi, obs, action = make_nets(dims, seed)
    d_action, d_q = np.random.default_rng([seed, 1]).standard_normal((2, *action.shape))

    def actor_score(theta):
        out, pattern = plain_actor(theta, obs, dims)
        return np.sum(d_action * out), pattern

    def critic_score(phi, action):
        q, pattern = plain_critic(phi, obs, action, dims)
        return d_q[:, 0] @ q, pattern

    out, cache = esmeta.actor_forward(theta, obs, dims)
    close(out, plain_actor(theta, obs, dims)[0], 1e-12)
    close(esmeta.actor_backward(d_action, cache), numeric_gradient(actor_score, theta))
    many, _ = esmeta.actor_forward(np.stack([theta, -theta]), np.stack([obs, 2 * obs]), dims)
    close(many, [out, plain_actor(-theta, 2 * obs, dims)[0]], 1e-12)
    q, cache = esmeta.critic_forward(phi, obs, action, dims)
    close(q, plain_critic(phi, obs, action, dims)[0], 1e-12)
    d_phi, d_a = esmeta.critic_backward(d_q[:, 0], cache)
    close(d_phi, numeric_gradient(lambda x: critic_score(x, action), phi))
    close(d_a, numeric_gradient(lambda x: critic_score(phi, x), action))


def test_sizes_xavier_weights_zero_biases_and_the_first_sigma():
    meta = esmeta.initial_state(small_config(task="cheetah_vel", sigma=0.25, seed=1))
    assert {*meta.sigma_actor, *meta.sigma_critic} == {0.25} and not meta.velocity.any()
    rng = np.random.default_rng([0, 1, 0, 0])  # one after the other, on which stored runs count
    o, a, h = dims = Dims(200, 150, 250)
    for own_shapes, mu, shapes in (
            (esmeta.actor_shapes, meta.mu_actor, ((o, h), (h,), (h, h), (h,), (h, a), (a,))),
            (esmeta.critic_shapes, meta.mu_critic, ((o, h), (h,), (h + a, h), (h,), (h, 1), (1,)))):
        assert_same_bits([mu], [esmeta.xavier(own_shapes(Dims(20, 6, 100)), rng).astype("f4")])
        layers = split(esmeta.xavier(own_shapes(dims), np.random.default_rng(0)), *shapes)
        for weights, bias in zip(layers[::2], layers[1::2]):
            bound = math.sqrt(6 / sum(weights.shape))
            assert 1 - 20 / weights.size < np.abs(weights).max() / bound <= 1 and not bias.any()
            assert abs(weights.mean()) < 5 * bound / math.sqrt(3 * weights.size)
            assert abs(np.abs(weights).mean() / bound - 0.5) < 5 / math.sqrt(12 * weights.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("paper", [False, True])
def test_formulas_keep_the_dtype_and_their_arguments(dtype, paper):
    config, (theta, phi, *_) = small_config(cycles=2, paper=paper), make_nets(DIMS, 0, dtype=dtype)
    data, sigma = make_data(DIMS, 0, dtype=dtype), np.full_like(theta, 0.1)
    explorers, F = theta + sigma * np.eye(4, len(theta), dtype=dtype), np.arange(4, dtype=dtype)
    for array in (given := [*data, theta, phi, sigma, F, explorers]):
        array.setflags(write=False)
    value = esmeta.state_values(theta, phi, data.obs, DIMS)
    y = esmeta.nstep_targets(data, value, config)
    adapted = esmeta.adapt(theta, phi, data, sigma, config, DIMS, np.random.default_rng(0))
    gradient = esmeta.nes_gradient(explorers, F, theta, sigma)
    for array in (value, y, *adapted, *gradient,
                  *esmeta.ascend(*gradient, sigma, 4, 0.1, 0.1, config)):
        assert array.dtype == dtype
        assert not any(np.may_share_memory(array, other) for other in given)


# ---- Eq. 3 and DDPG: the inner loop --------------------------------------------------------------


@quick
@given(SMALL, SEED)
def test_policy_gradient_is_that_of_the_mean_q(dims, seed):  # Eq. 3
    theta, phi, obs, _ = make_nets(dims, seed)

    def mean_q(theta):
        action, pattern = plain_actor(theta, obs, dims)
        q, other = plain_critic(phi, obs, action, dims)
        return q.mean(), np.hstack([pattern, other])

    close(esmeta.policy_gradient(theta, phi, obs, dims), numeric_gradient(mean_q, theta))


def test_adam_equals_the_published_algorithm():
    rng, m, v, moments = np.random.default_rng(0), 0, 0, np.zeros((2, 6))
    weights = expected = rng.standard_normal(6)
    gradients = rng.standard_normal((9, 6)) * 10.0 ** np.arange(-9, 3, 2)  # its eps counts or not
    for t, g in enumerate(gradients, start=1):
        weights, moments = esmeta.adam_step(weights, g, moments, t, 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        close(weights, expected, 1e-12)


@quick
@given(SEED)
def test_fit_critic_descends_the_squared_error(seed):
    _, phi, obs, action = make_nets(DIMS, seed, rows=9)
    rng = np.random.default_rng(seed)
    y, rows, expected = rng.standard_normal(9), rng.integers(9, size=(2, 5)), phi

    def loss(x, batch):
        q, pattern = plain_critic(x, obs[batch], action[batch], DIMS)
        return np.mean((q - y[batch]) ** 2), pattern

    for t, batch in enumerate(rows, start=4):
        slope = numeric_gradient(functools.partial(loss, batch=batch), expected)
        expected = expected - 0.01 * t * slope
    with unittest.mock.patch.object(  # Adam would hide the gradient's scale
            esmeta, "adam_step", lambda x, gradient, m, t, lr: (x - lr * t * gradient, m + 1)):
        fitted, moments = esmeta.fit_critic(phi, obs, action, y, rows, 0.01, DIMS, 5, taken=3)
    close(fitted, expected)
    assert moments == 7


@pytest.mark.parametrize("paper", [False, True])
def test_three_cycles_of_adapt_by_hand(paper):
    """Ours: the next targets are of the new networks; a step is 0.5 sigmas long, along sigma^2 g.

    The paper's: Adam, and targets that follow slowly. The shared `value` changes nothing.
    """
    config, rng = small_config(cycles=3, paper=paper), np.random.default_rng(2)
    theta, phi, _, _ = old = make_nets(DIMS, 0)
    data, sigma = make_data(DIMS, 3, 0.1), np.random.default_rng(1).uniform(0.1, 0.3, len(theta))
    obs, action = data.obs[:-1][data.valid], data.action[data.valid]
    adam_critic, adam = np.zeros((2, len(phi))), np.zeros((2, len(theta)))
    if not paper:
        phi = np.append(phi[:-1], data.reward[data.valid].mean() / (1 - 0.9))
    slow = theta, phi
    for cycle in range(3):
        y = esmeta.nstep_targets(data, esmeta.state_values(*slow, data.obs, DIMS), config)
        phi, adam_critic = esmeta.fit_critic(phi, obs, action, y[data.valid], rng.integers(
            len(obs), size=(3, 5)), 0.05, DIMS, adam_critic, 3 * cycle)
        g = esmeta.policy_gradient(theta, phi, obs[rng.integers(len(obs), size=5)], DIMS)
        if paper:
            theta, adam = esmeta.adam_step(theta, -g, adam, cycle + 1, 0.5)
            slow = tuple(0.999 * x + 0.001 * new for x, new in zip(slow, (theta, phi)))
        else:
            theta = theta + 0.5 * sigma**2 * g / np.linalg.norm(sigma * g)
            slow = theta, phi
    for value in None, esmeta.state_values(*old[:2], data.obs, DIMS):
        adapted = esmeta.adapt(*old[:2], data, sigma, config, DIMS, np.random.default_rng(2), value)
        for part, expected in zip(adapted, (theta, phi)):
            close(part, expected, 1e-10)


def test_a_critic_without_slope_moves_no_actor():
    theta, phi, _, _ = make_nets(DIMS, 0)
    actor, _ = esmeta.adapt(theta, 0 * phi, make_data(DIMS, 0), np.full_like(theta, 0.1),
                            small_config(critic_lr=0.0), DIMS, np.random.default_rng(0))
    np.testing.assert_array_equal(actor, theta)


# ---- Eq. 4 to Eq. 7: returns and the two fitnesses -----------------------------------------------


def plain_target(data, value, gamma, n, t, i):
    """y_t by its definition: n rewards or the horizon bootstrap, a termination does not."""
    if n == 0 or t == len(data.reward):
        return value[t, i]
    ended = data.terminated[t, i]
    rest = 0.0 if ended else plain_target(data, value, gamma, n - 1, t + 1, i)
    return data.reward[t, i] + gamma * rest


@quick
@given(SEED, st.integers(1, 9), st.sampled_from([0.0, 0.2, 1.0]), st.sampled_from([0.0, 0.5, 0.97]))
def test_returns_and_critic_error_equal_plain_loops(seed, n, ends, gamma):  # Eq. 4, Eq. 6
    theta, phi, _, _ = make_nets(DIMS, seed)
    data, config = make_data(DIMS, seed, ends), small_config(n_step=n, gamma=gamma)
    value = np.stack([plain_critic(phi, s, plain_actor(theta, s, DIMS)[0], DIMS)[0]
                      for s in data.obs])
    living = [*zip(*np.nonzero(data.valid))]
    errors = [plain_critic(phi, data.obs[t, [i]], data.action[t, [i]], DIMS)[0]
              - plain_target(data, value, gamma, n, t, i) for t, i in living]
    close(esmeta.critic_error(theta, phi, data, config, DIMS), np.mean(np.square(errors)))
    returns = [sum(data.reward[t, i] - 2.0 for t, i in living if i == j) for j in (2, 0)]
    close(data.part([2, 0]).returns(bonus=2.0), returns, 1e-12)


@quick
@given(SEED, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_explorer_fitness_equals_a_plain_loop(seed, goals, rounds, pairs):  # ours, for Eq. 7
    rng, k = np.random.default_rng(seed), 2 * pairs
    task = np.array([(j // 2 + r) % goals for r in range(rounds) for j in range(k)])
    explored, after = rng.standard_normal((goals, k)), rng.standard_normal(len(task))
    F = explored.mean(axis=0)
    for t, g in enumerate(task):
        F[t % k] += (after[t] - after[task == g].mean()) / rounds
    close(esmeta.explorer_fitness(explored, after, task), F, 1e-12)


# ---- Eq. 10: the search gradient -----------------------------------------------------------------


def make_population(seed, m, k, p):
    """theta (M, K, P), F (M, K), mu, sigma (P,)."""
    rng = np.random.default_rng(seed)
    mu, sigma = rng.normal(size=p), rng.uniform(0.3, 2.0, p)
    return mu + sigma * rng.standard_normal((m, k, p)), rng.normal(1, 1, (m, k)), mu, sigma


def log_normal(theta, mu, sigma):
    """log N(theta; mu, sigma^2) of actors (M, K, P), by the standard library: -> (M, K)."""
    normals = [statistics.NormalDist(*each) for each in zip(mu, sigma)]
    return np.array([[sum(math.log(n.pdf(x)) for n, x in zip(normals, actor)) for actor in worker]
                     for worker in theta])


@quick
@given(SEED, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_log_density_and_eq10(seed, m, k, p):
    """By differences of 1/M sum_ij F_ij log N(theta_ij; mu, sigma^2); and beside what PGPE adds."""
    theta, F, mu, sigma = make_population(seed, m, k, p)

    def objective(mu, sigma):
        return np.sum(F * log_normal(theta, mu, sigma)) / m, None

    close(esmeta.log_density(theta, mu, sigma), log_normal(theta, mu, sigma), 1e-10)
    eq10, d = np.array(esmeta.nes_gradient(theta, F, mu, sigma)), theta - mu
    close(eq10, [numeric_gradient(lambda x: objective(x, sigma), mu),
                 numeric_gradient(lambda x: objective(mu, x), sigma)], 1e-6)
    pgpe = [np.einsum("ij,ijp->p", F, x) / m for x in (d, (d**2 - sigma**2) / sigma)]
    close(pgpe, sigma**2 * eq10, 1e-10)  # without Eq. 10's 1 / sigma^2


@quick
@given(SEED, st.integers(1, 4), st.integers(1, 4))
def test_eq10_is_a_mean_of_workers_and_takes_a_fitness_for_each(seed, m, k):
    def eq10(*args):
        return np.array(esmeta.nes_gradient(*args))

    theta, F, mu, sigma = make_population(seed, m, k, 3)
    g = eq10(theta, F, mu, sigma)
    one = eq10(theta, F[:, 0], mu, sigma)  # a fitness for each worker
    close(one, eq10(theta, np.repeat(F[:, :1], k, axis=1), mu, sigma), 1e-10)
    for fitness, whole in (F, g), (F[:, 0], one):  # 1/M sum_i of the workers' own terms
        terms = [eq10(x, f, mu, sigma) for x, f in zip(theta, fitness)]
        close(np.mean(terms, axis=0), whole, 1e-10)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_natural_gradient_divides_by_the_fisher_matrix(k):
    """Sums of w f(eps) are exact E f(eps), eps (.., K, 1) normal, for polynomials to degree 5."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    eps = np.array([*itertools.product(nodes, repeat=k)])[..., None]
    w = np.prod([*itertools.product(weights / weights.sum(), repeat=k)], axis=1)
    sigma, mu = np.array([0.7]), np.array([0.4])
    score_mu, score_sigma = np.array([
        esmeta.nes_gradient(mu + sigma * e, np.ones(()), mu, sigma) for e in eps])[..., 0].T
    score_log_sigma = score_sigma * sigma
    close([w @ score_mu, w @ score_log_sigma, w @ (score_mu * score_log_sigma)], 0)  # diagonal
    step, ascended = esmeta.ascend(score_mu, score_sigma, sigma, k, 3.0, 0.1, small_config())
    close(step, 3 * score_mu / (w @ score_mu**2), 1e-10)
    close(ascended, sigma * np.exp(0.1 * score_log_sigma / (w @ score_log_sigma**2)), 1e-10)


@quick
@given(st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.5, 3.0, 1e6]), min_size=1, max_size=9))
def test_centred_ranks_share_ties(values):
    values = np.array(values)
    ahead = np.sign(values[:, None] - values).sum(axis=1)  # of how many, less behind how many
    close(esmeta.centred_ranks(values), ahead / 2 / max(len(values) - 1, 1), 1e-12)


# ---- Algorithm 1: explorers, tasks, observations; a worker, the update, an iteration -------------


@pytest.mark.parametrize("paper", [False, True])
def test_explorers_are_normal_each_weight_with_its_sigma(paper):
    """--paper: independent. Else mirrored pairs, each with one start."""
    config, rng = small_config(paper=paper, rollouts=4000), np.random.default_rng(0)
    mu, sigma = rng.normal(size=6), rng.uniform(0.1, 3, 6)
    kinds = esmeta.INIT, esmeta.GOALS, esmeta.WORKER, esmeta.EVAL
    keys = [*itertools.product(kinds, (0, 1), (3, 4), (6, 7))]  # .., seed, iteration, worker
    draws = [esmeta.sample_explorers(mu, sigma, config, esmeta.generator(*key)) for key in keys]
    theta, starts = draws[0]
    eps, n = (theta - mu) / sigma, 4000 if paper else 2000
    first = np.random.default_rng([3, 1, 4, 7]).standard_normal(6, np.float32)
    close(draws[-1][0][0], mu + sigma * first)  # its key and order, on which stored runs count
    assert len({tuple(theta[0]) for theta, _ in draws}) == len({tuple(s) for _, s in draws}) == 32
    assert len(np.unique(starts)) == len(np.unique(np.abs(eps).round(9), axis=0)) == n
    close(eps[::2].mean(axis=0), 0, 0.1)
    np.testing.assert_allclose(np.cov(eps[::2].T), np.eye(6), rtol=0, atol=0.1)
    close(np.mean(eps[::2] * eps[1::2], axis=0), 0 if paper else -1, 0.1)
    if not paper:
        np.testing.assert_array_equal(starts[::2], starts[1::2])
        close(eps[::2], -eps[1::2])


def test_tasks_of_the_workers():
    """--paper: one mini-batch of tasks in an iteration; else one of each worker, spread."""
    def goals(paper, s, *key):
        return esmeta.sample_tasks(small_config(task="cheetah_vel", seed=s, paper=paper), *key)

    for *key, worker in (0, 5, 1), (0, 5, 2), (0, 6, 1), (1, 5, 1):
        for paper, sample, i in (True, tasks.sample_goals, 0), (False, tasks.spread_goals, worker):
            expected = sample("cheetah_vel", esmeta.generator(esmeta.GOALS, *key, i), 2)
            np.testing.assert_array_equal(goals(paper, *key, worker), expected)


def test_normaliser():
    rng, scale = np.random.default_rng(0), np.array([1, 3e-5])  # the second's variance is near 1e-8
    rows, obs = scale * rng.normal(4, 3, (50, 2)), scale * rng.normal(4, 30, (20, 2))
    sums = np.array([np.full(2, 50.0), rows.sum(axis=0), (rows**2).sum(axis=0)])
    config, z = small_config(), (obs - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-8)
    # a third column that was always 1000, and whose variance is rounded to less than 0
    sums = np.column_stack([sums, [50, 5e4, 5e7 * (1 - 1e-12)]])
    obs, z = np.column_stack([obs, np.full(20, 1000.0002)]), np.column_stack([z, np.full(20, 2.0)])
    meta = esmeta.initial_state(config)._replace(obs_sums=sums)
    close(esmeta.make_normaliser(meta, config)(obs), np.clip(z, -5, 5), 1e-8)
    assert z.min() < -5 and z.max() > 5
    for raw in (meta, small_config(paper=True)), (esmeta.initial_state(config), config):
        np.testing.assert_array_equal(esmeta.make_normaliser(*raw)(obs), obs)


@pytest.mark.parametrize("name", ["cheetah_dir", "ant_vel", "point_goal"])
def test_rollout_is_what_the_environment_does_under_each_goal(name):
    """One run of the physics, scored for two goals: `step`'s rewards and ends, the bonus on top."""
    dims, goals, starts = esmeta.task_dims(name), tasks.test_goals(name)[:2], [3, 1, 4, 1, 5, 9]
    size = len(esmeta.xavier(esmeta.actor_shapes(dims), np.random.default_rng(0)))
    theta = np.random.default_rng(0).normal(0, 0.3, (3, size))  # so large that some ants fall
    for goal, data in zip(goals, esmeta.rollout(name, theta, starts, lambda s: s / 2, goals, 0.5)):
        env, alive = tasks.make_vec(name, 6, goal=goal), np.ones(6, bool)
        obs, _ = env.reset(seed=starts)
        for t, action in enumerate(data.action):
            np.testing.assert_array_equal(data.valid[t], alive)
            close([data.raw[t][alive], 2 * data.obs[t][alive]], [obs[alive]] * 2, 1e-12)
            close(action, [esmeta.actor_forward(theta[i // 2], data.obs[t, [i]], dims)[0][0]
                           for i in range(6)], 1e-9)
            obs, reward, ended, *_ = env.step(action)
            close(data.reward[t][alive], reward[alive] + 0.5, 1e-9)
            np.testing.assert_array_equal(data.terminated[t][alive], ended[alive])
            alive &= ~ended
        assert alive.all() == (name != "ant_vel")
    with unittest.mock.patch.object(tasks.GoalVectorEnv, "unstable", lambda env: np.arange(6) == 2):
        [data] = esmeta.rollout(name, theta, starts, lambda s: s / 2, goals[:1])
    assert np.flatnonzero(np.isnan(data.returns())).tolist() == [2]  # finite, but not to be trusted
    assert (data.raw[9, 2] == data.raw[8, 2]).all() == (name == "ant_vel")  # no others are frozen


@pytest.mark.parametrize("name, paper, bonus", [
    ("point_goal", False, 0.5), ("cheetah_dir", False, 0.0), ("ant_vel", False, 2.0),
    ("cheetah_vel", True, 0.0), ("point_goal", True, 0.5)])
def test_worker_by_hand(name, paper, bonus):
    """Each episode alone. Test r of pair p is on task (p + r) mod G; F of --paper is Eq. 5 and 7.

    The bonus counts in what adapts and in fitness, and in no return that is told.
    """
    k, dims = 2 if paper else 8, esmeta.task_dims(name)
    config = small_config(task=name, paper=paper, goals=3, rollouts=k, alive_bonus=bonus, seed=53)
    meta = make_meta(config)
    rng, normalise = esmeta.generator(esmeta.WORKER, 53, 3, 1), esmeta.make_normaliser(meta, config)
    goals = esmeta.sample_tasks(config, 3, 1)

    def episodes(theta, starts):
        return esmeta.rollout(name, theta, starts, normalise, goals, bonus)

    def told(scored):
        return np.mean([data.returns(bonus) for data in scored])

    def lived(scored):
        return np.any([data.valid for data in scored], axis=0)

    theta, starts = esmeta.sample_explorers(meta.mu_actor, meta.sigma_actor, config, rng)
    bar, eps = theta.mean(axis=0), rng.standard_normal(len(meta.mu_critic), np.float32)
    phi, data = meta.mu_critic + meta.sigma_critic * eps, episodes(theta, starts)
    before = episodes(bar[None], [rng.integers(2**31)])
    adapted = [esmeta.adapt(bar, phi, part, meta.sigma_actor, config, dims, rng) for part in data]
    if paper:  # actor, task
        plan = [(bar, g) for g in (0, 0, 1, 1, 2, 2)]
        starts = rng.integers(2**31, size=6)
    else:
        plan = [(theta[j], (j // 2 + r) % len(goals)) for r in (0, 1) for j in range(8)]
        starts = rng.integers(2**31, size=8).repeat(2)
    tests = [episodes((actor + (adapted[g][0] - bar))[None], [start])[g]
             for (actor, g), start in zip(plan, starts)]
    task = np.array([g for _, g in plan])
    after = np.concatenate([test.returns() for test in tests])
    F = np.full(k, after.mean()) if paper else esmeta.centred_ranks(esmeta.explorer_fitness(
        np.array([part.returns() for part in data]), after, task))
    error, steps = np.array([(esmeta.critic_error(*adapted[g], test, config, dims),
                              test.valid.sum()) for g, test in zip(task, tests)]).T
    error = np.mean([np.average(error[task == g], weights=steps[task == g]) for g in {*task}])
    seen = data[0].raw[:-1][lived(data)]
    assert lived(data).all() == (name != "ant_vel")
    ends_with_the_goal = not np.all([part.valid for part in data]) and lived(data).all()
    assert ends_with_the_goal == (name == "point_goal" and not paper)  # as of few seeds, 53

    result = esmeta.evaluate_worker(config, meta, 1)
    gradient = esmeta.nes_gradient(theta, F.astype(np.float32), meta.mu_actor, meta.sigma_actor)
    for part, expected in zip(result, gradient):
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(result.phi, phi)
    close(result.fitness_critic, -error, 1e-5)
    close(result.returns, [told(before), told(data), told(tests)], 1e-5)
    close(result.obs_sums, [len(seen) + 0 * seen[0], seen.sum(axis=0), (seen**2).sum(axis=0)])
    assert result.env_steps == len(seen) + lived(before).sum() + steps.sum()


@pytest.mark.parametrize("paper", [False, True])
def test_update_distribution_by_hand(paper):
    """Rates, mu's halved twice (--paper: never); ranks of critics; 1/M of those who are there."""
    rng, config = np.random.default_rng(0), small_config(
        paper=paper, workers=9, lr_mu_actor=1.6, lr_sigma_actor=0.2, lr_mu_critic=2,
        lr_sigma_critic=0.4, half_life=0.0 if paper else 3.5, momentum=0.75, weight_decay=0.1)
    (mu, mu_c, velocity), (s, s_c) = rng.normal(size=(3, 5)), rng.uniform(0.1, 0.4, (2, 5))
    d_mu, d_sigma, phi = rng.normal(size=(3, 3, 5))
    F, ranks, z = np.array([3.0, -1.0, 0.5]), np.array([0.5, -0.5, 0.0]), (phi - mu_c) / s_c
    meta = esmeta.MetaState(mu, s, mu_c, s_c, velocity, "obs_sums", 7, "env_steps")
    new = esmeta.update_distribution(meta, [
        esmeta.Result(*each, *[None] * 3) for each in zip(d_mu, d_sigma, phi, F)], config)
    d_mu, d_sigma = d_mu.mean(axis=0), d_sigma.mean(axis=0)
    if paper:
        step, step_c = 1.6 * d_mu, 2.0 * F @ z / s_c / 3
        sigma, sigma_c = s + 0.2 * d_sigma, s_c + 0.4 * F @ (z**2 - 1) / s_c / 3
    else:
        step, step_c = 0.4 * s**2 * d_mu / 4, 0.5 * ranks @ z * s_c / 3
        sigma, sigma_c = s * np.exp(0.2 * s * d_sigma / 8), s_c * np.exp(
            0.4 * ranks @ (z**2 - 1) / 2 / 3)
    close(new.velocity, 0.75 * velocity + 0.25 * step)
    close(new.mu_actor, (0.9 if paper else 0.975) * mu + new.velocity)
    close(new.mu_critic, mu_c + step_c)
    close((new.sigma_actor, new.sigma_critic), np.clip((sigma, sigma_c), 1e-5, 1))
    assert new[5:] == meta[5:]  # what it does not touch
    for rate, limit in (1e4, 1.0), (-1e4, 1e-5):
        np.testing.assert_array_equal(
            esmeta.ascend(d_mu, np.ones(5), s, 4, 1.0, rate, config)[1], limit)


class InProcess:
    """A crew in this process that keeps its results; bad workers diverge or send what is broken."""

    def __init__(self, bad=(), broken=None):
        self.bad, self.broken, self.results = bad, broken, []

    def map(self, function, jobs):
        for config, meta, worker in jobs:
            bad = worker in self.bad
            if bad and not self.broken:
                meta = meta._replace(sigma_critic=meta.sigma_critic * np.float32(1e30))
            result = function(config, meta, worker)
            self.results.append(result._replace(**self.broken if bad and self.broken else {}))
        return self.results


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("task, broken", [
    ("point_goal", None), ("cheetah_vel", None), ("point_goal", dict(fitness_critic=math.inf)),
    ("point_goal", dict(returns=np.array([-math.inf, 1.0, 2.0]))),
    ("point_goal", dict(returns=np.array([1.0, 2.0, math.inf])))])
def test_iterate_leaves_out_a_diverged_worker(task, broken):
    config, crew = small_config(task=task, goals=4), InProcess({1}, broken)  # task 3: no test
    meta = make_meta(config)
    new, row, failed = esmeta.iterate(config, meta, crew)
    assert failed == 1 and [*map(np.result_type, new)] == [*map(np.result_type, meta)]
    first, _, last = crew.results
    expected = esmeta.update_distribution(meta, [first, last], config)._replace(
        obs_sums=meta.obs_sums + first.obs_sums + last.obs_sums, iteration=4,
        env_steps=70 + sum(result.env_steps for result in crew.results))
    for part, other in zip(new, expected):
        close(part, other)
    ratio = np.linalg.norm(new.mu_actor - meta.mu_actor) / np.linalg.norm(meta.mu_actor)
    close([*row.values()], [3, *(first.returns + last.returns) / 2, -(
        first.fitness_critic + last.fitness_critic) / 2, new.sigma_actor.mean(), ratio,
        new.env_steps, 0])
    with pytest.raises(RuntimeError, match="no worker"):
        esmeta.iterate(config, meta, InProcess(range(3), broken))
    for part, like in ("d_mu", meta.mu_actor), ("d_sigma", meta.mu_actor), ("phi", meta.mu_critic):
        with pytest.raises(RuntimeError, match="no more"):
            esmeta.iterate(config, meta, InProcess({1}, {part: np.nan * like}))
    meta, (goal, *_) = meta._replace(mu_critic=meta.mu_critic * 1e30), tasks.test_goals(task)
    assert np.isnan(esmeta.evaluate_goal(config, meta, goal, 0, 1, 0)[0][1])  # in silence


# ---- Algorithm 1: the adapted actor in meta-test; the paper's literal form -----------------------


@pytest.mark.parametrize("name, best, middle, shrink", [  # middle: goals' mean distance from it
    ("cheetah_vel", 0.0, 0.5, 0.25), ("ant_vel", 1.05, 0.75, 0.25), ("point_goal", None, 1, 0.25),
    ("cheetah_dir", None, 1, 0.01), ("ant_dir", None, 1, 0.01)])
@quick
@given(seed=SEED, paper=st.booleans(), update=st.integers(0, 2), bonus=st.floats(0, 3),
       more=st.floats(-3, 3))
def test_length_of_a_meta_tests_step(name, best, middle, shrink, seed, paper, update, bonus, more):
    config, data = small_config(task=name, paper=paper, alive_bonus=bonus), make_data(DIMS, seed)
    data = data._replace(reward=data.reward + more)
    rewards = [r for row, lives in zip(data.reward, data.valid) for r in row[lives].tolist()]
    later = statistics.fmean(rewards[len(rewards) // 2 :])
    distance = middle if best is None else np.clip(best + bonus - later, 0.0, 1.5 * middle)
    found = esmeta.config_of_update(update, data, config)
    close(found.actor_step, 0.5 * (1 if paper else shrink**update * distance / middle))
    assert dataclasses.replace(found, actor_step=0.5) == config
    broken = data._replace(reward=data.reward * np.nan)  # where the simulation broke down
    assert esmeta.config_of_update(update, broken, config).actor_step >= 0


@pytest.mark.parametrize("name, paper", [
    ("cheetah_vel", False), ("point_goal", True), ("ant_dir", False)])
def test_meta_test_by_hand(name, paper):
    """Fresh explorers around the current actor, the critic of the last update, a step in config."""
    config = small_config(task=name, paper=paper, alive_bonus=0.5)
    meta, goal, dims = make_meta(config), tasks.test_goals(name)[3], esmeta.task_dims(name)
    actor, phi, actors = meta.mu_actor, meta.mu_critic, [meta.mu_actor]
    normalise = esmeta.make_normaliser(meta, config)
    for update in 0, 1, 2:
        rng = esmeta.generator(esmeta.EVAL, 5, 4, update + 1)
        theta, starts = esmeta.sample_explorers(actor, meta.sigma_actor, config, rng)
        [data] = esmeta.rollout(name, theta, starts, normalise, [goal], 0.5)
        step = esmeta.config_of_update(update, data, config)
        actor, phi = esmeta.adapt(
            theta.mean(axis=0), phi, data, meta.sigma_actor, step, dims, rng)
        actors.append(actor)
    returns, found = esmeta.evaluate_goal(config, meta, goal, 3, 3, 5)
    np.testing.assert_array_equal(found, actors)
    starts = esmeta.generator(esmeta.EVAL, 5, 0, 0).integers(2**31, size=20)
    np.testing.assert_array_equal(returns, [
        esmeta.rollout(name, actor[None], starts, normalise, [goal])[0].returns().mean()
        for actor in actors])  # without the bonus


@pytest.mark.parametrize("name", tasks.TASKS)
def test_papers_form_has_none_of_our_settings(name):
    config = dataclasses.asdict(esmeta.make_config(name, True))
    assert config == config | dict(  # Lillicrap's (2015) DDPG, the actor's rate ten times his
        goals=1, tests=1, cycles=3, n_step=1, critic_updates=48, batch=64, gamma=0.99,
        critic_lr=1e-3, actor_step=1e-3, alive_bonus=0, half_life=0, momentum=0, weight_decay=0,
        lr_mu_actor=3e-7, lr_mu_critic=1e-6, lr_sigma_actor=1e-8, lr_sigma_critic=1e-8,
        workers=64, rollouts=40 if name == "ant_dir" else 20)
    own = esmeta.make_config(name, True, rollouts=3, n_step=5)  # it has no pairs: odd is fine
    assert (own.rollouts, own.n_step) == (3, 5)
    assert esmeta.TASK_SETTINGS.get(name, {}).keys() <= esmeta.PAPER.keys()


# ---- tasks -------------------------------------------------------------------------------------

MUJOCO_TASKS = ["cheetah_vel", "cheetah_dir", "ant_vel", "ant_dir"]
ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


def some_actions(name, steps, num_envs, seed=0, scale=1.5):
    """Random actions, a third of them outside [-1, 1]."""
    shape = (steps, num_envs, tasks.TASKS[name].act)
    return np.random.default_rng(seed).uniform(-scale, scale, shape)


def play(envs, actions, spoil=False, **reset):
    """All that an environment returns over one episode; `spoil`: copies, and it is overwritten."""
    seen = []

    def take(*arrays, info):
        for array in (*arrays, *info.values()):
            seen.append(array.copy() if spoil else array)
            if spoil:
                array[...] = 1

    obs, info = envs.reset(**reset)
    take(obs, info=info)
    for action in actions:
        *arrays, info = envs.step(action)
        take(*arrays, info=info)
    return seen


def assert_same_bits(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b, strict=True)


def reference_model(name):
    """MAML's model once more, here by editing the text of the file."""
    if name.startswith("cheetah"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mujoco.MjModel.from_xml_path(str(ASSETS / "half_cheetah.xml"))
    text = (ASSETS / "ant.xml").read_text()
    for old, new in (('timestep="0.01"', 'timestep="0.02"'),
                     ('<geom conaffinity="0"',
                      '<geom solref=".02 1" solimp=".8 .8 .01" conaffinity="0"')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    return mujoco.MjModel.from_xml_string(text)


def reference_obs(model, data, name):
    """What is seen of a plain MjData: -> obs, x velocity, contact forces."""
    mujoco.mj_forward(model, data)
    mujoco.mj_subtreeVel(model, data)
    mujoco.mj_rnePostConstraint(model, data)
    torso = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "torso")
    v, com = data.subtree_linvel[torso][0], data.subtree_com[torso]
    force = [min(1.0, max(-1.0, x)) for x in data.cfrc_ext.ravel().tolist()]
    if name.startswith("cheetah"):
        return np.array([*data.qpos[1:], *data.qvel, *com]), v, force
    return np.array([*data.qpos, *data.qvel, *force, *data.xmat[torso], *com]), v, force


def reference_step(model, data, name, action, goal):
    """One step as Task.reward says, on a plain MjData: -> obs, reward, terminated, x velocity."""
    a = [min(1.0, max(-1.0, float(x))) for x in action]
    data.ctrl[:] = a
    mujoco.mj_step(model, data)
    obs, v, force = reference_obs(model, data, name)
    effort = sum(x * x for x in a)
    if name.startswith("cheetah"):
        cost, bonus, terminated = 0.05 * effort, 0.0, False
    else:
        cost = 0.005 * effort + 0.5 * 1e-3 * sum(x * x for x in force)
        bonus = 0.05
        terminated = not 0.2 <= data.qpos[2] <= 1.0
    if name.endswith("dir"):
        reward = goal * v - cost + bonus
    else:
        reward = -abs(v - goal) - cost + bonus + (1.0 if name == "ant_vel" else 0.0)
    return obs, reward, terminated, v


@pytest.mark.parametrize("name", MUJOCO_TASKS)
def test_tasks_equal_an_independent_loop_over_plain_mjdata(name):
    num_envs, model = 3, reference_model(name)
    goals = np.array([-1.0, 1.0, 1.0]) if name.endswith("dir") else np.array([0.1, 1.0, 1.9])
    envs = tasks.make_vec(name, num_envs)
    obs, info = envs.reset(seed=7, options={"goal": goals})
    datas = [mujoco.MjData(model) for _ in range(num_envs)]
    for data, first, qpos, qvel in zip(datas, obs, info["qpos"], info["qvel"]):
        data.qpos[:], data.qvel[:] = qpos, qvel
        np.testing.assert_allclose(first, reference_obs(model, data, name)[0], rtol=0, atol=1e-12)
    forces = 0.0
    for action in some_actions(name, 200, num_envs):
        obs, reward, terminated, _, info = envs.step(action)
        for i, data in enumerate(datas):
            expected = reference_step(model, data, name, action[i], goals[i])
            np.testing.assert_allclose(obs[i], expected[0], rtol=0, atol=1e-12)
            alone = envs.task.reward(expected[3], np.clip(action[i], -1, 1), data.cfrc_ext.ravel(),
                                     goals[i])
            np.testing.assert_allclose([reward[i], alone], expected[1], rtol=0, atol=1e-12)
            assert terminated[i] == expected[2]
            assert abs(info["x_velocity"][i] - expected[3]) <= 1e-12
            forces = max(forces, np.abs(data.cfrc_ext).max())
    assert forces > 1.0  # the reference's own forces, so that the test cannot compare zeros


@given(st.sampled_from(["cheetah_vel", "ant_vel"]), SEED, st.floats(-9, 9), st.floats(0, 3))
def test_tasks_best_reward_is_that_of_a_step_at_the_goal_without_effort(name, seed, v, goal):
    task, rng = tasks.TASKS[name], np.random.default_rng(seed)
    action, contact = rng.uniform(-1, 1, task.act), rng.standard_normal(84)
    close(task.reward(goal, 0 * action, 0 * contact, goal), task.best_reward)
    assert task.reward(v, action, contact, goal) <= task.best_reward


@pytest.mark.parametrize("name, qpos0", [
    ("cheetah_dir", np.zeros(9)),
    ("ant_dir", [0, 0, .55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1])])
def test_tasks_noise_of_a_reset_is_mamls(name, qpos0):
    _, info = tasks.make_vec(name, 3).reset(seed=5)
    for i in range(3):
        rng = np_random(5 + i)[0]
        close(info["qpos"][i], qpos0 + 0.01 * rng.standard_normal(len(qpos0)), 1e-15)
        close(info["qvel"][i], 0.1 * rng.standard_normal(len(qpos0) - (name == "ant_dir")), 1e-15)
        assert info["goal"][i] == tasks.sample_goals(name, rng, 1)[0]  # after the noise


@pytest.mark.parametrize("name, lengths, low, high, seed, forward", [
    ("cheetah_vel", (200, 20), 0, 2, 1, 0), ("cheetah_dir", (200, 20), -1, 1, 1, 18),
    ("ant_vel", (200, 20), 0, 3, 1, 0), ("ant_dir", (200, 40), -1, 1, 2, 15),
    ("point_goal", (100, 20), -0.5, 0.5, 1, 0)])
def test_tasks_lengths_and_goals_are_mamls(name, lengths, low, high, seed, forward):
    task, state = tasks.TASKS[name], np.random.get_state()[1].copy()
    assert (task.horizon, task.rollouts) == lengths
    shape = (2,) if name == "point_goal" else ()
    draw = np.random.RandomState(seed).uniform(low, high, (40, *shape))
    np.testing.assert_array_equal(tasks.test_goals(name), np.sign(draw) if forward else draw)
    assert not forward or (draw > 0).sum() == forward
    assert (np.random.get_state()[1] == state).all()  # the global generator is left alone
    goals = tasks.sample_goals(name, np.random.default_rng(0), 2000)
    share = (goals - low) / (high - low)
    assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1 and abs(share.mean() - 0.5) < 0.05
    assert goals.shape == (2000, *shape) and (len(np.unique(goals)) == 2) == (forward > 0)


@given(st.sampled_from(list(tasks.TASKS)), SEED, st.integers(1, 9))
def test_tasks_spread_goals_cover_the_distribution(name, seed, n):
    """Both directions in random order, or a speed from each n-th of the range, rising."""
    task, rng = tasks.TASKS[name], np.random.default_rng(seed)
    goals = tasks.spread_goals(name, np.random.default_rng(seed), n)
    if task.direction:
        np.testing.assert_array_equal(goals, rng.permutation([-1, 1]))
    elif task.goal_shape:
        np.testing.assert_array_equal(goals, tasks.sample_goals(name, rng, n))
    else:
        share = (goals - task.goal_low) / (task.goal_high - task.goal_low) * n
        close(share, np.arange(n) + rng.uniform(size=n), 1e-12)


@given(st.floats(0.15, 0.25) | st.floats(0.95, 1.05) | st.sampled_from([0.2, 1.0]),
       st.integers(2, 28), st.floats())
def test_tasks_ant_termination_is_height_or_not_finite(height, index, value):
    state = np.zeros((2, 29))
    state[1, 2], state[1, index] = height, value  # index 2 is the height
    stands = 0.2 <= state[1, 2] <= 1.0 and math.isfinite(value)
    assert tasks.ant_terminated(state).tolist() == [True, not stands]


@quick
@given(SEED)
def test_tasks_point_moves_is_paid_and_arrives(seed):
    """By a tenth of the clipped action; minus the squared distance; within 1 cm, there it stays."""
    rng, envs = np.random.default_rng(seed), tasks.make_vec("point_goal", 9, freeze=True)
    goal, x, arrived = rng.uniform(-0.5, 0.5, (9, 2)), np.zeros((9, 2)), np.zeros(9, bool)
    obs, _ = envs.reset(options={"goal": goal})
    for _ in range(20):
        close(obs, x, 1e-12)
        action = 10 * (goal - x) + rng.normal(0, 0.1, (9, 2))
        x = np.where(arrived[:, None], x, x + 0.1 * np.clip(action, -1, 1))
        distance = np.linalg.norm(x - goal, axis=1)
        obs, reward, terminated, _, _ = envs.step(action)
        close(reward, np.where(arrived, 0, -(distance**2)), 1e-12)
        arrived |= distance < 0.01
        assert terminated.tolist() == arrived.tolist()
    assert arrived.any()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_reset_leaves_no_trace(name):
    task = tasks.TASKS[name]
    envs, actions = tasks.make_vec(name, 3), some_actions(name, 80, 3)
    fresh = play(envs, actions, seed=1)
    play(envs, some_actions(name, 33, 3, seed=9), seed=2)
    assert_same_bits(fresh, play(envs, actions, seed=1))
    if task.model is not None:  # nor after a breakdown, in every part of the state
        envs.reset(seed=4)
        envs.batch.qvel[1] = 1e12
        envs.step(np.full((3, task.act), np.nan))
        assert_same_bits(fresh, play(envs, actions, seed=1))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", ["cheetah_vel", "ant_vel", "point_goal"])
def test_tasks_what_was_returned_or_given_belongs_to_the_caller(name, freeze):
    envs, actions = tasks.make_vec(name, 8, freeze=freeze), some_actions(name, 200, 8, seed=2)
    goal = tasks.test_goals(name)[:8].copy()
    for given_array in actions, goal:
        given_array.setflags(write=False)
    expected = play(envs, actions, seed=0, options={"goal": goal})
    assert_same_bits(expected, play(envs, actions, spoil=True, seed=0, options={"goal": goal}))
    assert not np.may_share_memory(envs.goal, goal)
    assert expected[-4].any() or name != "ant_vel" or not freeze  # terminated, at the end


def test_tasks_freeze_stops_what_has_terminated_and_changes_nothing_else():
    frozen, free = both = [tasks.make_vec("ant_vel", 8, freeze=f) for f in (True, False)]
    last, _ = [envs.reset(seed=0)[0] for envs in both]
    dead = np.zeros(8, bool)
    for t, action in enumerate(some_actions("ant_vel", 250, 8, seed=2)):
        seen, expected = [[*arrays, info["x_velocity"]] for *arrays, info in (
            envs.step(action) for envs in both)]
        assert_same_bits([x[~dead] for x in seen], [x[~dead] for x in expected])
        obs, reward, terminated, *_ = seen
        assert_same_bits([obs[dead]], [last[dead]])
        assert not reward[dead].any() and terminated[dead].all()
        dead, last = terminated, obs
        if t == 200:
            assert 1 < dead.sum() < 8 and (frozen.batch.time[dead] < free.batch.time[dead]).all()
            revived = np.arange(8) == dead.argmax()  # one of them
            last, expected = [envs.reset(options={"reset_mask": revived})[0] for envs in both]
            assert_same_bits([last[revived], last[~revived]], [expected[revived], obs[~revived]])
            dead = dead & ~revived
    assert (frozen.batch.time[revived] > 0.02).all()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_what_breaks_down_terminates_alone_and_for_good(name, freeze):
    envs, robots = tasks.make_vec(name, 3, freeze=freeze), name in MUJOCO_TASKS
    act = tasks.TASKS[name].act
    still, bad = np.zeros((2, 3, act))
    bad[0], bad[1, 0] = np.inf, np.nan
    for velocity in (0, 1e7, 1e12, np.nan) if robots else (0,):
        envs.reset(seed=0)
        if velocity:
            envs.batch.qvel[1] = velocity
        for action in (still if velocity else bad, still, still):  # MuJoCo carries on afresh
            obs, reward, terminated, _, info = envs.step(action)
            assert terminated.tolist() == info["unstable"].tolist() == [False, True, False]
            assert np.isfinite(obs if robots else obs[[0, 2]]).all()
            assert np.isfinite(reward[[0, 2]]).all()
    with pytest.raises(ValueError, match="shape"):
        envs.step(np.zeros(act))  # would broadcast


def test_tasks_bad_names_goals_seeds_and_options():
    for function in tasks.test_goals, functools.partial(tasks.make_vec, num_envs=1):
        with pytest.raises(ValueError, match="did you mean 'ant_vel'"):
            function("ant_vell")
    with pytest.raises(ValueError, match="goals of shape"):
        gymnasium.make("esmeta/AntVel-v0", goal=[1.0, 2.0])
    for name, goals in (("ant_vel", (np.zeros(2), np.zeros((3, 1)), 1.0, [1.0, math.nan, 1.0])),
                        ("point_goal", (np.zeros(3), np.zeros((3, 3))))):
        envs, half = tasks.make_vec(name, 3), np.array([True, False, False])
        with pytest.raises(ValueError, match="at first all"):
            envs.reset(options={"reset_mask": half})
        envs.reset()
        masks = half[:0], half & False, half[:1], half[None], half.astype(int), [1.0] * 3, True
        for word, reset in [("3 seeds", dict(seed=[1, 2])), ("sead", dict(options={"sead": 1})),
                            *(("goals of shape", dict(options={"goal": goal})) for goal in goals),
                            *(("bools", dict(options={"reset_mask": mask})) for mask in masks)]:
            with pytest.raises(ValueError, match=word) as error:
                envs.reset(**reset)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_partial_reset_equals_gymnasiums(name):
    task, n, goal = tasks.TASKS[name], 4, tasks.test_goals(name)[5]
    sync = gymnasium.make_vec(task.env_id, n, vectorization_mode="sync",
                              vector_kwargs=dict(autoreset_mode=AutoresetMode.DISABLED))
    envs, partial = tasks.make_vec(name, n), 0
    assert_same_bits([envs.reset(seed=3)[0]], [sync.reset(seed=3)[0]])
    for t, action in enumerate(some_actions(name, 2 * task.horizon + 50, n)):
        seen, expected = envs.step(action), sync.step(action)
        assert_same_bits(seen[:4], expected[:4])
        some = (t % 70 == 0) & (np.arange(n) == t // 70 % n)  # one of them in mid-episode
        if (mask := seen[2] | seen[3] | some).any():
            partial += not mask.all()
            own, theirs = ({"goal": [goal] * n}, {"goal": goal}) if t % 40 else ({}, {})
            seed = [None, 50, [7, 8, None, 9]][t % 3]
            (obs, info), (obs1, info1) = (
                e.reset(seed=seed, options={**goals, "reset_mask": mask.copy()})
                for e, goals in ((envs, own), (sync, theirs)))
            assert_same_bits([obs, *(x[mask] for x in info.values())],
                             [obs1, *(info1[key][mask] for key in info)])
    assert partial >= 3


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_are_registered_and_pass_check_env(name):
    task = tasks.TASKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds infinite bounds of observations unusual
        check_env(one := gymnasium.make(task.env_id).unwrapped, skip_render_check=True)
    assert [*map(type, one.step(np.zeros(task.act))[1:4])] == [float, bool, bool]
    envs = gymnasium.make_vec(task.env_id, num_envs=4, vectorization_mode="vector_entry_point")
    obs, info = envs.reset(seed=0)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    for space, shape in (envs.single_action_space, (task.act,)), (envs.action_space, (4, task.act)):
        assert str(space) == f"Box(-1.0, 1.0, {shape}, float64)"
    assert obs in envs.observation_space and obs.shape == (4, task.obs)
    short = tasks.make_vec(name, 4, max_episode_steps=1)
    assert (short.reset(seed=0)[0] == obs).all() and short.step(np.zeros((4, task.act)))[3].all()


def test_tasks_render_the_point_and_its_goal():
    env = gymnasium.make("esmeta/PointGoal-v0", goal=[0.25, 0.5], render_mode="rgb_array")
    env.reset(seed=0)
    env.step(np.array([1.0, 0.0]))
    frame = env.render()
    assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8
    assert (frame[240, 264] == 0).all() and frame[120, 300].tolist() == [0, 160, 0]


# ---- system ------------------------------------------------------------------------------------

HERE = Path(esmeta.__file__).parent
FIELDS = {field.name: field for field in dataclasses.fields(esmeta.Config)}
TINY = ("--task point_goal --workers 4 --rollouts 4 --goals 1 --critic-updates 2 --batch 8 "
        "--momentum 0.5 --weight-decay 0.01")
SLOW = TINY.replace("--critic-updates 2", "--critic-updates 150")  # ~0.1 s a job
LAUNCHED = []


def call(line, out=None):
    """esmeta.main in this process: -> exit status."""
    return esmeta.main(shlex.split(line) + (["--out", str(out)] if out else []))


def start(*arguments, **options):
    """A Python process, the first of its group, which is killed after the test."""
    LAUNCHED.append(subprocess.Popen(
        [sys.executable, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE), "OPENBLAS_NUM_THREADS": "2"}, **options))
    return LAUNCHED[-1]


def launch(line, out):
    """esmeta.py in a process of its own."""
    return start(esmeta.__file__, *line.split(), "--out", out)


@pytest.fixture(autouse=True)
def end_what_was_launched():
    yield
    while LAUNCHED:
        LAUNCHED.pop().kill()


def log_rows(out):
    """Rows of log.csv without their seconds."""
    return [line.rsplit(",", 1)[0] for line in (out / "log.csv").read_text().splitlines()[1:]]


def bits(out):
    """What is equal in two runs that are the same."""
    return (out / "checkpoint.npz").read_bytes(), (out / "config.json").read_bytes(), log_rows(out)


def one_line(error):
    """The error, if it is one line; the line feed before it ends the terminal's ^C."""
    assert error.lstrip("\n").startswith("esmeta: ") and error.strip().count("\n") == 0, error
    return error


def undisturbed(out, iterations, line=TINY):
    """The bits of a run, or of the rest of one, that nothing happens to."""
    resume = " --resume" * out.exists()
    assert call(f"{line} --iterations {iterations} --processes 1{resume}", out) == 0
    return bits(out)


@pytest.fixture(scope="module")
def run_of_4(tmp_path_factory):
    """A run of 4 iterations, by a process whose output is a pipe; beside it, what it printed."""
    out = tmp_path_factory.mktemp("system") / "run"
    process = launch(TINY + " --iterations 4 --processes 1", out)
    text, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    (out.parent / "printed").write_text(text)
    return out


@pytest.fixture
def copy(run_of_4, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(run_of_4, tmp_path / "run")


def test_system_what_a_training_prints(run_of_4):
    text = (run_of_4.parent / "printed").read_text()
    assert text.replace("\n", "").isprintable()  # no terminal: no control characters
    *rows, last = text.splitlines()
    assert [line.split()[0] for line in rows] == [f"{i}/4" for i in "1234"]
    assert all(line.split()[1::2] == [*esmeta.LOG_COLUMNS[1:]] for line in rows)
    assert f"{run_of_4} has 4 iterations" in last and f" --eval {run_of_4} --updates 3" in last


def test_system_processes_and_resume_change_no_bit(run_of_4, tmp_path, capsys):
    assert call(TINY + " --iterations 4 --processes 3", tmp_path / "run") == 0
    assert bits(tmp_path / "run") == bits(run_of_4)
    assert call(TINY + " --iterations 2 --processes 2", tmp_path / "half") == 0
    assert len(log_rows(tmp_path / "half")) == 2
    (tmp_path / "half").rename(tmp_path / "moved")  # the place is not in the state either
    for _ in "to 4", "nothing left":
        capsys.readouterr()
        assert undisturbed(tmp_path / "moved", 4) == bits(run_of_4)
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "has 4 iterations" in text


def test_system_no_more_processes_than_jobs_or_usable_cores(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(esmeta, "stop_if_asked", lambda: seen.append(
        len(multiprocessing.active_children())))
    line = TINY.replace("--workers 4", "--workers 2") + " --iterations 1"
    assert call(line + " --processes 24", tmp_path / "many") == 0 and set(seen) == {2}
    assert call(line + " --processes 1", tmp_path / "one") == 0 and seen[-2:] == [0, 0]
    assert call(f"--eval {tmp_path / 'one'} --updates 0 --processes 3") == 0 and seen[-1] == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})  # as taskset sets it
    assert esmeta.Crew().processes == 3


def test_system_an_error_of_a_job_is_raised_as_it_is(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    for processes, draws in (1, None), (2, "off"):
        with pytest.raises(ZeroDivisionError), esmeta.Crew(processes) as crew:
            assert crew.map(os.getenv, [("MUJOCO_GL",)] * 2) == [draws] * 2
            crew.map(divmod, [(1, 0)] * 2)


def test_system_a_run_is_by_default_in_a_folder_of_its_task_and_seed(monkeypatch):
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)  # an iteration takes 1 s
    assert call(TINY + " --seed 7 --iterations 3 --processes 1") == 0
    assert esmeta.load_checkpoint("runs/point_goal-seed7")[0].seed == 7
    rows = csv.DictReader(open("runs/point_goal-seed7/log.csv"))
    assert [row["seconds"] for row in rows] == ["1"] * 3


def test_system_what_a_run_directory_holds(run_of_4):
    rows = list(csv.DictReader((run_of_4 / "log.csv").open()))
    assert ",".join(rows[0]) == ("iteration,return_before,return_explorers,return_after,"
                                 "critic_error,sigma_actor,update_ratio,env_steps,seconds")
    config = dataclasses.asdict(esmeta.make_config(
        "point_goal", workers=4, rollouts=4, goals=1, critic_updates=2, batch=8, momentum=0.5,
        weight_decay=0.01))
    assert json.loads((run_of_4 / "config.json").read_text()) == config
    with np.load(run_of_4 / "checkpoint.npz", allow_pickle=False) as archive:  # so: no pickles
        stored = json.loads(str(archive["config"]))
        assert {*archive} == {*esmeta.MetaState._fields, "config"} and archive["iteration"] == 4
        assert archive["env_steps"] == int(rows[-1]["env_steps"])
    assert stored == {"version": 3, "config": config}
    assert sorted(os.listdir(run_of_4)) == ["checkpoint.npz", "config.json", "log.csv"]


def test_system_eval_is_one_table_for_any_process_count(copy, capsys):
    before, seen = bits(copy), []
    for path, processes in (copy, 1), (copy / "checkpoint.npz", 2):
        assert call(f"--eval {path} --updates 2 --processes {processes}") == 0
        seen.append((capsys.readouterr().out, (copy / "eval.csv").rename("seen").read_text()))
    assert seen[0] == seen[1] and bits(copy) == before
    rows = list(csv.DictReader(io.StringIO(seen[0][1])))
    assert list(rows[0]) == ["task", "goal", "updates", "return"]
    assert [row["updates"] for row in rows] == ["0"] * 40 + ["1"] * 40 + ["2"] * 40
    told = [[float(x) for x in row["goal"].split()] for row in rows]
    close(told, np.tile(tasks.test_goals("point_goal"), (3, 1)), 1e-5)
    x = np.array([float(row["return"]) for row in rows]).reshape(3, 40)
    name, shown = seen[0][0].split(", mean return before and after each update:")
    assert name == "point_goal"
    np.testing.assert_allclose([*map(float, shown.split())], x.mean(axis=1), rtol=0, atol=0.06)


def test_system_meta_test_on_any_goals_with_any_number_of_explorers(copy, capsys):
    four = tasks.test_goals("point_goal")[:4]
    returns, eight = esmeta.meta_test(copy, four), esmeta.meta_test(copy, four, rollouts=8)
    assert returns.shape == (2, 4) and np.isfinite(returns).all()
    for path, goals, other in ((copy, four[:2], dict(rollouts=20)),  # MAML's; trained with 4
                               (copy / "checkpoint.npz", four, dict(updates=0))):
        again = esmeta.meta_test(path, goals, **other)
        np.testing.assert_array_equal(again, returns[: len(again), : len(goals)])
    for other in eight, esmeta.meta_test(copy, four, seed=1):
        assert (other[1] != returns[1]).all()
    before, after = esmeta.meta_test(copy, four[[0, 0]])  # each has explorers of its own
    assert before[0] == before[1] and after[0] != after[1]
    assert call(f"--eval {copy} --processes 1 --rollouts 8") == 0
    rows = list(csv.DictReader((copy / "eval-K8.csv").open()))
    assert len(rows) == 80
    close([float(row["return"]) for row in rows[40:44]], eight[1], 1e-5)
    assert call(f"--eval {copy} --rollouts 7") == 2 and "even" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("name, k, shape, wrong", [
    ("point_goal", 20, "(n, 2)", (1.5, [1.5], [0.1, 0.2], np.ones((2, 20)), [[0.1, math.inf]])),
    ("ant_dir", 40, "(n,)", (1.5, [], [[1.5]], np.ones((2, 20)), [math.nan], [math.inf]))])
def test_system_meta_test_takes_mamls_k_and_names_the_goals_it_takes(
        name, k, shape, wrong, tmp_path, monkeypatch):
    config = small_config(task=name)
    esmeta.save_checkpoint(tmp_path / "checkpoint.npz", config, esmeta.initial_state(config))
    for goals, updates in (*((goals, 1) for goals in wrong), (None, -1)):
        with pytest.raises(ValueError, match=re.escape(shape) + "|NaNs") as caught:
            esmeta.meta_test(tmp_path, goals, updates)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(esmeta, "evaluate_goal", lambda config, *_: ([config.rollouts], None))
    assert esmeta.meta_test(tmp_path).tolist() == [[k] * 40]


def test_system_help_shows_every_default_with_its_provenance(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # a help text is one line
    assert call("--help") == 0
    text = re.sub(r"\n {4,}", " ", capsys.readouterr().out)
    groups = dict(re.findall(r"\n([a-z ]+):\n((?:  .+\n)+)", text))
    assert list(groups)[-4:] == ["run", "outer loop", "exploration", "inner loop"]
    helps = {(group, line.split()[0]): line for group, lines in groups.items()
             for line in lines.splitlines()}
    for name, field in FIELDS.items():
        text = helps[field.metadata["group"], "--" + name.replace("_", "-")]
        assert f"(default {field.default}" in text and field.metadata["help"] in text
        assert re.search(r"\((paper|ours)\)$", text)[1] == field.metadata["source"]
        for whose, own in (*esmeta.TASK_SETTINGS.items(), ("--paper", esmeta.PAPER)):
            assert name not in own or f"; {whose} {own[name]}" in text
    for flag in "iterations processes out updates pool".split():
        assert "default" in helps["run", "--" + flag], flag


def section(file, heading):
    """Lines of a Markdown file from a heading of level 2 to the next."""
    text = (HERE / file).read_text().split(f"\n## {heading}\n", 1)[1]
    return text.split("\n## ", 1)[0].splitlines()


def test_system_readme_lists_the_differences_from_the_paper():
    """A numbered line for each `config.paper` in esmeta.py, in order, that names its function."""
    program = ast.parse(Path(esmeta.__file__).read_text())
    found = [part.name for part in program.body if isinstance(part, ast.FunctionDef)
             for node in ast.walk(part)
             if isinstance(node, ast.Attribute) and ast.unparse(node) == "config.paper"]
    listed = [line for line in section("README.md", "Differences from the paper")
              if re.match(r"\d+\. ", line)]
    assert [line.split(".")[0] for line in listed] == [str(i + 1) for i in range(len(found))]
    for line, function in zip(listed, found):
        assert function in re.findall(r"`(\w+)`", line), line


def test_system_readme_example_prints_one_number_twice():
    program = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    text, error = start("-c", program).communicate()
    formula, difference = map(float, text.split())
    assert error == "" and formula == pytest.approx(difference, rel=1e-6)


def test_system_readme_own_task(monkeypatch):
    """README's class decides the reward; goals from 0.3 on, so that goal_low is not 0."""
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    exec((HERE / "README.md").read_text().split("```python\n")[2].split("```")[0], {**vars(tasks)})
    tasks.TASKS["slow"] = tasks.TASKS["slow"]._replace(goal_low=0.3)
    envs = tasks.make_vec("slow", 2, goal=0.5)
    envs.reset(seed=0, options={"goal": [0.4, 0.4]})  # before the fixed one
    _, reward, _, _, info = envs.step(np.full((2, 6), 0.5))
    close(reward, -np.abs(info["x_velocity"] - 0.4) - 0.5 * 6 * 0.25)
    close(tasks.spread_goals("slow", np.random.default_rng(0), 4) // 0.05, range(6, 10))
    data = make_data(DIMS, 0)._replace(reward=np.full((6, 3), -0.03))
    for low, step in (0.3, 0.5 * 4 * 0.03 / 0.2), (0.5, 0.5):  # one goal has no range to count in
        tasks.TASKS["slow"] = tasks.TASKS["slow"]._replace(goal_low=low)
        close(esmeta.config_of_update(0, data, small_config(task="slow")).actor_step, step)


def test_system_point_goal_learns(tmp_path):
    line = "--task point_goal --workers 32 --rollouts 10 --iterations 20"
    assert call(line, tmp_path / "run") == 0
    rows = np.array([[*map(float, row.split(","))] for row in log_rows(tmp_path / "run")])
    before, after = rows[-3:, [1, 3]].mean(axis=0)
    assert after > before + 2  # it adapts; before, it stands still, for -17; first, after is -110


# ---- faults ------------------------------------------------------------------------------------


def group(pgid):
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end while we look
            state, _, own, *_ = stat.read_text().rpartition(")")[2].split()
            found += [int(stat.parent.name)] * (state != "Z" and int(own) == pgid)
    return found


def wait_until(condition, seconds=300):
    """Poll until a condition holds; fail if it does not within seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def iteration_of(out):
    """Iterations in a run's log, 0 where there is none."""
    return len(log_rows(out)) if (out / "log.csv").exists() else 0


def test_fault_killed_pool_workers_change_no_bit(tmp_path, monkeypatch, capsys):
    # (rows in the log, when, which): of the idle, one holds the job queue's lock
    kills, out = [(0, "works", 0), (2, "saves", 0), (3, "saves", 1), (4, "works", 0),
                  (4, "works", 1)], tmp_path / "run"

    def kill(when):
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid)
        assert len(children) <= 2  # none of a pool that was given up
        while children and kills and kills[0][:2] == (iteration_of(out), when):
            os.kill(children[kills.pop(0)[2]].pid, signal.SIGKILL)

    save = esmeta.save_checkpoint
    monkeypatch.setattr(esmeta, "save_checkpoint", lambda *a: kill("saves") or save(*a))
    monkeypatch.setattr(esmeta, "stop_if_asked", lambda: kill("works"))
    assert call(SLOW + " --iterations 5 --processes 2", out) == 0
    assert not kills and not multiprocessing.active_children()
    assert all(thread.daemon for thread in threading.enumerate()[1:])  # what else would not end
    assert bits(tmp_path / "run") == undisturbed(tmp_path / "quiet", 5, SLOW)
    assert capsys.readouterr().err == ""


def test_fault_job_that_kills_its_worker_stops_the_run(tmp_path, monkeypatch, capsys):
    crew_map, start_pool, made = esmeta.Crew.map, esmeta.Crew.open, []

    def deadly_map(self, function, jobs):
        if jobs[0][1].iteration == 1:
            function, jobs = os._exit, [(1,)] * 3
        return crew_map(self, function, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(esmeta.Crew, "map", deadly_map)
        patch.setattr(esmeta.Crew, "open", lambda *a: made.append(0) or start_pool(*a))
        assert call(TINY + " --iterations 4 --processes 3", tmp_path / "run") == 1
    assert "three" in one_line(capsys.readouterr().err) and len(made) == 3
    assert not multiprocessing.active_children()
    assert bits(tmp_path / "run") == undisturbed(tmp_path / "quiet", 1)


def test_fault_a_pool_ends_its_own_processes_only(tmp_path, monkeypatch):
    def launch_one():
        if not LAUNCHED:  # while a pool is open
            context = multiprocessing.get_context("spawn")
            LAUNCHED.append(context.Process(target=time.sleep, args=(600,)))
            LAUNCHED[0].start()

    monkeypatch.setattr(esmeta, "stop_if_asked", launch_one)
    assert call(TINY + " --iterations 2 --processes 2", tmp_path / "run") == 0
    assert multiprocessing.active_children() == LAUNCHED


@pytest.mark.parametrize("processes", [(1, 1), (2, 1), (2, 2)])
def test_fault_trainings_in_two_threads_do_not_touch_each_other(processes, tmp_path):
    def train(seed):
        for n in 1, 3:  # a pool ends while the other works
            esmeta.train(configs[seed], n, processes[seed], f"run{seed}", resume=n > 1)

    configs = [small_config(seed=seed) for seed in (0, 1)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(train, (0, 1)))
    assert not multiprocessing.active_children()
    for seed in 0, 1:
        assert esmeta.train(configs[seed], 3, 1, f"quiet{seed}").iteration == 3
        assert bits(tmp_path / f"run{seed}") == bits(tmp_path / f"quiet{seed}")


UNGUARDED = """
import esmeta
config = esmeta.make_config("point_goal", workers=2, rollouts=4)
esmeta.train(config, 2, processes=2, out="run")
"""


@pytest.mark.parametrize("source", ["script.py", "-"])
def test_fault_script_without_a_guard_is_told_so(source, tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    process = start(source, stdin=open("script.py"))
    output, error = process.communicate(timeout=300)
    assert process.returncode == 1 and output == ""
    wait_until(lambda: not group(process.pid))
    assert "if __name__ ==" in error.splitlines()[-1], error


def test_fault_signal_while_a_checkpoint_is_written_waits(tmp_path, monkeypatch, capfd):
    replace, handlers = os.replace, [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or replace(*a))
        assert call(TINY + " --iterations 9 --processes 1", tmp_path / "run") == 143
    assert "--resume" in one_line(capfd.readouterr().err) and not esmeta.SIGNALS
    assert [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))] == handlers
    assert iteration_of(tmp_path / "run") == 0
    assert undisturbed(tmp_path / "run", 1) == undisturbed(tmp_path / "quiet", 1)


@pytest.mark.parametrize("signum, send, delay, processes", [  # None: among the iterations
    (signal.SIGTERM, os.kill, None, 2), (signal.SIGINT, os.killpg, None, 2),  # as Ctrl-C does
    (signal.SIGINT, os.killpg, 0.1, 2), (signal.SIGINT, os.kill, None, 1)])  # workers start
def test_fault_interrupted_run_stops_cleanly(signum, send, delay, processes, tmp_path):
    out = tmp_path / "run"
    process = launch(f"{TINY} --iterations 9999 --processes {processes}", out)
    wait_until(lambda: len(group(process.pid)) >= 3 if delay else iteration_of(out) >= 2)
    if processes == 1:
        assert group(process.pid) == [process.pid]  # it starts none, and no thread for BLAS
        assert len([*Path(f"/proc/{process.pid}/task").iterdir()]) == 1
    time.sleep(delay or 0)
    send(process.pid, signum)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 128 + signum and "--resume" in one_line(error)
    wait_until(lambda: not group(process.pid))
    n = esmeta.load_checkpoint(out)[1].iteration
    assert (n >= 2 or delay) and not list(out.glob("*.tmp"))
    assert undisturbed(out, n + 1) == undisturbed(tmp_path / "quiet", n + 1)


def test_fault_main_process_killed_8_times(tmp_path):
    out, rng, groups, printed = tmp_path / "run", np.random.default_rng(3), [], ""
    for kill in range(8):
        known, resume = iteration_of(out), " --resume" * (out / "checkpoint.npz").exists()
        process = launch(f"{TINY} --iterations 9999 --processes {1 + kill // 4}{resume}", out)
        if kill % 4:  # in the iterations that follow the first
            wait_until(lambda: process.poll() is not None or iteration_of(out) > known + kill)
        elif kill:  # while its pool starts
            wait_until(lambda: len(group(process.pid)) >= 3)
        time.sleep(rng.uniform(0, 0.1) if kill else 0.5)  # 0: before the first checkpoint, mostly
        assert process.poll() is None, process.stderr.read()
        process.kill()
        printed += process.communicate()[0]
        groups.append(process.pid)
    n = esmeta.load_checkpoint(out)[1].iteration + 2
    assert printed.count("\n") >= n - 10 > 0  # each kill may come between a checkpoint and its line
    assert undisturbed(out, n) == undisturbed(tmp_path / "quiet", n)
    wait_until(lambda: not any(map(group, groups)))  # orphaned workers end by themselves


@pytest.mark.parametrize("writes", [0, 1, 2, 4])
def test_fault_full_disk(writes, copy, tmp_path, monkeypatch, capsys):
    left, before, write = [None] * writes, bits(copy), Path.write_bytes

    def write_bytes(path, content):
        if not left:
            write(path, content[: len(content) // 2])
            raise (OSError if writes else MemoryError)(28, "No space left on device")
        left.pop()
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        assert call(TINY + " --iterations 9 --processes 1 --resume", copy) == 1
    assert "No space left" in one_line(capsys.readouterr().err)
    # 4: room for checkpoint, config, log and the next checkpoint; then one more row is in the log
    assert iteration_of(copy) == 6 if writes == 4 else bits(copy)[0] == before[0]
    assert undisturbed(copy, 7) == undisturbed(tmp_path / "quiet", 7)


@pytest.mark.parametrize("line", [f"{TINY} --iterations 0 --out new", "--eval run"])
@pytest.mark.parametrize("to, status", [("> /dev/full", 1), ("| true", 1), (">&-", 0)])
def test_fault_output_that_nobody_takes(line, to, status, copy):
    program = shlex.join([sys.executable, esmeta.__file__, *line.split(), "--processes", "1"])
    process = subprocess.run(["bash", "-o", "pipefail", "-c", f"{program} {to}"], text=True,
                             stderr=subprocess.PIPE)
    assert process.returncode == status
    assert "Errno" in one_line(process.stderr) if status else process.stderr == ""


def test_fault_non_finite_fitness_is_told_and_ends_a_run(tmp_path, monkeypatch, capsys):
    out, bad = tmp_path / "run", [1]
    monkeypatch.setattr(esmeta.Crew, "map", lambda self, *args: InProcess(bad).map(*args))
    assert call(TINY + " --iterations 2", out) == 0
    assert capsys.readouterr().out.count(" failed 1 ") == 2
    before, bad = bits(out), range(4)
    assert call(TINY + " --iterations 4 --resume", out) == 1  # all workers: the end
    assert "finite" in one_line(capsys.readouterr().err) and bits(out) == before


# ---- bad input ---------------------------------------------------------------------------------


@pytest.fixture
def refused(copy, tmp_path, monkeypatch, capsys):
    """A function that checks that a command line is refused, without a trace: -> its one line."""
    (tmp_path / "folder" / "checkpoint.npz").mkdir(parents=True)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "none").mkdir()
    monkeypatch.setattr(esmeta.Crew, "map", lambda *a: pytest.fail("it started to work"))

    def tree():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def check(line):
        before = tree()
        assert call(line) == 2
        seen = capsys.readouterr()
        assert seen.out == "" and tree() == before and len(seen.err) < 500
        return one_line(seen.err)
    return check


@pytest.mark.parametrize("name", [x for x in FIELDS if FIELDS[x].metadata["low"] is not None])
def test_input_has_limits_which_it_may_equal(name, refused):
    low, high = (FIELDS[name].metadata[end] for end in ("low", "high"))
    below, above, *nan = (low - 1, high + 1) if type(FIELDS[name].default) is int else (
        math.nextafter(low, -1), math.nextafter(high, math.inf), math.nan)
    for value in low, high:
        assert getattr(esmeta.Config(**{name: value}), name) == value
    for value in below, above, *nan:
        assert f"{name} must be from" in refused(f"--{name.replace('_', '-')}={value}")
    for value in True, None, str(low):
        with pytest.raises(ValueError, match=f"{name} must be of type"):
            esmeta.Config(**{name: value})


@pytest.mark.parametrize("line", [  # the message has what is between the stars
    "--task *walker*", "*--task*", "*walker*", "--*workers* 1e3", "--*seed* 1.5", "--*sigma* x",
    "--*rollouts* 5", "--*iterations* -1", "--*processes* 0", "--processes *1000000*",
    "*--updates* 3", "--pool *cloud*", "*--horizon* 0", "*--iter* 3", "--out *file*",
    "--*out* ''", "--resume --out *missing*", "--resume --out *file*", "--resume --out *folder*",
    "--eval *missing*", "--eval *none*", "--eval *file*", "--eval *folder*",
    "--eval *folder/checkpoint.npz*", "--eval run --*updates* -1", "--eval run --*processes* 0",
    "--eval run *--seed* 3", "--eval run *--actor-step* 2", "--eval run *--out* new",
    "--eval run *--paper*", "--eval run *--resume*", "--eval run *--pool* ray",
    "--eval run *--iterations* 5", "--eval run --*rollouts* 0", "--*gamma* 1", "--*momentum* 1",
    "--*sigma* 0", *(f"--*{name}* 0" for name in (
        "workers", "goals", "tests", "n-step", "cycles", "critic-updates", "batch"))])
def test_input_is_refused_in_one_line_that_names_it(line, refused):
    first, named, last = line.split("*")
    assert named.replace("-", "_") in refused(first + named + last).replace("-", "_")


@pytest.mark.parametrize("flags, word", [
    ("", "--resume"), ("--resume --seed 1", "another seed, 0"), ("--resume --workers 6", "workers"),
    ("--resume --actor-step 6", "actor_step"), ("--resume --paper", "paper"),
    ("--resume --task cheetah_vel", "task"), ("--pool ray", "pip install")])
def test_input_that_does_not_fit_the_run_or_the_machine(flags, word, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert word in refused(f"{TINY} --out run {flags}")


@pytest.mark.parametrize("left", ["config.json", "log.csv"])
def test_input_folder_without_a_checkpoint_is_refused(left, copy, refused):
    (copy / left).rename(f"none/{left}")
    for flags, word in ("", "taken"), ("--resume", "checkpoint.npz"):
        assert word in refused(f"{TINY} --iterations 0 --out none {flags}")


@pytest.mark.parametrize("damage", [  # of the lines
    lambda x: [x[0], *("0," + y for y in x[1:])], lambda x: [], lambda x: x[1:], lambda x: x[:-1],
    lambda x: x[:2] + x[3:], lambda x: x[:2] + x[1:], lambda x: [x[0], x[2], x[1], *x[3:]],
    lambda x: [*x[:3], x[3] + x[4]], lambda x: [*x[:3], "", *x[3:]],
    lambda x: [*x[:3], "\udcff\udc80", x[4]]])
def test_input_damaged_log_is_refused(damage, copy, refused):
    lines = damage((copy / "log.csv").read_text().splitlines())
    text = "".join(line + "\n" for line in lines)
    (copy / "log.csv").write_text(text, errors="surrogateescape")
    assert "log.csv" in refused(f"{TINY} --out run --resume --iterations 5")


@pytest.mark.parametrize("change", [
    lambda text: text[:-1], lambda text: text + "4,-1.5,-2", lambda text: text + text])
def test_input_log_with_another_end_loses_no_row(change, copy, tmp_path):
    text = (copy / "log.csv").read_text()
    (copy / "log.csv").write_text(change(text))
    assert undisturbed(copy, 5) == undisturbed(tmp_path / "quiet", 5)
    assert (copy / "log.csv").read_text().startswith(text)


BROKEN = {  # changes of a checkpoint's arrays (None: left out), version, fields of Config
    "pickle": dict(mu_actor=lambda x: np.array([print], dtype=object)),
    "no JSON": dict(config=lambda x: "{"), "a list": dict(config=lambda x: "[1]"),
    "no config": dict(config=None), "no sigma": dict(sigma_actor=None),
    "version 4": dict(version=4), "many": dict(iteration=lambda x: np.ones(2, int)),
    "unknown": dict(fields=dict(horizon=200)), "no such task": dict(fields=dict(task="walker")),
    "negative workers": dict(fields=dict(workers=-4)), "a float": dict(fields=dict(workers=4.0)),
}


@pytest.mark.parametrize("name", [*BROKEN, "empty", "text"])
def test_input_broken_checkpoint_is_refused(name, copy, refused):
    change, path = BROKEN.get(name, {}), copy / "checkpoint.npz"
    arrays = dict(np.load(path))
    stored = json.loads(str(arrays["config"]))
    stored["config"] |= change.get("fields", {})
    arrays["config"] = json.dumps(stored | {"version": change.get("version", esmeta.VERSION)})
    for key in arrays.keys() & change.keys():
        arrays[key] = change[key] and change[key](arrays[key])
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    if name not in BROKEN:
        path.write_text("iteration,return_before" * (name == "text"))
    for line in "--eval run", "--eval run/checkpoint.npz", f"{TINY} --out run --resume":
        assert (name if name == "version 4" else "checkpoint") in refused(line)


@settings(max_examples=60)
@given(data=st.data())
def test_input_flipped_and_cut_checkpoints_load_equal_or_are_refused(run_of_4, data):
    good, path = (run_of_4 / "checkpoint.npz").read_bytes(), run_of_4.parent / "changed.npz"
    # most bytes are numbers, which a CRC guards: look more often at the headers around them
    near = st.sampled_from([at for at in range(len(good)) if good[at : at + 2] == b"PK"])
    place = st.integers(0, len(good) - 1) | st.tuples(near, st.integers(0, 250)).map(sum)
    changed = bytearray(good)
    for at, flip in data.draw(st.lists(st.tuples(place, st.integers(1, 255)), max_size=3)):
        changed[min(at, len(good) - 1)] ^= flip
    first, last = sorted(data.draw(st.just((0, 0)) | st.tuples(place, place)))
    del changed[first:last]
    path.write_bytes(changed)
    try:
        loaded = esmeta.load_checkpoint(path)
    except ValueError as error:
        assert str(error).isprintable()
    else:
        np.testing.assert_equal(loaded, esmeta.load_checkpoint(run_of_4))


# ---- ray, which may be missing; launcher ---------------------------------------------------------


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


def test_ray_joins_a_running_cluster_with_no_cores_of_its_own(monkeypatch):
    fake = unittest.mock.MagicMock()
    fake.is_initialized.return_value = False
    for name in "ray", "ray.util", "ray.util.multiprocessing":
        monkeypatch.setitem(sys.modules, name, fake)
    for environment, cpus in ({}, 3), ({"RAY_ADDRESS": "b:2"}, None):  # Ray refuses both
        monkeypatch.setattr(os, "environ", environment)
        crew = esmeta.Crew(3)
        crew.kind = "ray"
        crew.open(3)
        assert fake.init.call_args.kwargs["num_cpus"] == cpus
        fake.Pool.assert_called_with(3)


def test_ray_pool_gives_the_bits_of_the_local_one_and_no_alarm(ray, tmp_path):
    cheetah = TINY.replace("point_goal --workers 4", "cheetah_vel --workers 2")
    for line, n in (TINY, 3), (cheetah, 1):
        process = launch(f"{line} --iterations {n} --processes 2 --pool ray", tmp_path / f"ray{n}")
        output, error = process.communicate(timeout=600)
        assert process.returncode == 0 and output.startswith(f"1/{n} "), error
        assert not re.search("unexpected|died|killed", output + error), error
        assert bits(tmp_path / f"ray{n}") == undisturbed(tmp_path / f"local{n}", n, line)
    process = launch(f"{TINY} --iterations 9999 --processes 2 --pool ray", tmp_path / "run")
    wait_until(lambda: iteration_of(tmp_path / "run"))
    process.terminate()
    assert "--resume" in process.communicate(timeout=600)[1] and process.returncode == 143


def test_ray_actor_killed_in_an_iteration_changes_no_bit(ray, tmp_path, monkeypatch):
    crews, killed, start_pool = [], [], esmeta.Crew.open

    def kill_one():
        if not killed:
            killed.append(crews[0].pool._actor_pool[0][0])
            ray.kill(killed[0])

    monkeypatch.setattr(esmeta.Crew, "open", lambda *a: crews.append(a[0]) or start_pool(*a))
    monkeypatch.setattr(esmeta, "stop_if_asked", kill_one)
    assert call(SLOW + " --iterations 3 --pool ray --processes 2", tmp_path / "run") == 0
    assert killed and bits(tmp_path / "run") == undisturbed(tmp_path / "quiet", 3, SLOW)


PYTHON = f"""#!/bin/sh
[ "$2" = venv ] || exec {shlex.quote(sys.executable)} "$@"
{shlex.quote(sys.executable)} -m venv --without-pip "$3"
cd "$3"/lib/python3*/site-packages
echo 'import os, sys; print(os.getcwd(), *sys.argv[1:], sep="|")' > pytest.py
echo '
import sys
if __name__ == "__main__":
    print(sys.argv[-1], file=open(sys.prefix + "/asked", "a"))
    sys.exit("no such" in open(sys.argv[-1]).read())' > pip.py
"""


def test_launcher_uses_its_own_folder_and_makes_a_broken_environment_anew(tmp_path, monkeypatch):
    """The python3 on the PATH makes environments whose pip notes the last word that it is told."""
    home, venv, python = tmp_path / "home", tmp_path / "home/.venv", tmp_path / "bin/python3"
    asked = venv / "asked"
    for folder in home, python.parent, tmp_path / "links", tmp_path / "decoy/home":
        folder.mkdir(parents=True)
    shutil.copy(HERE / "run.sh", home)
    (home / "requirements.txt").write_text("# old")
    (home / "esmeta.py").write_text("import os, pip, sys; print(os.getpid(), os.path.exists("
                                    "'/proc/self/fd/9'), *sys.argv[1:], sep='|')")
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")

    def launches(script):  # the program takes over the process of run.sh, not its lock
        process = subprocess.Popen([script, "a  b", "c"], stdout=subprocess.PIPE, text=True)
        return process.communicate()[0] == f"{process.pid}|False|a  b|c\n"

    assert launches(home / "run.sh")
    (tmp_path / "links/second").symlink_to("../home/run.sh")
    (tmp_path / "first").symlink_to(tmp_path / "links/second")
    assert launches("./first")
    monkeypatch.setenv("CDPATH", str(tmp_path / "decoy"))  # where cd would go to home
    assert launches("home/run.sh") and asked.read_text() == f"{home}/requirements.txt\n"
    tested = subprocess.run(["./first", "test", "-k", "a  b"], stdout=subprocess.PIPE, text=True)
    assert tested.stdout == f"{home}|-q|-k|a  b\n"
    (home / "requirements.txt").write_text("no such package")
    assert not launches("./first") and not launches("./first")
    assert asked.read_text().count("\n") == 3
    (home / "requirements.txt").write_text("# new")
    assert launches("./first") and asked.read_text().count("\n") == 4
    next(venv.glob("lib/python3*")).rename(venv / "lib/python3.1")  # as if Python had moved on
    assert launches(home / "run.sh")
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/gone/python")
    fcntl.flock(lock := os.open(home, os.O_RDONLY), fcntl.LOCK_EX)  # as another launch does
    waiting = subprocess.Popen(["./first"])
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    os.close(lock)
    assert waiting.wait() == 0 and launches(home / "run.sh")
    python.write_text("#!/bin/sh\n[ \"$2\" != venv ] || { echo why; exit 1; }")
    shutil.rmtree(venv)
    failed = subprocess.run(["./first"], stderr=subprocess.PIPE, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("why\nrun.sh: ")
