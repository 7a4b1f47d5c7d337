"""Tests of this folder: rivals, stored runs, tables, pictures; some skipped without extras."""

import csv
import dataclasses
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import esmeta  # before numpy: it pins BLAS to one thread

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

import tasks
from esmeta import Dims
from results import ablate, baldwin, figures, gain, guard, maml, shared_sigma, table

HERE = Path(esmeta.__file__).parent
SEED = st.integers(0, 2**32 - 1)
SMALL = st.builds(Dims, st.integers(1, 4), st.integers(1, 3), st.integers(2, 4))
TINY = ["--task", "point_goal", "--workers", "4", "--rollouts", "4", "--critic-updates", "2"]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(SMALL, st.integers(1, 5), st.floats(0.1, 2.0), SEED)
def test_baldwin_a2c_gradient_is_that_of_the_log_likelihood_times_the_advantage(dims, n, std, seed):
    rng = np.random.default_rng(seed)
    theta = 0.7 * rng.normal(size=len(esmeta.xavier(esmeta.actor_shapes(dims), rng)))
    obs, action, advantage = (rng.normal(size=(n, *s)) for s in ((dims.obs,), (dims.act,), ()))

    def objective(theta):
        mean, cache = esmeta.actor_forward(theta, obs, dims)
        log_density = esmeta.log_density(action, mean, np.full(dims.act, std))
        return np.mean(log_density * advantage), [x > 0 for x in cache[3:5]]

    numeric, relu = np.empty_like(theta), objective(theta)[1]
    for i, step in enumerate(1e-6 * np.eye(len(theta))):
        (up, relu_up), (down, relu_down) = objective(theta + step), objective(theta - step)
        assume(all((a == b).all() and (a == c).all() for a, b, c in zip(relu, relu_up, relu_down)))
        numeric[i] = (up - down) / 2e-6
    exact = baldwin.a2c_gradient(theta, obs, action, advantage, std, dims)
    np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-6 * (1 + np.abs(numeric).max()))


def test_baldwin_earns_what_the_environment_pays_for_the_actions_that_it_drew():
    config, rng = esmeta.make_config("cheetah_vel", rollouts=2), np.random.default_rng(0)
    theta = esmeta.initial_state(config).mu_actor
    [data] = baldwin.explore(theta, [0.5], config, lambda obs: obs, rng)
    noisy, still = np.abs(data.action[:, :2]), np.abs(data.action[:, 2])
    assert noisy.max() > 1 > still.max()
    rng = np.random.default_rng(0)
    rng.standard_normal(data.action.shape, np.float32)
    env = tasks.make_vec("cheetah_vel", 3, goal=0.5)
    env.reset(seed=rng.integers(2**31, size=3).tolist())
    for action, reward in zip(data.action, data.reward):
        np.testing.assert_allclose(reward, env.step(action)[1], rtol=1e-6)


def test_baldwin_adapts_towards_what_pays():
    """The reward is the action's first entry, and no future counts."""
    config, rng = esmeta.make_config("cheetah_vel", gamma=0.0), np.random.default_rng(0)
    dims, meta = esmeta.task_dims(config.task), esmeta.initial_state(config)
    obs = rng.normal(size=(51, 4, dims.obs)).astype(np.float32)
    still = lambda theta: esmeta.actor_forward(theta, obs[:-1].reshape(200, -1), dims)[0]
    action = (still(meta.mu_actor) + 0.3 * rng.normal(size=(200, dims.act))).reshape(50, 4, -1)
    no = np.zeros((50, 4), bool)
    data = esmeta.Trajectories(obs, obs, action, action[..., 0] - 9, no, ~no)
    theta, phi = baldwin.adapt(*meta[:3:2], data, meta.sigma_actor, config, dims, rng)
    assert still(theta)[:, 0].mean() > still(meta.mu_actor)[:, 0].mean() + 0.1
    assert phi[-1] == pytest.approx(data.reward.mean(), abs=0.1)  # where its bias starts
    sigmas = np.linalg.norm((theta - meta.mu_actor) / meta.sigma_actor)
    assert sigmas == pytest.approx(config.actor_step, rel=1e-4)


def test_baldwin_step_is_along_sigma_squared_of_advantages_over_a_fitted_value(monkeypatch):
    """The value of the fitted critic; it is fitted to the actor's own actions, not to those drawn.

    A constant in the values changes no step.
    """
    config = esmeta.make_config("cheetah_vel", gamma=0.0, rollouts=2)
    dims, meta = esmeta.task_dims(config.task), esmeta.initial_state(config)
    [data] = baldwin.explore(meta.mu_actor, [0.5], config, lambda s: s, np.random.default_rng(0))
    seen, values, fit, constant = [], [], esmeta.fit_critic, 0.0
    monkeypatch.setattr(esmeta, "fit_critic", lambda phi, obs, action, *rest: (
        seen.append((obs, action)) or fit(phi, obs, action, *rest)))
    monkeypatch.setattr(baldwin, "state_values", lambda theta, phi, obs, dims: (
        values.append(phi) or np.full(obs.shape[:-1], constant, np.float32)))

    def move(sigma):
        theta, phi = baldwin.adapt(*meta[:3:2], data, sigma, config, dims, np.random.default_rng(1))
        assert values[-1] is phi and values[-2] is not phi
        step = (theta - meta.mu_actor) / sigma**2
        return step / np.linalg.norm(step)

    sigma = meta.sigma_actor * np.linspace(1, 2, len(meta.mu_actor), dtype=np.float32)
    first = move(meta.sigma_actor)
    np.testing.assert_allclose(move(sigma), first, atol=1e-4)
    constant = 50.0
    np.testing.assert_allclose(move(sigma), first, atol=1e-4)
    obs, action = seen[0]
    np.testing.assert_array_equal(action, esmeta.actor_forward(meta.mu_actor, obs, dims)[0])


def test_baldwin_update_is_by_ranks():
    config = esmeta.make_config("cheetah_vel")
    meta = esmeta.initial_state(config)
    better, worse = (esmeta.Result(d, d, meta.mu_critic, 0.0, None, None, 0)
                     for d in (np.ones_like(meta.mu_actor), -np.ones_like(meta.mu_actor)))
    results = [baldwin.Result(*each, f) for each, f in ((better, 9.0), (worse, 1.0))]
    new = baldwin.update_distribution(meta, results, config)
    np.testing.assert_allclose(new.velocity, 0.3 * 30 * 0.5 * 0.03**2 / 20, rtol=1e-4)
    assert (new.sigma_actor > meta.sigma_actor).all()


def test_baldwin_has_the_steps_of_esmetas_meta_test(monkeypatch):
    config, seen = esmeta.make_config("cheetah_vel", rollouts=2), []
    monkeypatch.setattr(baldwin, "adapt", lambda theta, phi, data, sigma, config, dims, rng: (
        seen.append((data, config, theta, phi)) or (0 * theta, phi + 1)))
    meta = esmeta.initial_state(config)
    actors = baldwin.evaluate_goal(config, meta, 0.5, 0, 2, 0)[1]
    np.testing.assert_array_equal([theta for *_, theta, _ in seen], actors[:2])
    np.testing.assert_array_equal([phi for *_, phi in seen], [meta.mu_critic, meta.mu_critic + 1])
    np.testing.assert_array_equal(actors, meta.mu_actor * [[1], [0], [0]])
    assert abs(seen[1][0].action.std() - baldwin.ACTION_STD) < 0.01 < seen[0][0].action.std() - 0.3
    assert [data.reward.shape for data, *_ in seen] == [(200, 2)] * 2  # no episode without noise
    steps = [config.actor_step for _, config, *_ in seen]
    assert steps == [esmeta.config_of_update(update, data, config).actor_step
                     for update, (data, *_) in enumerate(seen)]


def test_baldwin_has_the_same_bits_for_any_processes_and_after_a_resume(tmp_path, monkeypatch):
    def train(name, iterations, *flags):
        out = tmp_path / name
        assert baldwin.main([*TINY, "--out", str(out), "--iterations", iterations, *flags]) == 0
        rows = (out / "log.csv").read_text().splitlines()
        return (out / "checkpoint.npz").read_bytes(), [row.rsplit(",", 1)[0] for row in rows]

    one = train("one", "2", "--processes", "1")
    assert train("two", "2", "--processes", "2") == one != train("cut", "1", "--processes", "1")
    assert train("cut", "2", "--processes", "1", "--resume") == one
    assert one[1][0] == ",".join(esmeta.LOG_COLUMNS[:-1]) and len(one[1]) == 3
    monkeypatch.chdir(tmp_path)
    assert baldwin.main([*TINY, "--iterations", "0"]) == 0  # by default not where esmeta's runs are
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["point_goal-baldwin-seed0"]
    assert baldwin.main(["--eval", str(tmp_path / "one"), "--processes", "1"]) == 0
    rows = (tmp_path / "one" / "eval.csv").read_text().splitlines()
    assert rows[0] == "task,goal,updates,return" and len(rows) == 1 + 2 * 40
    with pytest.raises(ValueError, match=f"version 1 of results.baldwin, not {esmeta.VERSION}"):
        esmeta.load_checkpoint(tmp_path / "one")  # it would adapt by DDPG


@pytest.mark.parametrize("flags", [
    ["--task", "point_gaol"], ["--workers", "x"], ["--rollouts", "3"], ["--iterations", "-1"],
    ["--cycles", "2"], ["--paper"], ["--pool", "ray"], ["--eval", "nowhere"],
    ["--eval", "x", "--seed", "1"], ["--updates", "1"]])
def test_baldwin_refuses_bad_input_in_one_line(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert baldwin.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith("esmeta: error: ") and err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [esmeta, baldwin, shared_sigma])
def test_help_says_whose_program_it_is(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert program.main(["--help"]) == 0
    assert program.__doc__.split("\n")[0] in capsys.readouterr().out


@pytest.mark.parametrize("error, code", [
    (None, 0), (ValueError("a\nb"), 2), (OverflowError("x"), 2), (OSError("x"), 1),
    (RuntimeError("x"), 1), (MemoryError("x"), 1), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_error_of_a_program_is_one_line_and_its_exit_status(error, code, capsys, request):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of `&` ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, old))

    @guard.one_line("program")
    def main(argv):
        if isinstance(error, signal.Signals):
            signal.raise_signal(error)
        elif error is not None:
            raise error

    before = signal.getsignal(signal.SIGTERM)
    assert main([]) == code and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.count("\n") == (error is not None)


def test_ablations_take_the_papers_line_in_the_functions_that_they_name_and_no_other():
    config = esmeta.make_config("cheetah_vel")
    meta = esmeta.initial_state(config)._replace(obs_sums=np.full((3, 20), [[2.0], [1.0], [9.0]]))

    def differ(names):
        goals = [ablate.as_the_paper(names, lambda: esmeta.sample_tasks(config, 0, worker))
                 for worker in (1, 2)]
        seen = ablate.as_the_paper(names, lambda: esmeta.make_normaliser(meta, config)(np.ones(20)))
        return np.array_equal(*goals), (seen == 1).all()

    assert differ(["sample_tasks"]) == (True, False) != differ([]) == (False, False)
    assert differ(["make_normaliser"]) == (False, True)
    result = esmeta.Result(meta.mu_actor, meta.mu_actor, meta.mu_critic, 0.0, None, None, 0)
    step = ablate.as_the_paper([], esmeta.update_distribution, meta, [result], config)
    literal = ablate.as_the_paper(["update_distribution"], esmeta.update_distribution, meta,
                                  [result], config)
    np.testing.assert_array_equal(literal.mu_actor, step.mu_actor)  # ascend is not named
    readme = (HERE / "README.md").read_text().split("## Differences")[1].split("## Property")[0]
    assert all(f"`{name}`: " in readme for name in ablate.DIFFER) and len(ablate.DIFFER) == 7


@pytest.mark.parametrize("shapes_of", [esmeta.actor_shapes, esmeta.critic_shapes])
def test_shared_sigma_takes_the_natural_gradient_in_one_log_sigma_a_layer(shapes_of):
    config, rng = esmeta.make_config("point_goal"), np.random.default_rng(0)
    sizes = [rows * columns for rows, columns in shapes_of(esmeta.task_dims("point_goal"))]
    spread = lambda log_sigma: np.repeat(np.exp(log_sigma), sizes)
    log_sigma, mu = np.log([0.1, 0.2, 0.3]), rng.normal(size=sum(sizes))
    sigma, F = spread(log_sigma), rng.normal(size=(2, 4))
    theta = mu + sigma * rng.normal(size=(2, 4, len(mu)))
    objective = lambda x: np.mean(np.sum(F * esmeta.log_density(theta, mu, spread(x)), axis=1))
    gradient = [objective(log_sigma + e) - objective(log_sigma - e) for e in 1e-5 * np.eye(3)]
    expected = log_sigma + 30 * np.array(gradient) / 2e-5 / (2 * 4 * np.array(sizes))
    gradient = esmeta.nes_gradient(theta, F, mu, sigma)
    step, new = shared_sigma.ascend(*gradient, sigma, 4, 2.0, 30, config)
    np.testing.assert_array_equal(step, esmeta.ascend(*gradient, sigma, 4, 2.0, 0, config)[0])
    np.testing.assert_allclose(new, spread(expected), rtol=1e-7)
    _, far = shared_sigma.ascend(*gradient, sigma, 4, 2.0, 2e4, config)
    assert {far.min(), far.max()} <= {1e-5, 1.0}


def test_shared_sigma_refuses_the_papers_form(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shared_sigma.main([*TINY, "--paper"]) == 2 and not [*tmp_path.iterdir()]
    assert "--paper" in capsys.readouterr().err


def test_shared_sigma_has_a_row_an_iteration_also_after_a_resume(tmp_path):
    def train(name, iterations, *flags):
        flags = *TINY, "--lr-sigma-actor", "300", "--out", str(tmp_path / name), *flags
        assert shared_sigma.main([*flags, "--iterations", iterations, "--processes", "1"]) == 0
        return (tmp_path / name / "sigma.csv").read_text()

    whole = train("whole", "2")
    assert train("cut", "1") != whole == train("cut", "2", "--resume")
    assert [row.split(",")[0] for row in whole.split()] == ["iteration", "0", "1", "2"]
    meta = esmeta.load_checkpoint(tmp_path / "whole")[1]
    layers = esmeta.unpack(meta.sigma_actor, esmeta.actor_shapes(esmeta.task_dims("point_goal")))
    assert all(np.ptp(layer) <= 1e-6 < abs(layer.mean() - 0.03) for layer in layers)
    rows = np.loadtxt(tmp_path / "whole" / "sigma.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows[-1, 1:], [layer[0, 0] for layer in layers], rtol=1e-5)


def test_the_tables_of_the_readmes_are_those_of_the_files(capsys):
    assert table.main([]) == 0
    printed = capsys.readouterr().out.split("# ")[1:]
    assert len(printed) == 6
    for name, _, rows in (section.strip().partition("\n\n") for section in printed):
        text = (HERE / name.split(":")[0]).read_text()
        assert rows.startswith("| ") and f"\n\n{rows}\n\n" in text, name


def test_the_task_of_a_run_of_any_method_is_read():
    for name in "cheetah_vel-seed0", "cheetah_vel-baldwin-seed0", "cheetah_vel-maml-seed0":
        assert figures.read_task(HERE / "results" / name) == "cheetah_vel"


def test_maml_advantages_are_rewards_to_come_above_a_ridge_regression():
    rng, valid = np.random.default_rng(0), np.arange(30)[:, None] < [30, 12]
    obs, reward = 9 * rng.normal(size=(31, 2, 3)), rng.normal(size=(30, 2)) * valid
    y = [[sum(0.99 ** (s - t) * reward[s, n] for s in range(t, 30)) for n in (0, 1)]
         for t in range(30)]
    s, y, t = obs[:-1][valid].clip(-10, 10), np.array(y)[valid], np.nonzero(valid)[0] / 100
    features = np.column_stack([s, s**2, t, t**2, t**3, t**0])
    ridge = np.vstack([features, np.sqrt(1e-5) * np.eye(10)])
    rest = y - features @ np.linalg.lstsq(ridge, np.append(y, np.zeros(10)), rcond=None)[0]
    data = esmeta.Trajectories(obs, obs, None, reward, None, valid)
    np.testing.assert_allclose(maml.advantages(data), (rest - rest.mean()) / rest.std(), atol=1e-5)


def test_maml_takes_the_longest_step_that_descends_within_the_kl():
    """L' = g d + c d^2, KL = more d H d / 2; the whole step is the natural gradient's."""
    rng = np.random.default_rng(0)
    theta, g, root = rng.normal(size=5), rng.normal(size=5), rng.normal(size=(5, 5))
    H = root @ root.T + np.eye(5)
    whole = -np.linalg.solve(H, g) * np.sqrt(2 * 0.01 / (g @ np.linalg.solve(H, g)))
    for c, more, length in ((0.0, 1.0, 1.0), (0.0, 1.3, 0.8), (1e9, 1.0, 0.0),
                            (-g @ whole / (whole @ whole) / 0.7, 1.0, 0.8**2)):
        average = lambda function, *x: {
            maml.meta_gradient: lambda theta: g, maml.fisher_product: lambda theta, v: H @ v,
            maml.objective: lambda new, old: (
                g @ (new - old) + c * (new - old) @ (new - old),
                more * (new - old) @ H @ (new - old) / 2)}[function](*x)
        new, kl = maml.trust_region_step(theta, average, 0.01)
        np.testing.assert_allclose(new - theta, length * whole, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(kl, more * 0.01 * length**2, rtol=1e-4)
    assert (maml.CG_ITERATIONS, maml.DAMPING, maml.MIN_STD) == (10, 1e-5, 1e-6)
    np.testing.assert_allclose(maml.BACKTRACKS, [0.8**i for i in range(15)])


def make_maml_task(torch, updates):
    """theta, U + 1 Batches, alpha, dims: random numbers, float64."""
    rng, dims = np.random.default_rng(0), esmeta.Dims(obs=3, act=2, hidden=4)
    theta = np.append(1.5 * esmeta.xavier(esmeta.actor_shapes(dims), rng), [-0.3, 0.2])
    theta += 0.1 * rng.standard_normal(len(theta))
    batches = [maml.Batch(*(torch.tensor(rng.standard_normal(shape))
                            for shape in ((9, 3), (9, 2), 9))) for _ in range(updates + 1)]
    return torch.tensor(theta), batches, 0.3, dims


def central_differences(torch, f, x, eps=1e-5):
    """Of f in each entry of x (P,): (P, ..)."""
    return torch.stack([(f(x + eps * e) - f(x - eps * e)) / (2 * eps)
                        for e in torch.eye(len(x), dtype=x.dtype)])


@pytest.mark.parametrize("updates", [1, 3])
def test_extra_maml_derivatives_go_through_the_updates(updates):
    torch = pytest.importorskip("torch")
    theta, batches, *rest = make_maml_task(torch, updates)
    loss, kl = (lambda x, i=i: maml.objective(x, theta, batches, *rest)[i] for i in (0, 1))
    gradient = maml.meta_gradient(theta, batches, *rest)
    expected = central_differences(torch, loss, theta)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    adapted = maml.adapt(theta, batches[:-1], *rest)
    first_order = maml.meta_gradient(adapted, batches[-1:], *rest)
    assert (gradient - first_order).norm() > 0.1 * gradient.norm()
    v = torch.tensor(np.random.default_rng(1).standard_normal(len(theta)))
    hessian = central_differences(torch, torch.func.grad(kl), theta)
    np.testing.assert_allclose(maml.fisher_product(theta, v, batches, *rest), hessian @ v,
                               rtol=1e-6, atol=1e-7)


def test_extra_maml_has_the_same_bits_after_a_resume_and_for_any_processes(tmp_path):
    pytest.importorskip("torch")
    config = maml.make_config("point_goal", rollouts=3, iterations=2)._replace(batch=2)
    with esmeta.Crew(1) as one, esmeta.Crew(2) as two:
        whole = maml.train(config, one, tmp_path / "whole")
        maml.train(config._replace(iterations=1), two, tmp_path / "parts")
        parts = maml.train(config, two, tmp_path / "parts", resume=True)
    assert whole.tobytes() == parts.tobytes()
    rows = [[line.split(",")[:-1] for line in (tmp_path / run / "log.csv").read_text().split()]
            for run in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 3  # all but the seconds
    (tmp_path / "parts" / "checkpoint.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no run of results.maml"):
        maml.load_run(tmp_path / "parts")


@pytest.mark.parametrize("flags", ["--out a --eval b", "--eval nowhere", "--task nowhere --out a",
                                   "--updates 0 --out a", "--seed -1 --out a", "--resume --out a",
                                   "--eval nowhere --seed 1"])
def test_extra_maml_refuses_bad_input_in_one_line(flags, capsys, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maml, "iterate", lambda *_: pytest.fail("it started to work"))
    assert maml.main(flags.split()) == 2 and capsys.readouterr().err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_extra_maml_says_in_one_line_that_it_lacks_torch():
    code = ("import sys; sys.modules['torch'] = None\n"
            "from results import maml; sys.exit(maml.main(['--eval', 'x']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "results.maml: error: no torch: pip install torch"


def test_extra_maml_update_and_objective_by_hand():
    torch = pytest.importorskip("torch")
    theta, (first, last), rate, dims = make_maml_task(torch, 1)
    other = theta + 0.1 * torch.tensor(np.random.default_rng(1).standard_normal(len(theta)))

    def policy(theta, batch):  # log pi(a | s) (B,), mean (B, act), std (act,)
        *w, log_std = esmeta.unpack(theta.numpy(), [*esmeta.actor_shapes(dims), (dims.act,)])
        x = np.maximum(esmeta.affine(batch.obs.numpy(), w[0]), 0)
        mean = esmeta.affine(np.maximum(esmeta.affine(x, w[1]), 0), w[2])
        std = np.exp(log_std)
        return esmeta.log_density(batch.action.numpy(), mean, std), mean, std

    def adapted(theta):  # it climbs the mean of log pi A
        return theta + rate * central_differences(torch, lambda x: torch.tensor(
            np.mean(policy(x, first)[0] * first.advantage.numpy())), theta)

    np.testing.assert_allclose(maml.adapt(theta, [first], rate, dims), adapted(theta), atol=1e-8)
    (log_old, m0, s0), (log_new, m1, s1) = (policy(adapted(x), last) for x in (theta, other))
    loss = -np.mean(np.exp(log_new - log_old) * last.advantage.numpy())
    kl = np.mean(np.sum(np.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5, axis=1))
    np.testing.assert_allclose(maml.objective(other, theta, [first, last], rate, dims), [loss, kl],
                               rtol=1e-6)


@pytest.mark.parametrize("name, k, later", [("cheetah_vel", 20, 0.05), ("ant_dir", 40, 0.001)])
def test_maml_has_its_authors_tasks_steps_and_episodes(name, k, later, monkeypatch):
    config, loops, tests = maml.make_config(name, updates=2), [], []
    assert not maml.initial_theta(config)[-tasks.TASKS[name].act:].any()  # std 1
    zero = np.zeros((2, 1))
    monkeypatch.setattr(maml, "inner_loop", lambda *args: (
        loops.append((*args[:3], args[3].random(), *args[4:])) or [(0, 1.0, 2)]))
    monkeypatch.setattr(maml, "rollout", lambda *args: tests.append(args) or esmeta.Trajectories(
        None, None, None, zero + 3, None, zero == 0))
    assert [maml.collect(config, None, 5, i) for i in range(40)] == [((1.0,), (2,))] * 40
    _, _, goals, random, rates, rollouts = zip(*loops)
    assert config.batch == 40 and len(set(goals)) == (2 if name == "ant_dir" else 40)
    maml.collect(config, None, 6, 0)
    assert len({*random, loops[-1][3]}) == 41 and (loops[-1][2] != goals[0] or name == "ant_dir")
    assert rates == ([0.1, 0.1],) * 40 and rollouts == (config.rollouts,) * 40
    assert maml.evaluate(config, None, 7) == [(6.0, 1.0)]
    assert loops[-1][2] == tasks.test_goals(name)[7] == tests[0][2]
    np.testing.assert_allclose(loops[-1][4], [0.1, later, later])
    assert loops[-1][5] == k and tests[0][4].shape[1] == len(tests[0][3]) == 20
    starts = esmeta.generator(esmeta.EVAL, 0, 0, 0).integers(2**31, size=20)  # ESMeta's
    np.testing.assert_array_equal(tests[0][3], starts)
    assert not tests[0][4].any()


def test_extra_maml_committed_run_is_what_its_checkpoint_does():
    pytest.importorskip("torch")
    folder = HERE / "results" / "cheetah_vel-maml-seed1"
    config, theta, *_ = maml.load_run(folder)
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    for i in 0, 1:  # goals, to 10 or 10 %: other CPUs round differently
        written = [[float(row[c]) for c in ("return", "return_stochastic")] for row in rows[i::40]]
        np.testing.assert_allclose(maml.evaluate(config, theta, i), written, rtol=0.1, atol=10)


SETTINGS_OF = {  # a folder's variant: what differs from the defaults
    "heldout": {}, "baldwin": {}, "maml": {}, "maml3": dict(updates=3), "M16": dict(workers=16),
    "K40": dict(rollouts=40), "cycles3": dict(cycles=3, actor_step=1.5),
    "fixed_sigma": dict(lr_sigma_actor=0.0, lr_sigma_critic=0.0),
    "fixed06": dict(lr_sigma_actor=0.0, lr_sigma_critic=0.0, sigma=0.06),
    "shared015": dict(lr_sigma_actor=300.0, lr_sigma_critic=0.0, sigma=0.015),
    "shared03": dict(lr_sigma_actor=300.0, lr_sigma_critic=0.0),
    "shared06": dict(lr_sigma_actor=300.0, lr_sigma_critic=0.0, sigma=0.06),
    "critic12": dict(critic_updates=12), "critic12_lr30": dict(critic_updates=12, lr_mu_actor=30.0),
    "batch64": dict(batch=64), "batch512": dict(batch=512), "paper": dict(paper=True),
    "paper1e7": dict(paper=True, lr_mu_actor=1e-7),
    "paper1": dict(paper=True, cycles=1, critic_updates=1, lr_mu_actor=1e-6),
    "point_goal-paper": dict(paper=True, goals=4, rollouts=4, sigma=0.1, lr_mu_actor=1e-5,
                             cycles=1, critic_updates=24, actor_step=0.002),
    "ant_dir-maml": {}}
ITERATIONS_OF = {"paper": 3000, "paper1e7": 311, "paper1": 3000, "point_goal-paper": 200,
                 "ant_dir-maml": 166}


def test_committed_runs_have_the_settings_that_the_readmes_name():
    found = set()
    for folder in (HERE / "results").glob("*-*-seed*"):
        task, variant, seed = folder.name.replace("-seed", "-").split("-")
        make = maml.make_config if "maml" in variant else esmeta.make_config
        variant = f"{task}-{variant}" if f"{task}-{variant}" in SETTINGS_OF else variant
        config = make(task, seed=int(seed), **SETTINGS_OF[variant])
        usual = getattr(config, "iterations", esmeta.ITERATIONS)
        assert figures.read_config(folder, lambda given: type(config)(**given)) == config
        rows = len((folder / "log.csv").read_text().splitlines()) - 1
        assert rows == ITERATIONS_OF.get(variant, usual), folder
        found.add(variant)
    assert found == SETTINGS_OF.keys()


@pytest.mark.parametrize("folder", sorted({"cheetah_vel-seed0", "cheetah_dir-seed0"} | {
    path.name for path in (HERE / "results").glob("*") if re.fullmatch(r"\w+-seed\d+", path.name)}))
def test_committed_runs_of_the_defaults_are_what_their_checkpoints_do(folder):
    (task, seed), path = folder.split("-seed"), HERE / "results" / folder
    config, meta = esmeta.load_checkpoint(path)
    assert config == esmeta.make_config(task, seed=int(seed))
    rows = len((path / "log.csv").read_text().splitlines()) - 1
    assert {rows, meta.iteration, esmeta.ITERATIONS} == {100}
    if seed == "0":  # one update, 4 goals, to 10 or 10 %: other CPUs round differently
        rows = list(csv.DictReader((path / "eval.csv").open()))
        written = [float(row["return"]) for row in rows if row["updates"] == "1"][:4]
        after = esmeta.meta_test(path, tasks.test_goals(task)[:4])[1]
        assert after.mean() == pytest.approx(np.mean(written), rel=0.1, abs=10)


def test_the_laboratory_book_says_why_for_each_setting_of_ours():
    text = (HERE / "results/README.md").read_text().split("\n## Why each setting\n")[1]
    listed = re.findall(r"^\| `(\w+)`", text.split("\n## ")[0], re.M)
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(esmeta.Config)
                                    if field.metadata["source"] == "ours")


def test_video_renders_an_ant_where_the_machine_can():
    script = ("from results import video; import gymnasium, tasks; video.CAN_RENDER or exit('no'); "
              "env = gymnasium.make('esmeta/AntVel-v0', render_mode='rgb_array'); "
              "env.reset(seed=0); first = env.render(); [env.step([1] * 8) for _ in range(20)]; "
              "frame = env.render(); env.close(); "
              "print(frame.shape, frame.dtype, frame.std() > 1, (frame != first).any())")
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                             cwd=HERE)  # MUJOCO_GL counts before the import only
    if process.stderr == "no\n":
        pytest.skip("no OpenGL here")
    assert process.stdout.startswith("(480, 480, 3) uint8 True True\n"), process.stderr


def test_extra_scripts_draw_and_film(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    film, run = tmp_path / "point.gif", tmp_path / "run"
    assert esmeta.main([*TINY, "--iterations", "2", "--out", str(run)]) == 0
    for line in f"results.figures {run}", f"results.video {run} --goal 0.1 0.2 --out {film}":
        subprocess.run([sys.executable, "-m", *line.split()], check=True, cwd=HERE)
    assert (run / "training.png").stat().st_size and film.stat().st_size


def test_baldwin_workers_are_mirrored_and_tested_as_adapted(monkeypatch):
    """The adapted actor stands still; each task has a critic of its own."""
    config = esmeta.make_config("point_goal", rollouts=4, tests=2, alive_bonus=1.0)
    meta, critics, error = esmeta.initial_state(config), [], esmeta.critic_error
    monkeypatch.setattr(baldwin, "adapt", lambda theta, phi, data, *_: (
        0 * theta, phi + data.reward.mean()))
    monkeypatch.setattr(esmeta, "critic_error", lambda theta, phi, *rest: (
        critics.append(phi[0]) or error(theta, phi, *rest)))
    a, b, c = (baldwin.evaluate_worker(config, meta, worker) for worker in range(3))
    np.testing.assert_allclose(a.d_mu, -b.d_mu, atol=0.1)
    np.testing.assert_allclose(a.phi - meta.mu_critic, meta.mu_critic - b.phi, atol=1e-6)
    assert abs(np.corrcoef(a.d_mu, c.d_mu)[0, 1]) < 0.1
    assert abs(np.std(a.d_mu * meta.sigma_actor) - 4**0.5) < 0.1  # as far as K explorers move mu
    goals = esmeta.sample_tasks(config, 0, 0)
    assert a.fitness == b.fitness == pytest.approx(100 - 100 * np.mean(np.sum(goals**2, axis=1)))
    assert a.fitness == pytest.approx(a.returns[2] + 100) and a.env_steps == (5 + 2 * 4) * 100
    assert a.fitness_critic < 0 and len({*critics}) == 3 * len(goals)
    assert (a.obs_sums[0] == 500).all() and (500 * a.obs_sums[2] > a.obs_sums[1] ** 2).all()
    theta = meta.mu_actor + a.d_mu * meta.sigma_actor**2 / 2
    still = esmeta.rollout("point_goal", theta[None], [0], lambda s: s, goals)
    assert a.returns[0] == pytest.approx(np.mean([x.returns() for x in still]), rel=1e-4)


def test_gains_are_leads_over_the_settings_trained_with_and_their_errors():
    config, jobs = esmeta.make_config("cheetah_vel"), []
    crew = types.SimpleNamespace(map=lambda function, new: jobs.extend(new) or [
        (np.array([0.5, 9.0, config.n_step * goal]), None) for config, _, goal, *_ in new])
    rows = [*gain.gains(config, None, 2, ["n_step=23"], crew)]
    goals = np.array([job[2] for job in jobs[:40]])
    assert (goals < 1).sum() == 20 == (goals > 1).sum()
    assert [job[3:] for job in jobs] == [(i, 2, 1) for i in range(40)] * 2
    numbers = [0.5, 23 * goals.mean(), 23 * goals.mean() - 0.5, 3 * goals.mean(),
               3 * goals.std(ddof=1) / 40**0.5]
    assert rows[1] == "cheetah_vel,2,n_step=23," + ",".join(f"{x:.1f}" for x in numbers)


def test_ablations_are_of_the_last_quarter_and_its_range_over_seeds(monkeypatch):
    monkeypatch.setattr(esmeta, "iterate", lambda config, meta, crew: (
        meta._replace(iteration=meta.iteration + 1),
        {"return_after": config.n_step * (meta.iteration + 10.0 * config.seed)}, 0))
    rows = [*ablate.ablations(["", "n_step=2"], "cheetah_vel", 16, 3, None)]
    assert rows == ["cheetah_vel,16,3,default,470.0,400.0", "cheetah_vel,16,3,n_step=2,47.0,40.0"]


def test_ablations_do_an_iteration_and_its_jobs_as_the_paper(monkeypatch):
    def iterate(config, meta, crew):
        literal = np.array_equal(*(esmeta.sample_tasks(config, 0, worker) for worker in (1, 2)))
        crew.map(len, [((1, 2),)])
        return meta, {"return_after": float(literal)}, 0

    def fail(*_):
        raise RuntimeError(error)

    jobs, cases = [], (["", "paper:sample_tasks"], "cheetah_vel", 1, 1)
    crew = types.SimpleNamespace(map=lambda function, new: jobs.extend(new))
    monkeypatch.setattr(esmeta, "iterate", iterate)
    rows = [*ablate.ablations(*cases, crew)]
    assert rows == ["cheetah_vel,1,1,default,0.0,", "cheetah_vel,1,1,paper:sample_tasks,1.0,"]
    assert jobs == [([], len, (1, 2)), (["sample_tasks"], len, (1, 2))]
    monkeypatch.setattr(esmeta, "iterate", fail)
    error = "mu or sigma is finite no more"
    assert [*ablate.ablations(*cases, crew)][0] == "cheetah_vel,1,1,default,nan,"
    error = "a worker process died"
    with pytest.raises(RuntimeError, match="died"):
        [*ablate.ablations(*cases, crew)]


@pytest.mark.parametrize("program, rows", [(gain, "gains"), (ablate, "ablations")])
def test_only_a_program_without_arguments_writes_its_table(program, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(program, rows, lambda *_: ["a row"])
    run = [str(HERE / "results/cheetah_vel-seed0")] * (program is gain)
    assert program.main([*run, "n_step=2"]) == 0 and not program.TABLE.exists()
    assert program.main([]) == 0 and program.TABLE.read_text().startswith(program.HEADER)


def test_extra_figures_draw_means_over_seeds():
    plt = pytest.importorskip("matplotlib.pyplot")
    lines = {line.get_label(): line for line in figures.figure1(plt).axes[0].lines}
    for label, name, steps in ("ESMeta", "cheetah_vel", 133), ("MAML here", "cheetah_vel-maml", 76):
        x, y = lines[f"{label}, after adaptation"].get_data()
        logs = [figures.read_log(HERE / "results" / f"{name}-seed{s}") for s in range(3)]
        np.testing.assert_allclose(y, np.mean([log["return_after"] for log in logs], axis=0))
        assert round(x[-1]) == steps and len(x) == len(y)
    assert lines["MAML's paper, 1 update"].get_ydata()[0] == -78.6
    velocity, direction, *_ = figures.adaptation(plt).axes
    dots = {line.get_markerfacecolor(): line.get_ydata().mean()
            for line in velocity.lines if line.get_marker() == "o"}
    assert {colour: round(y, 1) for colour, y in dots.items()} == {
        "white": -121.1, figures.BLUE: -55.2}  # as README's table
    assert {text.get_text(): text.xy[0] for text in direction.texts} == {
        "mean 603": -1, "mean 475": 1}
    pays = figures.constant_speed("ant_vel", np.array([0.0, 1.0, 2.0]))  # 1.05 a step at the goal
    np.testing.assert_allclose(pays, [10, 210, 10])
    plt.close("all")


def test_maml_logs_returns_before_and_after_all_updates_and_counts_all_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(maml, "iterate", lambda config, theta, iteration, crew: (
        theta, np.array([1.0, 2.0, 3.0]), 0.5, 10))
    config = maml.make_config("point_goal", iterations=2)
    maml.train(config, None, tmp_path)
    rows = [line.rsplit(",", 1)[0] for line in (tmp_path / "log.csv").read_text().split()]
    for seed, resume, words in (0, False, "holds a run"), (1, True, "other settings"):
        with pytest.raises(ValueError, match=words):
            maml.train(config._replace(seed=seed), None, tmp_path, resume)
    assert rows == ["iteration,return_before,return_after,kl,env_steps", "0,1,3,0.5,10",
                    "1,1,3,0.5,20"]


def test_maml_iteration_is_of_all_tasks_and_steps(monkeypatch):
    monkeypatch.setattr(maml, "trust_region_step", lambda theta, average, kl: (theta + 1, kl))
    batch = maml.Batch(np.zeros((7, 20)), None, None)
    crew = types.SimpleNamespace(map=lambda function, jobs: [
        ([i, 3.0], [batch, batch]) for _, _, iteration, i in jobs if iteration == 5])
    config = maml.make_config("cheetah_dir")._replace(batch=3)
    theta, returns, kl, steps = maml.iterate(config, 0.0, 5, crew)
    assert (theta, *returns, kl, steps) == (1.0, 1.0, 3.0, 0.02, 3 * 2 * 7)


def test_maml_meta_test_writes_each_goal_and_update(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maml, "load_run", lambda folder: (maml.make_config("ant_dir"), 0.5, 9, 0))
    crew = types.SimpleNamespace(map=lambda function, jobs: [
        [(theta + i + 100 * u, 1000.0) for u in range(4)] for _, theta, i in jobs])
    maml.report_eval(tmp_path, crew)
    goals, returns = figures.read_eval(tmp_path, "ant_dir")
    np.testing.assert_array_equal(goals, tasks.test_goals("ant_dir"))
    np.testing.assert_array_equal(returns, 0.5 + np.arange(40) + 100 * np.arange(4)[:, None])
    mean, stochastic = capsys.readouterr().out.splitlines()
    assert mean.endswith("20.0 120.0 220.0 320.0") and "after 9 iterations" in mean
    assert stochastic.endswith(" 1000.0 1000.0 1000.0 1000.0")


def test_extra_maml_rollout_ends_at_the_goal_and_has_noise_of_its_std():
    """A point that moves by a tenth of noise of one: along x of std 1, along y of the least."""
    pytest.importorskip("torch")
    theta = 0 * maml.initial_theta(maml.make_config("point_goal"))
    theta[-4:] = 1, 0, -99, -99  # the mean, which moves alone, and the log std
    noise = np.ones((100, 1, 2), np.float32)
    data = maml.rollout("point_goal", theta, [0.3, 0.0], np.array([0]), noise)
    assert data.valid.sum() == 3
    np.testing.assert_allclose(data.action[:3, 0], [[1, 1e-6]] * 3, rtol=1e-4)


def test_baldwin_committed_run_is_what_its_checkpoint_does(monkeypatch):
    monkeypatch.setattr(esmeta, "VERSION", baldwin.VERSION)
    folder = HERE / "results" / "cheetah_vel-baldwin-seed0"
    config, meta = esmeta.load_checkpoint(folder)
    rows = list(csv.DictReader((folder / "eval.csv").open()))
    for i in 0, 1:  # goals, to 10 or 10 %: other CPUs round differently
        returns, _ = baldwin.evaluate_goal(config, meta, tasks.test_goals(config.task)[i], i, 3, 0)
        written = [float(row["return"]) for row in rows[i::40]]
        np.testing.assert_allclose(returns, written, rtol=0.1, atol=10)
