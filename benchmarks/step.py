"""A training step of LipNeXt against its own bare matrix products, and against plain linear layers with AdamW.

    python benchmarks/step.py --json

`ratio_to_gemm`: the whole step (forward, loss, backward, both optimisers) over nothing but the matrix products it
needs, on the same shapes: six token products a block, three C x C products for M R^T, and those of the manifold step.
`ratio_to_token_gemm`: over the six token products a block alone, which counts all of the optimiser as overhead.
`ratio_to_adamw`: over the same network written with nn.Linear, torch.roll and abs, trained by AdamW.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from timing import alternate, ratio, report
from torch import Tensor, nn

from lipnext import losses
from lipnext.core.network import LipschitzNetwork
from lipnext.optim.groups import split_parameters
from lipnext.optim.muon import ManifoldMuon
from lipnext.optim.orthogonal import OrthogonalOptimizer
from lipnext.optim.orthogonal_adam import OrthogonalAdam
from lipnext.systems.lipnext import build


def lipnext_step(args: argparse.Namespace, images: Tensor, labels: Tensor) -> Callable[[], object]:
    side = images.shape[-1]
    network: LipschitzNetwork = build(
        input_shape=(3, side, side), classes=10, width=args.width, depth=args.depth, patch=4
    )
    orthogonal, euclidean = split_parameters(network)
    params = list(orthogonal.values())
    manifold: OrthogonalOptimizer = (
        ManifoldMuon(params, lr=0.02, sign_dtype=torch.bfloat16 if args.bf16 else None)
        if args.optimizer == "muon"
        else OrthogonalAdam(params, lr=1e-3)
    )
    rest = torch.optim.NAdam(euclidean.values(), lr=1e-3)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = network(images)
        loss = losses.cross_entropy(losses.emma(logits, labels, network.head.distances(), 0.14), labels)
        manifold.zero_grad()
        rest.zero_grad()
        loss.backward()
        manifold.step()
        rest.step()

    return step


class PlainBlock(nn.Module):
    """The same block from PyTorch's own parts."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(side, side, 1))
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.group, self.folded = width // 16, width // 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x + self.position)
        k = self.group
        moves = ((1, 1), (1, -1), (2, 1), (2, -1))
        parts = [torch.roll(x[..., i * k : (i + 1) * k], s, d) for i, (d, s) in enumerate(moves)]
        x = self.second(torch.cat([*parts, x[..., 4 * k :]], dim=-1))
        return torch.cat([x[..., : self.folded].abs(), x[..., self.folded :]], dim=-1)


def plain_step(args: argparse.Namespace, images: Tensor, labels: Tensor) -> Callable[[], object]:
    side = images.shape[-1] // 4
    blocks = nn.Sequential(*(PlainBlock(args.width, side) for _ in range(args.depth)))
    head = nn.Linear(args.width, 10)
    optimizer = torch.optim.AdamW([*blocks.parameters(), *head.parameters()], lr=1e-3)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            x = nn.functional.pixel_unshuffle(images - 0.5, 4).permute(0, 2, 3, 1)
            x = blocks(nn.functional.pad(x, (0, args.width - x.shape[-1])))
        logits = head(torch.linalg.vector_norm(x.float(), dim=(1, 2)))
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def products(args: argparse.Namespace, positions: int, manifold: bool) -> Callable[[], object]:
    """The bare products: outputs preallocated, nothing else. Muon 3 x 5 + 1 + 3 a matrix, Adam 1 + 2 + 1."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    tokens, width = args.batch * positions, args.width
    x = torch.randn(tokens, width, dtype=dtype)
    y, w, g = (
        torch.empty_like(x),
        torch.randn(width, width, dtype=dtype),
        torch.empty(width, width, dtype=dtype),
    )
    stack = torch.randn(2 * args.depth, width, width)
    out = torch.empty_like(stack)
    half, half_out = stack.to(dtype), out.to(dtype)  # the sign iteration runs in the compute dtype
    count = 19 if args.optimizer == "muon" else 4

    def run() -> None:
        for _ in range(args.depth):
            for _ in range(2):
                torch.mm(x, w.T, out=y)  # forward
                torch.mm(x, w, out=y)  # gradient of the input
                torch.mm(x.T, y, out=g)  # gradient of the weight
        if manifold:
            for i in range(count):
                a, b = (half, half_out) if args.optimizer == "muon" and i < 15 else (stack, out)
                torch.bmm(a, a, out=b)
            for i in range(args.depth):
                for _ in range(3):
                    torch.mm(stack[i], stack[i].T, out=out[i])

    return run


def peak_memory_mib() -> float | None:
    """High-water mark of this process, or None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="pixels; tokens are (side / 4)^2")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.rand(args.batch, 3, args.side, args.side), torch.randint(0, 10, (args.batch,))
    positions = (args.side // 4) ** 2
    seconds = alternate(
        {
            "step": lipnext_step(args, images, labels),
            "gemm": products(args, positions, manifold=True),
            "token_gemm": products(args, positions, manifold=False),
            "adamw": plain_step(args, images, labels),
        },
        args.repeats,
    )
    report(
        {
            "what": f"training step, C={args.width} L={args.depth} {positions} tokens batch {args.batch}",
            "dtype": "bfloat16" if args.bf16 else "float32",
            "optimizer": args.optimizer,
            "ratio_to_gemm": round(ratio(seconds, "step", "gemm"), 4),
            "ratio_to_token_gemm": round(ratio(seconds, "step", "token_gemm"), 4),
            "ratio_to_adamw": round(ratio(seconds, "step", "adamw"), 4),
            "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
            "peak_memory_mib": peak_memory_mib(),
        },
        args.json,
        args.out,
    )


if __name__ == "__main__":
    main()
