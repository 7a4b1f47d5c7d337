"""Where the time goes, as ratios of one run: `python -m results.bench [--task T ..] [--quick]`.

What is compared is timed in turn, again and again, and medians are compared. Physics counts living
steps only: a robot that has fallen costs no more steps. Linux only (affinity, /proc).
"""

import dataclasses
import functools
import os
import pickle
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from unittest import mock

import esmeta  # first: it sets the number of BLAS threads
import gymnasium
import mujoco
import mujoco.rollout
import numpy as np
import tasks
from results.guard import one_line

BANDWIDTH = 125e6  # bytes/s of a 1 Gbit/s network, assumed by the model of many processes
TARGETS = {  # closed loop / C loop, closed loop / SyncVectorEnv, worker / its physics
    "half_cheetah.xml": (0.60, 2.3, 0.35), "ant.xml": (0.65, 1.2, 0.52)}


def timed(function, *args):
    """Seconds of one call, and its value."""
    begin = time.perf_counter()
    value = function(*args)
    return time.perf_counter() - begin, value


def show(label, value, ratio=None, target=None, most=False):
    """Print one row: label, value, ratio, its target and whether it is met."""
    text = f"  {label:<48}{value:>16}" + ("" if ratio is None else f"{ratio:9.3f}")
    if target is not None:
        met = ratio <= target if most else ratio >= target
        text += f"  {'<=' if most else '>='} {target:<5g}{'met' if met else 'MISSED'}"
    print(text, flush=True)


class PlainEnv(gymnasium.Env):
    """The task as a plain Gymnasium environment: MjData, mj_step, forward pass, no batch."""

    def __init__(self, name):
        env = tasks.make_vec(name, 1)
        self.task, self.model, self.start = env.task, env.model, env._init_qpos
        self.data, self.torso = mujoco.MjData(env.model), env.model.body("torso").id
        self.observation_space = env.single_observation_space
        self.action_space, self.ant = env.single_action_space, env._ant

    def reset(self, *, seed=None, options=None):
        """The initial pose."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.start
        return np.zeros(self.task.obs), {}

    def step(self, action):
        """One mj_step and the forward pass that the observation needs."""
        m, d = self.model, self.data
        d.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(m, d)
        if self.ant:
            mujoco.mj_forward(m, d)
            contact = np.clip(d.cfrc_ext, -1, 1).ravel()
            obs = d.qpos, d.qvel, contact, d.xmat[self.torso], d.sensordata[:3]
        else:  # positions, velocities and their sensors suffice
            mujoco.mj_fwdPosition(m, d), mujoco.mj_sensorPos(m, d)
            mujoco.mj_fwdVelocity(m, d), mujoco.mj_sensorVel(m, d)
            contact, obs = None, (d.qpos[1:], d.qvel, d.sensordata[:3])
        obs, reward = np.concatenate(obs), self.task.reward(d.sensordata[3], d.ctrl, contact, 1.0)
        return obs, reward, self.ant and bool(tasks.ant_terminated(obs[:29])), False, {}


class Episodes:
    """Real episodes of K explorers, and the ways to run them again."""

    def __init__(self, config, meta, k):
        rng = esmeta.generator(esmeta.WORKER, config.seed, meta.iteration, 0)
        self.theta, self.starts = esmeta.sample_explorers(
            meta.mu_actor, meta.sigma_actor, dataclasses.replace(config, rollouts=k), rng)
        self.name, self.normalise = config.task, esmeta.make_normaliser(meta, config)
        self.data = self.closed_loop()
        self.lengths = self.data.valid.sum(axis=0)  # (K,)

    def closed_loop(self):
        """The rollout that training does, its environment made anew."""
        goal = tasks.test_goals(self.name)[0]
        return esmeta.rollout(self.name, self.theta, self.starts, self.normalise, [goal])[0]

    def c_loop(self):
        """The function that replays the living steps by mj_step in a loop in C, nothing else."""
        env = tasks.make_vec(self.name, len(self.starts))
        model, data = env.model, mujoco.MjData(env.model)
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        info = env.reset(seed=self.starts.tolist())[1]
        # mjSTATE_FULLPHYSICS of these models is time, qpos, qvel; bit for bit the rollout's states
        start = np.hstack([np.zeros((len(self.starts), 1)), info["qpos"], info["qvel"]])
        control = np.clip(self.data.action, -1, 1).astype(float).swapaxes(0, 1)  # (K, H, act)
        groups = [(start[self.lengths == n], control[self.lengths == n, :n].copy())
                  for n in np.unique(self.lengths)]
        return lambda: [mujoco.rollout.rollout(model, data, *group) for group in groups]

    def sync(self, make):
        """The function that steps a SyncVectorEnv with the actions; what has fallen, it resets."""
        envs = gymnasium.vector.SyncVectorEnv([make] * len(self.starts))
        return lambda: (envs.reset(seed=0), [envs.step(action) for action in self.data.action])


def profile(job):
    """Seconds of evaluate_worker and of its parts, timed inside it: -> dict, Result."""
    spent = {"rollout": [], "adapt": [], "critic_error": []}

    def watch(name):
        def call(*args, original=getattr(esmeta, name)):
            duration, value = timed(original, *args)
            spent[name].append(duration)
            return value
        return call

    with mock.patch.multiple(esmeta, **{name: watch(name) for name in spent}):
        total, result = timed(esmeta.evaluate_worker, *job)
    return {"worker": total, "explore": spent["rollout"][0], "adapt": sum(spent["adapt"]),
            "fitness": sum(spent["rollout"][1:]) + sum(spent["critic_error"])}, result


class Recorder(np.ndarray):
    """An array that notes the operands of the matrix products it and its offspring take part in."""

    log, __array_priority__ = [], 1.0  # a concatenation with plain arrays is one too

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        plain = lambda x: x.view(np.ndarray) if isinstance(x, Recorder) else x
        inputs = [plain(x) for x in inputs]
        if ufunc is np.matmul:
            Recorder.log.append([(x.shape, x.dtype, x.flags.c_contiguous) for x in inputs])
        if out:
            options["out"] = tuple(map(plain, out))
        value = getattr(ufunc, method)(*inputs, **options)
        return value.view(Recorder) if isinstance(value, np.ndarray) else value


def bare_products(job):
    """The function that does the matrix products of the job's adaptations, nothing else."""
    def recording(theta, phi, data, *rest, adapt=esmeta.adapt):
        data = data._replace(obs=data.obs.view(Recorder), action=data.action.view(Recorder))
        pair = adapt(theta.view(Recorder), phi.view(Recorder), data, *rest)
        return [weights.view(np.ndarray) for weights in pair]

    @functools.cache  # those of one kind share their memory: the caches stay warm, as in backprop
    def operand(shape, dtype, ordered):
        return np.ones(shape, dtype) if ordered else np.ones(shape[::-1], dtype).T

    Recorder.log.clear()
    with mock.patch.object(esmeta, "adapt", recording):
        esmeta.evaluate_worker(*job)
    products = [(operand(*a), operand(*b), np.empty((a[0][0], b[0][1]), a[1]))
                for a, b in Recorder.log]
    return lambda: [np.matmul(a, b, out=out) for a, b, out in products]


def real_state(config):
    """The meta-state of the committed run of this task, else an untrained one with a normaliser."""
    path = Path(__file__).parent / f"{config.task}-seed0"
    try:
        return esmeta.load_checkpoint(path)[1], f"policy of {path.name}"
    except ValueError:  # none, or of another version
        meta = esmeta.initial_state(config)
        raw = Episodes(config, meta, 20).data.raw.reshape(-1, meta.obs_sums.shape[1])
        sums = np.array([np.full(raw.shape[1], len(raw)), raw.sum(axis=0), (raw**2).sum(axis=0)])
        return meta._replace(obs_sums=sums), "untrained policy"


def one_core(config, meta, repeats):
    """Print what one core does with a worker: -> seconds of a worker, its Result."""
    task, job = tasks.find_task(config.task), (config, meta, 0)
    few, many = Episodes(config, meta, 20), Episodes(config, meta, 40)
    products, parts = bare_products(job), []
    ways = {"C loop": few.c_loop(), "closed loop, K = 20": few.closed_loop,
            "closed loop, K = 40": many.closed_loop,
            "SyncVectorEnv": few.sync(lambda: PlainEnv(config.task)),
            "SyncVectorEnv, registered": few.sync(lambda: gymnasium.make(task.env_id)),
            "products": products, "worker": lambda: parts.append(profile(job))}
    # in turn, and the first turn only warms up
    turns = [[timed(way)[0] for way in ways.values()] for _ in range(repeats + 1)][1:]
    time_of = dict(zip(ways, np.median(turns, axis=0)))
    part = {name: np.median([p[name] for p, _ in parts[1:]]) for name in parts[0][0]}
    result, n = parts[0][1], 20 * task.horizon
    steps = {"closed loop, K = 40": many.lengths.sum(), "SyncVectorEnv": n,
             "SyncVectorEnv, registered": n}
    us = {name: 1e6 * t / steps.get(name, few.lengths.sum()) for name, t in time_of.items()}
    c, loops, gym, whole = us["C loop"], *TARGETS[task.model]
    show("C loop of mj_step", f"{c:.2f} us/step")
    for name in ("closed loop, K = 20", "closed loop, K = 40"):
        show(name + ": C loop over it", f"{us[name]:.2f} us/step", c / us[name], loops)
    for name, target in ("SyncVectorEnv", gym), ("SyncVectorEnv, registered", None):
        show(f"{name}: over closed loop", f"{us[name]:.2f} us/step",
             us[name] / us["closed loop, K = 20"], target)
    show("adaptations of a worker over their products", f"{1e3 * part['adapt']:.1f} ms",
         part["adapt"] / time_of["products"], 1.5, most=True)
    for name, label in ("explore", "exploring rollouts"), ("fitness", "fitness"):
        show(f"{label}, of the worker", f"{1e3 * part[name]:.1f} ms", part[name] / part["worker"])
    show(f"worker: physics of {result.env_steps} steps over it", f"{1e3 * part['worker']:.1f} ms",
         1e-6 * c * result.env_steps / part["worker"], whole)
    return part["worker"], result


class Replay:
    """A crew whose workers take no time: it pickles jobs and unpickles stored results."""

    def __init__(self, blob):
        self.blob = blob

    def map(self, function, jobs):
        """What the main process does for `jobs`, but for the pipes."""
        for job in jobs:
            pickle.dumps((function, job), pickle.HIGHEST_PROTOCOL)
        return [pickle.loads(self.blob) for _ in jobs]


def serial_part(config, meta, result, repeats):
    """Seconds that the main process works on an iteration: pickles, update, checkpoint."""
    crew = Replay(pickle.dumps(result, pickle.HIGHEST_PROTOCOL))

    def iteration(folder):
        new, _, _ = esmeta.iterate(config, meta, crew)
        esmeta.save_checkpoint(Path(folder) / "checkpoint.npz", config, new)

    with tempfile.TemporaryDirectory() as folder:
        return np.median([timed(iteration, folder)[0] for _ in range(repeats + 1)][1:])


def iteration_times(config, meta, counts, repeats):
    """Median seconds of a whole iteration on P processes, for each P of counts, in turn."""
    times = {p: [] for p in counts}
    for p in list(counts) * repeats:
        with esmeta.Crew(p) as crew:
            warm = dataclasses.replace(config, workers=4 * p, goals=1, critic_updates=1)
            esmeta.iterate(warm, meta, crew)  # imports of new processes
            times[p].append(timed(esmeta.iterate, config, meta, crew)[0])
    return {p: np.median(t) for p, t in times.items()}


def memory(config, iterations, processes):
    """Peak resident MB (main, largest worker) after each iteration; run it in a fresh process."""
    def peak(pid):
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    meta, peaks = esmeta.initial_state(config), []
    with esmeta.Crew(processes) as crew:
        for _ in range(iterations):
            meta, _, _ = esmeta.iterate(config, meta, crew)
            pids = [child.pid for child in active_children()] or [os.getpid()]
            peaks.append((peak(os.getpid()), max(map(peak, pids))))
    return peaks


def show_memory(processes, quick):
    """Print peaks on the largest task and their growth on the smallest."""
    def fresh(*args):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(memory, *args).result()

    config = esmeta.make_config("ant_dir", rollouts=40, workers=4 if quick else 64)
    for name, peak in zip(("main", "worker"), fresh(config, 1, processes)[-1]):
        show(f"peak memory of {name}, ant_dir M={config.workers} K=40, GB", f"{peak:.0f} MB",
             peak / 1000, 0.4, most=True)
    tiny = esmeta.make_config("point_goal", workers=4, rollouts=4, goals=1, critic_updates=2)
    peaks = fresh(tiny, 40 if quick else 200, processes)
    for name, early, late in zip(("main", "worker"), peaks[len(peaks) // 4], peaks[-1]):
        show(f"growth of {name} to iteration {len(peaks)} of point_goal", f"{late - early:.1f} MB",
             late / early, 1.02, most=True)


def show_model(worker, serial, size, m):
    """Print seconds an iteration takes on P processes, modelled, and where more stop paying."""
    print(f"  model: ceil(M / P) * {worker:.3f} s + M * ({1e3 * serial / m:.2f} ms + "
          f"{size / 1e3:.0f} kB at {8e-9 * BANDWIDTH:g} Gbit/s)")
    each = serial / m + size / BANDWIDTH
    times = {p: -(-m // p) * worker + m * each for p in 2 ** np.arange(11)}
    print("    P       " + "".join(f"{p:>8}" for p in times))
    print("    seconds " + "".join(f"{t:8.2f}" for t in times.values()))
    best = next((p for p in times if times.get(2 * p, 0) > 0.9 * times[p]), 1024)
    print(f"    M = {m} pays up to P = {best}; with M = P, the main process is busy as long as a "
          f"worker at P = {worker / each:.0f}")


def bench(name, processes, quick):
    """Everything about one task."""
    config = esmeta.make_config(name, **(dict(workers=8) if quick else {}))
    (meta, source), m, cores = real_state(config), config.workers, os.sched_getaffinity(0)
    print(f"{f'{name}, M={m}, K={config.rollouts}, {source}':<50}{'value':>16}    ratio  target")
    os.sched_setaffinity(0, {min(cores)})
    try:
        worker, result = one_core(config, meta, 1 if quick else 15)
        serial = serial_part(config, meta, result, 2 if quick else 15)
    finally:
        os.sched_setaffinity(0, cores)
    job = len(pickle.dumps((config, meta, 0), pickle.HIGHEST_PROTOCOL))
    back = len(pickle.dumps(result, pickle.HIGHEST_PROTOCOL))
    show("bytes of a job, of a result", f"{job} {back}")
    counts = sorted({processes, *(2 ** i for i in range(processes.bit_length()))})
    times = iteration_times(config, meta, counts, 1 if quick else 3)
    for p in counts:
        show(f"iterations an hour, P = {p}: over P = 1", f"{3600 / times[p]:.0f}",
             times[1] / times[p], 1.9 if p == 2 else None)
    if 2 in times:
        show("main process's share of an iteration, P = 2", f"{1e3 * serial:.1f} ms",
             serial / times[2], 0.03, most=True)
    show_model(worker, serial, job + back, m)


@one_line("results.bench")
def main(argv=None):
    """The program."""
    parser = esmeta.OneLineParser("results.bench", description=__doc__)
    parser.add_argument("--task", nargs="+", default=["cheetah_vel", "ant_vel"], help="to time")
    parser.add_argument("--processes", type=int, default=esmeta.Crew().processes,
                        help="most to try (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="one repetition, few workers: a check")
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise ValueError(f"--processes must be at least 1, not {args.processes}")
    if flat := [name for name in args.task if tasks.find_task(name).model is None]:
        raise ValueError(f"{flat[0]} has no physics to compare with")
    for name in args.task:
        bench(name, args.processes, args.quick)
    show_memory(args.processes, args.quick)


if __name__ == "__main__":
    sys.exit(main())
