"""Pictures of the gate: which tokens of a text took the hook, layer by layer."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook.evaluation.firing import trace
from coachhook.evaluation.scoring import encode_prompts

if TYPE_CHECKING:
    from coachhook.hooks import HookSet

SUFFIXES = (".html", ".png")


@dataclass(frozen=True)
class GateRow:
    """One layer's gate over one text.

    Args:
        layer: index of the block.
        alpha: the threshold.
        z: what is compared with it, one value per token; NaN where undefined, -inf where no edit
            may fire because no cue was read.
        fired: whether the token took the hook.
    """

    layer: int
    alpha: float
    z: tuple[float, ...]
    fired: tuple[bool, ...]


@dataclass(frozen=True)
class GatePicture:
    """The gates of all hooked layers over one text.

    Args:
        text: the text.
        tokens: its tokens as text, the tokenizer's special tokens included.
        rows: one per layer, in order.
    """

    text: str
    tokens: tuple[str, ...]
    rows: tuple[GateRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; z is None where it is not a number."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "layers": [
                {
                    "layer": row.layer,
                    "alpha": row.alpha,
                    "z": [z if math.isfinite(z) else None for z in row.z],
                    "fired": list(row.fired),
                }
                for row in self.rows
            ],
        }


def gate_pictures(
    model: Any, tokenizer: Any, hooks: HookSet, texts: Sequence[str]
) -> list[GatePicture]:
    """Runs texts through the edited model and keeps what every gate said about every token.

    Raises:
        ValueError: a text gives no token.
    """
    ids = encode_prompts(tokenizer, texts)
    for text, tokens in zip(texts, ids, strict=True):
        if not tokens:
            raise ValueError(f"inspect: texts must give at least one token each, got {text!r}")
    pictures = []
    for text, tokens, layers in zip(texts, ids, trace(model, hooks, ids), strict=True):
        rows = [
            GateRow(layer, float(hooks[layer].alpha), tuple(t.z.tolist()), tuple(t.fired.tolist()))
            for layer, t in sorted(layers.items())
        ]
        names = tuple(tokenizer.decode([token]) for token in tokens)
        pictures.append(GatePicture(text, names, tuple(rows)))
    return pictures


def to_text(picture: GatePicture) -> str:
    """The picture as lines of text: fired tokens in brackets."""
    lines = []
    for row in picture.rows:
        marked = [
            f"[{token}]" if fired else token
            for token, fired in zip(picture.tokens, row.fired, strict=True)
        ]
        defined = [z for z in row.z if math.isfinite(z)]
        highest = f"{max(defined):.2f}" if defined else "-"
        lines.append(
            f"layer {row.layer}, alpha {row.alpha:.2f}, largest z {highest}: {''.join(marked)!r}"
        )
    return "\n".join(lines)


def check_picture_path(path: Path) -> None:
    """Refuses a picture that could not be written later.

    Raises:
        ValueError: the name does not end in .html or .png, its folder does not exist, or it is
            the name of a folder.
        ImportError: matplotlib is needed for ``.png`` and is not there.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"inspect: --out must end in .html or .png, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"inspect: --out must be in an existing folder, got {path}")
    if path.is_dir():
        raise ValueError(f"inspect: --out must be a file, got the folder {path}")
    if path.suffix == ".png":
        _matplotlib()


def save_pictures(pictures: Sequence[GatePicture], path: Path) -> None:
    """Writes pictures to one ``.html`` or ``.png`` file.

    Raises:
        ValueError, ImportError: see :func:`check_picture_path`.
    """
    check_picture_path(path)
    if path.suffix == ".html":
        path.write_text(_page(pictures), encoding="utf-8")
    else:
        _plot(pictures, path)


_STYLE = """\
body { font-family: system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 0 0 2em }
td, th { padding: .25em .4em; text-align: center; font-size: .85em; white-space: pre }
th { font-weight: normal; color: #555; text-align: right }
td { border: 1px solid #eee; font-family: ui-monospace, monospace }
td.fired { outline: 2px solid #b00020; outline-offset: -2px; font-weight: bold }
"""
_LEGEND = (
    "One row per layer. The darker a token, the nearer its z to the layer's threshold alpha; "
    "a framed token took the hook. Hover for the numbers."
)


def _page(pictures: Sequence[GatePicture]) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>coachhook gates</title>",
        f"<style>{_STYLE}</style></head><body><h1>Where the hooks fire</h1>",
        f"<p>{_LEGEND}</p>",
    ]
    for picture in pictures:
        parts.append(f"<h2>{html.escape(picture.text)}</h2><table>")
        for row in picture.rows:
            cells = "".join(
                _cell(token, z, fired, row.alpha)
                for token, z, fired in zip(picture.tokens, row.z, row.fired, strict=True)
            )
            parts.append(f"<tr><th>layer {row.layer}, &alpha; {row.alpha:.2f}</th>{cells}</tr>")
        parts.append("</table>")
    return "".join([*parts, "</body></html>\n"])


def _cell(token: str, z: float, fired: bool, alpha: float) -> str:
    shade = f"rgba(230, 120, 20, {_share(z, alpha):.2f})"
    number = (
        f"{z:.3f}" if math.isfinite(z) else "undefined" if math.isnan(z) else "none: no cue read"
    )
    return (
        f"<td{' class=fired' if fired else ''} style='background: {shade}' "
        f"title='z {number}, alpha {alpha:.3f}'>{html.escape(token)}</td>"
    )


def _share(z: float, alpha: float) -> float:
    """z as a share of alpha, in [0, 1]; 0 where it is undefined."""
    if math.isnan(z) or alpha <= 0:
        return 0.0
    return min(1.0, max(0.0, z / alpha))


def _plot(pictures: Sequence[GatePicture], path: Path) -> None:
    Figure, FigureCanvasAgg, Rectangle = _matplotlib()
    longest = max(len(p.tokens) for p in pictures)
    height = sum(1.2 + 0.4 * len(p.rows) for p in pictures)
    figure = Figure(figsize=(min(100.0, 2 + 0.55 * longest), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for axis, picture in zip(axes, pictures, strict=True):
        shares = [[_share(z, row.alpha) for z in row.z] for row in picture.rows]
        axis.imshow(shares, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(picture.rows):
            for x, (z, fired) in enumerate(zip(row.z, row.fired, strict=True)):
                label = f"{z:.2f}" if math.isfinite(z) else ""
                ink = "white" if shares[y][x] > 0.6 else "black"
                axis.text(x, y, label, ha="center", va="center", fontsize=7, color=ink)
                if fired:
                    frame = {"fill": False, "edgecolor": "#b00020", "linewidth": 3}
                    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, **frame))
        # A "$" would start mathematics in matplotlib's text.
        names = [token.replace("$", r"\$") for token in picture.tokens]
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(
            range(len(picture.rows)),
            [f"layer {row.layer}, alpha {row.alpha:.2f}" for row in picture.rows],
            fontsize=8,
        )
    figure.savefig(path, dpi=120)


def _matplotlib() -> tuple[Any, Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError(
            "inspect: a .png needs matplotlib (pip install 'coachhook[plot]'); .html does not"
        ) from error
    return Figure, FigureCanvasAgg, Rectangle
