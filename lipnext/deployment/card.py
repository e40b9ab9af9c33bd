"""The model card: what was measured, what it means in words, what it does not say, how to check it."""

import json
from fractions import Fraction
from typing import Any

from lipnext.core.eps import round_down, round_up

_MEANING = {
    "real": "The network with exactly these weights, computed in real arithmetic, gives its label to every point of the closed "
    "{norm} ball of the certified radius around an image.",
    "deployed": "The program that evaluates these weights in {arithmetic}, in whatever order it adds, gives its label to every "
    "point of the closed {norm} ball of the certified radius around an image that this type can represent.",
}
_KIND = {
    "deterministic": "No probability is involved.",
    "probabilistic": "The label is a vote under noise, and each radius holds with confidence {confidence:.9g}; {abstained} "
    "images got no label, which counts as wrong.",
}


def model_card(config: dict[str, Any], certificate: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the `README.md` of a bundle; certified numbers are rounded down.

    Args:
        config: content of `config.json`.
        certificate: content of `certificate.json`.
        result: content of `result.json`: clean, cra, acr on n test images, and how they were obtained.
    """
    channels, height, width = config["input_shape"]
    title = f"{config['system']}/{result.get('preset') or 'own experiment'}"
    arithmetic = result.get("arithmetic", "float64")
    meaning = _MEANING[result["semantics"]].format(norm=result["norm"], arithmetic=arithmetic)
    kind = _KIND[result["kind"]]
    if result["kind"] == "probabilistic":
        kind = kind.format(confidence=result["confidence"], abstained=result["abstained"])
    bound = certificate.get("lipschitz")
    constant = (
        "" if bound is None else f" Lipschitz bound {round_up(bound['bound'], 9)}, proved ({bound['proof']})."
    )
    lines = [
        _header(config["system"]),
        f"# {title}",
        "",
        f"An image classifier with a proof: {len(config['classes'])} classes, images {channels} x {height} x {width} with "
        f"pixels in [0, 1], no other preprocessing.{constant}",
        "",
        f"Weights `{certificate['model_sha256']}`.",
        "",
        "## Measured",
        "",
        *_table(result),
        "",
        f"{result['n']} test images, norm {result['norm']}, {result['kind']}, semantics {result['semantics']}. "
        "CRA (certified robust accuracy) is the share of all images whose label is right and certified at a radius above "
        "eps; ACR is the mean radius, 0 where the label is wrong.",
        *_training(config, result),
        "",
        "## What a radius says",
        "",
        f"{meaning} {kind}",
        "",
        "## What it does not say",
        "",
        "- Not that the label is right: a certified wrong label is still wrong.",
        "- Not about rotation, blur, lighting, or a shift of the object: small to the eye, often far in the norm.",
        "- Not about what happens before the model: the ball lives at its input, after resizing and cropping.",
        "- Not about other data: the table holds for the test part that was measured.",
        "",
        "## Use and check",
        "",
        "    pip install lipnext",
        "    lipnext certify FOLDER --data DIR",
        "    lipnext verify FOLDER        # re-derives every bound, shares no code with certify",
        "",
        "FOLDER is this folder, or `hf:owner/name`. In Python: `lipnext.load(FOLDER).certify(images)`.",
        "",
    ]
    return "\n".join(lines)


def _header(system: str) -> str:
    tags = "".join(f"\n  - {tag}" for tag in dict.fromkeys(("certified-robustness", "lipschitz", system)))
    return f"---\nlibrary_name: lipnext\npipeline_tag: image-classification\ntags:{tags}\n---\n"


def _table(result: dict[str, Any]) -> list[str]:
    n = result["n"]
    # A share is a fraction of n: 8841 of 10,000 is printed as 0.8841, though the float lies below it.
    shares = [Fraction(round(share * n), n) for share in (result["clean"], *result["cra"].values())]
    cells = [round_down(value, 4) for value in (*shares, result["acr"])]
    names = ["clean", *(f"CRA {eps}" for eps in result["cra"]), "ACR"]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| {' | '.join(cells)} |"]


def _training(config: dict[str, Any], result: dict[str, Any]) -> list[str]:
    lines = ["", "## Training", ""]
    if "minutes" in result:
        lines += [
            f"{result['epochs']} epochs on the data `{config['experiment']['data']['name']}`, "
            f"{result['minutes']} minutes, {result['precision']}, {result['parameters']} parameters, seed {result['seed']}.",
        ]
    if result.get("notes"):
        lines.append(f"{result['notes']}.")
    if "command" in result:
        lines += ["", f"    {result['command']}"]
    model = json.dumps(config["experiment"]["model"])
    return [*lines, "", f"The experiment stands in `config.json`: model {model}."]
