"""MAML's goal tasks in lockstep: half-cheetah and ant, goal velocity and direction; a 2-D point.

Robots as in cbfinn/maml_rl at 9c8e2eb. Units are MuJoCo's: metres, seconds, newtons, radians.
"""
import difflib
import functools
import warnings
from typing import NamedTuple

import gymnasium
import mujoco.batch
import numpy as np
from gymnasium.spaces import Box
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv

# ---- the tasks ---------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task: its sizes, lengths, goals, rewards, ends and the model file that Gymnasium ships."""

    name: str
    env_id: str
    model: str | None  # None: no physics engine
    obs: int
    act: int
    goal_low: float
    goal_high: float
    test_seed: int  # of MAML's 40 test goals
    direction: bool = False  # the goal is goal_low or goal_high, nothing between
    goal_shape: tuple[int, ...] = ()  # of one goal; () is a scalar
    horizon: int = 200  # H, steps
    rollouts: int = 20  # K of MAML, of a meta-test and of --paper
    shrink: float = 0.25  # of a meta-test: an update's step over that of the one before (ours)
    best_reward: float | None = None  # of a step, at the goal: scales a meta-test's steps

    def reward(self, velocity, action, contact, goal):
        """A robot's r (...): v, g (...) in m/s or g = +-1, a (..., act), f (..., 84) of the ant.

        cheetah_vel: -|v - g| - 0.05 sum a^2
        cheetah_dir: g v - 0.05 sum a^2
        ant_vel: -|v - g| + 1 - c + 0.05, c = 0.005 sum a^2 + 0.0005 sum clip(f, -1, 1)^2
        ant_dir: g v - c + 0.05
        """
        progress = goal * velocity if self.direction else -np.abs(velocity - goal)
        effort = np.vecdot(action, action)
        if self.model == "half_cheetah.xml":
            return progress - 0.05 * effort
        contact = np.clip(contact, -1.0, 1.0)
        cost = 0.005 * effort + 0.0005 * np.vecdot(contact, contact)
        return progress + (0.0 if self.direction else 1.0) - cost + 0.05

    def is_terminal(self, obs, goal):
        """Which states end an episode: obs (..., obs), goal (..., *goal_shape) -> (...)."""
        if self.model is None:
            return ~(point_reward(obs, goal) < -(0.01**2))  # arrived, or NaN
        if self.model == "ant.xml":
            return ant_terminated(obs[..., :29])
        return np.zeros(obs.shape[:-1], bool)


TASKS = {task.name: task for task in (
    Task("cheetah_vel", "esmeta/CheetahVel-v0", "half_cheetah.xml", obs=20, act=6,
         goal_low=0.0, goal_high=2.0, test_seed=1, best_reward=0.0),
    Task("cheetah_dir", "esmeta/CheetahDir-v0", "half_cheetah.xml", obs=20, act=6,
         goal_low=-1.0, goal_high=1.0, test_seed=1, direction=True, shrink=0.01),
    Task("ant_vel", "esmeta/AntVel-v0", "ant.xml", obs=125, act=8,
         goal_low=0.0, goal_high=3.0, test_seed=1, best_reward=1.05),
    Task("ant_dir", "esmeta/AntDir-v0", "ant.xml", obs=125, act=8, goal_low=-1.0, goal_high=1.0,
         test_seed=2, direction=True, rollouts=40, shrink=0.01),
    Task("point_goal", "esmeta/PointGoal-v0", None, obs=2, act=2,
         goal_low=-0.5, goal_high=0.5, test_seed=1, goal_shape=(2,), horizon=100),
)}


def find_task(name):
    """The task called `name`; raises ValueError, with the nearest name, where there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown task {name!r}: did you mean {near!r}? ({', '.join(TASKS)})")
    return TASKS[name]


def sample_goals(name, rng, n):
    """Goals of the training distribution, drawn from the generator `rng`: -> (n,) or (n, 2)."""
    task = find_task(name)
    if task.direction:
        return rng.choice([task.goal_low, task.goal_high], size=n)  # equally likely
    return rng.uniform(task.goal_low, task.goal_high, (n, *task.goal_shape))


def spread_goals(name, rng, n):
    """Goals spread over the training distribution, drawn from `rng`: -> (n,), (n, 2) or (2,).

    A velocity in each of n equal parts of the range, in order; both directions, each once, in
    random order, whatever n; n uniform points.
    """
    task = find_task(name)
    if task.direction:
        return rng.permutation([task.goal_low, task.goal_high])
    if task.goal_shape:
        return sample_goals(name, rng, n)
    part = (np.arange(n) + rng.uniform(size=n)) / n
    return task.goal_low + (task.goal_high - task.goal_low) * part


def test_goals(name):
    """The 40 goals of meta-test, MAML's own draws: -> (40,) or (40, 2)."""
    task = find_task(name)
    legacy = np.random.RandomState(task.test_seed)  # numpy.random.seed's draws, not its global
    if task.direction:
        forward = legacy.uniform(size=40) > 0.5  # MAML's U(0, 2) > 1 or U(0, 3) > 1.5
        return np.where(forward, task.goal_high, task.goal_low)
    return legacy.uniform(task.goal_low, task.goal_high, (40, *task.goal_shape))


def point_reward(position, goal):
    """Minus the squared distance, r = -|x - g|^2; x, g (..., 2) in m -> (...)."""
    return -np.sum((position - goal) ** 2, axis=-1)


def ant_terminated(state):
    """Fallen or broken: z outside [0.2, 1.0] m or not finite; (qpos, qvel) (..., 29) -> (...)."""
    height = state[..., 2]
    return ~((height >= 0.2) & (height <= 1.0) & np.isfinite(state).all(axis=-1))


def outcomes(name, obs, action, velocity, goal):
    """What steps already taken are worth for any goal, which no task's dynamics see.

    obs (..., obs) and velocity (...) in m/s after the step, action (..., act) in [-1, 1], goal
    (..., *goal_shape) -> reward, terminated (...), as `step` returns, but for `unstable`.
    """
    task, action = find_task(name), np.asarray(action, np.float64)
    reward = (point_reward(obs, goal) if task.model is None
              else task.reward(velocity, action, obs[..., 29:113], goal))
    return reward, task.is_terminal(obs, goal)


# ---- environments in lockstep ------------------------------------------------------------------


@functools.cache
def load_model(file):
    """MAML's physics from Gymnasium's model file, with sensors for the centre of mass."""
    spec = mujoco.MjSpec.from_file(f"{gymnasium.__path__[0]}/envs/mujoco/assets/{file}")
    torso = dict(objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
    spec.add_sensor(type=mujoco.mjtSensor.mjSENS_SUBTREECOM, **torso)
    spec.add_sensor(type=mujoco.mjtSensor.mjSENS_SUBTREELINVEL, **torso)
    if file == "ant.xml":
        # never read: a sensor of an acceleration makes MuJoCo compute cfrc_ext, else left at zero
        spec.add_sensor(type=mujoco.mjtSensor.mjSENS_FRAMELINACC, **torso)
        spec.option.timestep = 0.02
        for geom in spec.geoms:  # each by itself: editing spec.default changes no loaded geom
            geom.solimp[:3] = 0.8, 0.8, 0.01
    with warnings.catch_warnings():  # the cheetah's file has an attribute that MuJoCo retires
        warnings.simplefilter("ignore")
        return spec.compile()


class GoalVectorEnv(VectorEnv):
    """`num_envs` environments of a task; `goal`, one for all, replaces the draw at each reset."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, name, num_envs, freeze=False, goal=None, max_episode_steps=None):
        self.task = task = find_task(name)
        self.num_envs, self.freeze = num_envs, freeze
        self.horizon = max_episode_steps or task.horizon
        self.single_observation_space = Box(-np.inf, np.inf, (task.obs,), np.float64)
        self.single_action_space = Box(-1.0, 1.0, (task.act,), np.float64)
        self.observation_space = Box(-np.inf, np.inf, (num_envs, task.obs), np.float64)
        self.action_space = Box(-1.0, 1.0, (num_envs, task.act), np.float64)
        self.rngs = [None] * num_envs
        self.goal = np.zeros((num_envs, *task.goal_shape))
        self.fixed_goal = None if goal is None else self._checked([goal] * num_envs)
        self.elapsed = np.zeros(num_envs, int)
        self._alive = np.ones(num_envs, bool)  # all of them without `freeze`
        self._ant = ant = task.model == "ant.xml"
        if task.model is None:
            self.batch, self.velocity = None, 0.0  # which no task of the point asks for
            self._qpos, self._qvel, self._ctrl = np.zeros((3, num_envs, 2))
            self._parts = [self._qpos]
            return
        self.model = model = load_model(task.model)
        self._init_qpos = model.numeric("init_qpos").data if ant else model.qpos0
        # A persistent batch continues from the VEL stages that the observation needs, for free.
        # Contact forces need the whole forward pass, after which persistence gains nothing.
        self._stage = mujoco.mjtStage.mjSTAGE_ACC if ant else mujoco.mjtStage.mjSTAGE_VEL
        self.batch = batch = mujoco.batch.Batch(model, num_envs, nthread=1, persistent=not ant)
        # live views, bound before the first call: a field bound later is zero until the next one
        self._qpos, self._qvel, self._ctrl = map(batch.bind, ("qpos", "qvel", "ctrl"))
        sensors = batch.bind("sensordata")
        com, self.velocity = sensors[:, :3], sensors[:, 3]  # views; along x in m/s
        self._parts = [self._qpos[:, 1:], self._qvel, com]
        if ant:
            contact = batch.bind("cfrc_ext").reshape(num_envs, -1)  # (N, 14, 6) -> (N, 84)
            rotation = batch.bind("xmat")[:, model.body("torso").id]  # (N, 9), row by row
            self._parts = [self._qpos, self._qvel, contact, rotation, com]

    def _checked(self, goal):
        goal = np.array(goal, np.float64)
        if goal.shape != self.goal.shape or not np.isfinite(goal).all():
            raise ValueError(f"{self.task.name} takes finite goals of shape {self.goal.shape}, "
                             f"not {goal.tolist()}")
        return goal

    def reset(self, *, seed=None, options=None):
        """Start episodes anew: -> obs (num_envs, obs), info with qpos, qvel and goal.

        Environment i draws from its own stream: `seed + i`, `seed[i]`, or (None) its last one
        continued. `options["goal"]` (num_envs, ...) sets the goals, else they are drawn after the
        noise. `options["reset_mask"]` (num_envs,) bool leaves alone those that are False. Raises
        ValueError for goals, masks or seeds of a wrong shape and for other options.
        """
        options, n = options or {}, self.num_envs
        if np.ndim(seed) == 0:
            seed = [None if seed is None else seed + i for i in range(n)]
        if set(options) - {"goal", "reset_mask"} or len(seed) != n:
            raise ValueError(f"reset takes the options 'goal' and 'reset_mask' and one or {n} "
                             f"seeds, not {[*options]} and {len(seed)} seeds")
        goal = options.get("goal")
        goal = self.fixed_goal if goal is None else self._checked(goal)
        mask = np.asarray(options.get("reset_mask", [True] * n))
        first = None in self.rngs
        if mask.dtype != bool or mask.shape != (n,) or not (mask.all() if first else mask.any()):
            raise ValueError(f"reset_mask needs {n} bools, one True, at first all: {mask.tolist()}")
        if self.batch:  # warm start, clock, warnings, stages of a persistent batch leave no trace
            self.batch.reset(mask, stage=mujoco.mjtStage.mjSTAGE_NONE)
        self._qpos[mask] = 0.0  # where the point starts
        for i in np.flatnonzero(mask):
            if seed[i] is not None or self.rngs[i] is None:
                self.rngs[i] = np_random(seed[i])[0]
            rng = self.rngs[i]
            if self.batch:
                self._qpos[i] = self._init_qpos + 0.01 * rng.standard_normal(self.model.nq)
                self._qvel[i] = 0.1 * rng.standard_normal(self.model.nv)
            self.goal[i] = sample_goals(self.task.name, rng, 1)[0] if goal is None else goal[i]
        if self.batch:
            self.batch.forward(mask, self._stage)
        self.elapsed[mask], self._alive[mask] = 0, True
        info = {"qpos": self._qpos, "qvel": self._qvel, "goal": self.goal}
        return self._observe(), {key: view.copy() for key, view in info.items()}

    def _observe(self, out=None):
        obs = np.concatenate(self._parts, axis=1, out=out)
        if self._ant:
            np.clip(obs[:, 29:113], -1.0, 1.0, out=obs[:, 29:113])
        return obs

    def step(self, action):
        """One control step under clip(action, -1, 1), action (num_envs, act).

        -> obs (num_envs, obs), reward, terminated, truncated (num_envs,), info: `unstable`, the
        simulation broke down since the reset, and (not the point) `x_velocity` in m/s; all copies.
        With `freeze`, what has terminated stays: same obs, reward 0, terminated. Raises ValueError
        for actions of another shape.
        """
        if np.shape(action) != self._ctrl.shape:
            raise ValueError(f"actions must have shape {self._ctrl.shape}, not {np.shape(action)}")
        frozen, obs = ~self._alive, np.empty(self.observation_space.shape)
        self.advance(action, obs)
        action, velocity, unstable = np.clip(action, -1.0, 1.0), self.velocity, self.unstable()
        reward, terminated = outcomes(self.task.name, obs, action, velocity, self.goal)
        reward[frozen] = 0.0
        info = {"unstable": unstable} | ({"x_velocity": velocity.copy()} if self.batch else {})
        self.elapsed += 1
        # the horizon is no termination: its last state has a future, which adaptation bootstraps
        return obs, reward, terminated | unstable, self.elapsed >= self.horizon, info

    def advance(self, action, out):
        """`step` for those who score later, by `outcomes`: the observation goes to `out`.

        action (num_envs, act), out (num_envs, obs); with `freeze`, what has terminated stays.
        """
        self._ctrl[:] = np.minimum(np.maximum(action, -1.0), 1.0)  # half of np.clip's time
        if self.batch is None:
            self._qpos[self._alive] += 0.1 * self._ctrl[self._alive]
        else:
            self.batch.step(None if self._alive.all() else self._alive, 1, self._stage)
        self._observe(out)
        if self.freeze:
            self._alive = ~(self.unstable() | self.task.is_terminal(out, self.goal))

    def unstable(self):
        """Which broke down since the reset: (num_envs,) bool."""
        # MuJoCo resets a diverged simulation to a finite state and goes on: only a count tells
        broken = np.isnan(self._qpos) if self.batch is None else self.batch.warning[:, :, 1]
        return broken.any(axis=1) if np.count_nonzero(broken) else np.zeros(self.num_envs, bool)


class GoalEnv(gymnasium.Env):
    """Environment 0 of `make_vec`, bit for bit; Gymnasium's TimeLimit truncates it at H."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # the ant's; cheetahs run slow

    def __init__(self, name, goal=None, render_mode=None):
        self.core = make_vec(name, 1, goal=goal)
        self.observation_space = self.core.single_observation_space
        self.action_space = self.core.single_action_space
        self.render_mode, self._renderer = render_mode, None

    def reset(self, *, seed=None, options=None):
        """As the vector environment's, without its leading axis."""
        super().reset(seed=seed)
        self.core.rngs = [self.np_random]
        obs, info = self.core.reset(options={key: [x] for key, x in (options or {}).items()})
        return obs[0], self._unbatched(info)

    def step(self, action):
        """As the vector environment's, without its leading axis."""
        obs, reward, terminated, _, info = self.core.step(np.asarray(action)[None])
        return obs[0], reward.item(), terminated.item(), False, self._unbatched(info)

    def _unbatched(self, info):
        return {key: x[0] if x.ndim > 1 else x.item() for key, x in info.items()}

    def render(self):
        """One RGB frame (480, 480, 3) uint8, or None without render_mode="rgb_array"."""
        if self.render_mode is None:
            return None
        if self.core.task.model is None:  # 2 m wide; the goal is green, the point black
            frame = np.full((480, 480, 3), 255, np.uint8)
            for (x, y), colour in ((self.core.goal[0], (0, 160, 0)), (self.core._qpos[0], 0)):
                row, column = np.clip((240 - 240 * y, 240 + 240 * x), 4, 476).astype(int)
                frame[row - 4:row + 4, column - 4:column + 4] = colour
            return frame
        data = self.core.batch.get_data(0)
        mujoco.mj_forward(self.core.model, data)
        self._renderer = self._renderer or mujoco.Renderer(self.core.model, 480, 480)
        self._renderer.update_scene(data, camera="track")
        return self._renderer.render()

    def close(self):
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


make_vec = GoalVectorEnv
for _task in TASKS.values():
    gymnasium.register(_task.env_id, f"{__name__}:GoalEnv", max_episode_steps=_task.horizon,
                       vector_entry_point=f"{__name__}:make_vec", kwargs={"name": _task.name})
