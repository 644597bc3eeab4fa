"""Plots of a metric, of what is propagated through it, and of training. Every function returns a Figure."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from datasets.images import UNKNOWN
from lib.graph.spectrum import Spectrum
from lib.report.curves import Curve
from lib.runtime.seeding import generator
from models.layers import l2_normalize

SAMPLE = 1000  # images in the picture of a matrix: a screen does not show more
SAMPLE_CLASSES = 20  # classes in it: among a thousand, no two of the images would share one


def _sample_by_class(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Draw images with a label, if there are any; return their indexes by class, and where each begins."""
    known = targets != UNKNOWN
    present = targets[known].unique()
    if len(present) > SAMPLE_CLASSES:
        order = torch.randperm(len(present), generator=generator(0, "sample", 1))
        known = torch.isin(targets, present[order[:SAMPLE_CLASSES]])
    candidates = known.nonzero()[:, 0] if known.any() else torch.arange(len(targets))
    drawn = torch.randperm(len(candidates), generator=generator(0, "sample"))[:SAMPLE]
    chosen = candidates[drawn]
    chosen = chosen[targets[chosen].argsort(stable=True)]
    return chosen, targets[chosen].diff().nonzero()[:, 0] + 1


def _pairs(axes: Axes, matrix: Tensor, borders: Tensor, title: str, label: str) -> None:
    """Draw a matrix of similarities on the axes, with lines between the classes and a color bar."""
    # The diagonal is 1 by definition: scaled to it, the rest would be dark.
    picture = axes.imshow(matrix.numpy(), cmap="viridis", vmin=0, vmax=float(matrix.quantile(0.99)))
    for place in borders.tolist():
        axes.axhline(place - 0.5, color="white", linewidth=0.4)
        axes.axvline(place - 0.5, color="white", linewidth=0.4)
    axes.set(title=title, xlabel="images, by class", ylabel="images, by class")
    axes.figure.colorbar(picture, ax=axes, label=label)


def spectral_cosines(spectrum: Spectrum, images: Tensor) -> Tensor:
    """Compute the cosines of the rows of U diag(1 / sqrt(lambda)) at some images: M x M, as published.

    Their products are those of the pseudo-inverse of L, which the normalized cut spreads labels by.
    """
    rows = spectrum.rows(images).cpu()
    return rows @ rows.T


def similarity_matrix(
    features: Tensor, targets: Tensor, temperature: float = 0.1, spectrum: Spectrum | None = None
) -> Figure:
    """Plot exp((cos - 1) / T) of sampled images sorted by class: a good metric shows bright squares.

    With a `spectrum`, the cosines of the same images in its embedding stand beside it.
    """
    chosen, borders = _sample_by_class(targets)
    rows = l2_normalize(features[chosen.to(features.device)].cpu())
    matrix = ((rows @ rows.T - 1) / temperature).exp()
    figure = Figure(figsize=(6 if spectrum is None else 12, 5.4), layout="constrained")
    axes = figure.subplots(1, 1 if spectrum is None else 2, squeeze=False)[0]
    label = f"exp((cos - 1) / {temperature})"
    _pairs(axes[0], matrix, borders, "Similarity of the metric", label)
    if spectrum is not None:
        cosines = spectral_cosines(spectrum, chosen)
        _pairs(axes[1], cosines, borders, "Similarity in the spectral embedding", "cos")
    return figure


def spectral_matrix(spectrum: Spectrum, targets: Tensor, num_vectors: int = 40) -> Figure:
    """Plot the first eigenvectors at sampled images sorted by class, and the eigenvalues."""
    chosen, borders = _sample_by_class(targets)
    shown = spectrum.vectors[chosen.to(spectrum.device), :num_vectors].cpu()
    shown = shown / shown.std(dim=0, correction=0, keepdim=True).clamp(min=1e-12)
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    picture = left.imshow(shown, cmap="RdBu", vmin=-2, vmax=2, aspect="auto", interpolation="none")
    for place in borders.tolist():
        left.axhline(place - 0.5, color="black", linewidth=0.5)
    left.set(title="Spectral embedding", xlabel="eigenvector", ylabel="images, by class")
    figure.colorbar(picture, ax=left, label="entry / standard deviation")
    right.plot(range(1, len(spectrum.values) + 1), spectrum.values, ".", markersize=3)
    right.set(
        title="Eigenvalues of the Laplacian", xlabel="number", ylabel="eigenvalue", ylim=(0, None)
    )
    right.grid(alpha=0.3)
    return figure


def accuracy_coverage(curves: dict[int, Curve], title: str) -> Figure:
    """Plot the precision of the most confident share, by confidence and, dashed, by entropy.

    There is a color for each number of labels.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    for place, (n, curve) in enumerate(sorted(curves.items())):
        label = f"{n} labels: {curve.overall:.1f}% of all, AUC {curve.auc:.1f}%"
        # The precision of a few images is all or nothing, and tells more about luck than confidence.
        start = min(len(curve.precision) // 100, len(curve.precision) - 1)
        shown, color = 100 * curve.coverage[start:], f"C{place}"
        if curve.precision_by_entropy is not None:
            label += f", by entropy {curve.auc_by_entropy:.1f}%"
            axes.plot(
                shown, 100 * curve.precision_by_entropy[start:], "--", color=color, linewidth=1
            )
        axes.plot(shown, 100 * curve.precision[start:], color=color, label=label)
    axes.set(
        title=title,
        xlabel="most confident share of the pseudo-labels (%)",
        ylabel="precision (%)",
        xlim=(0, 100),
        ylim=(0, 101),
    )
    axes.grid(alpha=0.3)
    legend = "solid: by confidence, dashed: by entropy"
    axes.legend(loc="lower left", fontsize="small", title=legend, title_fontsize="small")
    return figure


def reliability(curves: dict[int, Curve]) -> Figure:
    """Plot how often labels are right over the probability that they are given, published and calibrated.

    There is a panel for each number of labels. Points below the diagonal promise too much. The area of a
    point is in proportion to its images.
    """
    shown = {n: curve for n, curve in sorted(curves.items()) if curve.calibrated}
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (n, curve), axes in zip(shown.items(), panels, strict=False):
        both = {"published": curve.published, "calibrated": curve.calibrated}
        axes.plot((0, 100), (0, 100), "--", color="gray", linewidth=1)
        for color, (name, found) in zip(("C1", "C0"), both.items(), strict=True):
            full, share = found.count > 0, found.count / found.count.sum()
            x, y = (100 * values[full].numpy() for values in (found.probability, found.accuracy))
            axes.plot(x, y, color=color, linewidth=1, label=f"{name}: ECE {found.error:.1f}%")
            axes.scatter(x, y, 150 * share[full].numpy(), color=color)
        axes.set(title=f"{n} labels", xlabel="probability (%)", ylabel="right (%)")
        axes.set(xlim=(0, 100), ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in list(panels):
        axes.remove()
    return figure


def accuracy_by_labels(
    results: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str]
) -> Figure:
    """Plot mean and range of several methods side by side, for each choice of the labeled images.

    `results` are percentages of each method, by choice and repetition; `names` are for the legend.
    """
    rows = list(next(iter(results.values())))
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.7 / len(names)
    for place, (name, label) in enumerate(names.items()):
        values = [torch.tensor(results[name][row], dtype=torch.float64) for row in rows]
        means = [float(v.mean()) for v in values]
        lows = [float(v.mean() - v.min()) for v in values]
        highs = [float(v.max() - v.mean()) for v in values]
        places = [row + (place - (len(names) - 1) / 2) * width for row in range(len(rows))]
        axes.errorbar(places, means, (lows, highs), fmt="o", markersize=5, capsize=2, label=label)
    axes.set_xticks(range(len(rows)), [row.replace(", ", ",\n") for row in rows])
    axes.set(xlabel="labeled images", ylabel="right (%)", title="Mean, and range over the draws")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    return figure


def growth(runs: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Plot `total_s` and `added_mib` of every variant over the number of images, on logarithmic scales."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    keys = ("total_s", "added_mib"), ("seconds", "memory beyond the features' (MiB)")
    for axes, key, label in zip(figure.subplots(1, 2), *keys, strict=True):
        for name in names:
            sizes = [n for n in runs if name in runs[n]]
            axes.loglog(sizes, [runs[n][name][key] for n in sizes], marker="o", label=name)
        axes.set(xlabel="images", ylabel=label)
        axes.grid(which="both", alpha=0.3)
    axes.legend()
    return figure


def training_curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Tensor]]]) -> Figure:
    """Plot mean and range over the seeds of what training logs, one line per variant.

    `panels` hold, for each title, the T steps and the values (seeds x T) of each variant.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, variants) in zip(row, panels.items(), strict=True):
        for place, (name, (steps, values)) in enumerate(variants.items()):
            axes.plot(steps, values.mean(dim=0), color=f"C{place}", linewidth=1, label=name)
            low, high = values.min(dim=0).values, values.max(dim=0).values
            axes.fill_between(steps, low, high, color=f"C{place}", alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="optimizer steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
