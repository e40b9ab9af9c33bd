"""Fast figures on the validation part during training. They choose and report; they certify nothing."""

import torch

from lipnext.core.eps import parse_eps_list
from lipnext.core.network import LipschitzNetwork
from lipnext.core.world import World
from lipnext.data.dataset import ImageSet


@torch.no_grad()
def estimate_validation(
    network: LipschitzNetwork,
    dataset: ImageSet,
    eps: tuple[str, ...],
    batch_size: int,
    world: World = World(),
) -> dict[str, object]:
    """Estimate clean accuracy, CRA and ACR in the network's precision, with estimated constants.

    No bound is proved and no rounding counted, hence the name; the certificate is another path. Several processes look at a
    part of the images each, every image once, and get the same figures.

    Returns:
        `{"clean": float, "cra": {eps: float}, "acr": float}`.
    """
    like = next(network.parameters())
    estimate = network.radius_estimator()
    mine = world.share(len(dataset))
    # 0 for the images of others, which leaves the sum exact
    radius = torch.zeros(len(dataset), dtype=torch.float64)
    for start in range(mine.start, mine.stop, batch_size):
        chosen = slice(start, min(start + batch_size, mine.stop))
        labels = dataset.labels[chosen].to(like.device)
        radius[chosen] = estimate(dataset.float_images(chosen).to(like), labels).double().cpu()
    world.add_(radius)
    return {
        "clean": (radius > 0).double().mean().item(),
        "cra": {
            name: (radius > float(value)).double().mean().item()
            for name, value in parse_eps_list(eps).items()
        },
        "acr": radius.clamp_min(0).mean().item(),
    }
