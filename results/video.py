"""A film of before and after: `python -m results.video DIR --goal 1.5 --out ant.gif`.

The policy of a run plays one episode as it is and one adapted to the goal, side by side.
"""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

NO_GL = ("no way to render: install EGL (apt install libegl1) or OSMesa (apt install libosmesa6) "
         "and set MUJOCO_GL to egl or osmesa")
PROBE = """import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1"/></worldbody></mujoco>')
mujoco.Renderer(model, 8, 8).render()"""


def choose_gl():
    """Set MUJOCO_GL, which mujoco reads when it is imported, to what renders here: -> found one.

    Each candidate is tried in a process of its own: a broken one fails in too many ways.
    """
    asked = os.environ.pop("MUJOCO_GL", "").replace("off", "")  # which esmeta's pools leave behind
    for gl in [asked] if asked else ["glfw"] * ("DISPLAY" in os.environ) + ["egl", "osmesa"]:
        trial = subprocess.run([sys.executable, "-W", "error", "-c", PROBE], capture_output=True,
                               env={**os.environ, "MUJOCO_GL": gl})
        if trial.returncode == 0:
            os.environ["MUJOCO_GL"] = gl
            return True
    return False


CAN_RENDER = choose_gl()

import esmeta
import gymnasium
import numpy as np
import tasks
from results.guard import one_line

SIZE, FRAME = 320, 0.04  # pixels of a picture, seconds of the film that it lasts, about


def parse_goal(task, numbers):
    """The goal that the command line's numbers mean; ValueError where it is none of the task's."""
    goal, low, high = np.array(numbers), task.goal_low, task.goal_high
    if goal.size != math.prod(task.goal_shape):
        raise ValueError(f"a goal of {task.name} is {math.prod(task.goal_shape)} number(s)")
    if task.direction and goal[0] not in (low, high):
        raise ValueError(f"a goal of {task.name} is {low:g} or {high:g}, not {goal[0]:g}")
    if not ((goal >= low) & (goal <= high)).all():
        raise ValueError(f"a goal of {task.name} is from {low:g} to {high:g}, not {goal}")
    return goal.reshape(task.goal_shape)


def film(config, meta, actor, goal, stride, seed):
    """One episode: -> pictures (SIZE, SIZE, 3) of every stride-th step, lines of text for each."""
    from PIL import Image

    task, dims = tasks.find_task(config.task), esmeta.task_dims(config.task)
    normalise = esmeta.make_normaliser(meta, config)
    env = gymnasium.make(task.env_id, render_mode="rgb_array")
    obs, info = env.reset(seed=seed, options={"goal": goal if task.goal_shape else float(goal)})
    pictures, texts, total, end = [], [], 0.0, False
    for t in range(task.horizon):
        action, _ = esmeta.actor_forward(actor, normalise(obs)[None].astype(actor.dtype), dims)
        obs, reward, end, _, info = env.step(action[0])
        total += reward
        if t % stride == 0 or end or t == task.horizon - 1:
            picture = Image.fromarray(env.render()).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            state = (f"velocity {info['x_velocity']:+.2f} m/s" if "x_velocity" in info
                     else f"position {np.array2string(obs, precision=2)} m")
            pictures.append(picture)
            ending = "" if not end else ", fell" if task.model else ", arrived"
            texts.append((state, f"return {total:.1f}{ending}"))
        if end:  # nothing is earned after it
            break
    env.close()
    return pictures, texts


def compose(films, titles, goal_text):
    """Both films side by side with their texts; the shorter one stands still at its end."""
    from PIL import Image, ImageDraw, ImageFont

    font, frames = ImageFont.load_default(15), []
    for t in range(max(len(pictures) for pictures, _ in films)):
        frame = Image.new("RGB", (len(films) * SIZE, SIZE + 66), "white")
        draw = ImageDraw.Draw(frame)
        for i, ((pictures, texts), title) in enumerate(zip(films, titles)):
            now = min(t, len(pictures) - 1)
            frame.paste(pictures[now], (i * SIZE, 66))
            state, score = texts[now]
            for row, line in enumerate((title, f"{state}   {goal_text}", score)):
                draw.text((i * SIZE + 8, 3 + 20 * row), line, "black", font)
        frames.append(frame)
    palette = frames[-1].quantize(256)  # one palette and no dithering: the ground does not flicker
    return [frame.quantize(palette=palette, dither=0) for frame in frames]


def make_video(args):
    """Adapt, play, draw and write what the command line asks for."""
    config, meta = esmeta.load_checkpoint(args.run)
    task, out = tasks.find_task(config.task), Path(args.out)
    goal = parse_goal(task, args.goal)
    if out.suffix != ".gif" or not out.parent.is_dir():
        raise ValueError(f"--out must be a .gif in a directory that exists, not {out}")
    if args.updates < 1 or not 0.01 <= args.speed <= 100 or not 0 <= args.seed < 2**31:
        raise ValueError("--updates must be at least 1, --speed from 0.01 to 100, --seed positive")
    if task.model and not CAN_RENDER:
        raise RuntimeError(NO_GL)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise RuntimeError("no Pillow: pip install pillow") from None
    step = tasks.load_model(task.model).opt.timestep if task.model else FRAME  # a picture each
    stride = max(1, round(FRAME * args.speed / step))
    unit = "" if task.direction else " m/s" if task.model else " m"
    goal_text = f"goal {np.array2string(goal, precision=2)}{unit}"
    config = dataclasses.replace(config, rollouts=task.rollouts)  # as in a meta-test
    _, actors = esmeta.evaluate_goal(config, meta, goal, 0, args.updates, args.seed)
    films = [film(config, meta, a, goal, stride, args.seed) for a in actors[[0, -1]]]
    plural = "s" * (args.updates > 1)
    frames = compose(films, (f"{config.task} before adaptation",
                             f"after {args.updates} update{plural}"), goal_text)
    frames[0].save(out, save_all=True, append_images=frames[1:], loop=0,
                   duration=round(1000 * stride * step / args.speed))
    before, after = (texts[-1][1] for _, texts in films)
    print(f"{out}: {len(frames)} frames, before: {before}, after: {after}")


@one_line("results.video")
def main(argv=None):
    """The program."""
    parser = esmeta.OneLineParser("results.video", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("--goal", type=float, nargs="+", required=True, help="of the task's kind")
    parser.add_argument("--out", required=True, help="the GIF to write")
    parser.add_argument("--updates", type=int, default=1, help="adaptations (default 1)")
    parser.add_argument("--speed", type=float, default=0.5, help="1: real time (default 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of episode and adaptation (default 0)")
    make_video(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
