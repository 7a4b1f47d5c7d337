"""MAML's goal tasks in lockstep: half-cheetah and ant, goal velocity and direction; a 2-D point.

Facts from cbfinn/maml_rl at 9c8e2eb. Units are MuJoCo's: metres, seconds, newtons, radians.
"""
import difflib
import functools
import pathlib
import warnings
from typing import Callable, NamedTuple

import gymnasium
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.spaces import Box
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

# ---- rewards and terminations: pure functions over any leading axes (...) ----------------------


def cheetah_vel_reward(velocity, action, contact, goal):
    """Match a speed, r = -|v - g| - 0.05 sum a^2; v, g (...) in m/s, a (..., 6) -> (...)."""
    return -np.abs(velocity - goal) - 0.05 * np.vecdot(action, action)


def cheetah_dir_reward(velocity, action, contact, goal):
    """Run one way, r = g v - 0.05 sum a^2; v (...) in m/s, g (...) +-1, a (..., 6) -> (...)."""
    return goal * velocity - 0.05 * np.vecdot(action, action)


def ant_cost(action, contact):
    """Effort, c = 0.005 sum a^2 + 0.0005 sum clip(f, -1, 1)^2; a (..., 8), f (..., 84) -> (...)."""
    clipped = np.clip(contact, -1.0, 1.0)
    return 0.005 * np.vecdot(action, action) + 0.0005 * np.vecdot(clipped, clipped)


def ant_vel_reward(velocity, action, contact, goal):
    """Match a speed, r = -|v - g| + 1 - c + 0.05; v, g (...) in m/s, c of `ant_cost` -> (...)."""
    return -np.abs(velocity - goal) + 1.0 - ant_cost(action, contact) + 0.05


def ant_dir_reward(velocity, action, contact, goal):
    """Run one way, r = g v - c + 0.05; v (...) in m/s, g (...) +-1, c of `ant_cost` -> (...)."""
    return goal * velocity - ant_cost(action, contact) + 0.05


def ant_terminated(state):
    """Fallen or broken: z outside [0.2, 1.0] m or not finite; (qpos, qvel) (..., 29) -> (...)."""
    height = state[..., 2]
    return ~((height >= 0.2) & (height <= 1.0) & np.isfinite(state).all(axis=-1))


def point_reward(position, goal):
    """Minus the squared distance, r = -|x - g|^2; x, g (..., 2) in m -> (...)."""
    offset = position - goal
    return -np.vecdot(offset, offset)


def point_terminated(position, goal):
    """Arrived, |x - g| <= 0.01 m, or not finite; x, g (..., 2) in m -> (...)."""
    return ~(point_reward(position, goal) < -(0.01**2))  # written so that NaN terminates


# ---- the tasks ---------------------------------------------------------------------------------


class Task(NamedTuple):
    """A task: its sizes, lengths, goals, reward and the model file that Gymnasium ships."""

    name: str
    env_id: str
    model: str | None  # None: no physics engine
    obs: int
    act: int
    goal_low: float
    goal_high: float
    test_seed: int  # of MAML's 40 test goals
    direction: bool = False  # the goal is goal_low or goal_high, nothing between
    test_high: float | None = None  # a direction's test goals are U(0, test_high), which halves it
    goal_shape: tuple[int, ...] = ()  # of one goal; () is a scalar
    horizon: int = 200  # H, steps
    rollouts: int = 20  # K, the trajectories that one adaptation sees
    reward: Callable | None = None  # of (velocity, action, contact, goal); the point's is another


TASKS = {task.name: task for task in (
    Task("cheetah_vel", "esmeta/CheetahVel-v0", "half_cheetah.xml", obs=20, act=6,
         goal_low=0.0, goal_high=2.0, test_seed=1, reward=cheetah_vel_reward),
    Task("cheetah_dir", "esmeta/CheetahDir-v0", "half_cheetah.xml", obs=20, act=6, goal_low=-1.0,
         goal_high=1.0, test_seed=1, direction=True, test_high=2.0, reward=cheetah_dir_reward),
    Task("ant_vel", "esmeta/AntVel-v0", "ant.xml", obs=125, act=8,
         goal_low=0.0, goal_high=3.0, test_seed=1, reward=ant_vel_reward),
    Task("ant_dir", "esmeta/AntDir-v0", "ant.xml", obs=125, act=8, goal_low=-1.0, goal_high=1.0,
         test_seed=2, direction=True, test_high=3.0, rollouts=40, reward=ant_dir_reward),
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


def test_goals(name):
    """The 40 goals of meta-test, MAML's own draws: -> (40,) or (40, 2)."""
    task = find_task(name)
    legacy = np.random.RandomState(task.test_seed)  # numpy.random.seed's draws, not its global
    if task.direction:
        forward = legacy.uniform(0.0, task.test_high, 40) > task.test_high / 2
        return np.where(forward, task.goal_high, task.goal_low)
    return legacy.uniform(task.goal_low, task.goal_high, (40, *task.goal_shape))


test_goals.__test__ = False  # no test, though pytest would collect the name


def outcomes(name, obs, action, velocity, goal):
    """What steps already taken are worth for any goal, which no task's dynamics see.

    obs (..., obs) and velocity (...) in m/s after the step, action (..., act), goal broadcast
    against (...) -> reward (...), terminated (...): what `step` returns, but for `unstable`.
    """
    task, action = find_task(name), np.asarray(action, np.float64)
    if task.model is None:
        return point_reward(obs, goal), point_terminated(obs, goal)
    if task.model == "ant.xml":
        contact = obs[..., 29:113]
        return task.reward(velocity, action, contact, goal), ant_terminated(obs[..., :29])
    return task.reward(velocity, action, None, goal), np.zeros(obs.shape[:-1], bool)


# ---- environments in lockstep ------------------------------------------------------------------


def make_vec(name, num_envs, freeze=False, goal=None, max_episode_steps=None):
    """`num_envs` environments of a task; `goal`, one for all, replaces the draw at each reset."""
    kind = PointVectorEnv if find_task(name).model is None else MujocoVectorEnv
    return kind(name, num_envs, freeze, goal, max_episode_steps)


class GoalVectorEnv(VectorEnv):
    """What the point and the robots share: goals, streams of noise, clipping, horizon, freezing."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, name, num_envs, freeze, goal, max_episode_steps):
        self.task = task = find_task(name)
        self.num_envs, self.freeze = num_envs, freeze
        self.horizon = max_episode_steps or task.horizon
        self.single_observation_space = Box(-np.inf, np.inf, (task.obs,), np.float64)
        self.single_action_space = Box(-1.0, 1.0, (task.act,), np.float64)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.fixed_goal = None if goal is None else self._checked(
            np.broadcast_to(goal, (num_envs, *np.shape(goal))))
        self.rngs = [None] * num_envs
        self._action = np.zeros((num_envs, task.act))

    def _checked(self, goal):
        goal, shape = np.array(goal, np.float64), (self.num_envs, *self.task.goal_shape)
        if goal.shape != shape or not np.isfinite(goal).all():
            raise ValueError(f"{self.task.name} takes finite goals of shape {shape}, not {goal}")
        return goal

    def reset(self, *, seed=None, options=None):
        """Start every episode anew: -> obs (num_envs, obs), info with qpos, qvel and goal.

        Environment i draws from its own stream: `seed + i`, `seed[i]`, or (None) its last one
        continued. `options["goal"]` (num_envs, ...) sets the goals, else they are drawn after the
        noise. Raises ValueError for goals or seeds of a wrong shape and for other options.
        """
        options = options or {}
        seeds = [None] * self.num_envs if seed is None else (
            [seed + i for i in range(self.num_envs)] if np.ndim(seed) == 0 else list(seed))
        if set(options) - {"goal"} or len(seeds) != self.num_envs:
            raise ValueError(f"reset takes the option 'goal' and one or {self.num_envs} seeds, "
                             f"not {sorted(options)} and {len(seeds)} seeds")
        goal = options.get("goal")
        goal = self.fixed_goal if goal is None else self._checked(goal)
        for i, own in enumerate(seeds):
            if own is not None or self.rngs[i] is None:
                self.rngs[i] = np_random(own)[0]
        self._restart()
        self.goal = goal if goal is not None else np.concatenate(
            [sample_goals(self.task.name, rng, 1) for rng in self.rngs])
        self.elapsed = 0
        self._living = None  # ids of those that have not terminated, None for all; with `freeze`
        obs = self._observe(np.empty((self.num_envs, self.task.obs)))
        return obs, {"qpos": self._qpos.copy(), "qvel": self._qvel.copy(), "goal": self.goal.copy()}

    def step(self, action):
        """One control step under clip(action, -1, 1), action (num_envs, act).

        -> obs (num_envs, obs), reward, terminated, truncated (num_envs,), info: `unstable`, the
        simulation broke down since the reset, and (not the point) `x_velocity` in m/s; all copies.
        With `freeze`, what has terminated stays: same obs, reward 0, terminated. Raises ValueError
        for actions of another shape.
        """
        if np.shape(action) != self._action.shape:
            raise ValueError(f"actions must have shape {self._action.shape}, "
                             f"not {np.shape(action)}")
        before, obs = self._living, np.empty((self.num_envs, self.task.obs))
        self.advance(np.asarray(action), obs)
        velocity, unstable = self.velocity(), self.unstable()
        reward, terminated = outcomes(self.task.name, obs, self._action, velocity, self.goal)
        info = {"unstable": unstable} | ({"x_velocity": velocity.copy()} if self.task.model else {})
        if before is not None:  # the state of the others stands still, and is terminal as before
            reward[~np.isin(np.arange(self.num_envs), before)] = 0.0
        self.elapsed += 1
        # the horizon is no termination: its last state has a future, which adaptation bootstraps
        truncated = (np.ones if self.elapsed >= self.horizon else np.zeros)(self.num_envs, bool)
        return obs, reward, terminated | unstable, truncated, info

    def advance(self, action, out):
        """`step` for those who score later, by `outcomes`: the observation goes to `out`.

        action (num_envs, act), out (num_envs, obs) -> False once all have terminated (`freeze`).
        """
        box = self.action_space  # half of np.clip's time, as its bounds have the actions' shape
        np.maximum(action, box.low, out=self._action)  # keeps NaN
        np.minimum(self._action, box.high, out=self._action)
        self._advance(self._living)
        self._observe(out)
        if self.freeze:
            ended = self._ended(out)
            if np.count_nonzero(ended):
                self._living = np.flatnonzero(~ended)
        return self._living is None or self._living.size > 0


class PointVectorEnv(GoalVectorEnv):
    """MAML's 2-D navigation: x' = x + 0.1 a from (0, 0), observed as it is."""

    def _restart(self):
        self._qpos, self._qvel = np.zeros((2, self.num_envs, 2))

    def _advance(self, living):
        living = slice(None) if living is None else living
        self._qpos[living] += 0.1 * self._action[living]

    def _observe(self, out):
        out[:] = self._qpos
        return out

    def _ended(self, obs):
        return point_terminated(obs, self.goal)

    def velocity(self):
        """No task of the point asks for it: 0."""
        return 0.0

    def unstable(self):
        """Which broke down since the reset: (num_envs,) bool."""
        return np.isnan(self._qpos).any(axis=1)


@functools.lru_cache(maxsize=None)
def load_model(file):
    """MAML's physics from Gymnasium's model file, with sensors for the centre of mass."""
    assets = pathlib.Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / file))
    sensors = [mujoco.mjtSensor.mjSENS_SUBTREECOM, mujoco.mjtSensor.mjSENS_SUBTREELINVEL]
    if file == "ant.xml":
        spec.option.timestep = 0.02
        # never read: a sensor of an acceleration makes MuJoCo compute cfrc_ext, else left at zero
        sensors.append(mujoco.mjtSensor.mjSENS_FRAMELINACC)
    for kind in sensors:
        spec.add_sensor(type=kind, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
    with warnings.catch_warnings():  # the cheetah's file has an attribute that MuJoCo retires
        warnings.simplefilter("ignore")
        model = spec.compile()
    if file == "ant.xml":  # on the compiled model: editing spec.default changes no loaded geom
        model.geom_solref[:] = 0.02, 1.0
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
    return model


class MujocoVectorEnv(GoalVectorEnv):
    """Cheetahs or ants in one `mujoco.batch.Batch`; one control step is one mj_step."""

    def __init__(self, name, num_envs, *args):
        super().__init__(name, num_envs, *args)
        self.model = model = load_model(self.task.model)
        self._ant = ant = self.task.model == "ant.xml"
        # A persistent batch continues from the VEL stages that the observation needs, for free.
        # Contact forces need the whole forward pass, after which persistence gains nothing.
        self._stage = int(mujoco.mjtStage.mjSTAGE_ACC if ant else mujoco.mjtStage.mjSTAGE_VEL)
        self.batch = batch = mujoco.batch.Batch(model, num_envs, nthread=1, persistent=not ant)
        self._init_qpos = model.numeric("init_qpos").data if ant else model.qpos0
        # live views, bound before the first call: a field bound later is zero until the next one
        self._qpos, self._qvel, self._ctrl = map(batch.bind, ("qpos", "qvel", "ctrl"))
        sensors = batch.bind("sensordata")  # centre of mass (3), its velocity (3), ...
        self._com, self._x_velocity = sensors[:, :3], sensors[:, 3]
        if ant:
            self._contact = batch.bind("cfrc_ext").reshape(num_envs, -1)  # (N, 14, 6) -> (N, 84)
            self._rotation = batch.bind("xmat")[:, model.body("torso").id]  # (N, 9), row by row

    def _restart(self):
        # a full reset: warm start, clock, warnings, stages of a persistent batch leave no trace
        self.batch.reset(stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        nq, nv = self._qpos.shape[1], self._qvel.shape[1]
        noise = np.array([rng.standard_normal(nq + nv) for rng in self.rngs])  # (N, nq + nv)
        self._qpos[:] = self._init_qpos + 0.01 * noise[:, :nq]  # ~ N(init_qpos, 0.01^2)
        self._qvel[:] = 0.1 * noise[:, nq:]  # ~ N(0, 0.1^2)
        self.batch.forward(stage=self._stage)

    def _advance(self, living):
        self._ctrl[:] = self._action
        self.batch.step(living, 1, self._stage)

    def _observe(self, out):
        if not self._ant:
            return np.concatenate((self._qpos[:, 1:], self._qvel, self._com), axis=1, out=out)
        contact = np.clip(self._contact, -1.0, 1.0)
        parts = self._qpos, self._qvel, contact, self._rotation, self._com
        return np.concatenate(parts, axis=1, out=out)

    def velocity(self):
        """Velocity of the centre of mass along x in m/s, (num_envs,), a view of the simulation."""
        return self._x_velocity

    def unstable(self):
        """Which broke down since the reset: (num_envs,) bool."""
        # MuJoCo resets a diverged simulation to a finite state and goes on: only a count tells
        warning = self.batch.warning  # (N, kinds, 2): what, and how often since the reset
        return (warning[:, :, 1].any(axis=1) if np.count_nonzero(warning)
                else np.zeros(self.num_envs, bool))

    def _ended(self, obs):
        return self.unstable() | ant_terminated(obs[:, :29]) if self._ant else self.unstable()


# ---- one environment, for Gymnasium ------------------------------------------------------------


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
        if options and "goal" in options:
            options = {**options, "goal": [options["goal"]]}
        obs, info = self.core.reset(options=options)
        return obs[0], {key: v[0] if v.ndim > 1 else v.item() for key, v in info.items()}

    def step(self, action):
        """As the vector environment's, without its leading axis."""
        obs, reward, terminated, _, info = self.core.step(np.asarray(action)[None])
        return (obs[0], reward.item(), terminated.item(), False,
                {key: v[0] if v.ndim > 1 else v.item() for key, v in info.items()})

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


for _task in TASKS.values():
    gymnasium.register(_task.env_id, f"{__name__}:GoalEnv", max_episode_steps=_task.horizon,
                       vector_entry_point=f"{__name__}:make_vec", kwargs={"name": _task.name})
