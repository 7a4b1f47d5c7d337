"""One sigma a layer, learned: `python -m results.shared_sigma --lr-sigma-actor 300 --out DIR`.

The command line is esmeta's. In `ascend` each log sigma of a layer takes the mean of the layer's
natural gradients, which is the natural gradient of Eq. 10 in one log sigma that the layer shares.
DIR also gets sigma.csv: sigma_a of W1, W2, W3 after each iteration. Resume by this program too, as
esmeta's own would go on with a sigma for each weight.
"""

import sys
from unittest import mock

import esmeta
import numpy as np

HEADER = "iteration,W1,W2,W3"


def ascend(d_mu, d_sigma, sigma, k, lr_mu, lr_sigma, config, per_weight=esmeta.ascend):
    """A step of mu as esmeta.ascend's, and the next sigma, which stays one number a layer: (P,)."""
    step, _ = per_weight(d_mu, d_sigma, sigma, k, lr_mu, 0.0, config)
    natural, dims = d_sigma * sigma / (2 * k), esmeta.task_dims(config.task)
    for shapes in esmeta.actor_shapes(dims), esmeta.critic_shapes(dims):
        if sum(rows * columns for rows, columns in shapes) == len(sigma):  # actor's or critic's
            for layer in esmeta.unpack(natural, shapes):
                layer[:] = layer.mean()
    return step, np.clip(sigma * np.exp(lr_sigma * natural), 1e-5, 1.0)


def save_checkpoint(path, config, meta, plain=esmeta.save_checkpoint):
    """esmeta.save_checkpoint, and a row of sigma.csv."""
    file = path.with_name("sigma.csv")
    rows = file.read_text().splitlines()[1 : meta.iteration + 1] if file.exists() else []
    layers = esmeta.unpack(meta.sigma_actor, esmeta.actor_shapes(esmeta.task_dims(config.task)))
    row = ",".join([str(meta.iteration), *(f"{layer.mean():.6g}" for layer in layers)])
    esmeta.replace_file(file, "\n".join([HEADER, *rows, row, ""]))
    plain(path, config, meta)


def train(config, *args, plain=esmeta.train, **others):
    """esmeta's; ValueError for --paper, whose mu takes no natural gradient."""
    if config.paper:
        raise ValueError("results.shared_sigma takes no --paper")
    return plain(config, *args, **others)


def main(argv=None):
    """The program, with esmeta's exit status."""
    with mock.patch.multiple(esmeta, train=train, ascend=ascend, save_checkpoint=save_checkpoint,
                             __doc__=__doc__):
        return esmeta.main(argv)


if __name__ == "__main__":
    sys.exit(main())
