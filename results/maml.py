"""MAML (Finn, Abbeel, Levine 2017) with TRPO, as its authors ran it but for what is told below.

    python -m results.maml --task cheetah_vel --out DIR  # trains, then meta-tests as --eval DIR

theta (P,) is a Gaussian policy, its weights and log std; K trajectories of task i are a Batch D_i.

MAML with TRPO                                                     function
  initialise theta                                                 initial_theta
  while not done                                                   train, iterate
    sample a batch of tasks                                        tasks.sample_goals
    for each task i                                                collect, inner_loop
      sample K trajectories D_i with theta                         rollout, advantages
      theta_i = theta - alpha grad L(theta; D_i), U such updates   adapt, of inner_loss
      sample K trajectories D_i' with theta_i                      rollout, advantages
    g = grad_theta of mean_i of L'(theta_i; D_i'), second order    meta_gradient, of objective
    F = Hessian of the mean KL of the adapted policies             fisher_product
    step theta along F^-1 g as far as the KL allows                trust_region_step

(MAML): from cbfinn/maml_rl at 9c8e2eb, its code or the names of its test scripts' checkpoints.
Theirs may collect a few episodes more than K. With U > 1, each of its tasks acts from the second
update on from the last task's weights (compute_updated_dists), here from its own, as in L'.
"""

import io
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import esmeta  # before numpy and torch: it sets them to one thread
import numpy as np
import tasks
from results.guard import one_line

try:
    import torch
except ImportError:  # main says so
    torch = None

GAMMA = 0.99  # discount (MAML)
RIDGE = 1e-5  # of the linear baseline (MAML)
MIN_STD = 1e-6  # (MAML)
CG_ITERATIONS = 10  # (MAML)
DAMPING = 1e-5  # of the Hessian (MAML)
BACKTRACKS = 0.8 ** np.arange(15)  # lengths that the line search tries (MAML)
SETTINGS = {  # (MAML)
    "cheetah_vel": dict(rollouts=10, iterations=476),
    "cheetah_dir": dict(rollouts=20, iterations=101, max_kl=0.02),
    "ant_vel": dict(rollouts=20, iterations=376),
    "ant_dir": dict(rollouts=40, iterations=576),
    "point_goal": dict(rollouts=20, iterations=100, inner_rate=0.5)}  # its reward is ours


class Config(NamedTuple):
    """All that decides a run; SETTINGS are other defaults."""

    task: str
    seed: int = 0  # (ours)
    updates: int = 1  # U (MAML)
    batch: int = 40  # tasks of an iteration (MAML)
    rollouts: int = 20  # K (MAML)
    inner_rate: float = 0.1  # alpha (MAML)
    max_kl: float = 0.01  # of a step of theta (MAML)
    iterations: int = 500  # in all (ours, as each of SETTINGS has MAML's)


def make_config(task, **explicit):
    """Config from defaults, the task's settings, then explicit values; else ValueError."""
    config = Config(tasks.find_task(task).name, **{**SETTINGS.get(task, {}), **explicit})
    if config.seed < 0 or min(config.iterations, config.updates) < 1:
        raise ValueError("seed must be at least 0, iterations and updates at least 1")
    return config


class Batch(NamedTuple):
    """The steps of K trajectories of one task; NumPy's or torch's."""

    obs: np.ndarray  # (B, obs)
    action: np.ndarray  # (B, act), not clipped
    advantage: np.ndarray  # (B,), A: mean 0, std 1


def policy(theta, obs, dims):
    """pi(a | s) = N(mean, std^2), std the same for all s: theta (P,), obs (B, obs) -> Normal."""
    *layers, log_std = esmeta.unpack(theta, [*esmeta.actor_shapes(dims), (dims.act,)])
    for w in layers[:-1]:
        obs = esmeta.affine(obs, w).relu()
    mean, std = esmeta.affine(obs, layers[-1]), log_std.exp().clip(MIN_STD)
    return torch.distributions.Normal(mean, std, validate_args=False)  # (B, act) independent ones


def inner_loss(theta, batch, dims):
    """L, minus the mean of log pi(a | s) A; minus its gradient is REINFORCE's."""
    log_prob = policy(theta, batch.obs, dims).log_prob(batch.action).sum(-1)  # (B,)
    return -(log_prob * batch.advantage).mean()


def adapt(theta, batches, rate, dims):
    """A step theta - rate grad L(theta; D) for each batch D in turn: (P,) -> (P,)."""
    for batch in batches:
        theta = theta - rate * torch.func.grad(inner_loss)(theta, batch, dims)
    return theta


def advantages(data):
    """A = y - V(s), scaled: y discounted rewards to come, V linear in features: -> (B,)."""
    y, valid = data.reward.copy(), data.valid
    for t in reversed(range(len(y) - 1)):
        y[t] += GAMMA * y[t + 1]
    s = np.clip(data.obs[:-1][valid].astype(np.float64), -10, 10)
    t = np.nonzero(valid)[0][:, None] / 100
    features = np.hstack([s, s**2, t, t**2, t**3, np.ones_like(t)])  # (B, 2 obs + 4)
    gram = features.T @ features + RIDGE * np.eye(features.shape[1])
    A = y[valid] - features @ np.linalg.solve(gram, features.T @ y[valid])
    return ((A - A.mean()) / (A.std() + 1e-8)).astype(np.float32)


# ---- the outer loop of TRPO: derivatives are of one task, through its inner loop ----------------


def adapted_policy(theta, batches, rate, dims):
    """Adapt to all batches but the last: -> the Normal of the last's states."""
    return policy(adapt(theta, batches[:-1], rate, dims), batches[-1].obs, dims)


def objective(theta, old, batches, rate, dims):
    """L' = -mean of pi'(a | s) / pi(a | s) A, and mean KL(pi, pi'): -> (2,).

    pi is adapted from old (P,), and collected the last batch; pi' is adapted from theta (P,).
    """
    _, action, advantage = batches[-1]
    pi, new = (adapted_policy(x, batches, rate, dims) for x in (old, theta))
    ratio = (new.log_prob(action) - pi.log_prob(action)).sum(-1).exp()  # (B,)
    kl = torch.distributions.kl_divergence(pi, new).sum(-1)  # (B,)
    return torch.stack([-(ratio * advantage).mean(), kl.mean()])


def meta_gradient(theta, batches, rate, dims):
    """Gradient of L' in theta at old = theta, through the gradients in `adapt`: -> (P,)."""
    return torch.func.grad(lambda new: objective(new, theta, batches, rate, dims)[0])(theta)


def fisher_product(theta, vector, batches, rate, dims):
    """Hessian of the mean KL at old = theta, times vector: J^T diag(1, 2) / (B std^2) J vector."""
    def outputs(theta):
        pi = adapted_policy(theta, batches, rate, dims)
        return pi.loc, pi.scale  # (B, act) both; J is their Jacobian

    def push(theta):  # J vector
        return torch.func.jvp(outputs, (theta,), (vector,))

    (mean, std), pull, (d_mean, d_std) = torch.func.vjp(push, theta, has_aux=True)
    weight = 1 / (len(mean) * std**2)
    return pull((weight * d_mean, 2 * weight * d_std))[0]


def conjugate_gradient(product, b):
    """x with A x = b, nearly; product(v) is A v: b (P,) -> (P,)."""
    x, r, p = np.zeros_like(b), b, b
    for _ in range(CG_ITERATIONS):
        if r @ r < 1e-10:
            break
        z = product(p)
        step = r @ r / (p @ z)
        x, last, r = x + step * p, r, r - step * z
        p = r + (r @ r) / (last @ last) * p
    return x


def trust_region_step(theta, average, max_kl):
    """Descend the mean of L' within a mean KL of max_kl: theta (P,) -> theta (P,), the KL.

    average(function, *arrays) is the mean over tasks of function(*arrays, batches, ..).
    """
    def product(vector):
        return average(fisher_product, theta, vector.astype(theta.dtype)) + DAMPING * vector

    direction = conjugate_gradient(product, average(meta_gradient, theta))
    length = np.sqrt(2 * max_kl / (direction @ product(direction) + 1e-8))
    for shorter in BACKTRACKS:
        new = (theta - shorter * length * direction).astype(theta.dtype)
        loss, kl = average(objective, new, theta)
        if loss < 0 and kl <= max_kl:  # L' starts at 0, which is the mean of A
            return new, float(kl)
    return theta, 0.0


def derive(function, arrays, batches, rate, dims):
    """function(*arrays, batches, rate, dims) of NumPy's arrays: torch gets aligned copies."""
    batches = [Batch(*map(torch.tensor, batch)) for batch in batches]
    return function(*map(torch.tensor, arrays), batches, rate, dims).numpy()


def rollout(name, theta, goal, starts, noise):
    """Trajectories from K seeds `starts` with actions mean + std noise: noise (H, K, act)."""
    theta, dims = torch.tensor(theta), esmeta.task_dims(name)
    env = tasks.make_vec(name, len(starts), freeze=True)
    obs = [env.reset(seed=starts.tolist(), options={"goal": [goal] * len(starts)})[0]]
    steps, valid = [], np.ones(len(starts), bool)
    for eps in noise:
        pi = policy(theta, torch.tensor(obs[-1].astype(np.float32)), dims)
        action = (pi.loc + pi.scale * torch.tensor(eps)).numpy()
        new, reward, terminated, _, _ = env.step(action)
        obs.append(new)
        steps.append((action, reward, terminated, valid))
        valid = valid & ~terminated
    raw = np.stack(obs)
    return esmeta.Trajectories(raw.astype(np.float32), raw, *map(np.stack, zip(*steps)))


def inner_loop(name, theta, goal, rng, rates, k):
    """Before and after an update for each rate, from theta (P,): theta_i, return, D_i."""
    task = tasks.TASKS[name]
    for rate in (*rates, None):
        starts = rng.integers(2**31, size=k)
        noise = rng.standard_normal((task.horizon, k, task.act), np.float32)
        run = rollout(name, theta, goal, starts, noise)
        batch = Batch(run.obs[:-1][run.valid], run.action[run.valid], advantages(run))
        yield theta, run.returns().mean(), batch
        if rate is not None:
            theta = derive(adapt, [theta], [batch], rate, esmeta.task_dims(name))


def collect(config, theta, iteration, i):
    """The inner loop of task i of an iteration: -> returns (U + 1,), U + 1 Batches."""
    rng = esmeta.generator(esmeta.GOALS, config.seed, iteration, 0)
    goal = tasks.sample_goals(config.task, rng, config.batch)[i]
    rng = esmeta.generator(esmeta.WORKER, config.seed, iteration, i)
    rates = [config.inner_rate] * config.updates
    _, returns, data = zip(*inner_loop(config.task, theta, goal, rng, rates, config.rollouts))
    return returns, data


def evaluate(config, theta, i):
    """Returns on test goal i of the mean policy (ESMeta's starts), the stochastic one: (4, 2)."""
    name, task = config.task, tasks.TASKS[config.task]
    goal, rng = tasks.test_goals(name)[i], esmeta.generator(esmeta.EVAL, 0, i + 1, 0)
    starts = esmeta.generator(esmeta.EVAL, 0, 0, 0).integers(2**31, size=esmeta.EVAL_ROLLOUTS)
    still = np.zeros((task.horizon, len(starts), task.act), np.float32)
    later = config.inner_rate * (0.01 if name == "ant_dir" else 0.5)  # (MAML)
    updates = inner_loop(name, theta, goal, rng, [config.inner_rate, later, later], task.rollouts)
    return [(rollout(name, adapted, goal, starts, still).returns().mean(), stochastic)
            for adapted, stochastic, _ in updates]  # stochastic: what the next update takes (MAML)


# ---- what runs it -------------------------------------------------------------------------------


def initial_theta(config):
    """Xavier weights, biases 0, std 1 (MAML): (P,), float32."""
    dims, rng = esmeta.task_dims(config.task), esmeta.generator(esmeta.INIT, config.seed, 0, 0)
    weights = esmeta.xavier(esmeta.actor_shapes(dims), rng)
    return np.append(weights, np.zeros(dims.act)).astype(np.float32)


def iterate(config, theta, iteration, crew):
    """One iteration: theta (P,) -> theta (P,), mean returns (U + 1,), KL, steps of physics."""
    jobs = [(config, theta, iteration, i) for i in range(config.batch)]
    returns, data = zip(*crew.map(collect, jobs))
    args = config.inner_rate, esmeta.task_dims(config.task)

    def average(function, *arrays):
        jobs = [(function, arrays, batches, *args) for batches in data]
        return np.mean(crew.map(derive, jobs), axis=0, dtype=np.float64)

    theta, kl = trust_region_step(theta, average, config.max_kl)
    return theta, np.mean(returns, axis=0), kl, sum(len(x.obs) for batches in data for x in batches)


def train(config, crew, out, resume=False):
    """MAML, each iteration a row of log.csv and a checkpoint: -> theta (P,)."""
    out, log = Path(out), ["iteration,return_before,return_after,kl,env_steps,seconds\n"]
    theta, done, env_steps = initial_theta(config), 0, 0
    if resume:
        stored, theta, done, env_steps = load_run(out)
        log = (out / "log.csv").read_text().splitlines(keepends=True)[: done + 1]
        if (stored._replace(iterations=config.iterations) != config
                or not done == len(log) - 1 <= config.iterations):
            raise ValueError(f"{out} has other settings, more iterations or fewer rows: {stored}")
    elif (out / "checkpoint.npz").exists():
        raise ValueError(f"{out} holds a run: --resume continues it, --out names another place")
    out.mkdir(parents=True, exist_ok=True)
    esmeta.replace_file(out / "config.json", json.dumps(config._asdict()))
    for iteration in range(done, config.iterations):
        begin, content = time.monotonic(), io.BytesIO()
        theta, (before, *_, after), kl, steps = iterate(config, theta, iteration, crew)
        env_steps, seconds = env_steps + steps, time.monotonic() - begin
        log.append(esmeta.csv_line((iteration, before, after, kl, env_steps, seconds)))
        esmeta.replace_file(out / "log.csv", "".join(log))
        np.savez(content, theta=theta, iteration=iteration + 1, env_steps=env_steps)
        esmeta.replace_file(out / "checkpoint.npz", content.getvalue())
        print(f"{iteration + 1}/{config.iterations} returns {before:.4g} {after:.4g}", flush=True)
    return theta


def load_run(folder):
    """Config, theta, iteration, env_steps of a run directory; ValueError where there are none."""
    try:
        config = make_config(**json.loads((Path(folder) / "config.json").read_text()))
        with np.load(Path(folder) / "checkpoint.npz", allow_pickle=False) as x:
            return config, x["theta"], int(x["iteration"]), int(x["env_steps"])
    except Exception as error:  # zipfile, numpy and json have many for broken bytes
        raise ValueError(f"{folder} holds no run of results.maml: {error}") from None


def report_eval(folder, crew):
    """MAML's meta-test on its 40 goals: writes eval.csv, prints the means."""
    config, theta, done, _ = load_run(folder)
    goals = tasks.test_goals(config.task)
    returns = np.array(crew.map(evaluate, [(config, theta, i) for i in range(len(goals))]))
    rows = [("task", "goal", "updates", "return", "return_stochastic")]
    rows += [(config.task, " ".join(f"{x:.6g}" for x in np.ravel(goal)), u, *each[u].tolist())
             for u in range(4) for goal, each in zip(goals, returns)]
    esmeta.replace_file(Path(folder) / "eval.csv", "".join(map(esmeta.csv_line, rows)))
    for kind, means in zip(("mean policy", "stochastic"), returns.mean(axis=0).T):
        print(f"{config.task} after {done} iterations, {kind}, before and after 1, 2, 3 updates:",
              *means.round(1))


@one_line("results.maml")
def main(argv=None):
    """The program; a training that was stopped goes on with --resume."""
    parser = esmeta.OneLineParser("results.maml", description=__doc__.split("\n")[0])
    parser.add_argument("--task", help="one of " + ", ".join(tasks.TASKS))
    for name, usual in dict(seed=0, updates=1, iterations="MAML's", processes="cores").items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {usual}")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", help="run directory: trains, then meta-tests")
    where.add_argument("--eval", metavar="DIR", help="only meta-tests a run")
    parser.add_argument("--resume", action="store_const", const=True, help="continue --out")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    if torch is None:
        raise ValueError("no torch: pip install torch")
    processes, folder = given.pop("processes", None), given.pop("eval", None)
    if folder is not None and given:
        raise ValueError(f"--eval takes no --{min(given)}")
    with esmeta.Crew(processes) as crew:
        if folder is None:
            folder, resume = given.pop("out"), given.pop("resume", False)
            train(make_config(**{"task": "cheetah_vel", **given}), crew, folder, resume)
        report_eval(folder, crew)


if __name__ == "__main__":
    sys.exit(main())
