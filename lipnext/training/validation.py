"""Fast figures on the validation part during training. They choose and report; they certify nothing."""

import torch

from lipnext.core.eps import parse_eps_list
from lipnext.core.network import LipschitzNetwork
from lipnext.data.dataset import Dataset


@torch.no_grad()
def estimate_validation(
    network: LipschitzNetwork, dataset: Dataset, eps: tuple[str, ...], batch_size: int
) -> dict[str, object]:
    """Estimate clean accuracy, CRA and ACR in the network's precision, with estimated constants.

    No bound is proved and no rounding counted, hence the name; the certificate is another path.

    Returns:
        `{"clean": float, "cra": {eps: float}, "acr": float}`.
    """
    like = next(network.parameters())
    estimate = network.radius_estimator()
    radii = []
    for start in range(0, len(dataset), batch_size):
        chosen = slice(start, start + batch_size)
        labels = dataset.labels[chosen].to(like.device)
        radii.append(estimate(dataset.float_images(chosen).to(like), labels))
    radius = torch.cat(radii).double()
    return {
        "clean": (radius > 0).double().mean().item(),
        "cra": {
            name: (radius > float(value)).double().mean().item()
            for name, value in parse_eps_list(eps).items()
        },
        "acr": radius.clamp_min(0).mean().item(),
    }
