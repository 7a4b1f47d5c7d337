"""Tests: networks, DDPG, NES; the tasks; the system, its faults, its input; Ray.

A test is worth what it catches: each group was tried on deliberately wrong versions of the code.
"""
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import unittest.mock
import warnings
import zipfile
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
from results import ablate, gain, table

SEED = st.integers(0, 2**32 - 1)
SMALL = st.builds(Dims, st.integers(1, 4), st.integers(1, 3), st.integers(2, 4))
REAL = st.builds(Dims, st.integers(9, 30), st.integers(5, 9), st.integers(31, 100))
settings.register_profile("untimed", deadline=None, derandomize=True)  # busy: no failure
settings.load_profile("untimed")
quick = settings(max_examples=15)


BASE = dict(task="point_goal", obs_clip=5.0, gamma=0.97, n_step=3, centre=True, actor_rule="sigma",
            antithetic=True, utility="rank", natural=True, correlation=0.5, half_life=0.0,
            own_credit=0.0)


def make_config(**fields):
    """A config that other defaults would not change."""
    return esmeta.Config(**{**BASE, **fields})


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
    return esmeta.Trajectories(obs, action, reward, terminated, valid)


def close(a, b, tolerance=1e-7):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def numeric_gradient(f, x, steps=None):
    """Central differences of f, which returns a value and its ReLU pattern, along x's axes."""
    changes = []
    for step in np.eye(x.size).reshape(-1, *x.shape) if steps is None else steps:
        (above, pattern), (below, other) = f(x + 1e-6 * step), f(x - 1e-6 * step)
        if not np.array_equal(pattern, other):
            assume(False)  # a kink lies between
        changes.append((above - below) / 2e-6)
    return np.reshape(changes, x.shape if steps is None else -1)


def check_gradient(gradient, f, x):
    """Each coordinate where they are few, else one random direction."""
    if x.size < 200:
        return close(gradient, numeric_gradient(f, x))
    v = np.random.default_rng(x.size).standard_normal((1, *x.shape))
    return close([np.sum(gradient * v)], numeric_gradient(f, x, v), 1e-6)


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
@given(SMALL | REAL, SEED)
def test_forwards_and_backwards(dims, seed):
    theta, phi, obs, action = make_nets(dims, seed)
    rng = np.random.default_rng(seed)
    d_action, d_q = rng.standard_normal(action.shape), rng.standard_normal(len(obs))

    def actor_score(theta):
        out, pattern = plain_actor(theta, obs, dims)
        return np.sum(d_action * out), pattern

    def critic_score(phi, action):
        q, pattern = plain_critic(phi, obs, action, dims)
        return d_q @ q, pattern

    out, cache = esmeta.actor_forward(theta, obs, dims)
    close(out, plain_actor(theta, obs, dims)[0], 1e-12)
    d_theta, again = (esmeta.actor_backward(d_action, cache) for _ in range(2))
    check_gradient(d_theta, actor_score, theta)
    assert not np.may_share_memory(d_theta, again)  # fresh arrays
    q, cache = esmeta.critic_forward(phi, obs, action, dims)
    close(q, plain_critic(phi, obs, action, dims)[0], 1e-12)
    (d_phi, d_a), again = (esmeta.critic_backward(d_q, cache) for _ in range(2))
    assert not any(map(np.may_share_memory, (d_phi, d_a), again))
    check_gradient(d_phi, lambda x: critic_score(x, action), phi)
    check_gradient(d_a, lambda x: critic_score(phi, x), action)


@quick
@given(SMALL, SEED, st.integers(1, 4), st.integers(1, 3))
def test_many_actors_at_once_equal_single_ones(dims, seed, k, rows):
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((k, esmeta.actor_size(dims)))
    obs = rng.standard_normal((k, rows, dims.obs))
    singles = np.stack([plain_actor(*pair, dims)[0] for pair in zip(theta, obs)])
    close(esmeta.actor_forward(theta, obs, dims)[0], singles, 1e-12)
    policy = esmeta.make_policy(theta, rows, dims)
    for _ in range(2):  # its arrays are reused
        out = np.empty((k * rows, dims.act))
        policy(obs.reshape(-1, dims.obs), out)
        close(out, singles.reshape(-1, dims.act), 1e-12)


def test_sizes_xavier_weights_and_zero_biases():
    # the sizes do not tell where the action joins, test_forwards_and_backwards does
    assert esmeta.actor_size(Dims(20, 6)) == 12806 and esmeta.critic_size(Dims(20, 6)) == 12901
    o, a, h = dims = Dims(50, 30, 40)
    for own_shapes, size, shapes in (
            (esmeta.actor_shapes, esmeta.actor_size, ((o, h), (h,), (h, h), (h,), (h, a), (a,))),
            (esmeta.critic_shapes, esmeta.critic_size,
             ((o, h), (h,), (h + a, h), (h,), (h, 1), (1,)))):
        flat = esmeta.xavier(own_shapes(dims), np.random.default_rng(0))
        assert flat.shape == (size(dims),)
        layers = split(flat, *shapes)
        for weights, bias in zip(layers[::2], layers[1::2]):
            bound = math.sqrt(6 / sum(weights.shape))
            assert 0.9 * bound < np.abs(weights).max() <= bound and not bias.any()
            assert abs(weights.mean()) < 5 * bound / math.sqrt(3 * weights.size)


def arrays(tree):
    """Every array and NumPy scalar in nested tuples and lists."""
    if isinstance(tree, (tuple, list)):
        return [leaf for branch in tree for leaf in arrays(branch)]
    return [tree] if isinstance(tree, (np.ndarray, np.generic)) else []


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("rule", ["sigma", "sgd"])
def test_formulas_keep_the_dtype_and_their_arguments(monkeypatch, dtype, rule):
    """Every call inside adapt, critic_error and ascend; a silent promotion costs but time."""
    calls = set()

    def strict(name, function):
        def checked(*args):
            before = [array.copy() for array in arrays(args)]
            out = function(*args)
            calls.add(name)
            assert {a.dtype for a in arrays([args, out]) if a.dtype.kind == "f"} <= {dtype}, name
            if name not in ("adam_step", "fit_critic"):  # these move Adam in place
                assert all(map(np.array_equal, before, arrays(args))), name
            if not name.endswith("forward"):  # a cache refers to the arguments
                pairs = itertools.product(arrays(out), arrays(args))
                assert not any(itertools.starmap(np.may_share_memory, pairs)), name
            return out
        return checked

    names = ["actor_forward", "actor_backward", "critic_forward", "critic_backward",
             "critic_layer2_gradient", "nstep_targets", "critic_targets", "fit_critic",
             "state_values",
             "policy_gradient", "step_actor", "adapt", "summed_gradient", "natural_gradient"]
    for name in names:
        monkeypatch.setattr(esmeta, name, strict(name, getattr(esmeta, name)))
    monkeypatch.setattr(esmeta, "adam_step", strict("adam_step", esmeta.adam_step))
    dims, config = Dims(3, 2, 4), make_config(cycles=2, critic_updates=2, actor_rule=rule)
    theta, phi, _, _ = make_nets(dims, 0, dtype=dtype)
    data, sigma = make_data(dims, 0, dtype=dtype), np.full_like(theta, 0.1)
    theta, phi = esmeta.adapt(theta, phi, data, sigma, config, dims, np.random.default_rng(0))
    assert math.isfinite(esmeta.critic_error(theta, phi, data, data.reward[0, 0], config, dims))
    eps = np.random.default_rng(0).standard_normal((4, len(theta)), dtype)
    new = esmeta.ascend(theta, sigma, eps, eps**2, np.arange(4.0), 1, 0.0, 1.0, 1.0, config)
    assert [part.dtype for part in new] == [dtype, dtype]
    assert calls == {*names, "adam_step"}


# ---- DDPG ----------------------------------------------------------------------------------------


def plain_targets(reward, terminated, value, gamma, n):
    """n-step targets by their definition: the horizon bootstraps, a termination does not."""
    y = np.zeros(reward.shape)
    for t, i in np.ndindex(y.shape):
        for step in range(n + 1):
            if step == n or t + step == len(reward):  # n rewards or the horizon: bootstrap
                y[t, i] += gamma**step * value[t + step, i]
                break
            y[t, i] += gamma**step * reward[t + step, i]
            if terminated[t + step, i]:
                break
    return y


@quick
@given(SEED, st.integers(1, 7), st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.97]),
       st.sampled_from([0.0, 0.2, 1.0]))
def test_nstep_targets_equal_a_plain_loop(seed, horizon, n, gamma, ends):
    rng = np.random.default_rng(seed)
    args = rng.normal(size=(horizon, 2)), rng.random((horizon, 2)) < ends, rng.normal(
        size=(horizon + 1, 2)), gamma, n
    close(esmeta.nstep_targets(*args), plain_targets(*args), 1e-12)


@quick
@given(SEED, st.sampled_from([1, 3, 30]), st.sampled_from([0.0, 0.3]), st.booleans())
def test_critic_error_and_targets_equal_plain_loops(seed, n, ends, centre):
    """Centring moves Q by b = mean / (1 - gamma), wherever a target ends, and nothing else."""
    dims, config = Dims(3, 2, 4), make_config(n_step=n, centre=centre, gamma=0.9)
    theta, phi, _, _ = make_nets(dims, seed)
    data = make_data(dims, seed, ends)
    value = np.stack([plain_critic(phi, s, plain_actor(theta, s, dims)[0], dims)[0]
                      for s in data.obs])
    b = data.reward[data.valid].mean() / (1 - 0.9) if centre else 0.0

    def targets(data):
        values = esmeta.state_values(theta, phi, data.obs, dims)
        return esmeta.critic_targets(values, data, esmeta.mean_reward(data, config), config)

    target = plain_targets(data.reward, data.terminated, value + b, 0.9, n) - b
    close(targets(data)[data.valid], target[data.valid])
    if centre and not ends:  # a constant reward is forgotten, where it cannot be lost by an end
        more = data._replace(reward=data.reward + 7)
        close(targets(more), target)
    errors = [(plain_critic(phi, data.obs[t, i : i + 1], data.action[t, i : i + 1], dims)[0][0]
               - target[t, i]) ** 2 for t, i in np.argwhere(data.valid)]
    offset = esmeta.mean_reward(data, config)
    close(esmeta.critic_error(theta, phi, data, offset, config, dims), np.mean(errors))
    part = data.part(1, 3)
    close(part.returns(), np.where(data.valid, data.reward, 0).sum(axis=0)[1:])
    assert np.array_equal(part.rows(part.action), part.action[part.valid])


def test_adam_equals_the_published_algorithm():
    rng, m, v = np.random.default_rng(0), 0, 0
    moments, expected = np.zeros((2, 6)), rng.standard_normal(6)
    weights = expected.copy()
    gradients = rng.standard_normal((9, 6)) * 10.0 ** np.arange(-9, 3, 2)  # its eps counts or not
    for t, g in enumerate(gradients, start=1):
        esmeta.adam_step(weights, g, *moments, t, 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = expected - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        close(weights, expected, 1e-12)


@quick
@given(SMALL, SEED)
def test_fit_critic_descends_the_semi_gradient(dims, seed):
    theta, phi, _, _ = make_nets(dims, seed)
    data, config = make_data(dims, seed, ends=0), make_config(n_step=1, gamma=0.9, centre=False)
    obs, action = data.obs[:-1][data.valid], data.action[data.valid]
    rows = np.random.default_rng(seed).integers(len(obs), size=(2, 5))

    def targets(x):
        value = esmeta.state_values(theta, x, data.obs, dims)
        return esmeta.critic_targets(value, data, 0.0, config)[data.valid]

    def loss(x, batch, y):
        q, pattern = plain_critic(x, obs[batch], action[batch], dims)
        return np.mean((q - y[batch]) ** 2), pattern

    def plain_step(weights, gradient, m, v, t, lr):  # Adam would hide the gradient's scale
        weights -= lr * t * gradient

    y, expected, gradients = targets(phi), phi, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(esmeta, "adam_step", plain_step)
        fitted = esmeta.fit_critic(phi, obs, action, y, rows, 0.01, dims)
    for t, batch in enumerate(rows, start=1):  # y stays as it was before the first step
        gradients.append(numeric_gradient(lambda x: loss(x, batch, y), expected))
        expected = expected - 0.01 * t * gradients[-1]
    close(fitted, expected)
    through_y = numeric_gradient(lambda x: loss(x, rows[0], targets(x)), phi)
    assert not np.allclose(through_y, gradients[0], rtol=0.01)  # the check tells them apart
    moments = np.zeros((2, len(phi)))  # Adam goes on where it was
    once = esmeta.fit_critic(phi, obs, action, y, rows[:1], 0.01, dims, moments, 0)
    close(esmeta.fit_critic(once, obs, action, y, rows[1:], 0.01, dims, moments, 1),
          esmeta.fit_critic(phi, obs, action, y, rows, 0.01, dims), 1e-12)


def test_state_values_of_many_rows():
    dims = Dims(3, 2, 5)
    theta, phi, obs, _ = make_nets(dims, 0, rows=1202)
    q, _ = plain_critic(phi, obs, plain_actor(theta, obs, dims)[0], dims)
    close(esmeta.state_values(theta, phi, obs.reshape(601, 2, 3), dims), q.reshape(601, 2))


@quick
@given(SMALL | REAL, SEED)
def test_policy_gradient_is_that_of_the_mean_q(dims, seed):  # Eq. 3
    theta, phi, obs, _ = make_nets(dims, seed)

    def mean_q(theta):
        action, pattern = plain_actor(theta, obs, dims)
        q, other = plain_critic(phi, obs, action, dims)
        return q.mean(), np.hstack([pattern, other])

    check_gradient(esmeta.policy_gradient(theta, phi, obs, dims), mean_q, theta)


def test_actor_step():
    rng = np.random.default_rng(0)
    theta, gradient, sigma = rng.normal(size=9), rng.normal(size=9), rng.uniform(0.1, 2, 9)
    config, sgd = make_config(actor_step=2.5), make_config(actor_rule="sgd", actor_step=0.1)
    step = esmeta.step_actor(theta, gradient, sigma, config) - theta
    assert np.linalg.norm(step / sigma) == pytest.approx(2.5)  # sigmas
    ratio = step / (sigma**2 * gradient)
    assert ratio[0] > 0 and np.allclose(ratio, ratio[0])
    assert np.array_equal(esmeta.step_actor(theta, 0 * gradient, sigma, config), theta)
    close(esmeta.step_actor(theta, gradient, sigma, sgd), theta + 0.1 * gradient, 1e-12)


@pytest.mark.parametrize("rule", ["sigma", "sgd"])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_two_cycles_of_adapt_by_hand(rule, tau):
    dims, rng = Dims(3, 2, 4), np.random.default_rng(2)
    config = make_config(cycles=2, critic_updates=3, critic_batch=5, actor_batch=4, actor_rule=rule,
                         actor_step=0.5, critic_lr=0.05, target_tau=tau, n_step=2)
    theta, phi, _, _ = old = make_nets(dims, 0)
    data, sigma = make_data(dims, 0, 0.1), np.random.default_rng(1).uniform(0.1, 0.3, len(theta))
    obs, action, followed = data.obs[:-1][data.valid], data.action[data.valid], old[:2]
    centre, adam = esmeta.mean_reward(data, config), np.zeros((2, len(phi)))
    for cycle in range(2):
        value = esmeta.state_values(*followed, data.obs, dims)
        y = esmeta.critic_targets(value, data, centre, config)[data.valid]
        rows = rng.integers(len(obs), size=(3, 5))
        phi = esmeta.fit_critic(phi, obs, action, y, rows, 0.05, dims, adam, 3 * cycle)
        states = obs[rng.integers(len(obs), size=4)]
        gradient = esmeta.policy_gradient(theta, phi, states, dims)
        theta = esmeta.step_actor(theta, gradient, sigma, config)
        followed = {0.0: old[:2], 1.0: (theta, phi),
                    0.3: (0.7 * old[0] + 0.3 * theta, 0.7 * old[1] + 0.3 * phi)}[tau]
    adapted = esmeta.adapt(*old[:2], data, sigma, config, dims, np.random.default_rng(2))
    close(adapted[0], theta, 1e-10)
    close(adapted[1], phi, 1e-10)


# ---- NES -----------------------------------------------------------------------------------------


def log_normal(theta, mu, sigma, rho=0.0):
    """log N(theta (K, P); mu, sigma^2 R), R correlating the K rows by rho, by numpy.linalg."""
    total = 0.0
    for x, s in zip((theta - mu).T, sigma):
        cov = s**2 * ((1 - rho) * np.eye(len(x)) + rho)
        total -= 0.5 * (x @ np.linalg.solve(cov, x) + np.linalg.slogdet(2 * np.pi * cov)[1])
    return total


def numeric_eq10(theta, fitness, mu, sigma, rho=0.0):
    """Central differences of (1/M) sum_i F_i log N(theta_i; mu, sigma) in mu and in sigma."""
    def objective(mu, sigma):
        return np.mean([f * log_normal(x, mu, sigma, rho) for f, x in zip(fitness, theta)]), None
    return (numeric_gradient(lambda x: objective(x, sigma), mu),
            numeric_gradient(lambda x: objective(mu, x), sigma))


def make_population(seed, m, k, p):
    """theta (M, K, P), fitness (M,), mu, sigma (P,)."""
    rng = np.random.default_rng(seed)
    mu, sigma = rng.normal(size=p), rng.uniform(0.3, 2.0, p)
    return mu + sigma * rng.standard_normal((m, k, p)), rng.normal(1, 1, m), mu, sigma


def is_eq10(gradient, population):
    return np.allclose(gradient(*population), numeric_eq10(*population), rtol=1e-6, atol=1e-6)


@quick
@given(SEED, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_log_density_and_eq10(seed, m, k, p):
    theta, _, mu, sigma = population = make_population(seed, m, k, p)
    assert esmeta.log_density(theta, mu, sigma).shape == (m, k)
    close(esmeta.log_density(theta, mu, sigma).sum(axis=1),
          [log_normal(x, mu, sigma) for x in theta], 1e-10)
    assert is_eq10(esmeta.nes_gradient, population)


def right_mu(d, F, s):
    return F @ np.sum(d / s**2, axis=1) / len(F)


def right_sigma(d, F, s):
    return F @ np.sum((d**2 - s**2) / s**3, axis=1) / len(F)


RIGHT = right_mu, right_sigma
WRONG = {  # d = theta - mu (M, K, P), F (M,), s = sigma (P,) -> d_mu, d_sigma
    "missing 1/M": lambda d, F, s: [g(d, F, s) * len(F) for g in RIGHT],
    "1/(MK)": lambda d, F, s: [g(d, F, s) / d.shape[1] for g in RIGHT],
    "mean over j": lambda d, F, s: [
        F @ np.mean(x, axis=1) / len(F) for x in (d / s**2, (d**2 - s**2) / s**3)],
    "mu / sigma": lambda d, F, s: [F @ np.sum(d / s, axis=1) / len(F), right_sigma(d, F, s)],
    "mu of PGPE": lambda d, F, s: [F @ np.sum(d, axis=1) / len(F), right_sigma(d, F, s)],
    "sigma / sigma^2": lambda d, F, s: [
        right_mu(d, F, s), F @ np.sum((d**2 - s**2) / s**2, axis=1) / len(F)],
    "sigma of PGPE": lambda d, F, s: [
        right_mu(d, F, s), F @ np.sum((d**2 - s**2) / s, axis=1) / len(F)],
    "d^2 - sigma": lambda d, F, s: [
        right_mu(d, F, s), F @ np.sum((d**2 - s) / s**3, axis=1) / len(F)],
    "(sum_j d)^2": lambda d, F, s: [
        right_mu(d, F, s), F @ ((np.sum(d, axis=1) ** 2 - s**2) / s**3) / len(F)],
    "sigma by theta_bar": lambda d, F, s: [
        right_mu(d, F, s), right_sigma(np.mean(d, axis=1, keepdims=True), F, s)],
    "sign of sigma": lambda d, F, s: [right_mu(d, F, s), -right_sigma(d, F, s)],
    "centred on the sample": lambda d, F, s: [g(d - d.mean((0, 1)), F, s) for g in RIGHT],
    "centred on theta_bar": lambda d, F, s: [
        g(d - d.mean(axis=1, keepdims=True), F, s) for g in RIGHT],
}


@pytest.mark.parametrize("name", ["right", *WRONG])
def test_thirteen_wrong_versions_of_eq10_fail_the_check(name):
    assert len(WRONG) == 13
    version = WRONG.get(name, lambda d, F, s: [g(d, F, s) for g in RIGHT])
    for seed in range(3):
        population = make_population(seed, 3, 2, 2)
        verdict = is_eq10(lambda theta, F, mu, sigma: version(theta - mu, F, sigma), population)
        assert verdict == (name == "right")


def hermite_grid(k, p, rho=0.0):
    """eps (M, K, P) and weights (M,): sums w f(eps) are exact E f(eps), polynomials to degree 5."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, repeat=k * p))).reshape(-1, k, p)
    w = np.array([math.prod(row) for row in itertools.product(weights, repeat=k * p)])
    return np.linalg.cholesky((1 - rho) * np.eye(k) + rho) @ grid, w / w.sum()


@pytest.mark.parametrize("k", [1, 2])
def test_eq10_has_the_exact_expectation(k):
    mu, sigma, a = np.array([0.3, -1.2]), np.array([0.5, 1.7]), np.array([2.0, -0.7])
    eps, w = hermite_grid(k, 2)
    bar = (mu + sigma * eps).mean(axis=1)  # E a . theta_bar^2 = a . (mu^2 + sigma^2 / K)
    for f, g_mu, g_sigma in ((bar**2 @ a, 2 * a * mu, 2 * a * sigma / k), (bar @ a, a, 0 * a)):
        F = len(w) * w * f
        close(esmeta.nes_gradient(mu + sigma * eps, F, mu, sigma), (g_mu, g_sigma), 1e-12)


@quick
@given(SEED, st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.8]))
def test_summed_gradient_is_eq10_of_correlated_actors(seed, m, k, rho):
    theta, u_mu, mu, sigma = make_population(seed, m, k, 2)
    u_sigma = np.random.default_rng(seed).normal(size=m)
    eps = (theta - mu) / sigma
    fast = esmeta.summed_gradient(eps.sum(1), (eps**2).sum(1), u_mu, u_sigma, sigma, k, rho)
    for i, u in enumerate((u_mu, u_sigma)):
        close(fast[i], numeric_eq10(theta, u, mu, sigma, rho)[i], 1e-6)
        if rho == 0:
            close(fast[i], esmeta.nes_gradient(theta, u, mu, sigma)[i], 1e-10)


@pytest.mark.parametrize("k, rho", [(1, 0.0), (2, 0.0), (2, 0.6), (3, 0.5)])
def test_natural_gradient_divides_by_the_fisher_matrix(k, rho):
    sigma, one, (eps, w) = np.array([0.7]), np.ones(1), hermite_grid(k, 1, rho)
    score_mu, score_sigma = np.transpose([esmeta.summed_gradient(
        e.sum(0)[None], (e**2).sum(0)[None], one, one, sigma, k, rho) for e in eps])[0]
    score_log_sigma = score_sigma * sigma
    close([w @ score_mu, w @ score_log_sigma, w @ (score_mu * score_log_sigma)], 0)  # diagonal
    close(esmeta.natural_gradient(score_mu, score_sigma, sigma, k, rho),
          (score_mu / (w @ score_mu**2), score_log_sigma / (w @ score_log_sigma**2)), 1e-10)


def test_pgpe_is_eq10_times_sigma_squared():
    """PGPE codes add F d to mu, F (d^2 - sigma^2) / sigma to sigma: without Eq. 10's 1/sigma^2."""
    theta, F, mu, sigma = make_population(0, 4, 3, 2)
    d_mu, d_sigma = esmeta.nes_gradient(theta, F, mu, sigma)
    pgpe_mu, _ = WRONG["mu of PGPE"](theta - mu, F, sigma)
    _, pgpe_sigma = WRONG["sigma of PGPE"](theta - mu, F, sigma)
    close((pgpe_mu, pgpe_sigma), (sigma**2 * d_mu, sigma**2 * d_sigma), 1e-12)
    close(esmeta.natural_gradient(d_mu, d_sigma, sigma, 3),  # that is PGPE, but for constants
          (pgpe_mu / 3, pgpe_sigma / sigma / (2 * 3)), 1e-12)


def plain_ranks(values):
    return np.array([np.sum(values < x) + (np.sum(values == x) - 1) / 2 for x in values])


@quick
@given(st.lists(st.sampled_from([-2.5, -1.0, 0.0, 0.5, 3.0, 1e6]), min_size=1, max_size=9))
def test_ranks_share_ties(values):
    values, last = np.array(values), len(values) - 1
    close(esmeta.ranks(values), plain_ranks(values), 1e-12)
    centred = esmeta.centred_ranks(values)
    close(centred, plain_ranks(values) / last - 0.5 if last else [0.0], 1e-12)
    assert np.abs(centred).max() <= 0.5 and not esmeta.centred_ranks(0 * values).any()


@quick
@given(SEED, st.integers(1, 6))
def test_pair_utilities(seed, pairs):
    rng = np.random.default_rng(seed)
    fitness = rng.integers(-4, 5, 2 * pairs).astype(float)
    gap = fitness[::2] - fitness[1::2]
    half = np.sign(gap) * (plain_ranks(np.abs(gap)) + 1) / (2 * pairs)
    u = esmeta.pair_utilities(fitness)
    close(u.reshape(-1, 2).T, (half, -half), 1e-12)
    moved = fitness + np.repeat(rng.integers(-90, 90, pairs), 2)  # how hard a pair's goal is
    assert np.array_equal(esmeta.pair_utilities(moved), u)


def test_utilities():
    fitness = np.array([3.0, np.nan, -5.0, 1.0, np.inf, -np.inf])  # what broke ranks last
    u = esmeta.utilities(fitness, make_config(antithetic=False))
    close(u, [np.array([5, 1, 3, 4, 1, 1]) / 5 - 0.5] * 2)
    u_mu, u_sigma = esmeta.utilities(fitness, make_config())
    close(u_mu, np.array([3, -3, -2, 2, 0, 0]) / 6)
    close(u_sigma, [0.5, 0.5, 0, 0, -0.5, -0.5])  # pairs by their means
    raw = esmeta.utilities(fitness, make_config(utility="raw"))
    assert np.array_equal(raw, [[3, -6, -5, 1, -6, -6]] * 2)


@pytest.mark.parametrize("natural", [True, False])
def test_ascend_is_one_sgd_step(natural, rho=0.5):
    theta, _, mu, sigma = make_population(0, 4, 3, 5)
    eps, fitness = (theta - mu) / sigma, np.array([3.0, -1.0, 0.5, 2.0])
    config, sums = make_config(natural=natural, utility="raw"), (eps.sum(1), (eps**2).sum(1))
    d_mu, d_sigma = esmeta.summed_gradient(*sums, fitness, fitness, sigma, 3, rho)
    expected = sigma + 1e-3 * d_sigma
    if natural:
        d_mu, d_log_sigma = esmeta.natural_gradient(d_mu, d_sigma, sigma, 3, rho)
        expected = sigma * np.exp(1e-3 * d_log_sigma)
    new_mu, new_sigma = esmeta.ascend(mu, sigma, *sums, fitness, 3, rho, 0.1, 1e-3, config)
    close(new_mu, mu + 0.1 * d_mu, 1e-6)
    close(new_sigma, np.clip(expected, 1e-5, 1.0), 1e-6)
    for rate in 1e6, -1e6:
        _, far = esmeta.ascend(mu, sigma, *sums, fitness, 3, rho, 0.1, rate, config)
        assert np.all(far > 0) and np.all(far <= 1.0)
        if natural:  # a tenth at most
            limit = sigma * np.exp(0.1 * np.sign(rate * d_log_sigma))
            close(far, np.clip(limit, 1e-5, 1.0), 1e-6)


@given(SEED, st.integers(1, 3), st.integers(1, 5), st.integers(2, 6))
def test_own_ranks(seed, goals, tests, k):
    rng = np.random.default_rng(seed)
    before, after = rng.standard_normal((goals, k)), rng.standard_normal((goals, tests))
    own = [before[:, j].mean() for j in range(k)]
    for g, t in itertools.product(range(goals), range(tests)):
        own[(g * tests + t) % k] += after[g, t] - after[g].mean()
    r = esmeta.own_ranks(before, after)
    close(r, esmeta.centred_ranks(np.array(own)))
    close(r.sum(), 0, 1e-12)
    shift = rng.standard_normal((goals, 1))  # a hard task is no explorer's fault
    close(esmeta.own_ranks(before + shift, after - 3 * shift), r)
    for broken in np.nan, np.inf:  # among tests of a few explorers alone, it would be the best
        after[0, 0] = broken
        with np.errstate(invalid="ignore"):
            assert not esmeta.own_ranks(before, after).any()


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("a, goal, lr_mu", [(-1, 0.3, 3.0), (-1, 0.0, 0.0), (1, 0.0, 0.0)])
def test_ascend_climbs_and_learns_sigma(antithetic, a, goal, lr_mu):
    """f = a |theta_bar - goal|^2: mu goes to the top; there sigma falls, and grows in a valley."""
    rng, config = np.random.default_rng(0), make_config(antithetic=antithetic)
    mu, sigma = np.zeros(4), np.full(4, 0.1)
    for _ in range(60):
        eps = rng.standard_normal((32, 2, 4))
        eps[1::2] = -eps[::2] if antithetic else eps[1::2]
        f = a * np.sum((mu + sigma * eps.mean(axis=1) - goal) ** 2, axis=1)
        mu, sigma = esmeta.ascend(
            mu, sigma, eps.sum(1), (eps**2).sum(1), f, 2, 0.0, lr_mu, 1.0, config)
    if lr_mu:
        assert np.linalg.norm(mu - goal) < 0.1 * np.linalg.norm(np.full(4, goal))
    else:
        assert not mu.any() and np.all(a * (sigma - 0.1) > 0.01)


def test_update_distribution_has_four_learning_rates():
    rng, config = np.random.default_rng(0), make_config(
        rollouts=3, lr_mu_actor=1.5, lr_sigma_actor=0.2, lr_mu_critic=3.0, lr_sigma_critic=0.4)
    eps, eps_critic = rng.standard_normal((6, 3, 5)), rng.standard_normal((6, 4))
    F_actor, F_critic = rng.standard_normal((2, 6))
    actor, critic = (rng.normal(size=5), np.full(5, 0.2)), (rng.normal(size=4), np.full(4, 0.3))
    meta = esmeta.MetaState(*actor, *critic, np.zeros(5), 0.0, 0, 0, iteration=7, env_steps=0)
    eps_own = rng.standard_normal((6, 5))
    results = [esmeta.Result(*f, 0, 0, 0, 0, (own, e.sum(0), (e**2).sum(0), e_critic), ())
               for *f, own, e, e_critic in zip(F_actor, F_critic, eps_own, eps, eps_critic)]
    expected = (
        *esmeta.ascend(*actor, eps.sum(1), (eps**2).sum(1), F_actor, 3, 0.5, 1.5, 0.2, config),
        *esmeta.ascend(*critic, eps_critic, eps_critic**2, F_critic, 1, 0.0, 3.0, 0.4, config))
    new, ratio = esmeta.update_distribution(meta, results, config)
    for value, other in zip(new[:4], expected):
        close(value, other)
    close(new.velocity, expected[0] - actor[0])
    assert new[5:] == meta[5:]
    close(ratio, np.linalg.norm(expected[0] - actor[0]) / np.linalg.norm(actor[0]))
    config = dataclasses.replace(config, own_credit=2.0)
    new, _ = esmeta.update_distribution(meta, results, config)
    close(new.mu_actor, expected[0] + 1.5 * 2 * 0.2 * eps_own.sum(0) / (6 * 3))
    later, _ = esmeta.update_distribution(
        meta, results, dataclasses.replace(config, half_life=3.5))  # two of them
    close(later.mu_actor - meta.mu_actor, (new.mu_actor - meta.mu_actor) / 4)
    close(later.mu_critic - meta.mu_critic, (new.mu_critic - meta.mu_critic) / 4)
    assert np.array_equal(later.sigma_actor, new.sigma_actor)


def test_momentum_and_weight_decay():
    """v = momentum v + (1 - momentum) step; mu_a loses weight_decay times the annealed rate."""
    rng, config = np.random.default_rng(0), make_config(rollouts=1, half_life=7.0)
    mu, old = rng.normal(size=(2, 5))
    meta = esmeta.MetaState(mu, np.full(5, 0.2), mu, np.full(5, 0.2), old, 0, 0, 0, iteration=7,
                            env_steps=0)
    results = [esmeta.Result(*rng.normal(size=2), 0, 0, 0, 0, tuple(rng.normal(size=(4, 5))), ())
               for _ in range(2)]
    plain, _ = esmeta.update_distribution(meta, results, config)
    new, ratio = esmeta.update_distribution(
        meta, results, dataclasses.replace(config, momentum=0.75, weight_decay=0.1))
    step = plain.mu_actor - mu
    close(new.velocity, 0.75 * old + 0.25 * step)
    close(new.mu_actor, 0.95 * mu + 0.75 * old + 0.25 * step)
    close(ratio, np.linalg.norm(new.mu_actor - mu) / np.linalg.norm(mu))
    assert np.array_equal(new.mu_critic, plain.mu_critic)


# ---- noise and observations ----------------------------------------------------------------------


def test_noise_comes_from_its_key():
    dims, config = Dims(3, 2, 5), make_config(rollouts=4)
    eps, eps_critic = esmeta.sample_noise(config, 3, 6, dims)
    assert eps.shape == (4, esmeta.actor_size(dims)) and eps.dtype == np.float32
    assert eps_critic.shape == (esmeta.critic_size(dims),) and eps_critic.dtype == np.float32
    for worker, sign in (6, 1), (7, -1):  # the same bits again; opposite in a pair
        again = esmeta.sample_noise(config, 3, worker, dims)
        assert np.array_equal(sign * again[0], eps) and np.array_equal(sign * again[1], eps_critic)
    alone = dataclasses.replace(config, antithetic=False)
    seeded = dataclasses.replace(config, seed=1)
    for key in (config, 4, 6), (config, 3, 8), (config, 3, 5), (seeded, 3, 6):
        assert not np.isin(np.abs(esmeta.sample_noise(*key, dims)[0]), np.abs(eps)).any()
    one, other = (esmeta.sample_noise(alone, 3, i, dims)[0] for i in (6, 7))
    assert not np.isin(np.abs(one), np.abs(other)).any()


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_noise_is_standard_normal_correlated_by_rho(rho):
    config = make_config(rollouts=3, correlation=rho)
    eps, eps_critic = esmeta.sample_noise(config, 0, 0, Dims(9, 4))
    close(np.cov(eps), (1 - rho) * np.eye(3) + rho, 0.06)
    close([eps.mean(), eps_critic.mean(), eps_critic.std()], [0, 0, 1], 0.06)


@quick
@given(SEED, st.integers(1, 6), st.integers(1, 6))
def test_merged_moments_are_those_of_all_rows(seed, n_a, n_b):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(5, 1, (n_a, 3)), rng.normal(-2, 3, (n_b, 3))
    none = 0.0, np.zeros(3), np.zeros(3)
    n, mean, m2 = esmeta.merge_moments(
        esmeta.merge_moments(none, esmeta.moments(a)), esmeta.moments(b))
    rows = np.vstack([a, b])
    assert n == len(rows)
    close((mean, m2 / n), (rows.mean(axis=0), rows.var(axis=0)), 1e-10)


def test_normaliser():
    rng = np.random.default_rng(0)
    rows, obs = rng.normal(4, 3, (50, 2)), rng.normal(4, 30, (20, 2))
    meta = esmeta.MetaState(*[None] * 5, *esmeta.moments(rows), 0, 0)
    before, z = obs.copy(), (obs - rows.mean(axis=0)) / rows.std(axis=0)
    out = np.empty_like(obs)
    esmeta.make_normaliser(meta, make_config(obs_clip=2.0))(obs, out)
    close(out, np.clip(z, -2, 2))
    assert z.min() < -2 and z.max() > 2 and np.array_equal(obs, before)
    for raw in ((meta, make_config(obs_clip=0.0)), (meta._replace(obs_count=0.0), make_config())):
        esmeta.make_normaliser(*raw)(obs, out)
        assert np.array_equal(out, obs)


# ---- tasks -------------------------------------------------------------------------------------

MUJOCO_TASKS = ["cheetah_vel", "cheetah_dir", "ant_vel", "ant_dir"]
ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


@pytest.fixture(autouse=True)
def mujoco_log_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MUJOCO_LOG.TXT lands in the working directory


def some_actions(name, steps, num_envs, seed=0, scale=1.5):
    """Random actions, a third of them outside [-1, 1]."""
    shape = (steps, num_envs, tasks.TASKS[name].act)
    return np.random.default_rng(seed).uniform(-scale, scale, shape)


def play(envs, actions, **reset):
    """All that an environment returns over one episode, as one flat list of arrays."""
    obs, info = envs.reset(**reset)
    seen = [obs, *info.values()]
    for action in actions:
        obs, reward, terminated, truncated, info = envs.step(action)
        seen += [obs, reward, terminated, truncated, *info.values()]
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


def reference_step(model, data, name, action, goal):
    """One step of tasks.md's text on a plain MjData: -> obs, reward, terminated, x velocity."""
    a = [min(1.0, max(-1.0, float(x))) for x in action]
    data.ctrl[:] = a
    mujoco.mj_step(model, data)
    mujoco.mj_forward(model, data)
    mujoco.mj_subtreeVel(model, data)
    mujoco.mj_rnePostConstraint(model, data)
    torso = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "torso")
    v, com = data.subtree_linvel[torso][0], data.subtree_com[torso]
    effort = sum(x * x for x in a)
    if name.startswith("cheetah"):
        obs = [*data.qpos[1:], *data.qvel, *com]
        cost, bonus, terminated = 0.05 * effort, 0.0, False
    else:
        force = [min(1.0, max(-1.0, x)) for x in data.cfrc_ext.ravel().tolist()]
        obs = [*data.qpos, *data.qvel, *force, *data.xmat[torso], *com]
        cost = 0.005 * effort + 0.5 * 1e-3 * sum(x * x for x in force)
        bonus = 0.05
        terminated = not 0.2 <= data.qpos[2] <= 1.0
    if name.endswith("dir"):
        reward = goal * v - cost + bonus
    else:
        reward = -abs(v - goal) - cost + bonus + (1.0 if name == "ant_vel" else 0.0)
    return np.array(obs), reward, terminated, v


@pytest.mark.parametrize("name", MUJOCO_TASKS)
def test_tasks_equal_an_independent_loop_over_plain_mjdata(name):
    num_envs, model = 3, reference_model(name)
    goals = np.array([-1.0, 1.0, 1.0]) if name.endswith("dir") else np.array([0.1, 1.0, 1.9])
    envs = tasks.make_vec(name, num_envs)
    _, info = envs.reset(seed=7, options={"goal": goals})
    datas = [mujoco.MjData(model) for _ in range(num_envs)]
    for data, qpos, qvel in zip(datas, info["qpos"], info["qvel"]):
        data.qpos[:], data.qvel[:] = qpos, qvel
        mujoco.mj_forward(model, data)
    forces = 0.0
    for action in some_actions(name, 200, num_envs):
        obs, reward, terminated, _, info = envs.step(action)
        for i, data in enumerate(datas):
            expected = reference_step(model, data, name, action[i], goals[i])
            np.testing.assert_allclose(obs[i], expected[0], rtol=0, atol=1e-12)
            assert abs(reward[i] - expected[1]) <= 1e-12
            assert terminated[i] == expected[2]
            assert abs(info["x_velocity"][i] - expected[3]) <= 1e-12
            forces = max(forces, np.abs(data.cfrc_ext).max())
    assert forces > 1.0  # the reference's own forces, so that the test cannot compare zeros


def test_tasks_first_observation_is_forwarded_and_noise_is_mamls():
    for name, qpos0 in (("cheetah_dir", np.zeros(9)),
                        ("ant_dir", [0, 0, .55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1])):
        obs, info = tasks.make_vec(name, 3).reset(seed=5)
        nq = len(qpos0)
        for i in range(3):
            rng = np_random(5 + i)[0]
            noise_q, noise_v = rng.standard_normal(nq), rng.standard_normal(nq - (nq == 15))
            np.testing.assert_allclose(info["qpos"][i], qpos0 + 0.01 * noise_q, atol=1e-15)
            np.testing.assert_allclose(info["qvel"][i], 0.1 * noise_v, atol=1e-15)
            assert info["goal"][i] == tasks.sample_goals(name, rng, 1)[0]  # after the noise
        assert (obs[:, [-3, -1]] != 0).all()  # the centre of mass, x and z
        if nq == 15:
            rotation = obs[:, 113:122].reshape(3, 3, 3)
            np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1),
                                       np.tile(np.eye(3), (3, 1, 1)), atol=1e-12)


def test_tasks_table():
    assert {name: (t.obs, t.act, t.horizon, t.rollouts, t.shrink, t.goal_low, t.goal_high)
            for name, t in tasks.TASKS.items()} == {
        "cheetah_vel": (20, 6, 200, 20, 0.5, 0, 2), "cheetah_dir": (20, 6, 200, 20, 0.5, -1, 1),
        "ant_vel": (125, 8, 200, 20, 0.5, 0, 3), "ant_dir": (125, 8, 200, 40, 0.01, -1, 1),
        "point_goal": (2, 2, 100, 20, 0.5, -0.5, 0.5)}


def test_tasks_test_goals_are_mamls_draws():
    state = np.random.get_state()[1].copy()
    goals = {name: tasks.test_goals(name) for name in tasks.TASKS}
    assert (np.random.get_state()[1] == state).all()  # the global generator is left alone
    for name, seed, low, high, shape in (
            ("cheetah_vel", 1, 0, 2, 40), ("cheetah_dir", 1, 0, 2, 40), ("ant_vel", 1, 0, 3, 40),
            ("ant_dir", 2, 0, 3, 40), ("point_goal", 1, -0.5, 0.5, (40, 2))):
        draw = np.random.RandomState(seed).uniform(low, high, shape)
        if name.endswith("dir"):
            draw = np.where(draw > high / 2, 1, -1)
        assert (goals[name] == draw).all()
    assert [(goals[name] == 1).sum() for name in ("cheetah_dir", "ant_dir")] == [18, 15]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_sampled_goals_fill_the_range(name):
    task = tasks.TASKS[name]
    goals = tasks.sample_goals(name, np.random.default_rng(0), 2000)
    assert goals.shape == (2000, *tasks.test_goals(name).shape[1:])
    share = (goals - task.goal_low) / (task.goal_high - task.goal_low)
    assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1 and abs(share.mean() - 0.5) < 0.05
    assert (len(np.unique(goals)) == 2) == name.endswith("dir")
    assert (goals == tasks.sample_goals(name, np.random.default_rng(0), 2000)).all()


@given(st.sampled_from(list(tasks.TASKS)), SEED, st.integers(1, 9))
def test_tasks_spread_goals_cover_the_distribution(name, seed, n):
    task, goals = tasks.TASKS[name], tasks.spread_goals(name, np.random.default_rng(seed), n)
    if task.direction:
        assert sorted(goals) == [-1, 1]
    elif task.goal_shape:
        assert (goals == tasks.sample_goals(name, np.random.default_rng(seed), n)).all()
    else:
        part = n * goals / task.goal_high - np.arange(n)
        np.testing.assert_allclose(part, np.random.default_rng(seed).uniform(size=n), atol=1e-12)


def test_tasks_spread_directions_come_in_either_order():
    firsts = [tasks.spread_goals("ant_dir", np.random.default_rng(i), 1)[0] for i in range(200)]
    assert 70 < firsts.count(1) < 130


# ---- tasks: rewards and terminations, without MuJoCo


numbers = st.floats(-20, 20)


@given(st.integers(1, 5), SEED, st.floats(0, 30))
def test_tasks_rewards_are_their_formulas(n, seed, scale):
    rng = np.random.default_rng(seed)
    v, g = scale * rng.standard_normal((2, n))
    f = scale * rng.standard_normal((n, 84))
    for size, names in ((6, ("cheetah_vel", "cheetah_dir")), (8, ("ant_vel", "ant_dir"))):
        a = rng.uniform(-1, 1, (n, size))
        for name in names:
            reward = tasks.TASKS[name].reward(v, a, f, g)
            assert reward.shape == (n,)
            for i in range(n):
                effort = sum(x**2 for x in a[i])
                force = sum(min(1, max(-1, x))**2 for x in f[i])
                expected = {
                    "cheetah_vel": -abs(v[i] - g[i]) - 0.05 * effort,
                    "cheetah_dir": g[i] * v[i] - 0.05 * effort,
                    "ant_vel": -abs(v[i] - g[i]) + 1.05 - 0.005 * effort - 0.0005 * force,
                    "ant_dir": g[i] * v[i] + 0.05 - 0.005 * effort - 0.0005 * force}[name]
                assert reward[i] == pytest.approx(expected, abs=1e-11)
                # one environment alone, no leading axis, gives the same bits
                assert reward[i] == tasks.TASKS[name].reward(v[i], a[i], f[i], g[i])


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 28),
       st.sampled_from([0.0, 3.0, np.nan, np.inf, -np.inf]))
def test_tasks_ant_termination_is_height_or_not_finite(height, index, value):
    state = np.zeros(29)
    state[index] = value
    state[2] = height
    broken = index != 2 and not np.isfinite(value)
    assert tasks.ant_terminated(state) == (broken or not 0.2 <= height <= 1.0)
    assert tasks.ant_terminated(np.stack([state, state])).shape == (2,)


@given(numbers, numbers, numbers, numbers)
def test_tasks_point_reward_and_termination(x, y, gx, gy):
    position = np.array([x, y])

    def ends(goal):
        return tasks.outcomes("point_goal", position, np.zeros(2), 0.0, goal)

    assert ends(np.array([gx, gy]))[0] == pytest.approx(-(x - gx)**2 - (y - gy)**2, abs=1e-12)
    assert ends(position + [0.006, -0.006])[1] and not ends(position + [0.008, -0.008])[1]
    assert ends(np.array([np.nan, 0]))[1]


# ---- tasks: the lockstep environment


def test_tasks_point_moves_by_a_tenth_of_the_clipped_action():
    envs = tasks.make_vec("point_goal", 3)
    x, info = envs.reset(seed=0)
    assert (x == 0).all() and (np.abs(info["goal"]) <= 0.5).all()
    for action in some_actions("point_goal", 100, 3):
        x = x + 0.1 * np.clip(action, -1, 1)
        np.testing.assert_allclose(envs.step(action)[0], x, atol=1e-12)


def test_tasks_point_arrives():
    envs = tasks.make_vec("point_goal", 2, freeze=True)
    goal = np.array([[0.3, -0.2], [0.1, 0.1]])
    obs, _ = envs.reset(options={"goal": goal})
    for expected in ([False, True], [False, True], [True, True]):
        obs, reward, terminated, _, _ = envs.step(10 * (goal - obs))
        assert terminated.tolist() == expected
    assert reward[1] == 0 and reward[0] == pytest.approx(0, abs=1e-12)
    later, reward, terminated, _, _ = envs.step(np.ones((2, 2)))
    assert (later == obs).all() and (reward == 0).all() and terminated.all()


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_single_environment_is_environment_0_without_its_axis(name):
    env_id, goal = tasks.TASKS[name].env_id, tasks.test_goals(name)[1]
    both, envs = np.stack([goal, -goal]), tasks.make_vec(name, 2)
    for kwargs, alone, options in (({"goal": goal}, {}, {"goal": both}),
                                   ({}, {"goal": goal}, {"goal": both}), ({}, {}, {})):
        one = gymnasium.make(env_id, **kwargs)
        obs, info = envs.reset(seed=11, options=options)
        obs1, info1 = one.reset(seed=11, options=alone)
        assert (obs[0] == obs1).all()
        assert all(np.array_equal(info[key][0], info1[key]) for key in info | info1)
        for action in some_actions(name, 5, 2, scale=0.6):
            obs, reward, terminated, truncated, info = envs.step(action)
            obs1, *scalars, info1 = one.step(action[0])
            assert (obs[0] == obs1).all()
            assert {key: x[0] for key, x in info.items()} == info1
            assert scalars == [reward[0], terminated[0], truncated[0]]
            assert [*map(type, scalars)] == [float, bool, bool]


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
    num_envs, actions = 8, some_actions(name, 200, 8, seed=2)
    goal = np.array(tasks.test_goals(name)[:num_envs])
    envs, copy = tasks.make_vec(name, num_envs, freeze=freeze), actions.copy()
    expected = play(envs, actions, seed=0, options={"goal": goal})
    assert (actions == copy).all()
    # no array is returned twice, nor is any a view of the environment's
    assert len({x.__array_interface__["data"][0] for x in expected}) == len(expected)
    obs, info = envs.reset(seed=0, options={"goal": goal})
    seen = [x.copy() for x in (obs, *info.values())]
    goal[...] = 9
    for action in actions:
        for x in (obs, *info.values()):
            x[...] = 1
        obs, reward, terminated, truncated, info = envs.step(action)
        seen += [x.copy() for x in (obs, reward, terminated, truncated, *info.values())]
        last = terminated.copy()
        reward[...] = terminated[...] = truncated[...] = action[...] = 0
    assert_same_bits(expected, seen)
    assert last.any() or name != "ant_vel" or not freeze  # one had frozen


def test_tasks_freeze_stops_what_has_terminated_and_changes_nothing_else():
    actions = some_actions("ant_vel", 250, 8, seed=2)
    frozen, free = (tasks.make_vec("ant_vel", 8, freeze=f) for f in (True, False))
    last, _ = frozen.reset(seed=0)
    free.reset(seed=0)
    dead = np.zeros(8, bool)
    for t, action in enumerate(actions):
        obs, reward, terminated, truncated, info = frozen.step(action)
        expected = free.step(action)
        for a, b in zip((obs, reward, terminated, truncated, info["x_velocity"]),
                        (*expected[:4], expected[4]["x_velocity"])):
            np.testing.assert_array_equal(a[~dead], b[~dead])
        assert (obs[dead] == last[dead]).all() and (reward[dead] == 0).all()
        assert terminated[dead].all()
        dead, last = terminated, obs
        if t == 200:
            assert dead.any() and not dead.all()
            assert (frozen.batch.time[dead] < free.batch.time[dead]).all()  # really not stepped
            revived, last = dead, frozen.reset(options={"reset_mask": dead})[0]
            assert (last[dead] == free.reset(options={"reset_mask": dead})[0][dead]).all()
            assert (last[~dead] == obs[~dead]).all()
            dead = np.zeros(8, bool)
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
    envs.reset(seed=0)
    assert not envs.step(still)[2].any()
    with pytest.raises(ValueError, match="shape"):
        envs.step(np.zeros(act))  # would broadcast


def test_tasks_bad_names_goals_seeds_and_options():
    for call in (lambda n: tasks.make_vec(n, 1), tasks.test_goals,
                 lambda n: tasks.sample_goals(n, np.random.default_rng(0), 1)):
        with pytest.raises(ValueError, match="did you mean 'ant_vel'"):
            call("ant_vell")
    for name, bad in (("ant_vel", np.zeros(2)), ("ant_vel", np.zeros((3, 1))), ("ant_vel", 1.0),
                      ("ant_vel", [1.0, np.nan, 1.0]), ("point_goal", np.zeros(3)),
                      ("point_goal", np.zeros((3, 3)))):
        with pytest.raises(ValueError) as error:
            tasks.make_vec(name, 3).reset(options={"goal": bad})
        assert "\n" not in str(error.value).split("not ")[0]
    with pytest.raises(ValueError, match="goals of shape"):
        gymnasium.make("esmeta/AntVel-v0", goal=[1.0, 2.0])
    envs = tasks.make_vec("point_goal", 2)
    with pytest.raises(ValueError, match="2 seeds"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="sead"):
        envs.reset(options={"sead": 1})
    half = np.array([True, False])
    with pytest.raises(ValueError, match="at first all"):
        envs.reset(options={"reset_mask": half})
    envs.reset()
    for bad in (~half & half, half[:1], half[None], half.astype(int), [1.0, 2.0], True):
        with pytest.raises(ValueError, match="reset_mask.*bools") as error:
            envs.reset(options={"reset_mask": bad})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("with_goal", [False, True])
@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_partial_reset_equals_gymnasiums(name, with_goal):
    task, n, goal = tasks.TASKS[name], 4, tasks.test_goals(name)[5]
    sync = gymnasium.make_vec(task.env_id, n, vectorization_mode="sync",
                              vector_kwargs=dict(autoreset_mode=AutoresetMode.DISABLED))
    envs, partial = tasks.make_vec(name, n), 0
    assert_same_bits([envs.reset(seed=3)[0]], [sync.reset(seed=3)[0]])
    for t, action in enumerate(some_actions(name, 2 * task.horizon + 50, n)):
        seen, expected = envs.step(action), sync.step(action)
        assert_same_bits(seen[:4], expected[:4])
        mask = seen[2] | seen[3] | ((t == 20) & (np.arange(n) == 2))  # one of them in mid-episode
        if mask.any():
            partial += not mask.all()
            options = [{"goal": goal}, {"goal": np.stack([goal] * n)}] if with_goal else [{}, {}]
            seed = [None, 50, [7, 8, None, 9]][t % 3]
            (obs, info), (obs1, info1) = (
                e.reset(seed=seed, options={**o, "reset_mask": mask.copy()})
                for e, o in zip((envs, sync), options[::-1]))
            assert_same_bits([obs, *(x[mask] for x in info.values())],
                             [obs1, *(info1[key][mask] for key in info)])
    assert partial >= 3


# ---- tasks: Gymnasium


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_are_registered_and_pass_check_env(name):
    task = tasks.TASKS[name]
    assert gymnasium.spec(task.env_id).max_episode_steps == task.horizon
    goal = tasks.test_goals(name)[0]
    env = gymnasium.make(task.env_id, goal=goal)
    assert np.array_equal(env.reset(seed=0)[1]["goal"], goal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds infinite bounds of observations unusual
        check_env(gymnasium.make(task.env_id).unwrapped, skip_render_check=True)
    envs = gymnasium.make_vec(task.env_id, num_envs=4, vectorization_mode="vector_entry_point")
    obs, info = envs.reset(seed=0)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    assert obs in envs.observation_space and obs.shape == (4, task.obs)
    assert (tasks.make_vec(name, 4).reset(seed=0)[0] == obs).all()


def test_tasks_render_where_the_machine_can():
    env = gymnasium.make("esmeta/PointGoal-v0", goal=[0.25, 0.25], render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8
    assert (frame[240, 240] == 0).all() and frame[180, 300].tolist() == [0, 160, 0]
    script = ("import sys; from results import video; video.CAN_RENDER or sys.exit(77); "
              "import gymnasium, tasks; "
              "env = gymnasium.make('esmeta/AntVel-v0', render_mode='rgb_array'); "
              "env.reset(seed=0); frame = env.render(); env.close(); "
              "print(frame.shape, frame.dtype, frame.std() > 1)")
    path = str(Path(tasks.__file__).parent)
    ran = subprocess.run(  # in a process of its own: MUJOCO_GL counts before the import only
        [sys.executable, "-c", script], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path})
    if ran.returncode == 77:
        pytest.skip("no OpenGL here")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[0] == "(480, 480, 3) uint8 True"


# ---- system ------------------------------------------------------------------------------------

TINY = ("--task point_goal --workers 4 --rollouts 3 --goals 1 --critic-updates 2 --critic-batch 8 "
        "--test-rollouts 1 --momentum 0.5 --weight-decay 0.01")
SLOW = TINY.replace("--critic-updates 2", "--critic-updates 150")  # ~0.2 s a job
CHEETAH = TINY.replace("point_goal --workers 4", "cheetah_vel --workers 2")
LAUNCHED = []


def tiny_config(task="point_goal", **fields):
    return esmeta.make_config(task, **{**dict(workers=4, rollouts=3, goals=1, critic_updates=2,
                                              critic_batch=8, test_rollouts=1, momentum=0.5,
                                              weight_decay=0.01), **fields})


def call(line, out=None):
    """esmeta.main in this process: -> exit status."""
    return esmeta.main(shlex.split(line) + (["--out", str(out)] if out else []))


def launch(line, out):
    """esmeta.py in a process of its own, the first of its group, that no failing test leaves."""
    LAUNCHED.append(subprocess.Popen(
        [sys.executable, esmeta.__file__, *shlex.split(line), "--out", str(out)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
    return LAUNCHED[-1]


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


def in_process(self, function, jobs, progress=None):
    """A Crew.map for tests of something else: a pool takes a second to start."""
    return [function(job) for job in jobs]


def undisturbed(out, iterations, line=TINY):
    """The bits of a run, or of the rest of one, that nothing happens to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(esmeta.Crew, "map", in_process)
        resume = " --resume" if out.exists() else ""
        assert call(f"{line} --iterations {iterations}{resume}", out) == 0
    return bits(out)


@pytest.fixture
def no_pool(monkeypatch):
    monkeypatch.setattr(esmeta.Crew, "map", in_process)


@pytest.fixture(scope="module")
def run_of_4(tmp_path_factory):
    """A run directory of 4 iterations, made by a process whose output is a pipe."""
    out = tmp_path_factory.mktemp("system") / "run"
    process = launch(TINY + " --iterations 4 --processes 1", out)
    text, error = process.communicate(timeout=120)
    assert process.returncode == 0 and error == ""
    assert text.replace("\n", "").isprintable()  # no terminal: no control characters
    assert [line.split()[0] for line in text.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    return out


def test_system_processes_and_resume_change_no_bit(run_of_4, tmp_path):
    assert call(TINY + " --iterations 4 --processes 3", tmp_path / "run") == 0
    assert bits(tmp_path / "run") == bits(run_of_4)
    assert call(TINY + " --iterations 2 --processes 2", tmp_path / "half") == 0
    assert len(log_rows(tmp_path / "half")) == 2
    (tmp_path / "half").rename(tmp_path / "moved")  # the place is not in the state either
    for _ in "to 4", "nothing left":
        assert call(TINY + " --iterations 4 --processes 1 --resume", tmp_path / "moved") == 0
        assert bits(tmp_path / "moved") == bits(run_of_4)


def test_system_cheetah_iteration(no_pool, tmp_path, capsys):
    assert call(CHEETAH + " --iterations 1", tmp_path / "run") == 0
    _, meta = esmeta.load_checkpoint(tmp_path / "run")
    assert (meta.iteration, meta.obs_count) == (1, 2 * 3 * 200)
    assert meta.env_steps == 2 * (3 + 1 + 1) * 200  # explorers, before, after; none ends early
    assert capsys.readouterr().out.startswith("1/1 ")


def test_system_what_a_run_directory_holds(run_of_4):
    rows = list(csv.reader((run_of_4 / "log.csv").open()))
    assert ",".join(rows[0]) == ("iteration,return_before,return_explorers,return_after,"
                                 "critic_error,sigma_actor,update_ratio,env_steps,seconds")
    assert [row[0] for row in rows[1:]] == ["0", "1", "2", "3"]
    assert all(math.isfinite(float(cell)) for row in rows[1:] for cell in row)
    config = dataclasses.asdict(tiny_config())
    assert json.loads((run_of_4 / "config.json").read_text()) == config
    with np.load(run_of_4 / "checkpoint.npz", allow_pickle=False) as archive:  # so: no pickles
        assert set(archive) == set("mu_actor sigma_actor mu_critic sigma_critic velocity obs_count "
                                   "obs_mean obs_m2 iteration env_steps config".split())
        stored = json.loads(str(archive["config"]))
        assert archive["iteration"] == 4 and archive["mu_actor"].shape == (10602,)
    assert stored["config"] == config
    assert stored["packages"]["numpy"] == np.__version__ and "mujoco" in stored["packages"]
    assert {path.name for path in run_of_4.iterdir()} - {".lock", "eval.csv"} == {
        "checkpoint.npz", "config.json", "log.csv"}


def test_system_status_line_fits_100_columns():
    usual = (398, -123.4, -123.4, -123.4, 0.123, 0.03, 0.01, 4e8, 99.9)
    usual = dict(zip(esmeta.LOG_COLUMNS, usual))
    assert "98:30" in esmeta.status_line(usual, 400, 0, 98.5 * 3600)
    for huge in (-1234.567, 1e300, -1e300, -math.inf, math.nan):
        row = dict.fromkeys(usual, huge) | dict(iteration=999_998, env_steps=10**15, seconds=1e7)
        for line in (esmeta.status_line(usual, 400, 64, 98.5 * 3600),
                     esmeta.status_line(row, 1_000_000, 64, 1e12)):
            assert len(line) <= 100 and line.isprintable() and "failed 64" in line, line


def test_system_jobs_carry_no_noise():
    def size(**fields):
        config = tiny_config(**fields)
        return len(pickle.dumps(esmeta.make_jobs(config, esmeta.initial_state(config))[-1]))

    assert abs(size() - size(rollouts=3000, workers=300)) <= 8  # these integers' own bytes


@pytest.mark.parametrize("name", ["point_goal", "cheetah_vel", "ant_vel"])
def test_system_shared_exploration_is_what_each_goal_alone_gives(name):
    """All tasks of a worker share its exploration; here each goal has an environment of its own."""
    config, k, dims = tiny_config(name, goals=2), 3, esmeta.task_dims(name)
    meta = esmeta.initial_state(config)._replace(
        obs_count=10.0, obs_mean=np.full(dims.obs, 0.1), obs_m2=np.full(dims.obs, 40.0))
    job = esmeta.make_jobs(config, meta)[3]
    result = esmeta.evaluate_worker(job)
    eps, _ = esmeta.sample_noise(config, 0, 3, dims)
    theta = meta.mu_actor + meta.sigma_actor * eps
    theta = np.vstack([theta, theta.mean(axis=0)])  # (K + 1, P)
    starts = esmeta.generator(esmeta.STARTS, 0, 0, 1).integers(2**31, size=k + 2)[: k + 1].tolist()
    # the worker's bits: a fallen ant's path depends on the last one of its actions
    policy, action = esmeta.make_policy(theta, 1, dims), np.empty((k + 1, dims.act), np.float32)
    returns, seen = np.zeros((2, k + 1)), []
    for g, goal in enumerate(job.goals):
        env, alive = tasks.make_vec(name, k + 1, goal=goal), np.ones(k + 1, bool)
        raw, _ = env.reset(seed=starts)
        for _ in range(tasks.TASKS[name].horizon):
            if g == 0:
                seen.append(raw[:k][alive[:k]])
            obs = np.clip((raw - 0.1) / np.sqrt(4 + 1e-8), -5, 5).astype(np.float32)
            policy(obs, action)
            raw, reward, terminated, _, _ = env.step(action)
            returns[g] += reward * alive
            alive &= ~terminated
    np.testing.assert_allclose(result.return_explorers, returns[:, :k].mean(), rtol=1e-5)
    np.testing.assert_allclose(result.return_before, returns[:, k].mean(), rtol=1e-5)
    if name != "point_goal":  # whose ends depend on the goal
        seen = np.vstack(seen)
        assert result.moments[0] == len(seen)
        close(result.moments[1], seen.mean(axis=0), 1e-5)
        np.testing.assert_allclose(result.moments[2], len(seen) * seen.var(axis=0), rtol=1e-4)


def test_system_alive_bonus_is_for_living_steps():
    raw = np.zeros((6, 3, 125))
    raw[..., 2] = 0.5
    raw[3:, 1, 2] = 0.1  # below 0.2 m: the third step ends it
    run = esmeta.Run(raw, np.zeros((5, 3, 8)), raw, np.ones((5, 3)), False)
    plain, paid = run.score("ant_vel", 1.5), run.score("ant_vel", 1.5, 2.0)
    np.testing.assert_array_equal(paid.valid.sum(axis=0), [5, 3, 5])
    close(paid.returns() - plain.returns(), [10, 6, 10], 1e-12)
    np.testing.assert_array_equal(paid.terminated, plain.terminated)
    assert np.isnan(run._replace(broken=True).score("ant_vel", 1.5, 2.0).returns()).all()


@pytest.mark.parametrize("own_credit, bonus", [(0.0, 0.0), (2.0, 0.0), (2.0, 0.5)])
def test_system_worker_by_hand(own_credit, bonus):
    """Tests are of theta_bar + move, or (own_credit) of each explorer + move, in turn."""
    name, dims, k = "point_goal", esmeta.task_dims("point_goal"), 3
    config = tiny_config(goals=2, rollouts=k, test_rollouts=2, own_credit=own_credit, risk=0.7,
                         alive_bonus=bonus, centre=False)
    meta = esmeta.initial_state(config)
    job, copy = esmeta.make_jobs(config, meta)[1], esmeta.make_normaliser(meta, config)
    result = esmeta.evaluate_worker(job)
    eps, eps_critic = esmeta.sample_noise(config, 0, 1, dims)
    theta, phi = meta.mu_actor + meta.sigma_actor * eps, meta.mu_critic + 0.03 * eps_critic
    theta_bar = theta.mean(axis=0)
    starts = esmeta.generator(esmeta.STARTS, 0, 0, 0).integers(2**31, size=k + 1 + 2)
    explored = esmeta.rollout(name, theta, starts[:k], copy)
    after, errors, before = np.zeros((2, 2)), [], []
    for g, goal in enumerate(job.goals):
        data = explored.score(name, goal, bonus)
        before.append(explored.score(name, goal).returns())
        actor, critic = esmeta.adapt(theta_bar, phi, data, meta.sigma_actor, config, dims,
                                     esmeta.generator(esmeta.DATA, 0, 0, 0))
        for t in range(2):
            base = theta[(2 * g + t) % k] if own_credit else theta_bar
            run = esmeta.rollout(name, (base + actor - theta_bar)[None], starts[k + 1 + t :][:1],
                                 copy)
            after[g, t] = run.score(name, goal).returns()[0]
            errors.append(esmeta.critic_error(
                actor, critic, run.score(name, goal, bonus), 0.0, config, dims))
    close(result.return_after, after.mean(), 1e-4)  # without the bonus
    close(result.return_explorers, np.mean(before), 1e-4)
    fitness = (after + 100 * bonus).mean(axis=1)  # all live for H = 100 steps
    close(result.fitness_actor, fitness.mean() - 0.7 * fitness.std(), 1e-4)
    close(result.fitness_critic, -np.mean(errors), 1e-3)
    r = esmeta.own_ranks(np.array(before), after) if own_credit else np.zeros(k)
    for part, other in zip(result.noise, (r @ eps, eps.sum(0), (eps**2).sum(0), eps_critic)):
        close(part, other, 1e-4)


def test_system_adaptations_by_hand():
    """Fresh explorers around the current actor, half a step each further time, the same critic."""
    name, dims = "point_goal", esmeta.task_dims("point_goal")
    config = tiny_config(alive_bonus=0.5, centre=False, shrink=0.5, correlation=0.75)
    meta, goal = esmeta.initial_state(config), tasks.test_goals(name)[3]
    job, copy = esmeta.EvalJob(config, meta, goal, 3, 3, 5), esmeta.make_normaliser(meta, config)
    actor, phi, actors = meta.mu_actor, meta.mu_critic, [meta.mu_actor]
    for update, part in enumerate((1.0, 0.5, 0.25), start=1):
        rng = esmeta.generator(esmeta.EVAL, 5, 4, update)
        theta = actor + 0.5 * meta.sigma_actor * rng.standard_normal((3, len(actor)), np.float32)
        data = esmeta.rollout(name, theta, rng.integers(2**31, size=3), copy)
        step = dataclasses.replace(config, actor_step=part * config.actor_step)
        actor, phi = esmeta.adapt(theta.mean(axis=0), phi, data.score(name, goal, 0.5),
                                  meta.sigma_actor, step, dims, rng)
        actors.append(actor)
    np.testing.assert_array_equal(list(esmeta.adaptations(job)), actors)
    starts = esmeta.generator(esmeta.EVAL, 5, 0, 0).integers(2**31, size=20)
    np.testing.assert_array_equal(esmeta.evaluate_goal(job), [  # without the bonus
        esmeta.rollout(name, actor[None], starts, copy).score(name, goal).returns().mean()
        for actor in actors])


@pytest.mark.parametrize("name", ["cheetah_vel", "ant_vel", "ant_dir", "point_goal"])
def test_system_each_pair_has_goals_spread_over_the_range(name):
    def goals(**fields):
        config = tiny_config(name, **{**dict(workers=80, goals=4), **fields})
        meta = esmeta.initial_state(config)._replace(iteration=iteration)
        return np.array([job.goals for job in esmeta.make_jobs(config, meta)])

    task, iteration = tasks.TASKS[name], 0
    first = goals()
    np.testing.assert_array_equal(first[::2], first[1::2])
    pairs = first[::2].reshape(40, 4, -1)
    share = (pairs - task.goal_low) / (task.goal_high - task.goal_low)
    if task.direction:
        assert set(map(tuple, share[..., 0])) == {(0, 1, 0, 1), (1, 0, 1, 0)}
    else:
        assert share.min() >= 0 and share.max() <= 1 and len(np.unique(pairs)) == pairs.size
    if name.endswith("vel"):
        np.testing.assert_array_equal(np.floor(4 * share[..., 0]), np.tile(np.arange(4), (40, 1)))
        assert np.ptp(4 * share[..., 0] % 1) > 0.9
    shared = goals(antithetic=False)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[0], shared.shape))
    iteration = 1
    assert not np.array_equal(goals(), first)


def test_system_eval_is_one_table_for_any_process_count(run_of_4, capsys):
    before, seen = bits(run_of_4), []
    for path, processes in (run_of_4, 1), (run_of_4 / "checkpoint.npz", 2):
        assert call(f"--eval {path} --updates 2 --processes {processes}") == 0
        seen.append((capsys.readouterr().out, (run_of_4 / "eval.csv").read_text()))
    assert seen[0] == seen[1] and bits(run_of_4) == before
    text, rows = seen[0][0], list(csv.reader(io.StringIO(seen[0][1])))
    assert rows[0] == ["task", "goal", "updates", "return"] and len(rows) == 1 + 3 * 40
    assert [row[2] for row in rows[1:]] == ["0"] * 40 + ["1"] * 40 + ["2"] * 40
    returns = np.array([float(row[3]) for row in rows[1:]]).reshape(3, 40)
    mean = next(line for line in text.splitlines() if line.startswith("mean")).split()
    shown = [float(word) for word in mean if word.lstrip("-").replace(".", "").isdigit()]
    np.testing.assert_allclose(shown[0::2], returns.mean(axis=1), atol=0.06)
    np.testing.assert_allclose(shown[1::2], 1.96 * returns.std(axis=1) / 40**0.5, atol=0.06)
    assert text.replace("\n", "").isprintable()


def test_system_eval_with_another_number_of_explorers(run_of_4, no_pool, capsys):
    names = {"": "eval.csv", "--rollouts 20": "eval-K20.csv", "--rollouts 9": "eval-K9.csv"}
    for flags in names:
        assert call(f"--eval {run_of_4} --processes 1 {flags}") == 0
    own, same, fewer = (np.loadtxt(run_of_4 / name, delimiter=",", skiprows=1, usecols=-1)
                       for name in names.values())
    np.testing.assert_array_equal(own, same)  # MAML's; it was trained with 3
    np.testing.assert_array_equal(own[:40], fewer[:40])
    assert (own[40:] != fewer[40:]).all()
    assert call(f"--eval {run_of_4} --rollouts 0") == 2
    assert "rollouts" in one_line(capsys.readouterr().err)


def test_system_meta_test_on_any_goals(run_of_4, no_pool):
    two, everything = tasks.test_goals("point_goal")[:2], esmeta.meta_test(run_of_4)
    assert everything.shape == (2, 40) and np.isfinite(everything).all()
    np.testing.assert_array_equal(esmeta.meta_test(run_of_4, two), everything[:, :2])
    before = esmeta.meta_test(run_of_4 / "checkpoint.npz", two, updates=0)
    np.testing.assert_array_equal(before, everything[:1, :2])
    assert (esmeta.meta_test(run_of_4, two, seed=1)[1] != everything[1, :2]).all()


LITERAL = dict(
    workers=64, correlation=0, obs_clip=0, gamma=0.99, n_step=1, centre=False, cycles=50,
    critic_updates=1, critic_batch=128, critic_lr=1e-3, actor_batch=128, actor_rule="sgd",
    actor_step=1e-4, target_tau=1e-3, shrink=1, goals=1, alive_bonus=0, risk=0, own_credit=0,
    test_rollouts=1, antithetic=False, utility="raw", natural=False, lr_mu_actor=1e-6,
    lr_sigma_actor=1e-7, lr_mu_critic=1e-6, lr_sigma_critic=1e-7, half_life=0, momentum=0,
    weight_decay=0)


@pytest.mark.parametrize("name", ["point_goal", "cheetah_vel"])
def test_system_paper_is_the_literal_form(name, no_pool, tmp_path):
    for task, k in (name, 20), ("ant_dir", 40):
        assert esmeta.make_config(task, True) == esmeta.Config(task=task, rollouts=k, **LITERAL)
    line = f"--paper --task {name} --workers 2 --rollouts 2 --critic-batch 8 --iterations 1"
    assert call(line, tmp_path / "run") == 0
    stored, meta = esmeta.load_checkpoint(tmp_path / "run")
    assert stored == esmeta.make_config(name, True, workers=2, rollouts=2, critic_batch=8)
    assert meta.iteration == 1 and meta.obs_count > 0


def test_system_help_shows_every_default_with_its_provenance(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # a help text is one line
    assert call("--help") == 0
    helps = {part.split()[0]: part for part in capsys.readouterr().out.split("\n  --")[1:]}
    for field in dataclasses.fields(esmeta.Config):
        text, source = helps[field.name.replace("_", "-")].strip(), field.metadata["source"]
        assert f"(default {field.default}" in text and field.metadata["help"] in text
        assert source in ("paper", "MAML", "ours") and text.endswith(f"({source})")
    for flag in "iterations processes out updates pool ray-address".split():
        assert "default" in helps[flag], flag


def test_system_readme_lists_our_choices():
    section = Path(esmeta.__file__).with_name("README.md").read_text().split("\n## Choices", 1)[1]
    listed = [line.split("`")[1] for line in section.split("\n## ", 1)[0].splitlines()
              if line.startswith("| `")]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(esmeta.Config)
                                    if field.metadata["source"] == "ours")


def test_system_readme_names_the_line_of_each_function():
    text = (Path(esmeta.__file__).parent / "README.md").read_text()
    rows = [line.strip("|").split("|") for line in text.split("## Reading it as a spec")[1]
            .split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    source = Path(esmeta.__file__).read_text().splitlines()
    for _, names, lines in rows:
        names = [name for name in re.findall(r"`([\w.]+)`", names) if name != "tasks.py"]
        found = [source[int(line) - 1].split("(")[0].split() for line in re.findall(r"\d+", lines)]
        assert found == [["def", name.split(".")[-1]] for name in names]


def test_system_an_exported_number_of_threads_changes_no_bit():
    program = ("import esmeta, numpy as np; e = np.random.default_rng(0).standard_normal("
               "(64, 30000), np.float32); print((e[:, 0] @ e).tobytes().hex())")
    done = [subprocess.run([sys.executable, "-c", program], cwd=Path(esmeta.__file__).parent,
                           stdout=subprocess.PIPE, check=True, env={
                               **os.environ, "OPENBLAS_NUM_THREADS": n, "OMP_NUM_THREADS": n})
            for n in ("1", "2")]
    assert done[0].stdout == done[1].stdout


def test_system_readme_example_prints_one_number_twice():
    text = (Path(esmeta.__file__).parent / "README.md").read_text()
    done = subprocess.run([sys.executable, "-c", text.split("```python\n")[1].split("```")[0]],
                          cwd=Path(esmeta.__file__).parent, stdout=subprocess.PIPE, text=True,
                          check=True)
    formula, difference = map(float, done.stdout.split())
    assert formula == pytest.approx(difference, rel=1e-6)


LEARNING = "--task point_goal --workers 32 --rollouts 10 --iterations 20"
MARGIN = 8.0  # in return: standing still scores -17, the first iteration about -30


def test_system_point_goal_learns(tmp_path):
    assert call(LEARNING, tmp_path / "run") == 0
    after = [float(row.split(",")[3]) for row in log_rows(tmp_path / "run")]
    assert np.mean(after[-3:]) > after[0] + MARGIN


@pytest.mark.parametrize("task", MUJOCO_TASKS)
def test_system_committed_results_are_what_their_checkpoints_do(task):
    """After one update on the first 4 goals, to 10 %: other CPUs round differently."""
    folder = Path(esmeta.__file__).parent / "results" / f"{task}-seed0"
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    _, after = esmeta.meta_test(folder, tasks.test_goals(task)[:4])
    written = [float(row["return"]) for row in rows if row["updates"] == "1"][:4]
    assert after.mean() == pytest.approx(np.mean(written), rel=0.1, abs=10)


@pytest.mark.parametrize("task", MUJOCO_TASKS)
def test_system_committed_results_have_the_defaults(task):
    folders = sorted((Path(esmeta.__file__).parent / "results").glob(f"{task}-seed*"))
    assert len(folders) == 3
    for seed, folder in enumerate(folders):
        config, meta = esmeta.load_checkpoint(folder)
        assert config == esmeta.make_config(task, seed=seed)
        assert meta.iteration == esmeta.ITERATIONS[task]


def test_system_readme_tables_are_those_of_the_committed_runs(capsys):
    lines = (Path(esmeta.__file__).parent / "README.md").read_text().splitlines()
    assert table.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 8 and not set(rows) - set(lines)


def test_system_ablations_run(capsys):
    line = ["--task", "point_goal", "--iterations", "2", "--processes", "1", "--seeds", "2"]
    assert ablate.main([*line, "workers=2 rollouts=2", "workers=2 rollouts=2 natural=false"]) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert one.startswith("point_goal,2,2,workers=2 rollouts=2,-")
    assert one.split(",")[-2:] != other.split(",")[-2:]
    for variant, error in (("risk=-1", "risk must be from 0"), ("seed=1", "seed=1 is no setting"),
                           ("iterations=3", "iterations=3 is no"), ("risk", "risk is no")):
        assert ablate.main([variant]) == 2
        assert capsys.readouterr().err.startswith("results.ablate: error: " + error)


def test_system_gains_run(run_of_4, capsys):
    table_before = gain.TABLE.read_bytes()
    assert gain.main([str(run_of_4), "actor_step=0.01", "critic_updates=20"]) == 0
    head, *rows = (line.split(",") for line in capsys.readouterr().out.splitlines())
    assert head == "task updates setting before after gain more error".split()
    assert all(row[:2] == ["point_goal", "1"] for row in rows)
    values = {row[2]: [float(x) for x in row[3:]] for row in rows}
    assert list(values) == ["as trained", "actor_step=0.01", "critic_updates=20"]
    trained = values["as trained"]
    for before, after, gained, more, error in values.values():
        assert before == trained[0] and gained == pytest.approx(after - before, abs=0.11)
        assert more == pytest.approx(after - trained[1], abs=0.11) and error >= 0
    assert trained[3:] == [0, 0] and values["actor_step=0.01"] != trained
    assert gain.TABLE.read_bytes() == table_before
    assert gain.main(["nowhere"]) == 2
    assert capsys.readouterr().err == "results.gain: error: no checkpoint at nowhere\n"
    # as --eval does, but for its seed
    assert gain.main([str(run_of_4), "--updates", "3", "shrink=0.9"]) == 0
    _, row, _ = capsys.readouterr().out.splitlines()
    config, meta = esmeta.load_checkpoint(run_of_4)
    returns = np.mean([
        esmeta.evaluate_goal(esmeta.EvalJob(config, meta, goal, i, updates=3, seed=1))
        for i, goal in enumerate(tasks.test_goals("point_goal")[:10])], axis=0)
    assert row.startswith(f"point_goal,3,as trained,{returns[0]:.1f},{returns[3]:.1f},")


# ---- faults ------------------------------------------------------------------------------------


def group(pgid):
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end while we look
            state, _, own, *_ = stat.read_text().rpartition(")")[2].split()
            found += [stat.parent.name] * (state != "Z" and int(own) == pgid)
    return found


def wait_until(condition, seconds=60):
    """Poll until a condition holds; fail if it does not within seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def iteration_of(out):
    """Iterations in a run's log, 0 where there is none."""
    return len(log_rows(out)) if (out / "log.csv").exists() else 0


def one_line(error):
    """The error, if it is one line; the line feed before it ends the terminal's ^C."""
    assert error.lstrip("\n").startswith("esmeta: ") and error.strip().count("\n") == 0, error
    return error


# (iteration, jobs done at that moment, which): of the idle, one holds the lock of the job queue
KILLS = [(1, 1, 0), (2, 4, 0), (3, 4, 1), (5, 1, 0), (5, 1, 1)]


def test_fault_killed_pool_workers_change_no_bit(tmp_path, monkeypatch, capsys):
    kills, made = list(KILLS), []

    def progress(count):
        children = sorted(multiprocessing.active_children(), key=lambda child: child.pid)
        while kills and kills[0][0] == len(made) and kills[0][1] <= count:
            os.kill(children[kills.pop(0)[2]].pid, signal.SIGKILL)

    monkeypatch.setattr(esmeta, "progress_bar", lambda total: made.append(total) or progress)
    assert call(SLOW + " --iterations 5 --processes 2", tmp_path / "run") == 0
    assert not kills and not multiprocessing.active_children()
    assert bits(tmp_path / "run") == undisturbed(tmp_path / "quiet", 5, SLOW)
    assert capsys.readouterr().err == ""


class Deadly:
    """What ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize("processes", [1, 3])
def test_fault_job_that_kills_its_worker_stops_the_run(processes, tmp_path, monkeypatch, capsys):
    make_jobs = esmeta.make_jobs

    def deadly_jobs(config, meta):
        return [job._replace(goals=Deadly()) if (meta.iteration, job.worker) == (1, 2) else job
                for job in make_jobs(config, meta)]

    monkeypatch.setattr(esmeta, "make_jobs", deadly_jobs)
    assert call(TINY + f" --seed 7 --iterations 4 --processes {processes}", tmp_path / "run") == 1
    error = one_line(capsys.readouterr().err)
    assert "worker 2" in error and "iteration 1" in error and "seed 7" in error
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert bits(tmp_path / "run") == undisturbed(tmp_path / "quiet", 1, TINY + " --seed 7")


@pytest.mark.parametrize("receiver", ["this thread", "another thread"])
def test_fault_signal_while_a_checkpoint_is_written_waits(receiver, tmp_path, monkeypatch, capfd):
    write, done = zipfile.ZipFile.open, threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    thread = other.ident if receiver == "another thread" else threading.get_ident()

    def interrupted(archive, name, mode="r", **options):  # once numpy.savez has opened a member
        member = write(archive, name, mode, **options)
        if mode == "w":
            signal.pthread_kill(thread, signal.SIGTERM)
            time.sleep(0.01)  # until the other thread has it
        return member

    monkeypatch.setattr(zipfile.ZipFile, "open", interrupted)
    try:
        assert call(TINY + " --iterations 9 --processes 1", tmp_path / "run") == 143
    finally:
        done.set()
    assert "--resume" in one_line(capfd.readouterr().err)
    assert iteration_of(tmp_path / "run") == 0  # the first one, whole


@pytest.mark.parametrize("signum, send, delay", [
    (signal.SIGTERM, os.kill, None), (signal.SIGINT, os.kill, None),  # None: among the iterations
    (signal.SIGINT, os.killpg, None), (signal.SIGINT, os.killpg, 0.05),  # killpg: as Ctrl-C does
    (signal.SIGINT, os.killpg, 0.2), (signal.SIGTERM, os.kill, 0.05)])  # while the workers start
def test_fault_interrupted_run_stops_cleanly(signum, send, delay, tmp_path):
    out = tmp_path / "run"
    process = launch(TINY + " --iterations 9999 --processes 2", out)
    wait_until(lambda: len(group(process.pid)) >= 3 if delay else iteration_of(out) >= 2)
    time.sleep(delay or 0)
    send(process.pid, signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "--resume" in one_line(error)
    wait_until(lambda: not group(process.pid))
    n = esmeta.load_checkpoint(out)[1].iteration
    assert (n >= 1 or delay) and not list(out.glob("*.tmp"))
    assert undisturbed(out, n + 1) == undisturbed(tmp_path / "quiet", n + 1)


def test_fault_main_process_killed_20_times(tmp_path):
    out, rng, groups = tmp_path / "run", random.Random(3), []
    for kill in range(20):
        known, resume = iteration_of(out), " --resume" * out.is_dir()
        process = launch(TINY + " --iterations 9999 --processes 1" + resume, out)
        if kill % 4 == 0:  # any moment: before the first checkpoint, in the start of the pool
            time.sleep(rng.uniform(0.2, 1.5))
        else:  # or in the iterations that follow the first
            wait_until(lambda: process.poll() is not None or iteration_of(out) > known)
            time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
        groups.append(process.pid)
    n = esmeta.load_checkpoint(out)[1].iteration + 2
    assert undisturbed(out, n) == undisturbed(tmp_path / "quiet", n)
    assert [row.split(",")[0] for row in log_rows(out)] == [str(i) for i in range(n)]
    wait_until(lambda: not any(map(group, groups)))  # orphaned workers end by themselves


@pytest.mark.parametrize("writes", [None, 0, 1, 2, 4])
def test_fault_full_disk(writes, no_pool, tmp_path, monkeypatch, capsys):
    """After some writes no byte more; None: /dev/full says so to the first of a checkpoint."""
    out, left, fsync = tmp_path / "run", iter(range(writes or 0)), os.fsync

    def full(fileno):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        fsync(fileno)

    before = undisturbed(out, 2)
    with monkeypatch.context() as patch:
        if writes is None:
            (out / "checkpoint.npz.tmp").symlink_to("/dev/full")
        else:
            patch.setattr(os, "fsync", full)
        assert call(TINY + " --iterations 9 --resume", out) == 1
    assert "No space left" in one_line(capsys.readouterr().err) and not list(out.glob("*.tmp"))
    _, meta = esmeta.load_checkpoint(out)
    if writes == 4:  # room for config, log, checkpoint and the next iteration's checkpoint
        assert meta.iteration == 3
    else:
        assert bits(out)[0] == before[0]
    assert undisturbed(out, 5) == undisturbed(tmp_path / "quiet", 5)


def test_fault_unwritable_directory(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run" / "checkpoint.npz.tmp").mkdir(parents=True)  # root may write everywhere else
    for out in tmp_path / "file", tmp_path / "file/below", tmp_path / "run", "/proc/esmeta":
        assert call(TINY, out) in (1, 2)
        one_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "in the way"


def test_fault_two_runs_in_one_directory(tmp_path, capsys):
    out = tmp_path / "run"
    process = launch(TINY + " --iterations 9999 --processes 1", out)
    wait_until((out / "checkpoint.npz").exists)
    for line, word in (TINY + " --resume", "another process"), (TINY, "--resume"):
        assert call(line, out) == 2 and word in one_line(capsys.readouterr().err)
    known = iteration_of(out)
    wait_until(lambda: iteration_of(out) > known and process.poll() is None)  # it goes on


def breaking(bad, broken):
    """A Crew.map that changes results of bad workers; no changes: their adaptations diverge."""
    def poison(job):
        return job._replace(meta=job.meta._replace(sigma_critic=job.meta.sigma_critic * 1e30))

    def broken_map(self, function, jobs, progress=None):
        results = [function(poison(job) if job.worker in bad and not broken else job)
                   for job in jobs]
        return [r._replace(**broken) if i in bad else r for i, r in enumerate(results)]
    return broken_map


BREAKS = [dict(fitness_actor=math.nan), dict(fitness_actor=-math.inf),
          dict(fitness_actor=math.inf), dict(fitness_critic=math.nan), {}]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("line", [TINY, CHEETAH.replace("--workers 2", "--workers 4")])
@pytest.mark.parametrize("broken", BREAKS)
def test_fault_non_finite_fitness(line, broken, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)  # for MUJOCO_LOG.TXT
    monkeypatch.setattr(esmeta.Crew, "map", breaking({1}, broken))
    assert call(line + " --iterations 2", out) == 0  # one worker: counted, not fatal
    assert all("failed 1 " in text + " " for text in capsys.readouterr().out.splitlines())
    assert all(np.isfinite(value).all() for value in esmeta.load_checkpoint(out)[1])
    assert all(math.isfinite(float(x)) for row in log_rows(out) for x in row.split(","))
    before = bits(out)
    monkeypatch.setattr(esmeta.Crew, "map", breaking(range(4), broken))
    assert call(line + " --iterations 4 --resume", out) == 1  # all: the end
    assert "finite" in one_line(capsys.readouterr().err) and bits(out) == before


# ---- bad input ---------------------------------------------------------------------------------


def packed(arrays, **changed):
    """Bytes of a checkpoint with some arrays changed, None: left out."""
    content = io.BytesIO()
    np.savez(content, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
    return content.getvalue()


def configured(arrays, version=2, **fields):
    """The same with another version or other fields in the config."""
    stored = json.loads(str(arrays["config"]))
    stored |= dict(version=version, config={**stored["config"], **fields})
    return packed(arrays, config=json.dumps(stored))


def zipped(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(name + ".npy", text)
    return content.getvalue()


class Trap:
    """What makes a file in the working directory when unpickled."""

    def __reduce__(self):
        return open, ("trapped", "w")


BROKEN = {  # bytes of a checkpoint, its arrays -> bytes of none
    "empty": lambda good, a: b"",
    "text": lambda good, a: b"iteration,return_before\n",
    "cut after 1": lambda good, a: good[:1],
    "cut in half": lambda good, a: good[: len(good) // 2],
    "cut by 1": lambda good, a: good[:-1],
    "empty zip": lambda good, a: zipped(),
    "zip of text": lambda good, a: zipped(config="{}", mu_actor="1 2 3"),
    "pickle": lambda good, a: pickle.dumps(Trap()),
    "zip with a pickle": lambda good, a: packed(a, mu_actor=np.array([Trap()], dtype=object)),
    "version 1": lambda good, a: configured(a, version=1),
    "unknown field": lambda good, a: configured(a, horizon=200),
    "negative workers": lambda good, a: configured(a, workers=-4),
    "workers a string": lambda good, a: configured(a, workers="4"),
    "other task": lambda good, a: configured(a, task="ant_vel"),
    "unknown task": lambda good, a: configured(a, task="walker"),
    "config no JSON": lambda good, a: packed(a, config="{"),
    "config a list": lambda good, a: packed(a, config="[1]"),
    "no config": lambda good, a: packed(a, config=None),
    "no sigma": lambda good, a: packed(a, sigma_actor=None),
    "NaN": lambda good, a: packed(a, mu_actor=a["mu_actor"] * np.float32(math.nan)),
    "infinity": lambda good, a: packed(a, obs_m2=a["obs_m2"] + math.inf),
    "negative sigma": lambda good, a: packed(a, sigma_critic=-a["sigma_critic"]),
    "zero sigma": lambda good, a: packed(a, sigma_actor=0 * a["sigma_actor"]),
    "negative iteration": lambda good, a: packed(a, iteration=-1),
    "one weight less": lambda good, a: packed(a, mu_actor=a["mu_actor"][1:]),
    "an axis more": lambda good, a: packed(a, mu_actor=a["mu_actor"][None]),
    "float64": lambda good, a: packed(a, mu_actor=a["mu_actor"].astype(float)),
    "float iteration": lambda good, a: packed(a, iteration=2.0),
}


@pytest.fixture
def refused(run_of_4, tmp_path, monkeypatch, capsys):
    """A function that checks that a command line is refused, without a trace: -> its one line."""
    for path in run_of_4.iterdir():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "folder" / "checkpoint.npz").mkdir(parents=True)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(esmeta.Crew, "open", lambda self: pytest.fail("it started to work"))

    def tree():
        return {path: path.is_file() and path.read_bytes()
                for path in tmp_path.rglob("*") if path.name != ".lock"}

    def check(line):
        before = tree()
        assert call(line) == 2
        seen = capsys.readouterr()
        assert seen.out == "" and tree() == before and len(seen.err) < 500
        assert seen.err.startswith("esmeta: ") and seen.err.count("\n") == 1
        return seen.err
    return check


@pytest.mark.parametrize("line", [
    "--task walker", "--task ''", "--task", "--workers 3", "--workers 1", "--workers 0",
    "--workers -2", "--workers x", "--workers 1e3", "--workers 1000000000", "--rollouts 0",
    "--rollouts -1", "--rollouts 100000000", "--sigma-actor 0", "--sigma-actor -1",
    "--sigma-actor nan", "--sigma-critic inf", "--correlation 1", "--correlation -0.1",
    "--obs-clip -5", "--gamma 1", "--gamma -1", "--gamma nan", "--n-step 0", "--cycles 0",
    "--critic-updates 0", "--critic-batch 0", "--critic-lr -1", "--critic-lr nan", "--critic-lr x",
    "--actor-rule adam", "--actor-step inf", "--actor-step -1", "--target-tau 2", "--goals 0",
    "--test-rollouts 0", "--antithetic maybe", "--centre 1", "--natural ''", "--utility best",
    "--lr-mu-actor nan", "--lr-sigma-actor -1", "--lr-mu-critic inf", "--half-life -1",
    "--half-life nan", "--seed -1", "--seed 1.5", "--seed 99999999999999999999", "--iterations -1",
    "--iterations x", "--processes 0", "--processes -1", "--processes 1000000", "--processes x",
    "--updates -1", "--updates x", "--updates 3", "--pool cloud", "--pool", "--horizon 0",
    "--iter 3", "--out", "--out ''", "--out file", "--out run", "--ray-address 127.0.0.1:6379",
    "walker", "--resume --out missing", "--resume --out file", "--resume --out folder", "--eval",
    "--eval missing", "--eval none", "--eval file", "--eval folder",
    "--eval folder/checkpoint.npz", "--eval run --updates -1", "--eval run --processes 0",
    "--eval run --seed 3", "--eval run --actor-step 2", "--eval run --out new",
    "--eval run --paper", "--eval run --resume", "--eval run --pool ray",
    "--eval run --iterations 5"])
def test_input_is_refused_in_one_line_that_names_it(line, refused):
    words = [word.lstrip("-").replace("-", "_") for word in shlex.split(line)]
    words = [word for word in words if word != "eval"] or words
    error = refused(line).replace("-", "_")
    assert any(word and word in error for word in words), error


@pytest.mark.parametrize("flags, word", [
    ("", "--resume"), ("--resume --seed 1", "seed"), ("--resume --workers 6", "workers"),
    ("--resume --rollouts 4", "rollouts"), ("--resume --paper", "correlation"),
    ("--resume --task cheetah_vel", "task"), ("--task ant_vell", "'ant_vel'"),
    ("--workers 3", "even")])
def test_input_that_does_not_fit_the_run(flags, word, refused):
    assert word in refused(f"{TINY} --out run {flags}")


def test_input_pool_ray_without_ray(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for flags in "--pool ray", "--pool ray --ray-address auto":
        assert "pip install" in refused(f"{TINY} {flags} --out new")


@pytest.mark.parametrize("name", BROKEN)
def test_input_broken_checkpoint_is_refused(name, refused):
    path = Path("run/checkpoint.npz")
    good = path.read_bytes()
    with np.load(path) as archive:
        path.write_bytes(BROKEN[name](good, dict(archive)))
    for line in "--eval run", "--eval run/checkpoint.npz", f"{TINY} --out run --resume":
        assert "checkpoint" in refused(line)
    assert not Path("trapped").exists()


@settings(max_examples=60)
@given(data=st.data())
def test_input_flipped_and_cut_checkpoints_load_equal_or_are_refused(run_of_4, data):
    good = (run_of_4 / "checkpoint.npz").read_bytes()
    # most bytes are numbers, which a CRC guards: look more often at the headers around them
    near = st.sampled_from([at for at in range(len(good)) if good[at : at + 2] == b"PK"])
    place = st.integers(0, len(good) - 1) | st.builds(
        lambda at, by: min(at + by, len(good) - 1), near, st.integers(0, 250))
    changed = bytearray(good)
    for at, flip in data.draw(st.lists(st.tuples(place, st.integers(1, 255)), max_size=3)):
        changed[at] ^= flip
    start, stop = sorted(data.draw(st.just((0, 0)) | st.tuples(place, place)))
    del changed[start:stop]
    path = run_of_4.parent / "changed.npz"
    path.write_bytes(changed)
    try:
        config, meta = esmeta.load_checkpoint(path)
    except ValueError as error:
        assert str(error).isprintable()
        return
    like_config, like = esmeta.load_checkpoint(run_of_4)
    assert config == like_config
    for value, expected in zip(meta, like):
        np.testing.assert_array_equal(value, expected)


# ---- ray ---------------------------------------------------------------------------------------


@pytest.fixture
def ray():
    ray = pytest.importorskip("ray")
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("argument,environment,address,cpus", [
    (None, None, None, 3), ("a:1", None, "a:1", None), (None, "b:2", "b:2", None),
    ("a:1", "b:2", "a:1", None)])
def test_ray_joins_a_running_cluster_with_no_cores_of_its_own(
        argument, environment, address, cpus, monkeypatch):
    fake = unittest.mock.MagicMock()
    fake.is_initialized.return_value = False
    for name, module in (("ray", fake), ("ray.util", fake.util),
                         ("ray.util.multiprocessing", fake.util.multiprocessing)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    esmeta.ray_pool(3, argument)
    given = fake.init.call_args.kwargs  # Ray refuses num_cpus beside an address
    assert (given["address"], given["num_cpus"]) == (address, cpus)
    fake.util.multiprocessing.Pool.assert_called_once_with(3)


def test_ray_pool_gives_the_bits_of_the_local_one(ray, tmp_path):
    for line, n in (TINY, 3), (CHEETAH, 1):
        line += f" --iterations {n} --processes 2"
        assert call(line + " --pool ray", tmp_path / f"ray{n}") == 0
        assert call(line, tmp_path / f"local{n}") == 0
        assert bits(tmp_path / f"ray{n}") == bits(tmp_path / f"local{n}")


def test_ray_actor_killed_in_an_iteration_changes_no_bit(ray, tmp_path, monkeypatch):
    pools, killed, ray_pool = [], [], esmeta.ray_pool

    def progress(count):
        if 1 <= count < 4 and not killed:
            killed.append(pools[0][0]._actor_pool[0][0])
            ray.kill(killed[0])

    monkeypatch.setattr(esmeta, "ray_pool", lambda *a: pools.append(ray_pool(*a)) or pools[-1])
    monkeypatch.setattr(esmeta, "progress_bar", lambda total: progress)
    assert call(SLOW + " --iterations 3 --pool ray --processes 2", tmp_path / "run") == 0
    assert killed and bits(tmp_path / "run") == undisturbed(tmp_path / "quiet", 3, SLOW)


# ---- extras: skipped where Pillow or matplotlib is not installed -------------------------------


def test_extra_scripts_draw_and_film(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    run, film = tmp_path / "run", tmp_path / "point.gif"
    assert call(TINY + " --iterations 2", run) == 0
    for line in (f"results.figures {run}", f"results.video {run} --goal 0.1 0.2 --out {film}"):
        subprocess.run([sys.executable, "-m", *line.split()], check=True,
                       cwd=Path(esmeta.__file__).parent)
    assert (run / "training.png").stat().st_size and film.stat().st_size


# ---- launcher ----------------------------------------------------------------------------------


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """A folder with run.sh, and on the PATH a python3 whose environments get an empty pip."""
    home, bin_folder = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    bin_folder.mkdir()
    (home / "run.sh").write_bytes((Path(tasks.__file__).parent / "run.sh").read_bytes())
    (home / "run.sh").chmod(0o755)
    (home / "requirements.txt").touch()
    (home / "esmeta.py").write_text("import pip, sys; print(*sys.argv[1:])")
    stub = bin_folder / "python3"
    stub.write_text(f"""#!/bin/sh
real={shlex.quote(sys.executable)}
[ "$2" = venv ] || exec "$real" "$@"
"$real" -m venv --without-pip "$3" && cd "$3"/lib/python3*/site-packages && : > pip.py
""")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return home


def check_launch(script):
    ran = subprocess.run([script, "a b", "c"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "a b c\n"), ran.stderr


def test_launcher_makes_a_broken_environment_anew(launcher):
    venv = launcher / ".venv"
    check_launch(launcher / "run.sh")
    (venv / "kept").touch()
    check_launch(launcher / "run.sh")
    assert (venv / "kept").exists()  # a sound one stays
    [library] = venv.glob("lib/python3*")
    library.rename(library.with_name("python3.1"))  # as if the system's Python had moved on
    check_launch(launcher / "run.sh")
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/gone/python")
    check_launch(launcher / "run.sh")


def test_launcher_uses_its_own_folder(launcher, tmp_path, monkeypatch):
    for folder in ("links", "decoy/home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "links/second").symlink_to("../home/run.sh")
    (tmp_path / "first").symlink_to(tmp_path / "links/second")
    check_launch("./first")
    monkeypatch.setenv("CDPATH", str(tmp_path / "decoy"))  # where cd would go to home
    check_launch("home/run.sh")
    assert [path.parent.name for path in tmp_path.rglob(".venv")] == ["home"]
    assert not list((tmp_path / "decoy/home").iterdir())
