"""What pseudo-labels look like: contact sheets of images, and an HTML page that shows everything."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.utils import make_grid

from datasets import UNKNOWN, DataSet
from lib.labels.pseudo_labels import PseudoLabels
from lib.report.curves import Curve

SHOWN = 20  # images at each end of the ranking of a class
MOST_RANKED = 1000  # images of a single ranking
LEAST_SIDE, MOST_SIDE = 48, 96  # pixels; smaller images are enlarged without smoothing
RIGHT, WRONG, UNCLEAR = (60, 170, 80), (210, 60, 60), (150, 150, 150)  # frames, RGB
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;"
    "border-bottom:1px solid #ccc}h3{margin-bottom:.2rem}p{margin:.2rem 0}"
)


def _framed(image: Tensor, color: tuple[int, int, int]) -> Tensor:
    """Put a frame of 3 pixels around an image, whose color tells whether the label is right."""
    if image.shape[-1] > MOST_SIDE:
        image = functional.resize(image, [MOST_SIDE, MOST_SIDE], antialias=True)
    scale = max(1, -(-LEAST_SIDE // image.shape[-1]))
    image = image.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    return functional.pad(image, [3], fill=list(color))


def _grid(cells: list[Tensor]) -> Tensor:
    """Put pictures of one size into rows of ten."""
    cells = cells + [torch.full_like(cells[0], 255)] * (-len(cells) % 10)
    return make_grid(cells, nrow=10, padding=2, pad_value=255)


def write_ranking(indexes: Tensor, data: DataSet, folder: Path) -> dict[str, str]:
    """Write images in their order, a hundred to a file and `MOST_RANKED` at most; return captions by file."""
    written = {}
    for first in range(0, min(len(indexes), MOST_RANKED), 100):
        part = indexes[first : min(first + 100, MOST_RANKED)].tolist()
        sheet = _grid([_framed(data.picture(index), UNCLEAR) for index in part])
        file, last = f"chosen_{first // 100 + 1:02d}.png", first + len(part)
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(folder / file)
        written[file] = f"{first + 1} to {last} of {len(indexes)}, row by row"
    return written


def contact_sheet(pseudo: PseudoLabels, data: DataSet, label: int, shown: int = SHOWN) -> Image:
    """Draw the most confident images of a pseudo-class in the upper rows, the least confident ones below.

    Frames are green where the pseudo-label is right, red where it is wrong, and gray where the true label is
    not known. At most `shown` images are drawn at each end; None if no image got this label.
    """
    members = (pseudo.labels == label).nonzero()[:, 0]
    if not len(members):
        return None
    top, bottom = members[:shown], members[max(shown, len(members) - shown) :]
    rows = []
    for part in (top, bottom):
        cells = []
        for index in pseudo.indexes[part].tolist():
            true = int(data.targets[index])
            color = UNCLEAR if true == UNKNOWN else RIGHT if true == label else WRONG
            cells.append(_framed(data.picture(index), color))
        if cells:
            rows.append(_grid(cells))
    gap = torch.full((3, 12, rows[0].shape[2]), 255, dtype=torch.uint8)
    picture = torch.cat([rows[0], *(t for row in rows[1:] for t in (gap, row))], dim=1)
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def write_sheets(pseudo: PseudoLabels, data: DataSet, folder: Path) -> list[tuple[str, str, int]]:
    """Write a contact sheet of each class with images; return class name, file name and their number."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for label, name in enumerate(data.classes):
        sheet = contact_sheet(pseudo, data, label)
        if sheet is not None:
            file = f"class_{label:04d}.png"
            sheet.save(folder / file)
            written.append((name, file, int((pseudo.labels == label).sum())))
    return written


def html_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write an HTML table; every cell is escaped."""
    lines = ["<table><tr>" + "".join(f"<th>{escape(str(h))}</th>" for h in heads) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in r) + "</tr>" for r in rows]
    return "\n".join([*lines, "</table>"])


def write_page(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, object],
    pictures: Mapping[str, str],
    curves: Mapping[int, Curve] = MappingProxyType({}),
    sheets: Mapping[str, Sequence[tuple[str, str, int]]] = MappingProxyType({}),
    heading: str = "{} labels: most confident images above, least confident below",
) -> None:
    """Write an HTML page that shows the pictures beside it, whose file names are relative to the page.

    Args:
        facts: what made the pseudo-labels, as names and values.
        pictures: caption of each file.
        curves: the curve of each number of labels; {} if no true label is known.
        sheets: for each number of labels, class, file and number of images of each contact sheet.
        heading: heading of the sheets of one number of labels, which replaces {}.
    """
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>"]
    parts += [f"<style>{STYLE}</style><h1>{escape(title)}</h1>"]
    parts.append(html_table(("", ""), list(facts.items())))
    if curves:
        rows = [(n, *curve.figures(), *curve.errors()) for n, curve in sorted(curves.items())]
        heads = ("labels", "precision %", "AUC by confidence %", "AUC by entropy %")
        heads += ("ECE of the published probabilities %", "ECE of the calibrated ones %")
        parts.append("<h2>Precision of the pseudo-labels</h2>")
        parts.append(html_table(heads, rows))
    for file, caption in pictures.items():
        parts.append(f"<h2>{escape(caption)}</h2>")
        parts.append(f'<p><img src="{escape(file)}" alt="{escape(caption)}"></p>')
    for n, classes in sheets.items():
        parts.append(f"<h2>{escape(heading.format(n))}</h2>")
        parts.append("<p>Frame: green right, red wrong, gray unknown.</p>")
        for name, file, count in classes:
            parts.append(f"<h3>{escape(name)} ({count} images)</h3>")
            parts.append(f'<img loading=lazy src="{escape(file)}" alt="{escape(name)}">')
    path.write_text("\n".join(parts), encoding="utf-8")
